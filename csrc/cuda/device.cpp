#include "cuda/device.h"

#include <cuda_runtime_api.h>

#include <string>

namespace attn_sampler {

const char *cuda_device_problem() {
    static const std::string problem = [] {
        int count = 0;
        const cudaError_t status = cudaGetDeviceCount(&count);
        if (status != cudaSuccess)
            return std::string("the CUDA driver answers: ") + cudaGetErrorString(status);
        if (count == 0)
            return std::string("there is no CUDA device");
        return std::string("this version has no CUDA kernels yet");
    }();
    return problem.c_str();
}

} // namespace attn_sampler
