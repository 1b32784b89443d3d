/* Token confidence: one pass over a row's vocabulary, cut among blocks where rows are few.
 *
 * Logits are read 16 bytes at a time, eight tokens a group, several groups in flight. The running state is
 * rescaled only where a group holds a new maximum, and the chosen token is looked for only there, so that
 * most tokens cost a conversion, a comparison, a multiply-add, an exponential and an addition.
 */
#ifndef ATTN_SAMPLER_CUDA_TOKEN_CONFIDENCE_CUH_
#define ATTN_SAMPLER_CUDA_TOKEN_CONFIDENCE_CUH_

#include "attn_sampler_random.h"
#include "cuda/block.cuh"

namespace attn_sampler {
namespace cuda {

constexpr int kGroup = 8;  /* tokens */
constexpr int kFlight = 4; /* groups in flight for each thread, unless sampling keeps it busy */

/* What is known of a part of a row. */
struct Confidence {
    float max, second; /* the two largest logits (equal where they tie) */
    float sum;         /* of exp(x - shift) */
    float moment;      /* of exp(x - shift) (x - shift) */
    float best_key;    /* of the chosen token */
    int32_t best;

    __device__ float shift() const { return is_finite(max) ? max : 0.0f; }
};

struct ConfidenceArgs {
    View<const void, 2> logits;
    View<const int64_t, 1> seeds; /* may be null */
    uint64_t seed;
    View<const int64_t, 2> current_ids; /* may be null, as log_prob and current */
    View<int64_t, 2> token_ids;
    View<float, 2> confidence, log_prob, current;
    Confidence *partial;                       /* [rows, splits] */
    uint32_t *arrived;                         /* [rows] */
    int32_t batch, positions, vocab, excluded; /* excluded: -1 for none */
    int32_t splits, groups_per_split;
    uint32_t noise_group; /* of the sampling stream, and the place in it: where the first token's noise is */
    int32_t noise_place;
    int32_t dtype, metric;
    float inverse_temperature;
    bool sample;
};

__device__ inline float exp_fast(float x) { return exp2_fast(x * kLog2eHigh); }

/* A NaN is nowhere the largest; it makes the sums NaN. */
__device__ inline void raise(Confidence &s, float max) {
    const float before = s.shift();
    s.max = max;
    const float down = fmaxf(before - s.shift(), -1e4f); /* finite, and its exponential 0 */
    if (s.sum != 0.0f) {
        s.moment = exp_fast(down) * (s.moment + down * s.sum);
        s.sum *= exp_fast(down);
    }
}

__device__ inline Confidence merge(Confidence x, Confidence y) {
    if (y.best_key > x.best_key || (y.best_key == x.best_key && y.best < x.best)) {
        x.best_key = y.best_key;
        x.best = y.best;
    }
    const float lower = fminf(x.max, y.max), higher = fmaxf(x.max, y.max);
    x.second = fmaxf(lower, fmaxf(x.second, y.second));
    raise(x, higher);
    raise(y, higher);
    x.sum += y.sum;
    x.moment += y.moment;
    return x;
}

__device__ inline Confidence exchange(Confidence s, int distance) {
    return {__shfl_xor_sync(kAllLanes, s.max, distance),      __shfl_xor_sync(kAllLanes, s.second, distance),
            __shfl_xor_sync(kAllLanes, s.sum, distance),      __shfl_xor_sync(kAllLanes, s.moment, distance),
            __shfl_xor_sync(kAllLanes, s.best_key, distance), __shfl_xor_sync(kAllLanes, s.best, distance)};
}

/* One row's logits, whatever their type. */
struct LogitRow {
    const void *data;
    int dtype;

    __device__ float at(int64_t v) const {
        if (dtype == ATTN_SAMPLER_FLOAT32)
            return static_cast<const float *>(data)[v];
        if (dtype == ATTN_SAMPLER_FLOAT16)
            return to_float(static_cast<const Half *>(data)[v]);
        return to_float(static_cast<const BFloat16 *>(data)[v]);
    }
    __device__ int element_size() const { return dtype == ATTN_SAMPLER_FLOAT32 ? 4 : 2; }
    /* Elements by which the row starts beyond a multiple of 16 bytes. */
    __device__ int misalignment() const {
        return static_cast<int>(reinterpret_cast<uintptr_t>(data) % 16) / element_size();
    }
    __device__ void load(int64_t v, uint4 (&raw)[2]) const {
        const char *const from = static_cast<const char *>(data) + v * element_size();
        raw[0] = load_streaming(from);
        if (dtype == ATTN_SAMPLER_FLOAT32)
            raw[1] = load_streaming(from + 16);
    }
    __device__ void widen(const uint4 (&raw)[2], float (&x)[kGroup]) const {
        const uint32_t word[8] = {raw[0].x, raw[0].y, raw[0].z, raw[0].w,
                                  raw[1].x, raw[1].y, raw[1].z, raw[1].w};
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
            const uint16_t half = static_cast<uint16_t>(word[i / 2] >> (16 * (i % 2)));
            x[i] = dtype == ATTN_SAMPLER_FLOAT32    ? __uint_as_float(word[i])
                   : dtype == ATTN_SAMPLER_BFLOAT16 ? to_float(BFloat16{half})
                                                    : to_float(Half{half});
        }
    }
};

/* Takes in eight tokens from v on. */
template <bool kSample>
__device__ inline void add_group(const ConfidenceArgs &a, uint64_t seed, int position, int v,
                                 float (&x)[kGroup], Confidence &s) {
    if (static_cast<uint32_t>(a.excluded - v) < kGroup)
#pragma unroll
        for (int i = 0; i < kGroup; ++i)
            x[i] = v + i == a.excluded ? -infinity() : x[i];
    float largest = x[0] == x[0] ? x[0] : -infinity();
#pragma unroll
    for (int i = 1; i < kGroup; ++i)
        largest = fmaxf(largest, x[i]);
    if (a.metric == ATTN_SAMPLER_METRIC_MARGIN && largest > s.second) {
        float first = s.max;
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
            if (x[i] > first) {
                s.second = first;
                first = x[i];
            } else if (x[i] > s.second) {
                s.second = x[i];
            }
        }
    }
    if (largest > s.max)
        raise(s, largest);
    const float shift = s.shift();
    if (a.metric == ATTN_SAMPLER_METRIC_ENTROPY) {
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
            const float d = x[i] - shift, e = exp_fast(d);
            s.sum += e;
            s.moment = fmaf(e, d < -1e4f ? -1e4f : d, s.moment); /* 0 * -inf is no term */
        }
    } else {
#pragma unroll
        for (int i = 0; i < kGroup; ++i)
            s.sum += exp_fast(x[i] - shift);
    }
    /* Strictly larger, so that the lowest token wins. */
    if constexpr (kSample) {
        decltype(philox(seed, 0, 0)) words;
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
            const int token = v + i, place = a.noise_place + token, part = place & 3;
            if (i == 0 || part == 0)
                words = philox(seed, a.noise_group + static_cast<uint32_t>(place) / 4,
                               static_cast<uint32_t>(position));
            const auto word = part == 0   ? words.word[0]
                              : part == 1 ? words.word[1]
                              : part == 2 ? words.word[2]
                                          : words.word[3];
            const float noise = gumbel(static_cast<uint32_t>(word));
            const float key = __fadd_rn(__fmul_rn(x[i], a.inverse_temperature), noise);
            if (key > s.best_key) {
                s.best_key = key;
                s.best = token;
            }
        }
    } else if (largest > s.best_key) {
        s.best_key = largest;
#pragma unroll
        for (int i = kGroup - 1; i >= 0; --i)
            if (x[i] == largest)
                s.best = v + i;
    }
}

__device__ inline float confidence_of(const ConfidenceArgs &a, const Confidence &s, float chosen_logit) {
    if (a.metric == ATTN_SAMPLER_METRIC_ENTROPY)
        return s.moment / s.sum - logf(s.sum);
    const float chosen = exp_fast(chosen_logit - s.max) / s.sum;
    if (a.metric == ATTN_SAMPLER_METRIC_PROBABILITY)
        return chosen;
    const float other = chosen_logit == s.max ? s.second : s.max;
    return chosen - exp_fast(other - s.max) / s.sum;
}

/* The probability of a token that is given. */
__device__ inline float probability_of(const ConfidenceArgs &a, const Confidence &s, const LogitRow &row,
                                       int64_t token) {
    if (token < 0 || token >= a.vocab)
        return not_a_number();
    return token == a.excluded ? 0.0f : exp_fast(row.at(token) - s.max) / s.sum;
}

__device__ inline void write_confidence(const ConfidenceArgs &a, const Confidence &s, const LogitRow &row,
                                        int b, int c) {
    const bool is_defined = is_finite(s.max) && s.sum == s.sum; /* not of nothing but -inf, of +inf or NaN */
    const float logit = row.at(s.best), nan = not_a_number();
    element(a.token_ids, b, c) = s.best;
    element(a.confidence, b, c) = is_defined ? confidence_of(a, s, logit) : nan;
    if (a.log_prob.data != nullptr)
        element(a.log_prob, b, c) = is_defined ? logit - s.max - logf(s.sum) : nan;
    if (a.current.data != nullptr)
        element(a.current, b, c) = is_defined ? probability_of(a, s, row, element(a.current_ids, b, c)) : nan;
}

/* What this thread makes of its groups of a split, kGroups of them in flight. */
template <bool kSample, int kGroups>
__device__ inline Confidence scan(const ConfidenceArgs &a, const LogitRow &row, uint64_t seed, int position,
                                  int split) {
    Confidence s = {-infinity(), -infinity(), 0.0f, 0.0f, -infinity(), INT32_MAX};
    const int before = row.misalignment(), groups = (a.vocab + before + kGroup - 1) / kGroup;
    const int first = split * a.groups_per_split, last = min(first + a.groups_per_split, groups);
    for (int g = first + threadIdx.x; g < last; g += kThreads * kGroups) {
        uint4 raw[kGroups][2];
        int v[kGroups];
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            v[i] = (g + i * kThreads) * kGroup - before;
            if (g + i * kThreads < last && v[i] >= 0 && v[i] + kGroup <= a.vocab)
                row.load(v[i], raw[i]);
        }
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            if (g + i * kThreads >= last)
                continue;
            float x[kGroup];
            if (v[i] >= 0 && v[i] + kGroup <= a.vocab)
                row.widen(raw[i], x);
            else
#pragma unroll
                for (int n = 0; n < kGroup; ++n)
                    x[n] = v[i] + n >= 0 && v[i] + n < a.vocab ? row.at(v[i] + n) : -infinity();
            add_group<kSample>(a, seed, position, v[i], x, s);
        }
    }
    return s;
}

/* Block `index` of batch * positions * splits. True in the one block of a row that has written its results.
 */
__device__ inline bool confidence_block(const ConfidenceArgs &a, int index) {
    const int split = index % a.splits, row_index = index / a.splits;
    const int b = row_index / a.positions, c = row_index % a.positions;
    LogitRow row = {nullptr, a.dtype};
    row.data = static_cast<const char *>(a.logits.data) +
               (b * a.logits.stride[0] + c * a.logits.stride[1]) * row.element_size();
    const uint64_t seed =
        a.seeds.data == nullptr ? a.seed : static_cast<uint64_t>(a.seeds.data[b * a.seeds.stride[0]]);

    Confidence s =
        a.sample ? scan<true, 1>(a, row, seed, c, split) : scan<false, kFlight>(a, row, seed, c, split);
    s = block_reduce(s, exchange, merge);
    if (a.splits > 1) {
        Confidence *const partial = a.partial + static_cast<int64_t>(row_index) * a.splits;
        if (threadIdx.x == 0)
            partial[split] = s;
        if (!last_to_arrive(a.arrived + row_index, static_cast<uint32_t>(a.splits)))
            return false;
        s = {-infinity(), -infinity(), 0.0f, 0.0f, -infinity(), INT32_MAX};
        for (int i = threadIdx.x; i < a.splits; i += kThreads) {
            const Confidence *const p = partial + i;
            s = merge(s, {__ldcg(&p->max), __ldcg(&p->second), __ldcg(&p->sum), __ldcg(&p->moment),
                          __ldcg(&p->best_key), __ldcg(&p->best)});
        }
        s = block_reduce(s, exchange, merge);
    }
    if (threadIdx.x == 0) {
        if (s.best == INT32_MAX) /* no key above -inf: the lowest token that may be chosen */
            s.best = a.excluded == 0 ? 1 : 0;
        write_confidence(a, s, row, b, c);
    }
    return true;
}

class Launcher;
struct SelectArgs;

ConfidenceArgs confidence_args(const ConfidenceProblem &p, Launcher &launcher);
inline int64_t confidence_blocks(const ConfidenceArgs &a) {
    return static_cast<int64_t>(a.batch) * a.positions * a.splits;
}

/* Launches the confidence of all rows and, where select asks for it, the selection by the last of a
 * sequence's. */
void launch_confidence(const char *name, const ConfidenceArgs &confidence, const SelectArgs &select,
                       Launcher &launcher);

} // namespace cuda
} // namespace attn_sampler

#endif /* ATTN_SAMPLER_CUDA_TOKEN_CONFIDENCE_CUH_ */
