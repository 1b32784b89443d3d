/* Selection, revision and commit of one sequence by one block: a few comparisons for each position. */
#ifndef ATTN_SAMPLER_CUDA_SELECT_TOKENS_CUH_
#define ATTN_SAMPLER_CUDA_SELECT_TOKENS_CUH_

#include "cuda/block.cuh"
#include "selection.h"

namespace attn_sampler {
namespace cuda {

struct SelectArgs {
    View<const float, 2> scores, confidence;
    const float *scores_of_layers; /* [B, layers, C] of a step, from which it has its scores; or null */
    View<float, 2> summed;         /* these scores, where they go to */
    int32_t layers;
    View<const uint8_t, 2> masked; /* null where tokens say which positions are masked */
    View<uint8_t, 2> selected;
    View<int64_t, 2> tokens, token_ids; /* [B, C] of the block; null: nothing is committed */
    int64_t mask_token_id;
    uint32_t *arrived; /* [B]: tickets of the parts of a step; null where there is no selection */
    uint32_t parts;
    int32_t batch, columns;
    SelectionRules rules;
    View<int32_t, 2> budget; /* null, as what follows: nothing is revised */
    View<uint8_t, 2> revised;
    View<const float, 2> current;
    View<const uint8_t, 2> differs; /* null where tokens and token_ids say it */
    RevisionRule revision;
};

/* A position's place in the order of the fallback. */
struct Ranked {
    float value;
    int32_t position;
};

/* Ends a revision: `revised` holds the verdicts of this thread's positions, of which the first are carried
 * out. They are those of the largest keys, of which no two are equal; the least of these is found bit by bit.
 */
template <typename Score>
__device__ inline void revise(const SelectArgs &s, int b, const Score &score) {
    /* In the order of SelectionRule::is_before; 0 of what is kept. */
    auto key = [&](int c) -> uint64_t {
        if (c >= s.columns || element(s.revised, b, c) == ATTN_SAMPLER_KEPT)
            return 0;
        const float rank = s.revision.rank(score(c), __ldcg(&element(s.current, b, c)));
        const uint32_t bits = __float_as_uint(rank + 0.0f); /* -0 is equal to 0 */
        const uint32_t ordered = bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
        return static_cast<uint64_t>(ordered) << 32 | ~static_cast<uint32_t>(c);
    };
    auto reaching = [&](uint64_t least) {
        int count = 0;
#pragma unroll 1
        for (int first = 0; first < s.columns; first += kThreads)
            count += __syncthreads_count(key(first + threadIdx.x) >= least);
        return count;
    };
    uint64_t least = 0;
    int count = reaching(1);
    if (count > s.revision.most)
#pragma unroll 1
        for (uint64_t bit = uint64_t{1} << 63; bit != 0 && count != s.revision.most; bit /= 2) {
            const int passing = reaching(least | bit);
            if (passing >= s.revision.most) {
                least |= bit;
                count = passing;
            }
        }
#pragma unroll 1
    for (int c = threadIdx.x; c < s.columns; c += kThreads) {
        uint8_t &verdict = element(s.revised, b, c);
        if (verdict == ATTN_SAMPLER_KEPT)
            continue;
        if (key(c) < least) {
            verdict = ATTN_SAMPLER_KEPT;
            continue;
        }
        --element(s.budget, b, c);
        if (s.tokens.data != nullptr)
            element(s.tokens, b, c) =
                verdict == ATTN_SAMPLER_REPLACED ? __ldcg(&element(s.token_ids, b, c)) : s.mask_token_id;
    }
}

/* Layers are added up one after another, as calls with accumulate would. */
__device__ inline float sum_of_layers(const SelectArgs &s, int b, int c) {
    const float *const first = s.scores_of_layers + static_cast<int64_t>(b) * s.layers * s.columns + c;
    float sum = __ldcg(first);
#pragma unroll 16
    for (int layer = 1; layer < s.layers; ++layer)
        sum += __ldcg(first + static_cast<int64_t>(layer) * s.columns);
    return sum;
}

/* See attn_sampler_select_tokens. All that is asked of a thread's first position, rarely there is another, is
 * read at once. */
__device__ inline void select_sequence(const SelectArgs &s, int b) {
    auto is_masked = [&](int c) {
        return s.masked.data != nullptr ? element(s.masked, b, c) != 0
                                        : element(s.tokens, b, c) == s.mask_token_id;
    };
    const int own = threadIdx.x;
    float own_score = 0.0f, own_confidence = 0.0f;
    bool own_masked = false;
    int64_t own_token = 0;
    if (own < s.columns) {
        own_masked = is_masked(own);
        own_confidence = __ldcg(&element(s.confidence, b, own));
        if (s.tokens.data != nullptr)
            own_token = __ldcg(&element(s.token_ids, b, own));
    }
    if (s.scores_of_layers == nullptr) {
        if (own < s.columns)
            own_score = __ldcg(&element(s.scores, b, own));
    } else {
#pragma unroll 1
        for (int c = own; c < s.columns; c += kThreads) {
            const float sum = sum_of_layers(s, b, c);
            element(s.summed, b, c) = sum;
            own_score = c == own ? sum : own_score;
        }
    }
    auto score = [&](int c) { return c == own ? own_score : __ldcg(&element(s.scores, b, c)); };
    auto confidence = [&](int c) { return c == own ? own_confidence : __ldcg(&element(s.confidence, b, c)); };
    auto masked = [&](int c) { return c == own ? own_masked : is_masked(c); };
    auto token = [&](int c) { return c == own ? own_token : __ldcg(&element(s.token_ids, b, c)); };
    auto differs = [&](int c) {
        return s.differs.data != nullptr ? element(s.differs, b, c) != 0
                                         : element(s.tokens, b, c) != token(c);
    };
    auto commit = [&](int c) {
        if (s.tokens.data != nullptr)
            element(s.tokens, b, c) = token(c);
    };

    const SelectionRule rule = s.rules.at(b);
    float theta = kLowest;
#pragma unroll 1 /* a thread has one position, rarely more */
    for (int c = threadIdx.x; rule.is_parallel() && c < s.columns; c += kThreads)
        if (masked(c) && !rule.is_confident(confidence(c)))
            theta = score(c) > theta ? score(c) : theta;
    theta = block_reduce(
        theta, [](float x, int distance) { return __shfl_xor_sync(kAllLanes, x, distance); },
        [](float x, float y) { return x > y ? x : y; });

    Ranked best = {kLowest, INT32_MAX}; /* after every candidate */
    auto better = [](Ranked x, Ranked y) {
        return SelectionRule::is_before(y.value, y.position, x.value, x.position) ? y : x;
    };
    bool any = false;
#pragma unroll 1
    for (int c = threadIdx.x; c < s.columns; c += kThreads) {
        bool chosen = false;
        const bool was_masked = masked(c);
        if (was_masked) {
            const float x = score(c), y = confidence(c);
            chosen = rule.passes(x, y, theta);
            if (rule.is_candidate(x))
                best = better(best, {rule.rank(x, y), c});
        }
        element(s.selected, b, c) = chosen;
        if (s.budget.data != nullptr)
            element(s.revised, b, c) =
                was_masked ? static_cast<uint8_t>(ATTN_SAMPLER_KEPT)
                           : s.revision.verdict(element(s.budget, b, c), differs(c), confidence(c),
                                                __ldcg(&element(s.current, b, c)));
        any = any || chosen;
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
        element(s.selected, b, best.position) = 1;
        commit(best.position);
    }
    if (s.budget.data != nullptr)
        revise(s, b, score);
}

/* One part of a sequence's step is done; the last one's block selects. */
__device__ inline void finish_part(const SelectArgs &s, int b) {
    if (s.arrived != nullptr && last_to_arrive(s.arrived + b, 1, s.parts))
        select_sequence(s, b);
}

/* No sequence's tokens, nor what a step adds. */
SelectArgs select_args(const SelectProblem &p);

} // namespace cuda
} // namespace attn_sampler

#endif /* ATTN_SAMPLER_CUDA_SELECT_TOKENS_CUH_ */
