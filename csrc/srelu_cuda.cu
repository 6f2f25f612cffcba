// SReLU on a GPU: the formulas of srelu.h in the kernels of elementwise.cuh.
#include "launch.cuh"
#include "srelu.h"

namespace isonet_fast::cuda {

template cudaError_t launch<SReLUForward>(const Call&, void*, cudaStream_t);
template cudaError_t launch<SReLUBackward>(const Call&, void*, cudaStream_t);
template int64_t workspace_bytes<SReLUBackward>(const Call&);

}  // namespace isonet_fast::cuda
