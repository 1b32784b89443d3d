#include "cuda/launch.h"

#include <atomic>
#include <iterator>
#include <mutex>
#include <string>

namespace attn_sampler {
namespace cuda {
namespace {

constexpr int64_t kCounters = ATTN_SAMPLER_WORKSPACE_ZEROS / 4;
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

/* Older ones refuse them in a graph. */
bool driver_captures_early_starts() {
    static const bool captures = [] {
        int version = 0;
        check(cudaDriverGetVersion(&version), "cudaDriverGetVersion");
        return version >= 12030;
    }();
    return captures;
}

std::atomic<int> known_processors[kKnownDevices], known_shared[kKnownDevices], known_major[kKnownDevices];
int known_code[kKnownDevices]; /* its architecture, once device_unavailable has been asked */

/* Whether a device has a primary context, which making it current would give it: some hundred megabytes of a
 * GPU that the process may not use at all. The driver is asked through the runtime: the library loads
 * without. */
bool has_context(int device) {
    using GetState = int(int device, unsigned *flags, int *is_active);
    static GetState *const get_state = [] {
        void *entry = nullptr;
#if CUDART_VERSION >= 12050
        const cudaError_t status = cudaGetDriverEntryPointByVersion("cuDevicePrimaryCtxGetState", &entry,
                                                                    11000, cudaEnableDefault, nullptr);
#else
        const cudaError_t status =
            cudaGetDriverEntryPoint("cuDevicePrimaryCtxGetState", &entry, cudaEnableDefault);
#endif
        if (status != cudaSuccess)
            cudaGetLastError();
        return reinterpret_cast<GetState *>(entry);
    }();
    unsigned flags = 0;
    int is_active = 0;
    return get_state == nullptr || get_state(device, &flags, &is_active) != 0 || is_active != 0;
}

/* What device_unavailable answers, "" where the kernels run. */
std::string find_reason(int device) {
    try {
        const DeviceGuard guard(device);
        const cudaError_t status = find_code(&known_code[device]);
        if (status == cudaSuccess)
            return "";
        cudaGetLastError();
        int major = 0, minor = 0;
        check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
              "cudaDeviceGetAttribute");
        check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
              "cudaDeviceGetAttribute");
        throw Error(ATTN_SAMPLER_UNSUPPORTED,
                    "this build has no code for device %d, of compute capability %d.%d (%s)", device, major,
                    minor, cudaGetErrorString(status));
    } catch (const Error &error) {
        return error.what();
    }
}

} // namespace

void check_extent(const char *name, int64_t extent, int64_t limit) {
    if (extent > limit)
        throw Error(ATTN_SAMPLER_UNSUPPORTED, "%s: the CUDA kernels take at most %lld, got %lld", name,
                    static_cast<long long>(limit), static_cast<long long>(extent));
}

const char *device_unavailable(int device) {
    if (device < 0 || device >= kKnownDevices)
        return "there is no such device";
    static std::once_flag asked[kKnownDevices];
    static std::string reasons[kKnownDevices];
    std::call_once(asked[device], [device] { reasons[device] = find_reason(device); });
    return reasons[device].empty() ? nullptr : reasons[device].c_str();
}

DeviceGuard::DeviceGuard(int device) : former_(0), changed_(false) {
    check(cudaGetDevice(&former_), "cudaGetDevice");
    if (former_ != device) {
        check(cudaSetDevice(device), "cudaSetDevice");
        changed_ = true;
    }
}

DeviceGuard::~DeviceGuard() {
    if (changed_ && has_context(former_))
        cudaSetDevice(former_);
}

Launcher::Launcher(const attn_sampler_exec &exec)
    : stream_(static_cast<cudaStream_t>(exec.stream)), memory_(reinterpret_cast<uintptr_t>(exec.workspace)),
      size_(exec.workspace_size),
      processors_(attribute(cudaDevAttrMultiProcessorCount, exec.device_index, known_processors)),
      shared_of_processor_(
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, exec.device_index, known_shared)),
      compute_major_(attribute(cudaDevAttrComputeCapabilityMajor, exec.device_index, known_major)),
      starts_early_(known_code[exec.device_index] >= 90 && driver_captures_early_starts()) {}

void *Launcher::take_bytes(int64_t bytes) {
    const int64_t start = used_ > 0 ? used_ : kCounters * 4;
    used_ = start + round_up(bytes, 256);
    return reinterpret_cast<void *>(memory_ + static_cast<uintptr_t>(start));
}

uint32_t *Launcher::counters(int64_t count) {
    if (counters_used_ + count > kCounters) { /* a rare shape pays for one more node in its graph */
        uint32_t *const counters = take<uint32_t>(count);
        zeros_start_ = zeros_stop_ > 0 ? zeros_start_ : used_ - round_up(count * 4, 256);
        zeros_stop_ = used_;
        return counters;
    }
    take_bytes(0);
    counters_used_ += count;
    return reinterpret_cast<uint32_t *>(memory_ + static_cast<uintptr_t>(counters_used_ - count) * 4);
}

Launcher::Launch &Launcher::add(const char *name, int64_t blocks, int64_t shared_bytes) {
    if (blocks > INT32_MAX)
        throw Error(ATTN_SAMPLER_UNSUPPORTED,
                    "%s: a launch takes at most 2^31 - 1 blocks, and this would be %lld", name,
                    static_cast<long long>(blocks));
    Launch &launch = launches_ < std::size(first_) ? first_[launches_] : more_.emplace_back();
    ++launches_;
    launch.name = name;
    launch.blocks = blocks;
    launch.shared_bytes = shared_bytes;
    launch.starts_early = starts_early_;
    return launch;
}

/* Zeros from one byte of the workspace to another. */
cudaError_t Launcher::clear(int64_t start, int64_t stop) const {
    if (start == stop)
        return cudaSuccess;
    return cudaMemsetAsync(reinterpret_cast<void *>(memory_ + static_cast<uintptr_t>(start)), 0,
                           static_cast<size_t>(stop - start), stream_);
}

int64_t Launcher::issue() const {
    if (used_ > size_)
        return used_;
    check(clear(zeros_start_, zeros_stop_), "cudaMemsetAsync");
    for (size_t i = 0; i < launches_; ++i) {
        const Launch &launch = i < std::size(first_) ? first_[i] : more_[i - std::size(first_)];
        const cudaError_t status = launch.start(launch, stream_);
        if (status == cudaSuccess)
            continue;
        clear(0, counters_used_ * 4); /* of the tickets that launches before it took */
        cudaGetLastError();
        throw Error(ATTN_SAMPLER_INTERNAL_ERROR,
                    "%s<<<%lld blocks, 128 threads, %lld bytes of shared memory>>>: %s", launch.name,
                    static_cast<long long>(launch.blocks), static_cast<long long>(launch.shared_bytes),
                    cudaGetErrorString(status));
    }
    return 0;
}

} // namespace cuda
} // namespace attn_sampler
