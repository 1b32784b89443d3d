#include "cuda/launch.h"

#include <atomic>
#include <string>

namespace attn_sampler {
namespace cuda {
namespace {

constexpr int64_t kCounters = 1 << 14;
constexpr int kKnownDevices = 64;

void check(cudaError_t status, const char *call) {
    if (status == cudaSuccess)
        return;
    cudaGetLastError(); /* so that no later call is blamed */
    throw Error(ATTN_SAMPLER_INTERNAL_ERROR, "%s: %s", call, cudaGetErrorString(status));
}

/* An attribute of a device, asked for once. */
int64_t attribute(cudaDeviceAttr which, int device, std::atomic<int> (&known)[kKnownDevices]) {
    std::atomic<int> *const slot = device < kKnownDevices ? &known[device] : nullptr;
    int value = slot != nullptr ? slot->load(std::memory_order_relaxed) : 0;
    if (value == 0) {
        check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
        if (slot != nullptr)
            slot->store(value, std::memory_order_relaxed);
    }
    return value;
}

std::atomic<int> known_processors[kKnownDevices], known_shared[kKnownDevices], known_major[kKnownDevices];

} // namespace

const char *device_problem() {
    static const std::string problem = [] {
        int count = 0;
        const cudaError_t status = cudaGetDeviceCount(&count);
        if (status != cudaSuccess) {
            cudaGetLastError();
            return std::string("the CUDA driver answers: ") + cudaGetErrorString(status);
        }
        return std::string(count == 0 ? "there is no CUDA device" : "");
    }();
    return problem.empty() ? nullptr : problem.c_str();
}

DeviceGuard::DeviceGuard(int device) : former_(0), changed_(false) {
    check(cudaGetDevice(&former_), "cudaGetDevice");
    if (former_ != device) {
        check(cudaSetDevice(device), "cudaSetDevice");
        changed_ = true;
    }
}

DeviceGuard::~DeviceGuard() {
    if (changed_)
        cudaSetDevice(former_);
}

Launcher::Launcher(const attn_sampler_exec &exec, bool launch)
    : launch_(launch), stream_(static_cast<cudaStream_t>(exec.stream)),
      memory_(static_cast<char *>(exec.workspace)), used_(kCounters * 4), counters_used_(0),
      processors_(attribute(cudaDevAttrMultiProcessorCount, exec.device_index, known_processors)),
      shared_of_processor_(
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, exec.device_index, known_shared)),
      compute_major_(attribute(cudaDevAttrComputeCapabilityMajor, exec.device_index, known_major)) {}

void *Launcher::take_bytes(int64_t bytes) {
    asked_ = true;
    char *const taken = launch_ ? memory_ + used_ : nullptr;
    used_ += ceil_div(bytes, 256) * 256;
    return taken;
}

uint32_t *Launcher::counters(int64_t count) {
    asked_ = true;
    if (counters_used_ + count <= kCounters) {
        uint32_t *const counters = launch_ ? reinterpret_cast<uint32_t *>(memory_) + counters_used_ : nullptr;
        counters_used_ += count;
        return counters;
    }
    /* More than are kept at 0: a rare shape pays for one more node in its graph. */
    uint32_t *const counters = take<uint32_t>(count);
    if (launch_)
        check(cudaMemsetAsync(counters, 0, static_cast<size_t>(count) * 4, stream_), "cudaMemsetAsync");
    return counters;
}

void Launcher::check_blocks(const char *name, int64_t blocks) {
    if (blocks > INT32_MAX)
        throw Error(ATTN_SAMPLER_UNSUPPORTED,
                    "%s: a launch takes at most 2^31 - 1 blocks, and this would be %lld", name,
                    static_cast<long long>(blocks));
}

void Launcher::check_launch(cudaError_t status, const char *name, int64_t blocks, int64_t shared_bytes) {
    if (status == cudaSuccess)
        return;
    cudaGetLastError();
    throw Error(ATTN_SAMPLER_INTERNAL_ERROR,
                "%s<<<%lld blocks, 128 threads, %lld bytes of shared memory>>>: %s", name,
                static_cast<long long>(blocks), static_cast<long long>(shared_bytes),
                cudaGetErrorString(status));
}

} // namespace cuda
} // namespace attn_sampler
