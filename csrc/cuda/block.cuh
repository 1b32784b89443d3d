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

/* Into how many parts the work of one sequence is cut at the most: as many as blocks run at a time on 132
 * multiprocessors or a few more. It is not asked how many there are, nor how many sequences: where a sum is
 * cut decides its bits. */
constexpr int64_t kMostParts = 528;

/* Blocks of an attention kernel on a multiprocessor, as many as its registers take without spills. */
constexpr int resident_blocks(int columns, int element_size, bool may_be_unaligned = false) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
    constexpr int kWide = 2;
#else
    constexpr int kWide = 3;
#endif
    return element_size == 4 ? 2 : columns > 32 ? kWide : element_size == 1 || may_be_unaligned ? 3 : 4;
}

/* The front of every block's shared memory; keys follow it, on 128 bytes, as is best for wgmma's matrices. */
struct alignas(128) Shared {
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

/* True, in the whole block, where its `count` tickets are the last of `expected`. All that the blocks with
 * the others wrote before is then visible through __ldcg. The counter is 0 before the first ticket and again
 * after the last, so that a captured launch can be replayed. */
__device__ inline bool last_to_arrive(uint32_t *counter, uint32_t count, uint32_t expected) {
    Shared *const shared = reinterpret_cast<Shared *>(dynamic_shared());
    __syncthreads();
    if (threadIdx.x == 0) {
        shared->is_last = take_tickets(counter, count) + count == expected;
        if (shared->is_last)
            *counter = 0;
    }
    __syncthreads();
    return shared->is_last;
}

/* Units [first, last). */
struct Range {
    int first, last;
};

/* How units are dealt to blocks: each gets as many next to each other, the first `extra` one more. */
struct Deal {
    int32_t each, extra;

    __device__ int start(int block) const { return block * each + min(block, extra); }
    __device__ Range of(int block) const { return {start(block), start(block + 1)}; }
};

inline Deal deal(int64_t units, int64_t blocks) {
    return {static_cast<int32_t>(units / max_of(blocks, 1)), static_cast<int32_t>(units % max_of(blocks, 1))};
}

/* Divides by a number that the host knows, 1 ... 2^30: a product instead of a division. */
struct Divisor {
    uint32_t multiplier, shift;
    int32_t value;

    /* Of 0 ... 2^31 - 1. */
    __device__ int divide(int n) const {
        return value == 1 ? n : static_cast<int>(__umulhi(static_cast<uint32_t>(n), multiplier) >> shift);
    }
};

/* With 2^(shift - 1) < value <= 2^shift the multiplier, 2^(31 + shift) / value rounded up, is below 2^32 and
 * exceeds that by less than one: a quotient of 31 bits is exact. */
inline Divisor divisor(int64_t value) {
    Divisor d{0, 0, static_cast<int32_t>(value)};
    uint32_t shift = 1;
    while ((int64_t{1} << shift) < value)
        ++shift;
    d.multiplier = static_cast<uint32_t>(ceil_div(int64_t{1} << (31 + shift), max_of(value, 2)));
    d.shift = shift - 1;
    return d;
}

__device__ inline uint32_t bits(float x) { return __float_as_uint(x); }
template <typename T>
__device__ inline uint32_t bits(T x) {
    return x.bits;
}

/* Elements d ... of a row that may start anywhere, zeros beyond its end. */
template <typename T>
__device__ inline uint4 load_unaligned(const T *row, int d, int headdim) {
    constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
    uint32_t word[4] = {0, 0, 0, 0};
#pragma unroll
    for (int w = 0; w < 4; ++w)
#pragma unroll(sizeof(T) == 1 ? 1 : kPerWord) /* all the bytes at once would not fit the registers */
        for (int i = 0; i < kPerWord; ++i)
            if (d + w * kPerWord + i < headdim)
                word[w] |= bits(row[d + w * kPerWord + i]) << (32 / kPerWord * i);
    return uint4{word[0], word[1], word[2], word[3]};
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
