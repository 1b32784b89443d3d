/* What a build without CUDA answers. */
#include "device.h"

namespace attn_sampler {

/* Its functions are not called. */
const Device kCudaDevice = {
    [] { return "this build has no CUDA part (nvcc was not found, or ATTN_SAMPLER_CUDA=0 was set)"; },
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

} // namespace attn_sampler
