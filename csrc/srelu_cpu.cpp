// SReLU on the CPU: the formulas of srelu.h in the loops of elementwise_cpu.h.
#include "srelu.h"
#include "elementwise_cpu.h"

namespace isonet_fast::cpu {

template void launch<SReLUForward>(const Call&);
template void launch<SReLUBackward>(const Call&);

}  // namespace isonet_fast::cpu
