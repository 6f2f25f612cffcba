// The residual join on the CPU: the formulas of residual_srelu.cuh in the loops of walk_cpu.h.
#include "residual_srelu.cuh"
#include "walk_cpu.h"

namespace isonet_fast::cpu {

template void launch<ResidualSReLUForward>(const Call&);
template void launch<ResidualSReLUBackward>(const Call&);

}  // namespace isonet_fast::cpu
