/* Selection and commit of one sequence by one block: a few comparisons for each position. */
#ifndef ATTN_SAMPLER_CUDA_SELECT_CUH_
#define ATTN_SAMPLER_CUDA_SELECT_CUH_

#include "attn_sampler.h"
#include "cuda/block.cuh"

namespace attn_sampler {
namespace cuda {

struct SelectArgs {
    const float *scores, *confidence;
    int64_t scores_stride[2], confidence_stride[2];
    const uint8_t *masked; /* null where tokens say which positions are masked */
    int64_t masked_stride[2];
    uint8_t *selected;
    int64_t selected_stride[2];
    int64_t *tokens; /* [B, C] of the block, or null: nothing is committed */
    const int64_t *token_ids;
    int64_t tokens_stride[2], token_ids_stride[2], mask_token_id;
    uint32_t *arrived; /* [B]: tickets of the parts of a step; null where there is no selection */
    uint32_t parts;
    int32_t batch, columns;
    float tau;
    bool parallel, by_confidence;
};

/* A position's place in the order of the fallback. */
struct Ranked {
    float value;
    int32_t position;
};

/* See attn_sampler_select_tokens. */
__device__ inline void select_sequence(const SelectArgs &s, int b) {
    auto score = [&](int c) { return __ldcg(s.scores + b * s.scores_stride[0] + c * s.scores_stride[1]); };
    auto confidence = [&](int c) {
        return __ldcg(s.confidence + b * s.confidence_stride[0] + c * s.confidence_stride[1]);
    };
    auto token = [&](int c) -> int64_t & {
        return s.tokens[b * s.tokens_stride[0] + c * s.tokens_stride[1]];
    };
    auto masked = [&](int c) {
        return s.masked != nullptr ? s.masked[b * s.masked_stride[0] + c * s.masked_stride[1]] != 0
                                   : token(c) == s.mask_token_id;
    };
    auto commit = [&](int c) {
        if (s.tokens != nullptr)
            token(c) = __ldcg(s.token_ids + b * s.token_ids_stride[0] + c * s.token_ids_stride[1]);
    };

    float theta = -infinity();
    for (int c = threadIdx.x; s.parallel && c < s.columns; c += kThreads)
        if (masked(c) && !(confidence(c) >= s.tau))
            theta = score(c) > theta ? score(c) : theta;
    theta = block_reduce(
        theta, [](float x, int distance) { return __shfl_xor_sync(kAllLanes, x, distance); },
        [](float x, float y) { return x > y ? x : y; });

    /* NaN ranks last, but before nothing at all; the lowest position wins ties. */
    Ranked best = {-infinity(), INT32_MAX};
    auto better = [](Ranked x, Ranked y) {
        return y.value > x.value || (y.value == x.value && y.position < x.position) ? y : x;
    };
    bool any = false;
    for (int c = threadIdx.x; c < s.columns; c += kThreads) {
        const bool is_masked = masked(c);
        const bool chosen = s.parallel && is_masked && confidence(c) >= s.tau && score(c) > theta;
        s.selected[b * s.selected_stride[0] + c * s.selected_stride[1]] = chosen;
        any = any || chosen;
        if (is_masked && score(c) == score(c)) {
            const float value = s.by_confidence ? confidence(c) : score(c);
            best = better(best, Ranked{value == value ? value : -infinity(), c});
        }
        if (chosen)
            commit(c);
    }
    best = block_reduce(
        best,
        [](Ranked x, int distance) {
            return Ranked{__shfl_xor_sync(kAllLanes, x.value, distance),
                          __shfl_xor_sync(kAllLanes, x.position, distance)};
        },
        better);
    any = __syncthreads_or(any);
    if (threadIdx.x == 0 && !any && best.position != INT32_MAX) {
        s.selected[b * s.selected_stride[0] + best.position * s.selected_stride[1]] = 1;
        commit(best.position);
    }
}

/* One part of a sequence's step is done; the last one's block selects. */
__device__ inline void finish_part(const SelectArgs &s, int b) {
    if (s.arrived != nullptr && last_to_arrive(s.arrived + b, s.parts))
        select_sequence(s, b);
}

} // namespace cuda
} // namespace attn_sampler

#endif /* ATTN_SAMPLER_CUDA_SELECT_CUH_ */
