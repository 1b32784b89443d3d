#include "device.h"

#include <string>

#include "cuda/launch.h"

namespace attn_sampler {
namespace {

const char *unavailable() {
    static const std::string reason = [] {
        int count = 0;
        const cudaError_t status = cudaGetDeviceCount(&count);
        if (status != cudaSuccess) {
            cudaGetLastError();
            if (status == cudaErrorInsufficientDriver) // the answer where there is none, too
                return "there is no NVIDIA driver, or it is older than CUDA " +
                       std::to_string(CUDART_VERSION / 1000) + " needs, which this was built with";
            return std::string("the CUDA driver answers: ") + cudaGetErrorString(status);
        }
        return std::string(count == 0 ? "there is no CUDA device" : "");
    }();
    return reason.empty() ? nullptr : reason.c_str();
}

} // namespace

const Device kCudaDevice = {unavailable,         cuda::device_unavailable, cuda::column_scores,
                            cuda::attention_map, cuda::top_columns,        cuda::token_confidence,
                            cuda::select_tokens, cuda::decode_step};

} // namespace attn_sampler
