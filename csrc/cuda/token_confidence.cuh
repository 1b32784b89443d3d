/* Token confidence: one pass over a row's vocabulary, cut among blocks where rows are few.
 *
 * Logits are read 16 bytes at a time, eight tokens a group, several groups in flight. The running state is
 * rescaled only where a group holds a new maximum, and the chosen token is looked for only there, so that
 * most tokens cost a conversion, a comparison, a multiply-add, an exponential and an addition.
 *
 * Where only some tokens may be drawn, the last of a row's blocks, which knows its largest logit, looks at
 * the whole row again: for the top_k-th largest, for the mass, for a token, and whether that may be drawn.
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
    Draws draws;
    View<const uint32_t, 3> bitmask;    /* may be null */
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
    int32_t excluded;
    const uint32_t *words; /* of a bit for each token, or null */
    int64_t word_stride;

    __device__ bool is_present(int32_t token) const {
        return token != excluded &&
               (words == nullptr || (words[token / 32 * word_stride] >> (token % 32) & 1) != 0);
    }

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
__device__ inline void add_group(const ConfidenceArgs &a, const LogitRow &row, const Draw &draw, int position,
                                 int v, float (&x)[kGroup], Confidence &s) {
    if (row.words != nullptr || static_cast<uint32_t>(a.excluded - v) < kGroup)
#pragma unroll
        for (int i = 0; i < kGroup; ++i)
            if (v + i >= 0 && v + i < a.vocab && !row.is_present(v + i))
                x[i] = -infinity();
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
        decltype(philox(draw.seed, 0, 0)) words;
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
            const int token = v + i, place = a.noise_place + token, part = place & 3;
            if (i == 0 || part == 0)
                words = philox(draw.seed, a.noise_group + static_cast<uint32_t>(place) / 4,
                               static_cast<uint32_t>(position));
            const auto word = part == 0   ? words.word[0]
                              : part == 1 ? words.word[1]
                              : part == 2 ? words.word[2]
                                          : words.word[3];
            const float noise = gumbel(static_cast<uint32_t>(word));
            const float key = __fadd_rn(__fmul_rn(x[i], draw.inverse_temperature), noise);
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
    return row.is_present(static_cast<int32_t>(token)) ? exp_fast(row.at(token) - s.max) / s.sum : 0.0f;
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
__device__ inline Confidence scan(const ConfidenceArgs &a, const LogitRow &row, const Draw &draw,
                                  int position, int split) {
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
            add_group<kSample>(a, row, draw, position, v[i], x, s);
        }
    }
    return s;
}

/* A row of which only some tokens may be drawn, and its block. What is said of tokens is said of their
 * distances above the largest logit, by the inverse temperature, which are 0 or more. */
struct Truncated {
    const ConfidenceArgs &a;
    const LogitRow &row;
    const Draw &draw;
    float top;

    static constexpr int kNearest = 8;            /* that each thread keeps */
    static constexpr uint32_t kNone = 0x7F800000; /* infinity's bits: as far as what is absent */

    __device__ float scaled(int32_t token) const {
        const float y = token >= 0 && token < a.vocab && row.is_present(token)
                            ? __fmul_rn(row.at(token), draw.inverse_temperature)
                            : -infinity();
        return y == y ? y : -infinity();
    }
    /* In the order of what they stand for. */
    __device__ uint32_t bits(float y) const { return __float_as_uint(y < top ? top - y : 0.0f); }
    __device__ uint32_t bits(int32_t token) const { return bits(scaled(token)); }

    template <typename T>
    __device__ static T sum(T value) {
        return block_reduce(
            value, [](T x, int distance) { return __shfl_xor_sync(kAllLanes, x, distance); },
            [](T x, T y) { return x + y; });
    }

    /* The least number of bits of which count(at most as many) is k or more: found from the highest down. */
    template <typename Count>
    __device__ static uint32_t find(int k, const Count &count) {
        uint32_t below = 0; /* fewer than k are */
#pragma unroll 1
        for (uint32_t bit = 1u << 30; bit != 0; bit /= 2)
            if (below + bit <= kNone && count(below + bit - 1) < k)
                below += bit;
        return below;
    }

    /* How far the top_k-th largest is. Of each thread's tokens the nearest are enough to know, unless one has
     * that many nearer ones. */
    __device__ uint32_t kth_nearest() const {
        if (draw.top_k <= 0 || draw.top_k >= a.vocab)
            return kNone;
        if (draw.top_k <= kThreads) {
            uint32_t near[kNearest];
#pragma unroll
            for (int i = 0; i < kNearest; ++i)
                near[i] = kNone;
#pragma unroll 1
            for (int32_t v = threadIdx.x; v < a.vocab; v += kThreads) {
                uint32_t x = bits(v);
                if (x >= near[kNearest - 1])
                    continue;
#pragma unroll
                for (int i = 0; i < kNearest; ++i) {
                    const uint32_t larger = max(near[i], x);
                    near[i] = min(near[i], x);
                    x = larger;
                }
            }
            const uint32_t kth = find(draw.top_k, [&](uint32_t most) {
                int count = 0;
#pragma unroll
                for (int i = 0; i < kNearest; ++i)
                    count += near[i] <= most;
                return sum(count);
            });
            if (!__syncthreads_or(near[kNearest - 1] < kth))
                return kth;
        }
        return find(draw.top_k, [&](uint32_t most) {
            int count = 0;
#pragma unroll 1
            for (int32_t v = threadIdx.x; v < a.vocab; v += kThreads)
                count += bits(v) <= most;
            return sum(count);
        });
    }

    /* Of the tokens that are at most, or nearer than, so far. */
    __device__ int64_t mass(uint32_t most) const {
        int64_t total = 0;
#pragma unroll 1
        for (int32_t v = threadIdx.x; v < a.vocab; v += kThreads) {
            const uint32_t x = bits(v);
            total += x <= most ? token_weight(-__uint_as_float(x)) : 0;
        }
        return sum(total);
    }

    /* The token of the largest key of those that are at most so far. */
    __device__ Confidence draw_from(int position, uint32_t most) const {
        Confidence s = {-infinity(), -infinity(), 0.0f, 0.0f, -infinity(), INT32_MAX};
        const int32_t groups = (a.noise_place + a.vocab + 3) / 4;
#pragma unroll 1
        for (int32_t g = threadIdx.x; g < groups; g += kThreads) {
            const int32_t first = 4 * g - a.noise_place;
            float y[4];
            bool any = false;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                y[i] = scaled(first + i);
                any = any || (y[i] > -infinity() && bits(y[i]) <= most);
            }
            if (!any)
                continue;
            const auto words =
                philox(draw.seed, a.noise_group + static_cast<uint32_t>(g), static_cast<uint32_t>(position));
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float key = __fadd_rn(y[i], gumbel(static_cast<uint32_t>(words.word[i])));
                if (key > s.best_key && bits(y[i]) <= most) {
                    s.best_key = key;
                    s.best = first + i;
                }
            }
        }
        return block_reduce(s, exchange, merge);
    }

    __device__ int32_t choose(int position) const {
        const uint32_t kth = kth_nearest(), by_probability = __float_as_uint(0.0f - draw.least);
        uint32_t most = min(kth, by_probability);
        const bool by_mass = draw.top_p < 1.0f;
        const int64_t all = by_mass ? mass(kth) : 0;
        for (;;) {
            const int32_t token = draw_from(position, most).best;
            const uint32_t x = bits(token);
            /* A draw from more than may be drawn is right if it may be. If not, nothing that far may. */
            if (!by_mass || x == 0 || is_within(draw.top_p, mass(x - 1), all))
                return token;
            most = x - 1;
        }
    }
};

/* Block `index` of batch * positions * splits. True in the one block of a row that has written its results.
 */
__device__ inline bool confidence_block(const ConfidenceArgs &a, int index) {
    const int split = index % a.splits, row_index = index / a.splits;
    const int b = row_index / a.positions, c = row_index % a.positions;
    LogitRow row = {nullptr, a.dtype, a.excluded, nullptr, a.bitmask.stride[2]};
    if (a.bitmask.data != nullptr)
        row.words = a.bitmask.data + b * a.bitmask.stride[0] + c * a.bitmask.stride[1];
    row.data = static_cast<const char *>(a.logits.data) +
               (b * a.logits.stride[0] + c * a.logits.stride[1]) * row.element_size();
    const Draw draw = draw_of(a.draws, b);

    Confidence s = draw.samples() && !draw.truncates() ? scan<true, 1>(a, row, draw, c, split)
                                                       : scan<false, kFlight>(a, row, draw, c, split);
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
    if (draw.samples() && draw.truncates() && s.max > -infinity())
        s.best = Truncated{a, row, draw, __fmul_rn(s.max, draw.inverse_temperature)}.choose(c);
    if (threadIdx.x == 0) {
        if (s.best == INT32_MAX) { /* no key above -inf: the lowest token that may be chosen */
            const int32_t lowest = a.excluded == 0 ? 1 : 0;
            for (s.best = lowest; s.best < a.vocab && !row.is_present(s.best);)
                ++s.best;
            s.best = s.best < a.vocab ? s.best : lowest;
        }
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
