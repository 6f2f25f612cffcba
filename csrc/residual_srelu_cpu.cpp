// The residual join on the CPU: the formulas of residual_srelu.h in the loops of elementwise_cpu.h.
#include "residual_srelu.h"
#include "elementwise_cpu.h"

namespace isonet_fast::cpu {

template void launch<ResidualSReLUForward>(const Call&);
template void launch<ResidualSReLUBackward>(const Call&);

}  // namespace isonet_fast::cpu
