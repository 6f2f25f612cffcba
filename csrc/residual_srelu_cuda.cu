// The residual join on a GPU: the formulas of residual_srelu.h in the kernels of elementwise.cuh.
#include "launch.cuh"
#include "residual_srelu.h"

namespace isonet_fast::cuda {

template cudaError_t launch<ResidualSReLUForward>(const Call&, void*, cudaStream_t);
template cudaError_t launch<ResidualSReLUBackward>(const Call&, void*, cudaStream_t);
template int64_t workspace_bytes<ResidualSReLUBackward>(const Call&);

}  // namespace isonet_fast::cuda
