/* What every kernel here shares: the block's shape, its scratch memory, tickets and small reductions. */
#ifndef ATTN_SAMPLER_CUDA_BLOCK_CUH_
#define ATTN_SAMPLER_CUDA_BLOCK_CUH_

#include "arithmetic.h"
#include "cuda/ptx.cuh"
#include "problem.h"

namespace attn_sampler {
namespace cuda {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
/* log2(e) in float32, and what it has beyond. */
constexpr float kLog2eHigh = static_cast<float>(kLog2e);
constexpr float kLog2eLow = static_cast<float>(kLog2e - static_cast<double>(kLog2eHigh));

/* Blocks of an attention kernel on a multiprocessor, as many as its registers take without spills. */
constexpr int resident_blocks(int columns, int element_size) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
    constexpr int kWide = 2;
#else
    constexpr int kWide = 3;
#endif
    return element_size == 4 ? 2 : columns > 32 ? kWide : element_size == 2 ? 4 : 3;
}

/* The front of every block's shared memory; keys follow it. */
struct alignas(16) Shared {
    bool is_last;
    alignas(16) unsigned char scratch[2048]; /* a float of each warp for each column of the widest tile */
};

template <typename T>
__device__ inline T *scratch() {
    return reinterpret_cast<T *>(reinterpret_cast<Shared *>(dynamic_shared())->scratch);
}

__device__ inline float infinity() { return __uint_as_float(0x7F800000u); }
__device__ inline float not_a_number() { return __uint_as_float(0x7FC00000u); }
__device__ inline bool is_finite(float x) { return x - x == 0.0f; }
/* The larger, NaN if one is. */
__device__ inline float max_or_nan(float a, float b) { return a > b || a != a ? a : b; }

/* True, in the whole block, for the last of `expected` blocks to take a ticket. All that the others wrote
 * before is then visible through __ldcg. The counter is 0 before the first ticket and again after the last,
 * so that a captured launch can be replayed. */
__device__ inline bool last_to_arrive(uint32_t *counter, uint32_t expected) {
    Shared *const shared = reinterpret_cast<Shared *>(dynamic_shared());
    __syncthreads();
    if (threadIdx.x == 0)
        shared->is_last = take_ticket(counter, expected - 1) == expected - 1;
    __syncthreads();
    return shared->is_last;
}

/* Reduces one value of each thread in a fixed order; the result is thread 0's. combine(a, b) must not care
 * which of the two came first. Exchange moves a value across lanes. */
template <typename T, typename Exchange, typename Combine>
__device__ inline T block_reduce(T value, Exchange exchange, Combine combine) {
    for (int distance = 16; distance > 0; distance /= 2)
        value = combine(value, exchange(value, distance));
    T *const of_warp = scratch<T>();
    __syncthreads();
    if (threadIdx.x % 32 == 0)
        of_warp[threadIdx.x / 32] = value;
    __syncthreads();
    value = of_warp[0];
    for (int warp = 1; warp < kWarps; ++warp)
        value = combine(value, of_warp[warp]);
    return value;
}

} // namespace cuda
} // namespace attn_sampler

#endif /* ATTN_SAMPLER_CUDA_BLOCK_CUH_ */
