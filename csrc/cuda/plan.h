/* What the attention kernels are launched with: from validated problems to arguments, and by element type. */
#ifndef ATTN_SAMPLER_CUDA_PLAN_H_
#define ATTN_SAMPLER_CUDA_PLAN_H_

#include "cuda/launch.h"
#include "cuda/wgmma.cuh"

namespace attn_sampler {
namespace cuda {

/* Whether every row of q and k starts on 16 bytes and is a multiple of them long. */
bool is_aligned(const AttentionProblem &p);

/* Arguments of up to kMaxLayers layers of one shape, all of them aligned or none; computed_lse and row_tokens
 * are left null. */
AttentionArgs attention_args(const AttentionProblem *layers, int64_t num_layers);

/* Launches the row log-sum-exp, where it is not given, and lets args read it. */
void compute_row_lse(AttentionArgs &args, int dtype, Launcher &launcher);

/* Calls f(T{}) with the element type of dtype. */
template <typename Function>
void dispatch_type(int dtype, Function f) {
    if (dtype == ATTN_SAMPLER_FLOAT32)
        f(float{});
    else if (dtype == ATTN_SAMPLER_FLOAT16)
        f(Half{});
    else if (dtype == ATTN_SAMPLER_FLOAT8_E4M3)
        f(Float8{});
    else
        f(BFloat16{});
}

/* Whether the kernels of wgmma.cuh are built: they are not unless asked for, until they have passed on a GPU.
 */
#if defined(ATTN_SAMPLER_WGMMA)
constexpr bool kBuildsWgmma = true;
#else
constexpr bool kBuildsWgmma = false;
#endif

/* Whether they serve lists of so many rows and so many columns. */
bool wgmma_serves(const AttentionArgs &a, int dtype, int64_t rows, int64_t columns, const Launcher &launcher);

/* Calls f(T{}) for a type that they serve. */
template <typename Function>
void dispatch_wgmma_type(int dtype, Function f) {
    if constexpr (kBuildsWgmma) {
        if (dtype == ATTN_SAMPLER_FLOAT16)
            f(Half{});
        else
            f(BFloat16{});
    }
}

/* Bytes of a tile of keys in shared memory. */
template <typename T>
int64_t tile_bytes(const AttentionArgs &a, int64_t columns) {
    return ceil_div(a.headdim, kChunk<T>) * columns * 4 * 16;
}

} // namespace cuda
} // namespace attn_sampler

#endif /* ATTN_SAMPLER_CUDA_PLAN_H_ */
