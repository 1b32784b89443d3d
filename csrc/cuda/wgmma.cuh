/* The tile of attention weights for Hopper: 64 rows of a block times 128 keys, by wgmma. It is off unless the
 * build asks for it (ATTN_SAMPLER_WGMMA), because it has not run on a GPU yet.
 *
 * Whom it serves: all columns of M = N = 1024 ... 16384, and the log-sum-exp of as many rows. The floor there
 * is arithmetic. With 32 heads and D = 128, M = N = 16384 is 2.2 TFLOP and 8.6e9 exponentials: on an H100 2.2
 * ms of tensor cores (989 TFLOP/s, NVIDIA's figure) next to 2.3 ms of exponentials (16 a clock and
 * multiprocessor, 132 of them at 1.755 GHz), and as much again where the log-sum-exp is not given. The tile
 * of WarpTile cannot come near that:
 * 1. Each warp reads all keys of a tile for its 16 rows: 16 KiB of shared memory (64 columns) at 128 bytes a
 *    clock are 128 clocks, next to 64 clocks of arithmetic. wgmma reads them once for all 64 rows.
 * 2. Queries are read once for each tile of columns, from the L2 cache: 34 GB with 64 columns, half with 128;
 *    and since wgmma keeps no keys in registers, three blocks with 128 columns fit a multiprocessor.
 * 3. mma.sync does not reach Hopper's peak: FlashAttention-2, which is built on it, is reported at 35% of an
 *    H100, FlashAttention-3 with wgmma at 75% (arXiv 2407.08608).
 *
 * Where columns or rows are few the floor is memory, and WarpTile serves.
 *
 * sm_100 and sm_120 have no wgmma, and WarpTile serves there. sm_120 has no faster instruction than mma.sync.
 * sm_100 has tcgen05, whose sums lie in tensor memory and would need an epilogue of their own; but its
 * multiprocessors do no more exponentials a clock than Hopper's, and these bound the floor already here.
 *
 * What it shares with WarpTile, which the tests run on the CPU: rows, masks, softmax and sums, because the
 * accumulators of a warp are laid out alike. What is its own is little: the order of the keys in shared
 * memory and of the rows' elements in registers, and the descriptor that tells wgmma of the former.
 */
#ifndef ATTN_SAMPLER_CUDA_WGMMA_CUH_
#define ATTN_SAMPLER_CUDA_WGMMA_CUH_

#include <type_traits>

#include "cuda/tile.cuh"

namespace attn_sampler {
namespace cuda {

constexpr int kWgmmaColumns = 8 * kWgmmaTiles;

/* Describes 16 elements of kWgmmaColumns keys, loaded by load_keys. PTX ISA, "Matrix Descriptor Format" and
 * "Strides": without a swizzle, core matrices of 8 columns times 16 bytes are contiguous; for operands that
 * are contiguous along k the leading offset leads to the next 16 bytes of the same columns, the stride offset
 * to the next 8 columns. All three are counted in 16 bytes. */
__device__ inline uint64_t keys_descriptor(const uint4 *keys) {
    constexpr uint64_t kLeading = kWgmmaColumns, kStride = 8;
    return (shared_address(keys) & 0x3FFFFu) >> 4 | kLeading << 16 | kStride << 32;
}

/* Head dimensions up to those that stay in registers: kSliceChunks chunks. */
template <typename T>
class WarpgroupTile : public WarpTile<T, kWgmmaTiles> {
  public:
    __device__ bool any() const {
        return __syncthreads_or(this->row[0].q != nullptr || this->row[1].q != nullptr) != 0;
    }

    /* A lane loaded the 16 bytes t of each chunk, and wgmma wants word t of each 16 bytes: the four lanes of
     * a row exchange words as one transposes a matrix, blocks of two times two first. */
    __device__ void arrange() {
#pragma unroll
        for (int c = 0; c < kSliceChunks<T>; ++c)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                uint4 &q = this->q_[c][r];
                exchange<2>(q.x, q.z);
                exchange<2>(q.y, q.w);
                exchange<1>(q.x, q.y);
                exchange<1>(q.z, q.w);
            }
    }

    template <int kPending>
    __device__ static void await_keys() {
        copy_wait<kPending>();
        wgmma_publish();
        __syncthreads();
    }

    /* After `arrange`, by the whole block. The keys may be overwritten when all threads have returned. */
    __device__ void multiply(const AttentionArgs &a, const uint4 *keys, float (&logits)[kWgmmaTiles][4]) {
        switch (chunks<T>(a)) {
        case 1:
            return multiply_chunks<1>(keys, logits);
        case 2:
            return multiply_chunks<2>(keys, logits);
        case 3:
            return multiply_chunks<3>(keys, logits);
        default:
            return multiply_chunks<4>(keys, logits);
        }
    }

  private:
    static_assert(kSliceChunks<T> == 4, "multiply knows its cases");

    /* Without a branch between products, which would cut them into groups that wait for one another. */
    template <int kChunks>
    __device__ void multiply_chunks(const uint4 *keys, float (&logits)[kWgmmaTiles][4]) {
#pragma unroll
        for (int j = 0; j < kWgmmaTiles; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                logits[j][i] = 0.0f;
        wgmma_fence(this->q_, logits);
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
            const uint4 q0 = this->q_[c][0], q1 = this->q_[c][1];
            const uint4 *const chunk = keys + 4 * c * kWgmmaColumns;
            wgmma(logits, {q0.x, q1.x, q0.y, q1.y}, keys_descriptor(chunk), T{});
            wgmma(logits, {q0.z, q1.z, q0.w, q1.w}, keys_descriptor(chunk + 2 * kWgmmaColumns), T{});
        }
        wgmma_wait(logits);
    }

    /* Of the lanes that differ in this bit, the lower's y for the upper's x. */
    template <int kBit>
    __device__ static void exchange(uint32_t &x, uint32_t &y) {
        const bool upper = (threadIdx.x & kBit) != 0;
        const uint32_t other = __shfl_xor_sync(kAllLanes, upper ? x : y, kBit);
        x = upper ? other : x;
        y = upper ? y : other;
    }
};

/* The tile of a kernel for 8 * kTiles columns. */
template <typename T, int kTiles, bool kMayBeUnaligned = true>
using Tile =
    std::conditional_t<kTiles == kWgmmaTiles, WarpgroupTile<T>, WarpTile<T, kTiles, kMayBeUnaligned>>;

/* Whether this architecture can run such a kernel; no other is launched. */
template <int kTiles>
constexpr bool kServed = kTiles != kWgmmaTiles || kHasWgmma;

} // namespace cuda
} // namespace attn_sampler

#endif /* ATTN_SAMPLER_CUDA_WGMMA_CUH_ */
