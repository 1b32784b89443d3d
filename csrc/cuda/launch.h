/* Planning and launching: workspace, current device, errors that say which launch failed. */
#ifndef ATTN_SAMPLER_CUDA_LAUNCH_H_
#define ATTN_SAMPLER_CUDA_LAUNCH_H_

#include <cuda_runtime.h>

#include "cuda/kernels.h"

namespace attn_sampler {
namespace cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

/* Makes a device current, and the former one again. */
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

/* Hands out workspace and launches kernels, or only measures the workspace. The first part of every workspace
 * is counters that are 0 between calls. */
class Launcher {
  public:
    Launcher(const attn_sampler_exec &exec, bool launch);

    /* Blocks that run at a time: `resident` on a multiprocessor, or as many as its shared memory takes. */
    int64_t target_blocks(int64_t resident, int64_t shared_bytes) const {
        const int64_t reserved = 1024; /* of each block */
        return processors_ * clamp(shared_of_processor_ / (shared_bytes + reserved), 1, resident);
    }
    /* sm_90, the only architecture with wgmma. */
    bool is_hopper() const { return compute_major_ == 9; }

    /* Of workspace, if any was asked for. */
    int64_t bytes() const { return asked_ ? used_ : 0; }

    template <typename T>
    T *take(int64_t count) {
        return static_cast<T *>(take_bytes(count * static_cast<int64_t>(sizeof(T))));
    }
    /* Counters at 0. */
    uint32_t *counters(int64_t count);

    /* One block of 128 threads for each index. Does nothing where only the workspace is measured. */
    template <typename Args>
    void launch(const char *name, void (*kernel)(Args), const Args &args, int64_t blocks,
                int64_t shared_bytes) {
        if (!launch_ || blocks == 0)
            return;
        check_blocks(name, blocks);
        cudaError_t status = cudaSuccess;
        if (shared_bytes > 48 * 1024)
            status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(shared_bytes));
        if (status == cudaSuccess) {
            void *arguments[] = {const_cast<Args *>(&args)};
            status = cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(128), arguments,
                                      static_cast<size_t>(shared_bytes), stream_);
        }
        check_launch(status, name, blocks, shared_bytes);
    }

  private:
    void *take_bytes(int64_t bytes);
    static void check_blocks(const char *name, int64_t blocks);
    static void check_launch(cudaError_t status, const char *name, int64_t blocks, int64_t shared_bytes);

    bool launch_, asked_ = false;
    cudaStream_t stream_;
    char *memory_;
    int64_t used_, counters_used_, processors_, shared_of_processor_, compute_major_;
};

/* Runs plan(launcher) once to measure the workspace and, with `launch`, again to launch. */
template <typename Plan>
int64_t run(const attn_sampler_exec &exec, bool launch, Plan plan) {
    const DeviceGuard guard(exec.device_index);
    Launcher measure(exec, false);
    plan(measure);
    if (launch) {
        if (measure.bytes() > exec.workspace_size)
            throw Error(ATTN_SAMPLER_WORKSPACE_TOO_SMALL,
                        "exec.workspace: expected at least %lld bytes, got %lld",
                        static_cast<long long>(measure.bytes()), static_cast<long long>(exec.workspace_size));
        Launcher launcher(exec, true);
        plan(launcher);
    }
    return measure.bytes();
}

} // namespace cuda
} // namespace attn_sampler

#endif /* ATTN_SAMPLER_CUDA_LAUNCH_H_ */
