// SReLU on the CPU: the formulas of srelu.cuh in the loops of walk_cpu.h.
#include "srelu.cuh"
#include "walk_cpu.h"

namespace isonet_fast::cpu {

template void launch<SReLUForward>(const Call&);
template void launch<SReLUBackward>(const Call&);

}  // namespace isonet_fast::cpu
