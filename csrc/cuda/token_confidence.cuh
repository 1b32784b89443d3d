/* Token confidence: one pass over a row's vocabulary, which is cut in units of one block each.
 *
 * The ladder of ideas:
 * 1. What bounds it is issue slots: a greedy logit has some seven instructions until its 2 bytes have come.
 *    Conversion, comparison, multiply-add, exponential and addition are five of them; the others are shared
 * by a group of eight, which one 16-byte load brings. So the element type is fixed at compile time, and what
 *    is rare (the last group of a row, masks, other measures) is branched around.
 * 2. Exponents are one multiply-add, x log2(e) - base, whose base follows the largest logit only when that
 *    has left it behind (Sums). Of the largest, the group is remembered; its token is looked up at the end.
 * 3. Every thread has several groups in flight: one is loaded where another has just been consumed.
 * 4. A sampled token's key needs a random word and two logarithms. A group whose largest logit is too small
 *    for the noise at its largest needs neither, and a word that is too large for the key to win needs no
 *    logarithm: both are exact, since rounding is monotone.
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

constexpr int kGroup = 8; /* tokens */
/* Groups in flight for each thread: 64 bytes. */
template <typename L>
constexpr int kFlight = 8 / static_cast<int>(sizeof(L));

/* What is known of a part of a row. */
struct Confidence {
    float max, second; /* the two largest logits (equal where they tie) */
    float sum;         /* of exp(x - shift) */
    float moment;      /* of exp(x - shift) (x - shift) */
    float best_key;    /* of the chosen token; where none is drawn, its logit */
    int32_t best;      /* that token or, where none is drawn, the first of its group; INT32_MAX: none */

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
    Divisor splits;                            /* units of a row */
    Divisor by_positions;
    int32_t groups_per_split;
    uint32_t noise_group; /* of the sampling stream, and the place in it: where the first token's noise is */
    int32_t noise_place;
    int32_t dtype, metric;
};

__device__ inline Confidence no_confidence() {
    return {-infinity(), -infinity(), 0.0f, 0.0f, -infinity(), INT32_MAX};
}

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

    /* A bit for each of eight tokens from v, a multiple of 8, on: 0 too for those from `stop` on. */
    __device__ uint32_t present(int32_t v, int32_t stop) const {
        if (v >= stop)
            return 0;
        uint32_t bits = words != nullptr ? words[v / 32 * word_stride] >> (v % 32) : ~0u;
        if (static_cast<uint32_t>(excluded - v) < 8)
            bits &= ~(1u << (excluded - v));
        return stop - v < 8 ? bits & ((1u << (stop - v)) - 1) : bits;
    }

    __device__ float at(int64_t v) const {
        if (dtype == ATTN_SAMPLER_FLOAT32)
            return static_cast<const float *>(data)[v];
        if (dtype == ATTN_SAMPLER_FLOAT16)
            return to_float(static_cast<const Half *>(data)[v]);
        return to_float(static_cast<const BFloat16 *>(data)[v]);
    }
    __device__ int element_size() const { return dtype == ATTN_SAMPLER_FLOAT32 ? 4 : 2; }
};

/* A thread's sum of exponentials, and of their logarithms times them. The base stays where it is until a
 * logit is kLead above it, which after the first groups is rare: e^kLead and a vocabulary of them are far
 * from overflow. */
class Sums {
  public:
    /* Whether `add` will not do for logits with this largest one; a NaN changes nothing. */
    __device__ bool is_behind(float largest) const { return largest > limit_; }

    /* Moves the base for it. False where these logits have to be added by add_wide. */
    __device__ bool follow(float largest) {
        if (!is_wide_ || largest > base_) {
            const bool is_wide = is_finite(largest) && !(fabsf(largest) <= kNarrow);
            rebase(is_wide ? largest : is_finite(largest) ? largest * kLog2eHigh : 0.0f, is_wide);
            limit_ = is_wide ? -infinity() : largest + kLead;
        }
        return !is_wide_;
    }

    __device__ void add(float x) { sum_ += exp2_fast(fmaf(x, kLog2eHigh, -base_)); }
    __device__ void add_with_moment(float x) { add_log(fmaf(x, kLog2eHigh, -base_)); }
    /* A logit of a size that the multiply-add would lose. */
    __device__ void add_wide(float x) { add_log((x - base_) * kLog2eHigh); }

    /* As Confidence has them, of a part whose largest is s.max: that one counts as exactly 1. */
    __device__ void finish(Confidence &s) {
        const bool has_max = is_finite(s.max);
        const float t = is_wide_ ? (s.max - base_) * kLog2eHigh : fmaf(s.max, kLog2eHigh, -base_);
        if (has_max) {
            const float e = exp2_fast(t);
            sum_ -= e;
            moment_ -= e * t;
        }
        rebase(s.shift(), true);
        s.sum = has_max ? sum_ + 1.0f : sum_;
        s.moment = moment_ * kLn2;
    }

  private:
    static constexpr float kLead = 16.0f;
    /* Beyond it all logits are wide, and limit_ asks for add_wide. */
    static constexpr float kNarrow = 0x1p24f; /* logits beyond it are rounded to more than 1 */
    static constexpr float kLn2 = 0.693147181f;

    float base_ = 0.0f; /* of the exponents of 2 or, where the logits are wide, a logit */
    float limit_ = -infinity();
    bool is_wide_ = false;
    float sum_ = 0.0f, moment_ = 0.0f;

    __device__ void add_log(float t) {
        const float e = exp2_fast(t);
        sum_ += e;
        moment_ = fmaf(e, t < -1e4f ? -1e4f : t, moment_); /* 0 * -inf is no term */
    }

    /* Where a base is, in two parts. */
    __device__ static float2 position(float base, bool is_wide) {
        if (!is_wide)
            return make_float2(base, 0.0f);
        const float high = base * kLog2eHigh;
        return make_float2(high, fabsf(base) < 0x1p100f ? fmaf(base, kLog2eHigh, -high) : 0.0f);
    }

    __device__ void rebase(float base, bool is_wide) {
        const float2 from = position(base_, is_wide_), to = position(base, is_wide);
        float down = is_wide && is_wide_ ? (base_ - base) * kLog2eHigh : (from.x - to.x) + (from.y - to.y);
        down = fmaxf(down, -1e4f); /* finite, and its exponential 0 */
        if (sum_ != 0.0f) {
            moment_ = exp2_fast(down) * fmaf(down, sum_, moment_);
            sum_ *= exp2_fast(down);
        }
        base_ = base;
        is_wide_ = is_wide;
    }
};

/* The larger of all lanes, and the sum, in the same order in every lane. */
__device__ inline float warp_max(float x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
        x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, distance));
    return x;
}
__device__ inline float warp_sum(float x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
        x += __shfl_xor_sync(kAllLanes, x, distance);
    return x;
}

/* `merge` of all lanes: the maxima first, so that each has its sums rescaled once. */
__device__ inline Confidence warp_merge(Confidence s, int metric) {
    const float max = warp_max(s.max), best_key = warp_max(s.best_key);
    if (metric == ATTN_SAMPLER_METRIC_MARGIN) {
        const bool has_max = s.max == max;
        const uint32_t lanes = __ballot_sync(kAllLanes, has_max);
        const float second = warp_max(has_max ? s.second : s.max);
        s.second = (lanes & (lanes - 1)) != 0 ? max : second;
    }
    raise(s, max);
    s.sum = warp_sum(s.sum);
    if (metric == ATTN_SAMPLER_METRIC_ENTROPY)
        s.moment = warp_sum(s.moment);
    s.best = s.best_key == best_key ? s.best : INT32_MAX;
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
        s.best = min(s.best, __shfl_xor_sync(kAllLanes, s.best, distance));
    s.best_key = best_key;
    return s;
}

/* Gumbel noise of any word is at most this. */
constexpr float kMostNoise = 22.875f;

/* One thread's part of a unit of a row whose logits are of type L. */
template <typename L>
class Scan {
  public:
    __device__ Scan(const ConfidenceArgs &a, const LogitRow &row, const Draw &draw, int position, float bound)
        : row_(row), draw_(draw), noise_group_(a.noise_group), noise_place_(a.noise_place), vocab_(a.vocab),
          metric_(a.metric), position_(position), draws_(draw.samples() && !draw.truncates()), bound_(bound) {
    }

    /* Of groups [first, last) of the row. Which tokens are a thread's does not depend on where the row
     * starts, and so neither do its bits. */
    __device__ Confidence run(int first, int last) {
        add_groups(first, min(last, (vocab_ + kGroup - 1) / kGroup));
        sums_.finish(s_);
        if (!draws_)
            s_.best_key = s_.max;
        return s_;
    }

  private:
    static constexpr int kGroups = kFlight<L>;
    static constexpr int kStride = kThreads * kGroup; /* tokens from one of a thread's groups to its next */
    static constexpr int kWords = static_cast<int>(sizeof(L)) / 2; /* of 16 bytes, in a group */

    const LogitRow &row_;
    const Draw &draw_;
    const uint32_t noise_group_;
    const int noise_place_, vocab_, metric_, position_;
    const bool draws_;
    Confidence s_ = no_confidence();
    Sums sums_;
    float bound_; /* a key of the row: what is below it need not be drawn */

    __device__ void add_groups(int first, int last) {
        int start = first * kGroup; /* of the block's next tokens */
        const int stop = min(last * kGroup, vocab_), own = static_cast<int>(threadIdx.x) * kGroup;
        const L *p = static_cast<const L *>(row_.data) + start + own;
        const bool is_aligned = reinterpret_cast<uintptr_t>(row_.data) % 16 == 0;
        uint4 raw[kGroups][kWords];
        load(p, stop - start, is_aligned, raw);
#pragma unroll 1
        for (; start < stop; start += kGroups * kStride) {
            float x[kGroups][kGroup];
#pragma unroll
            for (int i = 0; i < kGroups; ++i)
                widen(raw[i], x[i]);
            p += kGroups * kStride;
            load(p, stop - start - kGroups * kStride, is_aligned, raw);
            if (row_.words != nullptr || stop - start < kGroups * kStride ||
                static_cast<uint32_t>(row_.excluded - start) < kGroups * kStride)
#pragma unroll
                for (int i = 0; i < kGroups; ++i) {
                    const uint32_t present = row_.present(start + own + i * kStride, stop);
#pragma unroll
                    for (int n = 0; n < kGroup; ++n)
                        x[i][n] = (present >> n & 1) != 0 ? x[i][n] : -infinity();
                }
            add(start + own, x);
        }
    }

    /* This thread's groups of the next `left` tokens; whatever, of what is not there. */
    __device__ static void load(const L *p, int left, bool is_aligned, uint4 (&raw)[kGroups][kWords]) {
        if (is_aligned && left >= kGroups * kStride) {
#pragma unroll
            for (int i = 0; i < kGroups * kWords; ++i)
                raw[i / kWords][i % kWords] = load_streaming(p + i / kWords * kStride + i % kWords * kVector);
        } else {
            left -= static_cast<int>(threadIdx.x) * kGroup;
#pragma unroll
            for (int i = 0; i < kGroups * kWords; ++i)
                raw[i / kWords][i % kWords] =
                    load_unaligned(p, i / kWords * kStride + i % kWords * kVector, left);
        }
    }

    static constexpr int kVector = kGroup / kWords; /* logits in 16 bytes */

    __device__ static void widen(const uint4 (&raw)[kWords], float (&x)[kGroup]) {
        const uint4 &low = raw[0], &high = raw[kWords - 1];
        const uint32_t word[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int i = 0; i < kGroup; ++i)
            if constexpr (sizeof(L) == 4)
                x[i] = __uint_as_float(word[i]);
            else
                x[i] = to_float(L{static_cast<uint16_t>(word[i / 2] >> (16 * (i % 2)))});
    }

    /* Adds groups at tokens v, v + kStride ... */
    __device__ void add(int v, const float (&x)[kGroups][kGroup]) {
        float of_group[kGroups], largest = -infinity();
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            of_group[i] = x[i][0]; /* NaN, or -inf, where all are NaN */
#pragma unroll
            for (int n = 1; n < kGroup; ++n)
                of_group[i] = fmaxf(of_group[i], x[i][n]);
            largest = fmaxf(largest, of_group[i]);
        }
        if (metric_ == ATTN_SAMPLER_METRIC_MARGIN && largest > s_.second) {
            float first = s_.max;
#pragma unroll
            for (int n = 0; n < kGroups * kGroup; ++n) {
                const float logit = x[n / kGroup][n % kGroup];
                s_.second = fmaxf(s_.second, fminf(first, logit));
                first = fmaxf(first, logit);
            }
        }
        if (sums_.is_behind(largest) && !sums_.follow(largest)) {
#pragma unroll 1
            for (int n = 0; n < kGroups * kGroup; ++n) {
                const int token = v + n / kGroup * kStride + n % kGroup;
                if (token < vocab_ && row_.is_present(token))
                    sums_.add_wide(row_.at(token));
            }
        } else if (metric_ == ATTN_SAMPLER_METRIC_ENTROPY) {
#pragma unroll
            for (int n = 0; n < kGroups * kGroup; ++n)
                sums_.add_with_moment(x[n / kGroup][n % kGroup]);
        } else {
#pragma unroll
            for (int n = 0; n < kGroups * kGroup; ++n)
                sums_.add(x[n / kGroup][n % kGroup]);
        }
        if (largest > s_.max) { /* strictly, so that the lowest group wins */
            s_.max = largest;
            if (!draws_)
#pragma unroll
                for (int i = kGroups - 1; i >= 0; --i)
                    s_.best = of_group[i] == largest ? v + i * kStride : s_.best;
        }
        if (draws_ && __any_sync(kAllLanes, may_win(largest)) != 0)
#pragma unroll 1
            for (int i = 0; i < kGroups; ++i) {
                float own = of_group[0];
#pragma unroll
                for (int n = 1; n < kGroups; ++n)
                    own = i == n ? of_group[n] : own;
                draw_group(v + i * kStride, own);
            }
    }

    /* Draws the tokens of a group whose keys can be the row's largest; by whole warps. */
    __device__ void draw_group(int v, float largest) {
        bool is_first = bound_ == -infinity(); /* then the largest logit of each lane gives a bound */
        for (;;) {
            const bool draws = may_win(largest);
            if (__any_sync(kAllLanes, draws) == 0)
                return;
            if (draws)
                draw_tokens(v, is_first ? largest : -infinity(), is_first ? ~0u : most_word(largest));
            if (__any_sync(kAllLanes, s_.best_key > bound_) != 0)
                bound_ = warp_max(s_.best_key);
            if (!is_first)
                return;
            is_first = false;
        }
    }

    /* Whether the most noise could lift a logit to the bound. */
    __device__ bool may_win(float logit) const {
        return __fadd_rn(__fmul_rn(logit, draw_.inverse_temperature), kMostNoise) >= bound_ &&
               logit > -infinity();
    }

    /* The largest word whose noise can lift a logit to the bound. Noise of d or more has a word
     * below 2^32 e^-d, for -log(1 - w) <= e^-d and w < -log(1 - w). A hundredth more makes up for the
     * rounding of the noise, and the first term for that of keys. */
    __device__ uint32_t most_word(float logit) const {
        const float scaled = __fmul_rn(logit, draw_.inverse_temperature);
        const float d = (bound_ - scaled) - fmaxf(fabsf(bound_), fabsf(scaled)) * 0x1p-22f;
        const float most = exp2_fast(fmaf(d, -kLog2eHigh, 32.0f)) * 1.01f + 4.0f;
        return most < 0x1p32f ? static_cast<uint32_t>(most) : ~0u;
    }

    /* Those tokens v ... v + 7 that have this logit at least, and such a word at the most. */
    __device__ void draw_tokens(int v, float least_logit, uint32_t most) {
        const int place = noise_place_ + v;
#pragma unroll 1
        for (int first = v - place % 4; first < v + kGroup; first += 4) { /* that share their noise */
            const auto words =
                noise_words(draw_.seed, noise_group_ + static_cast<uint32_t>(noise_place_ + first) / 4,
                            static_cast<uint32_t>(position_));
            uint32_t least = ~0u;
#pragma unroll
            for (int i = 0; i < 4; ++i)
                least = min(least, static_cast<uint32_t>(words.word[i]));
            if (least > most)
                continue;
#pragma unroll 1
            for (int i = 0; i < 4; ++i) {
                const int token = first + i;
                const uint32_t word = static_cast<uint32_t>(i == 0   ? words.word[0]
                                                            : i == 1 ? words.word[1]
                                                            : i == 2 ? words.word[2]
                                                                     : words.word[3]);
                if (word > most || token < v || token >= min(v + kGroup, vocab_) || !row_.is_present(token))
                    continue;
                const float logit = row_.at(token);
                const float key = __fadd_rn(__fmul_rn(logit, draw_.inverse_temperature), gumbel(word));
                /* The lowest token wins; -inf is no key. */
                if (logit >= least_logit && key > -infinity() &&
                    (key > s_.best_key || (key == s_.best_key && token < s_.best))) {
                    s_.best_key = key;
                    s_.best = token;
                }
            }
        }
    }
};

/* What a block makes of a unit; thread 0 has it. `bound` is a key of the row, or -inf. */
__device__ inline Confidence scan(const ConfidenceArgs &a, const LogitRow &row, const Draw &draw,
                                  int position, int unit, float bound) {
    const int first = unit * a.groups_per_split, last = first + a.groups_per_split;
    Confidence s;
    if (a.dtype == ATTN_SAMPLER_FLOAT32)
        s = Scan<float>(a, row, draw, position, bound).run(first, last);
    else if (a.dtype == ATTN_SAMPLER_BFLOAT16)
        s = Scan<BFloat16>(a, row, draw, position, bound).run(first, last);
    else
        s = Scan<Half>(a, row, draw, position, bound).run(first, last);
    s = warp_merge(s, a.metric);
    Confidence *const of_warp = scratch<Confidence>();
    __syncthreads();
    if (threadIdx.x % 32 == 0)
        of_warp[threadIdx.x / 32] = s;
    __syncthreads();
    for (int warp = 1; threadIdx.x == 0 && warp < kWarps; ++warp)
        s = merge(s, of_warp[warp]);
    return s;
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
        Confidence s = no_confidence();
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
            const auto words = noise_words(draw.seed, a.noise_group + static_cast<uint32_t>(g),
                                           static_cast<uint32_t>(position));
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

/* Ends a row; thread 0 has what is known of it, and writes the results. */
__device__ inline void finish_row(const ConfidenceArgs &a, Confidence s, const LogitRow &row,
                                  const Draw &draw, int b, int c) {
    if (draw.samples() && draw.truncates()) {
        float *const max = scratch<float>();
        __syncthreads();
        if (threadIdx.x == 0)
            *max = s.max;
        __syncthreads();
        const float top = *max;
        if (top > -infinity())
            s.best = Truncated{a, row, draw, __fmul_rn(top, draw.inverse_temperature)}.choose(c);
    } else if (threadIdx.x == 0 && !draw.samples() && s.best != INT32_MAX) {
        int token = INT32_MAX; /* the first of its group that is the largest */
#pragma unroll
        for (int v = s.best + kGroup - 1; v >= s.best; --v)
            if (v < a.vocab && row.at(v) == s.max && row.is_present(v))
                token = v;
        s.best = token;
    }
    if (threadIdx.x != 0)
        return;
    if (s.best == INT32_MAX) { /* no key above -inf: the lowest token that may be chosen */
        const int32_t lowest = a.excluded == 0 ? 1 : 0;
        for (s.best = lowest; s.best < a.vocab && !row.is_present(s.best);)
            ++s.best;
        s.best = s.best < a.vocab ? s.best : lowest;
    }
    write_confidence(a, s, row, b, c);
}

/* The units of batch * positions * splits, those of a row next to each other. Calls done(b) in the one block
 * of a row that has written its results. */
template <typename Done>
__device__ void confidence_units(const ConfidenceArgs &a, Range units, Done done) {
    const int splits = a.splits.value;
    for (int unit = units.first; unit < units.last;) {
        const int row_index = a.splits.divide(unit), b = a.by_positions.divide(row_index);
        const int c = row_index - b * a.positions, first = unit - row_index * splits;
        const int count = min(splits - first, units.last - unit);
        unit += count;
        LogitRow row = {nullptr, a.dtype, a.excluded, nullptr, a.bitmask.stride[2]};
        if (a.bitmask.data != nullptr)
            row.words = a.bitmask.data + b * a.bitmask.stride[0] + c * a.bitmask.stride[1];
        row.data = static_cast<const char *>(a.logits.data) +
                   (b * a.logits.stride[0] + c * a.logits.stride[1]) * row.element_size();
        const Draw draw = draw_of(a.draws, b);

        Confidence s;
        Confidence *const partial = a.partial + static_cast<int64_t>(row_index) * splits;
        float bound = -infinity();
        for (int split = first; split < first + count; ++split) {
            s = scan(a, row, draw, c, split, bound);
            if (splits > 1 && threadIdx.x == 0)
                partial[split] = s;
            if (draw.samples() && split + 1 < first + count) {
                if (threadIdx.x == 0)
                    *scratch<float>() = fmaxf(bound, s.best_key);
                __syncthreads();
                bound = *scratch<float>();
            }
        }
        if (splits > 1) {
            if (!last_to_arrive(a.arrived + row_index, static_cast<uint32_t>(count),
                                static_cast<uint32_t>(splits)))
                continue;
            s = no_confidence();
            for (int i = threadIdx.x; i < splits; i += kThreads) {
                const Confidence *const p = partial + i;
                s = merge(s, {__ldcg(&p->max), __ldcg(&p->second), __ldcg(&p->sum), __ldcg(&p->moment),
                              __ldcg(&p->best_key), __ldcg(&p->best)});
            }
            s = block_reduce(s, exchange, merge);
        }
        finish_row(a, s, row, draw, b, c);
        done(b);
    }
}

class Launcher;
struct SelectArgs;

ConfidenceArgs confidence_args(const ConfidenceProblem &p, Launcher &launcher);
inline int64_t confidence_unit_count(const ConfidenceArgs &a) {
    return static_cast<int64_t>(a.batch) * a.positions * a.splits.value;
}

/* Launches the confidence of all rows and, where select asks for it, the selection by the last of a
 * sequence's. */
void launch_confidence(const char *name, const ConfidenceArgs &confidence, const SelectArgs &select,
                       Launcher &launcher);

} // namespace cuda
} // namespace attn_sampler

#endif /* ATTN_SAMPLER_CUDA_TOKEN_CONFIDENCE_CUH_ */
