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

constexpr int64_t kChunk = 2048;
constexpr int64_t kPadding = 64; /* of a chunk, with -inf: the sampler takes four vectors at a time */
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

    void choose(float key, float logit, int64_t token) {
        best_key = key;
        best_logit = logit;
        best = token;
    }

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
        if (best < 0 || other.best_key > best_key)
            choose(other.best_key, other.best_logit, other.best);
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

/* The sums of a chunk; fetches as many tokens from `ahead` on the way. Sixteen accumulators whatever the
 * vector's width, so that none adds up many terms. */
template <bool kMoment>
inline void add_exponentials(const float *x, int64_t n, const char *ahead, int64_t size, State &state) {
    constexpr int kVectors = 16 / kLanes;
    VecF sum[kVectors] = {}, moment[kVectors] = {};
    for (int64_t i = 0; i < n; i += 16) {
        __builtin_prefetch(ahead + i * size);
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
    VecF first = splat(-kInf), second = first;
    for (int64_t i = 0; i < n; i += kLanes) {
        const VecF v = load<VecF>(x + i);
        const VecF lower = first < v ? first : v;
        second = lower > second ? lower : second;
        first = v > first ? v : first;
    }
    float largest = state.max;
    for (int i = 0; i < kLanes; ++i) {
        state.push_second(second[i]);
        state.push_second(first[i] > largest ? largest : first[i]);
        largest = first[i] > largest ? first[i] : largest;
    }
}

/* Two vectors of counters, to keep the multipliers busy. */
struct Counters {
    VecL a, b;

    friend Counters operator+(Counters x, uint64_t y) { return {x.a + y, x.b + y}; }
    friend Counters operator^(Counters x, uint64_t y) { return {x.a ^ y, x.b ^ y}; }
    friend Counters operator^(Counters x, Counters y) { return {x.a ^ y.a, x.b ^ y.b}; }
    friend Counters operator&(Counters x, uint64_t y) { return {x.a & y, x.b & y}; }
    friend Counters operator|(Counters x, Counters y) { return {x.a | y.a, x.b | y.b}; }
    friend Counters operator<<(Counters x, int n) { return {x.a << n, x.b << n}; }
    friend Counters operator>>(Counters x, int n) { return {x.a >> n, x.b >> n}; }
};

/* The sampling stream's arithmetic across the lanes. */
struct VectorLane {
    using Float = VecF;
    using Int = VecI;
    using Word = VecU;
    using Wide = Counters;
    template <typename T>
    static Float to_float(T x) {
        return __builtin_convertvector(x, VecF);
    }
    static Wide multiply(Wide x, uint32_t y) {
        return {multiply_low_halves(x.a, VecL{} + y), multiply_low_halves(x.b, VecL{} + y)};
    }
};

/* Draws from one position's stream. */
struct Sampler {
    uint64_t seed;
    uint32_t position;
    float inverse_temperature;

    VecF key(VecF x, VecU word) const { return x * inverse_temperature + gumbel<VectorLane>(word); }

    /* A token's key can exceed best_key only where its random word is at most this. Noise is above t where
     * the word is below 2^32 (1 - exp(-exp(-t))), which is less than 2^32 exp(-t). The exponential is that of
     * straight lines between powers of two, nowhere below the true one: a number read as a float's bits. */
    VecF word_bound(VecF x, float best_key) const {
        constexpr float kUnit = 0x1p23f;                              /* one in the exponent */
        constexpr float kOffset = (127.0f + 32.0f + 0x1p-9f) * kUnit; /* with room for the roundings */
        const VecF bits = (x * inverse_temperature - best_key) * (kLog2e * kUnit) + kOffset;
        return (VecF) __builtin_convertvector(clamp(bits, 0.0f, 255.0f * kUnit), VecI);
    }

    /* Takes the token of the largest key among the n of a chunk, if it exceeds the state's. Few tokens can
     * win, and only their noise is worked out. */
    void choose(const float *x, int64_t n, int64_t first_token, State &state) const {
        Counters group; /* each counter good for four tokens */
        for (int i = 0; i < kLanes / 2; ++i)
            group.a[i] = static_cast<uint64_t>(first_token / 4 + i / 2 + i % 2 * (kLanes / 4));
        group.b = group.a + kLanes / 2;
        for (int64_t i = 0; i < n; i += 4 * kLanes, group = group + kLanes) {
            const PhiloxWords<Counters> w = philox<VectorLane>(seed, group, position);
            const Counters even = w.word[0] | w.word[1] << 32, odd = w.word[2] | w.word[3] << 32;
            VecL words[4];
            interleave(even.a, odd.a, words[0], words[1]);
            interleave(even.b, odd.b, words[2], words[3]);
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) {
                const int64_t at = i + v * kLanes;
                const VecF logits = load<VecF>(x + at);
                const VecU word = (VecU)words[v];
                if (!any_at_least(word_bound(logits, state.best_key), VectorLane::to_float(word)))
                    continue;
                const VecF keys = key(logits, word);
                for (int lane = 0; lane < kLanes && at + lane < n; ++lane)
                    if (keys[lane] > state.best_key)
                        state.choose(keys[lane], logits[lane], first_token + at + lane);
            }
        }
    }
};

/* The first token of a chunk with its largest logit. */
inline int64_t find(const float *x, float value) {
    int64_t i = 0;
    while (!any_at_least(load<VecF>(x + i), splat(value)))
        i += kLanes;
    while (!(x[i] >= value))
        ++i;
    return i;
}

/* Tokens [first, last) of one position; first is a multiple of 4. */
State scan(const ConfidenceProblem &p, int64_t b, int64_t c, int64_t first, int64_t last) {
    const int64_t size = p.dtype == ATTN_SAMPLER_FLOAT32 ? 4 : 2;
    const char *const row =
        static_cast<const char *>(p.logits) + (b * p.logits_stride[0] + c * p.logits_stride[1]) * size;
    const bool sample = p.params.temperature > 0.0;
    const Sampler sampler{
        p.seeds == nullptr ? p.params.seed : static_cast<uint64_t>(p.seeds[b * p.seeds_stride]),
        static_cast<uint32_t>(c), sample ? static_cast<float>(1.0 / p.params.temperature) : 0.0f};
    const int64_t excluded = p.params.exclude_token_id;
    State state;
    alignas(64) float x[kChunk];
    for (int64_t v = first; v < last; v += kChunk) {
        const int64_t n = min_of(kChunk, last - v), padded = round_up(n, kPadding);
        const char *const next =
            row + min_of(v + kChunk, last - 1) * size; /* a fetch past the end is no read */
        convert_to_float(row + v * size, p.dtype, n, x);
        for (int64_t i = n; i < padded; ++i)
            x[i] = -kInf;
        if (excluded >= v && excluded < v + n)
            x[excluded - v] = -kInf;
        const float chunk_max = largest(x, padded);
        if (p.params.metric == ATTN_SAMPLER_METRIC_MARGIN && chunk_max > state.runner_up)
            update_two_largest(x, padded, state);
        state.raise(chunk_max);
        if (p.params.metric == ATTN_SAMPLER_METRIC_ENTROPY)
            add_exponentials<true>(x, padded, next, size, state);
        else
            add_exponentials<false>(x, padded, next, size, state);

        /* Any token is better than none; then strictly larger ones, so that the lowest wins ties. */
        if (state.best < 0 && !(n == 1 && excluded == v))
            state.choose(-kInf, x[excluded == v], v + (excluded == v));
        if (sample)
            sampler.choose(x, n, v, state);
        else if (chunk_max > state.best_key)
            state.choose(chunk_max, chunk_max, v + find(x, chunk_max));
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
