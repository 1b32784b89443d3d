/* Planning and launching: workspace, current device, errors that say which launch failed. */
#ifndef ATTN_SAMPLER_CUDA_LAUNCH_H_
#define ATTN_SAMPLER_CUDA_LAUNCH_H_

#include <cstring>
#include <cuda_runtime.h>
#include <type_traits>
#include <vector>

#include "arithmetic.h"
#include "error.h"
#include "problem.h"

namespace attn_sampler {
namespace cuda {

/* The functions of the device (csrc/device.h), in the files of their names. */
int64_t column_scores(const AttentionProblem &, const attn_sampler_exec &);
int64_t attention_map(const AttentionProblem &, const attn_sampler_exec &);
int64_t top_columns(const TopProblem &, const attn_sampler_exec &);
int64_t token_confidence(const ConfidenceProblem &, const attn_sampler_exec &);
int64_t select_tokens(const SelectProblem &, const attn_sampler_exec &);
int64_t decode_step(const StepProblem &, const attn_sampler_exec &);

/* Why the kernels do not run on a device; null where they do. Asked of the driver once. */
const char *device_unavailable(int device);

/* Whether the current device has code of these kernels: success, or what the driver answers. And what
 * __CUDA_ARCH__ was of it, by 10: less than the device's own where the driver compiles older PTX. */
cudaError_t find_code(int *architecture);

constexpr int64_t kMaxPositions = 1 << 30; /* of any kind: they are 32-bit on the device */

/* Refuses what is larger than the kernels take. */
void check_extent(const char *name, int64_t extent, int64_t limit);

/* Makes a device current, and the former one again if it has a context: one without is not in use. */
class DeviceGuard {
  public:
    explicit DeviceGuard(int device);
    ~DeviceGuard();
    DeviceGuard(const DeviceGuard &) = delete;
    DeviceGuard &operator=(const DeviceGuard &) = delete;

  private:
    int former_;
    bool changed_;
};

/* Hands out workspace and prepares launches, all of which start together, once it is known how much workspace
 * they take. The first part of every workspace is counters that are 0 between calls. */
class Launcher {
  public:
    explicit Launcher(const attn_sampler_exec &exec);

    /* Blocks that run at a time: `resident` on a multiprocessor, or as many as its shared memory takes. */
    int64_t target_blocks(int64_t resident, int64_t shared_bytes) const {
        const int64_t reserved = 1024; /* of each block */
        return processors_ * clamp(shared_of_processor_ / (shared_bytes + reserved), 1, resident);
    }
    /* sm_90, the only architecture with wgmma. */
    bool is_hopper() const { return compute_major_ == 9; }

    template <typename T>
    T *take(int64_t count) {
        return static_cast<T *>(take_bytes(count * static_cast<int64_t>(sizeof(T))));
    }
    /* Counters at 0. */
    uint32_t *counters(int64_t count);

    /* One block of 128 threads for each index. */
    template <typename Args>
    void launch(const char *name, void (*kernel)(Args), const Args &args, int64_t blocks,
                int64_t shared_bytes) {
        static_assert(std::is_trivially_copyable_v<Args> && sizeof(Args) <= sizeof(Launch::args));
        if (blocks == 0)
            return;
        Launch &launch = add(name, blocks, shared_bytes);
        launch.start = start<Args>;
        launch.kernel = reinterpret_cast<void (*)()>(kernel);
        memcpy(launch.args, &args, sizeof(Args));
    }

    /* Starts all launches and answers 0; or starts none and answers how much workspace they take, where that
     * is more than there is. */
    int64_t issue() const;

  private:
    struct Launch {
        const char *name;
        int64_t blocks, shared_bytes;
        bool starts_early;
        cudaError_t (*start)(const Launch &, cudaStream_t);
        void (*kernel)();
        alignas(16) unsigned char args[4096]; /* as much as a kernel takes on every architecture */
    };

    template <typename Args>
    static cudaError_t start(const Launch &launch, cudaStream_t stream) {
        const auto kernel = reinterpret_cast<void (*)(Args)>(launch.kernel);
        cudaError_t status = cudaSuccess;
        if (launch.shared_bytes > 48 * 1024)
            status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(launch.shared_bytes));
        if (status != cudaSuccess)
            return status;
        /* Blocks may take their places while the launch before ends; kernels wait for it before they read. */
        cudaLaunchAttribute early{};
        early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        early.val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(static_cast<unsigned>(launch.blocks));
        config.blockDim = dim3(128);
        config.dynamicSmemBytes = static_cast<size_t>(launch.shared_bytes);
        config.stream = stream;
        config.attrs = &early;
        config.numAttrs = launch.starts_early ? 1 : 0;
        return cudaLaunchKernelEx(&config, kernel, *reinterpret_cast<const Args *>(launch.args));
    }

    void *take_bytes(int64_t bytes);
    Launch &add(const char *name, int64_t blocks, int64_t shared_bytes);
    cudaError_t clear(int64_t first, int64_t last) const;

    cudaStream_t stream_;
    uintptr_t memory_; /* read and written by what is launched alone: there may be too little of it */
    int64_t size_, used_ = 0, counters_used_ = 0, zeros_start_ = 0, zeros_stop_ = 0;
    int64_t processors_, shared_of_processor_, compute_major_;
    bool starts_early_; /* see start */
    Launch first_[2];   /* more are rare, and pay for memory of the host */
    size_t launches_ = 0;
    std::vector<Launch> more_;
};

/* Runs what plan(launcher) prepares: see Device in csrc/device.h for the answer. */
template <typename Plan>
int64_t run(const attn_sampler_exec &exec, Plan plan) {
    const DeviceGuard guard(exec.device_index);
    if (const char *const reason = device_unavailable(exec.device_index))
        throw Error(ATTN_SAMPLER_UNSUPPORTED, "exec.device_index: %s", reason);
    Launcher launcher(exec);
    plan(launcher);
    return launcher.issue();
}

} // namespace cuda
} // namespace attn_sampler

#endif /* ATTN_SAMPLER_CUDA_LAUNCH_H_ */
