/* For tests: enough of the CUDA runtime and language to compile csrc/cuda as C++ and run it on the CPU.
 *
 * A block's threads are fibers. One runs until it meets others, at a barrier or in a warp-wide operation;
 * warps, and a few resident blocks, take turns at random. What a GPU would answer with wrong results or a
 * hang is an error here: threads that wait at different barriers, a barrier that not all threads reach, a
 * warp-wide operation that not all lanes reach, a write beyond the launch's shared memory, more shared memory
 * than a device has or was asked for.
 */
#ifndef ATTN_SAMPLER_TESTS_CUDA_RUNTIME_H_
#define ATTN_SAMPLER_TESTS_CUDA_RUNTIME_H_

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3() = default;
    explicit dim3(unsigned x_) : x(x_) {}
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

namespace cuda_host {

struct Index {
    unsigned x;
};
/* The running thread and its block. */
extern Index thread_index, block_index;
unsigned char *shared_memory();
/* That of programmatic dependent launch, which every thread has to call. */
void await_launches();
/* Groups of four tokens whose noise was asked for so far. */
extern int64_t noise_groups;

/* Waits for all threads of the block; how many of them passed true. `file` and `line` say where. */
int meet_block(bool vote, const char *file, int line);

/* Waits for all lanes of the warp, and returns what each of them brought: 32 values. */
const void *meet_warp(const void *value, size_t size, const char *file, int line);
template <typename T>
const T *meet_warp(const T &value, const char *file, int line) {
    return static_cast<const T *>(meet_warp(&value, sizeof(T), file, line));
}

/* Asynchronous copies of 16 bytes (zeros where `from` is null). They arrive at once or when they are waited
 * for, at random. */
void copy_later(uint4 *to, const void *from);
void close_copy_group();
void await_copies(int pending_groups);

/* Where something lies in the block's shared memory, as matrix descriptors count it. */
uint32_t shared_address(const void *p);

/* Asynchronous products of the block: c[i / 2 % 2][8 (i / 4) + 2 t + i % 2] += a[i / 2 % 2] times that column
 * of the matrix at descriptor b, whose elements are of two bytes. They happen at once or when they are waited
 * for, at random; until then c is NaN. */
constexpr int kAccumulators = 64;
struct Product {
    float a[2][16];
    uint64_t b;
    float (*to_float)(uint16_t bits);
};
void publish_copies();
void fence_products();
void multiply_later(float *c, const Product &product);
void await_products(float *c);

} // namespace cuda_host

#define threadIdx (::cuda_host::thread_index)
#define blockIdx (::cuda_host::block_index)

#define CUDA_HOST_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_HOST_CALLER) { cuda_host::meet_block(false, file, line); }
inline int __syncthreads_or(int vote, CUDA_HOST_CALLER) {
    return cuda_host::meet_block(vote != 0, file, line) > 0;
}
/* Threads that pass true. */
inline int __syncthreads_count(int vote, CUDA_HOST_CALLER) {
    return cuda_host::meet_block(vote != 0, file, line);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int distance, CUDA_HOST_CALLER) {
    return cuda_host::meet_warp(value, file, line)[(threadIdx.x % 32) ^ static_cast<unsigned>(distance)];
}
inline int __any_sync(unsigned, int vote, CUDA_HOST_CALLER) {
    const int *const votes = cuda_host::meet_warp(vote, file, line);
    int any = 0;
    for (int i = 0; i < 32; ++i)
        any |= votes[i] != 0;
    return any;
}
inline unsigned __ballot_sync(unsigned, int vote, CUDA_HOST_CALLER) {
    const int *const votes = cuda_host::meet_warp(vote, file, line);
    unsigned ballot = 0;
    for (unsigned i = 0; i < 32; ++i)
        ballot |= (votes[i] != 0 ? 1u : 0u) << i;
    return ballot;
}
[[noreturn]] inline void __trap() { __builtin_trap(); }
template <typename T>
T __ldcg(const T *p) {
    return *p;
}

inline int atomicAdd(int *p, int x) {
    const int old = *p;
    *p += x;
    return old;
}

inline float __uint_as_float(uint32_t x) {
    float y;
    memcpy(&y, &x, sizeof(y));
    return y;
}
inline uint32_t __float_as_uint(float x) {
    uint32_t y;
    memcpy(&y, &x, sizeof(y));
    return y;
}
inline uint32_t __umulhi(uint32_t x, uint32_t y) {
    return static_cast<uint32_t>(static_cast<uint64_t>(x) * y >> 32);
}
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
template <typename T>
T min(T x, T y) {
    return y < x ? y : x;
}
template <typename T>
T max(T x, T y) {
    return x < y ? y : x;
}

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInsufficientDriver = 35,
    cudaErrorInvalidDevice = 101,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorLaunchFailure = 719
};
#define CUDART_VERSION 13000
constexpr unsigned long long cudaEnableDefault = 0;
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes {
    int ptxVersion;
};
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor,
    cudaDevAttrComputeCapabilityMajor,
    cudaDevAttrComputeCapabilityMinor
};
typedef struct CUstream_st *cudaStream_t;

cudaError_t cudaGetDeviceCount(int *count);
cudaError_t cudaGetDevice(int *device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device);
/* Of the driver's functions there is one: cuDevicePrimaryCtxGetState. */
cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned version,
                                             unsigned long long flags,
                                             cudaDriverEntryPointQueryResult *status);
cudaError_t cudaGetLastError();
/* Of the latest launch that failed, in full. */
const char *cudaGetErrorString(cudaError_t error);
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
cudaError_t cudaMalloc(void **memory, size_t size);
cudaError_t cudaFree(void *memory);
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, cudaMemcpyKind kind);
cudaError_t cudaStreamCreate(cudaStream_t *stream);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaMemsetAsync(void *memory, int value, size_t size, cudaStream_t stream);

namespace cuda_host {

typedef void (*AnyKernel)();
cudaError_t find_image(int *architecture);
cudaError_t set_shared_limit(AnyKernel kernel, int bytes);
cudaError_t launch(AnyKernel kernel, void (*call)(AnyKernel, void *), void *argument, unsigned blocks,
                   unsigned threads, size_t shared_bytes, bool starts_early);

} // namespace cuda_host

/* The last device is of an architecture for which nothing is compiled. */
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, Kernel *) {
    return cuda_host::find_image(&attributes->ptxVersion);
}
template <typename Args>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Args), cudaFuncAttribute, int bytes) {
    return cuda_host::set_shared_limit(reinterpret_cast<cuda_host::AnyKernel>(kernel), bytes);
}
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        int programmaticStreamSerializationAllowed;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute *attrs;
    unsigned numAttrs;
};
template <typename Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(Args), Args args) {
    return cuda_host::launch(
        reinterpret_cast<cuda_host::AnyKernel>(kernel),
        [](cuda_host::AnyKernel any, void *argument) {
            reinterpret_cast<void (*)(Args)>(any)(*static_cast<const Args *>(argument));
        },
        &args, config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes, config->numAttrs != 0);
}
cudaError_t cudaDriverGetVersion(int *version);

#endif /* ATTN_SAMPLER_TESTS_CUDA_RUNTIME_H_ */
