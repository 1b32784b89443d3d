/* Token confidence on the CPU: one pass over the vocabulary.
 *
 * A chunk of logits is widened into a buffer that stays in the first-level cache and read from there several
 * times: largest value, sum of exponentials, and, where wanted, runner-up, entropy and sampling noise. Memory
 * is read once. This file is compiled without contraction of multiply-adds, because the noise is fixed to
 * the last bit.
 */
#include <cmath>
#include <cstdlib>

#include "attn_sampler_random.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace attn_sampler {
namespace {

constexpr int64_t kChunk = 1024;
constexpr int64_t kTasks = 64;
constexpr int64_t kMinSplit = 8192; /* tokens that are worth a task */
constexpr float kLog2e = 0x1.715476p+0f;

/* What is known of a stretch of the vocabulary. */
struct State {
    float best_key = -kInf; /* of the chosen token, and its logit */
    float best_logit = -kInf;
    int64_t best = -1;
    float max = -kInf, runner_up = -kInf; /* the two largest logits (equal where they tie) */
    double sum = 0.0;                     /* of exp(x - shift) */
    double moment = 0.0;                  /* of exp(x - shift) (x - shift) */
    float shift = 0.0f;                   /* max, or 0 where that is not finite */

    /* A NaN is nowhere the largest; it makes the sums NaN. */
    void raise(float new_max) {
        if (!(new_max > max))
            return;
        max = new_max;
        const float new_shift = std::isfinite(max) ? max : 0.0f;
        const double down = static_cast<double>(shift) - new_shift;
        if (sum != 0.0) {
            moment = std::exp(down) * (moment + down * sum);
            sum *= std::exp(down);
        }
        shift = new_shift;
    }

    void push_second(float x) { runner_up = x > runner_up ? x : runner_up; }

    /* Takes in a later stretch. */
    void merge(State other) {
        if (best < 0 || other.best_key > best_key) {
            best_key = other.best_key;
            best_logit = other.best_logit;
            best = other.best;
        }
        push_second(other.max > max ? max : other.max);
        push_second(other.runner_up);
        raise(other.max);
        other.raise(max);
        sum += other.sum;
        moment += other.moment;
    }
};

inline float largest(const float *x, int64_t n) {
    VecF m = splat(-kInf);
    for (int64_t i = 0; i < n; i += kLanes) {
        const VecF v = load<VecF>(x + i);
        m = v > m ? v : m;
    }
    float result = -kInf;
    for (int i = 0; i < kLanes; ++i)
        result = m[i] > result ? m[i] : result;
    return result;
}

/* The sums of a chunk, whose padding to a multiple of 16 is -inf. Sixteen accumulators whatever the vector's
 * width, so that none adds up many terms. */
template <bool kMoment>
inline void add_exponentials(const float *x, int64_t n, State &state) {
    constexpr int kVectors = 16 / kLanes;
    VecF sum[kVectors] = {}, moment[kVectors] = {};
    for (int64_t i = 0; i < n; i += 16) {
        for (int v = 0; v < kVectors; ++v) {
            VecF d = load<VecF>(x + i + v * kLanes) - state.shift;
            const VecF e = exp2_vec(d * kLog2e);
            sum[v] += e;
            if (kMoment) {
                d = d < -1e4f ? splat(-1e4f) : d; /* 0 * -inf is no term */
                moment[v] += e * d;
            }
        }
    }
    for (int i = 0; i < 16; ++i) {
        state.sum += static_cast<double>(sum[i / kLanes][i % kLanes]);
        if (kMoment)
            state.moment += static_cast<double>(moment[i / kLanes][i % kLanes]);
    }
}

/* Both largest values of a chunk. */
inline void update_two_largest(const float *x, int64_t n, State &state) {
    float first = state.max, second = state.runner_up;
    for (int64_t i = 0; i < n; ++i) {
        if (x[i] > first) {
            second = first;
            first = x[i];
        } else if (x[i] > second) {
            second = x[i];
        }
    }
    state.runner_up = second;
}

/* The sampling stream's arithmetic across the lanes. */
struct VectorLane {
    using Float = VecF;
    using Int = VecI;
    using Word = VecU;
    using Wide = VecL;
    template <typename T>
    static Float to_float(T x) {
        return __builtin_convertvector(x, VecF);
    }
    static Wide multiply(Wide a, uint32_t b) { return multiply_low_halves(a, VecL{} + b); }
};

/* key[i] = x[i] / T + noise, in float32 as the specification rounds it; n is padded to a multiple of 16. */
inline void sampling_keys(const float *x, int64_t n, int64_t first_token, float inverse_temperature,
                          uint64_t seed, int64_t position, float *key) {
    constexpr int kGroups = kLanes / 2; /* counters at a time, each good for four tokens */
    VecL group;
    for (int i = 0; i < kGroups; ++i)
        group[i] = static_cast<uint64_t>(first_token / 4 + i);
    alignas(64) uint64_t pair[kChunk / 2]; /* two tokens' words */
    for (int64_t g = 0; g < n / 4; g += kGroups, group += kGroups) {
        const PhiloxWords<VecL> w = philox<VectorLane>(seed, group, static_cast<uint32_t>(position));
        const VecL first = w.word[0] | w.word[1] << 32, second = w.word[2] | w.word[3] << 32;
        for (int i = 0; i < kGroups; ++i) {
            pair[2 * (g + i)] = first[i];
            pair[2 * (g + i) + 1] = second[i];
        }
    }
    const uint32_t *const word = reinterpret_cast<const uint32_t *>(pair);
    for (int64_t i = 0; i < n; i += kLanes)
        store(key + i, load<VecF>(x + i) * inverse_temperature + gumbel<VectorLane>(load<VecU>(word + i)));
}

/* Tokens [first, last) of one position; first is a multiple of 4. */
State scan(const ConfidenceProblem &p, int64_t b, int64_t c, int64_t first, int64_t last) {
    const int64_t size = p.dtype == ATTN_SAMPLER_FLOAT32 ? 4 : 2;
    const char *const row =
        static_cast<const char *>(p.logits) + (b * p.logits_stride[0] + c * p.logits_stride[1]) * size;
    const bool sample = p.params.temperature > 0.0;
    const float inverse_temperature = sample ? static_cast<float>(1.0 / p.params.temperature) : 0.0f;
    const uint64_t seed =
        p.seeds == nullptr ? p.params.seed : static_cast<uint64_t>(p.seeds[b * p.seeds_stride]);
    const int64_t excluded = p.params.exclude_token_id;
    State state;
    alignas(64) float x[kChunk];
    alignas(64) float key[kChunk];
    for (int64_t v = first; v < last; v += kChunk) {
        const int64_t n = min_of(kChunk, last - v), padded = ceil_div(n, 16) * 16;
        convert_to_float(row + v * size, p.dtype, n, x);
        for (int64_t i = n; i < padded; ++i)
            x[i] = -kInf;
        if (excluded >= v && excluded < v + n)
            x[excluded - v] = -kInf;
        const float chunk_max = largest(x, padded);
        if (p.params.metric == ATTN_SAMPLER_METRIC_MARGIN && chunk_max > state.runner_up)
            update_two_largest(x, n, state);
        state.raise(chunk_max);
        if (p.params.metric == ATTN_SAMPLER_METRIC_ENTROPY)
            add_exponentials<true>(x, padded, state);
        else
            add_exponentials<false>(x, padded, state);

        const float *keys = x;
        float best = chunk_max;
        if (sample) {
            sampling_keys(x, padded, v, inverse_temperature, seed, c, key);
            if (excluded >= v && excluded < v + n)
                key[excluded - v] = -kInf;
            keys = key;
            best = largest(key, padded);
        }
        /* Strictly larger, so that the lowest token wins; any token is better than none. */
        if (state.best >= 0 && !(best > state.best_key))
            continue;
        for (int64_t i = 0; i < n; ++i) {
            const float k = keys[i] == keys[i] ? keys[i] : -kInf;
            if (k == best && v + i != excluded) {
                state.best_key = k;
                state.best_logit = x[i];
                state.best = v + i;
                break;
            }
        }
    }
    return state;
}

float confidence_of(const State &s, int metric) {
    if (!(std::isfinite(s.max) && s.sum == s.sum)) /* nothing but -inf, +inf, or NaN */
        return __builtin_nanf("");
    if (metric == ATTN_SAMPLER_METRIC_ENTROPY)
        return static_cast<float>(s.moment / s.sum - std::log(s.sum));
    /* NaN logits never are chosen, and with one the sum was NaN: best_logit is a number. */
    const double chosen = std::exp(static_cast<double>(s.best_logit) - s.shift) / s.sum;
    if (metric == ATTN_SAMPLER_METRIC_PROBABILITY)
        return static_cast<float>(chosen);
    const float other = s.best_logit == s.max ? s.runner_up : s.max;
    return static_cast<float>(chosen - std::exp(static_cast<double>(other) - s.shift) / s.sum);
}

} // namespace

namespace ATTN_SAMPLER_ISA {

bool token_confidence(const ConfidenceProblem &p) {
    const int64_t rows = p.batch * p.positions;
    /* By the vocabulary alone: a position has the same bits alone and in a batch. */
    const int64_t splits = max_of(1, min_of(kTasks, p.vocab / kMinSplit));
    const int64_t tokens_per_split = ceil_div(ceil_div(p.vocab, splits), kChunk) * kChunk;
    State *const state =
        static_cast<State *>(std::malloc(static_cast<size_t>(max_of(rows * splits, 1)) * sizeof(State)));
    if (state == nullptr)
        return false;
    struct Context {
        const ConfidenceProblem &p;
        State *state;
        int64_t splits, tokens_per_split;
    } context{p, state, splits, tokens_per_split};
    parallel_for(
        p.num_threads, rows * splits,
        [](void *opaque, int64_t index, int) {
            const Context &c = *static_cast<Context *>(opaque);
            const int64_t row = index / c.splits;
            const int64_t first = min_of(index % c.splits * c.tokens_per_split, c.p.vocab);
            const int64_t last = min_of(first + c.tokens_per_split, c.p.vocab);
            c.state[index] = scan(c.p, row / c.p.positions, row % c.p.positions, first, last);
        },
        &context);
    for (int64_t row = 0; row < rows; ++row) {
        State total = state[row * splits];
        for (int64_t split = 1; split < splits; ++split)
            total.merge(state[row * splits + split]);
        const int64_t b = row / p.positions, c = row % p.positions;
        p.token_ids[b * p.token_ids_stride[0] + c * p.token_ids_stride[1]] = total.best;
        p.confidence[b * p.confidence_stride[0] + c * p.confidence_stride[1]] =
            confidence_of(total, p.params.metric);
    }
    std::free(state);
    return true;
}

} // namespace ATTN_SAMPLER_ISA
} // namespace attn_sampler
