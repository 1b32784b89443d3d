/* A token drawn from a position's logits: the stream's noise across the lanes, and, where only some tokens
 * may be drawn, which. Everything here is compiled once for each instruction set, as simd.h says, and without
 * contraction of multiply-adds.
 */
#ifndef ATTN_SAMPLER_CPU_DRAW_H_
#define ATTN_SAMPLER_CPU_DRAW_H_

#include <algorithm>
#include <cmath>
#include <utility>

#include "arithmetic.h"
#include "attn_sampler_random.h"
#include "cpu/kernels.h"
#include "cpu/simd/simd.h"

namespace attn_sampler {
namespace {

constexpr int64_t kChunk = 4096;
constexpr int64_t kPadding = 64; /* of a chunk, with -inf: four vectors of the widest kind */

/* What is known of a stretch of the vocabulary. */
struct State {
    float best_key = -kInf; /* of the chosen token, and its logit */
    float best_logit = -kInf;
    int64_t best = -1;
    float max = -kInf, runner_up = -kInf; /* the two largest logits (equal where they tie) */
    double sum = 0.0;                     /* of exp(x - shift) */
    double moment = 0.0;                  /* of exp(x - shift) (x - shift) */
    float shift = 0.0f;                   /* finite; max or a little less */

    void choose(float key, float logit, int64_t token) {
        best_key = key;
        best_logit = logit;
        best = token;
    }

    void move_shift(float to) {
        const float new_shift = std::isfinite(to) ? to : 0.0f;
        const double down = static_cast<double>(shift) - new_shift;
        if (sum != 0.0) {
            moment = std::exp(down) * (moment + down * sum);
            sum *= std::exp(down);
        }
        shift = new_shift;
    }

    /* Takes in two largest logits. A NaN is nowhere the largest; it makes the sums NaN. */
    void push(float other_max, float other_runner_up) {
        const float lower = other_max > max ? max : other_max;
        runner_up = lower > runner_up ? lower : runner_up;
        runner_up = other_runner_up > runner_up ? other_runner_up : runner_up;
        max = other_max > max ? other_max : max;
    }

    /* Takes in a later stretch. */
    void merge(State other) {
        if (best < 0 || other.best_key > best_key)
            choose(other.best_key, other.best_logit, other.best);
        push(other.max, other.runner_up);
        move_shift(max);
        other.move_shift(max);
        sum += other.sum;
        moment += other.moment;
    }
};

/* As in simd.h: what is made with it is this file's own. */
struct OneLane : ScalarLane {};

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
    static Int to_int(Float x) { return __builtin_convertvector(x, VecI); }
    static Wide multiply(Wide x, uint32_t y) {
        return {multiply_low_halves(x.a, VecL{} + y), multiply_low_halves(x.b, VecL{} + y)};
    }
};

/* Draws from one position's stream. */
struct Sampler {
    uint64_t seed;
    uint32_t position;
    int64_t vocab_start;
    float inverse_temperature;

    VecF key(VecF x, VecU word) const { return x * inverse_temperature + gumbel<VectorLane>(word); }

    /* A token's key can exceed best_key only where its random word is at most this. Noise is above t where
     * the word is below 2^32 (1 - exp(-exp(-t))), which is less than 2^32 exp(-t). The exponential is that of
     * straight lines between powers of two, nowhere below the true one: a number read as a float's bits. */
    VecF word_bound(VecF x, float best_key) const {
        constexpr float kUnit = 0x1p23f;                              /* one in the exponent */
        constexpr float kOffset = (127.0f + 32.0f + 0x1p-9f) * kUnit; /* with room for the roundings */
        const VecF bits = (x * inverse_temperature - best_key) * static_cast<float>(kLog2e * kUnit) + kOffset;
        return (VecF) __builtin_convertvector(clamp_lanes(bits, 0.0f, 255.0f * kUnit), VecI);
    }

    /* Takes the token of the largest key among n, of which logits(i) is a vector from i on, if it exceeds the
     * state's. The first begins a group of the stream. Few tokens can win, and only their noise is worked
     * out; where kMostAbsent, not even words where all logits are -inf. */
    template <bool kMostAbsent, typename Logits>
    void choose(const Logits &logits, int64_t n, int64_t first_token, State &state) const {
        Counters group; /* each counter good for four tokens */
        for (int i = 0; i < kLanes / 2; ++i)
            group.a[i] =
                static_cast<uint64_t>((vocab_start + first_token) / 4 + i / 2 + i % 2 * (kLanes / 4));
        group.b = group.a + kLanes / 2;
        for (int64_t i = 0; i < n; i += 4 * kLanes, group = group + kLanes) {
            VecF x[4];
            for (int v = 0; v < 4; ++v)
                x[v] = logits(i + v * kLanes);
            if (kMostAbsent &&
                !any_at_least(larger(larger(x[0], x[1]), larger(x[2], x[3])), splat(-__FLT_MAX__)))
                continue;
            const PhiloxWords<Counters> w = philox<VectorLane>(seed, group, position);
            const Counters even = w.word[0] | w.word[1] << 32, odd = w.word[2] | w.word[3] << 32;
            VecL words[4];
            interleave(even.a, odd.a, words[0], words[1]);
            interleave(even.b, odd.b, words[2], words[3]);
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) {
                const int64_t at = i + v * kLanes;
                const VecU word = (VecU)words[v];
                if (!any_at_least(word_bound(x[v], state.best_key), VectorLane::to_float(word)))
                    continue;
                const VecF keys = key(x[v], word);
                for (int lane = 0; lane < kLanes && at + lane < n; ++lane)
                    if (keys[lane] > state.best_key)
                        state.choose(keys[lane], x[v][lane], first_token + at + lane);
            }
        }
    }
};

template <int kDtype>
inline const char *logits_of(const ConfidenceProblem &p, int64_t b, int64_t c) {
    const int64_t offset = b * p.logits.stride[0] + c * p.logits.stride[1];
    return static_cast<const char *>(p.logits.data) + offset * element_size(kDtype);
}

/* Whether some of the tokens [first, first + n) may be absent. */
bool edits(const ConfidenceProblem &p, int64_t first, int64_t n) {
    return p.bitmask.data != nullptr || (p.excluded >= first && p.excluded < first + n);
}

/* Puts -inf in the place of logits of absent tokens [first, first + n); first is a multiple of 32. */
void remove_absent(const ConfidenceProblem &p, int64_t b, int64_t c, int64_t first, int64_t n, float *x) {
    for (int64_t i = 0; p.bitmask.data != nullptr && i < n; i += 32) {
        const int64_t *const stride = p.bitmask.stride;
        const uint32_t word = p.bitmask.data[b * stride[0] + c * stride[1] + (first + i) / 32 * stride[2]];
        for (int64_t bit = 0; word != ~0u && bit < min_of(32, n - i); ++bit)
            x[i + bit] = (word >> bit & 1) != 0 ? x[i + bit] : -kInf;
    }
    if (p.excluded >= first && p.excluded < first + n)
        x[p.excluded - first] = -kInf;
}

/* Sums of weights in two parts, in 32 bits for as many vectors as kFew. */
struct Mass {
    static constexpr int64_t kFew = 4096;
    VecU low{}, high{};

    void add(VecU weights) {
        low += weights & 0xFFFF;
        high += weights >> 16;
    }
    int64_t sum() const {
        int64_t total = 0;
        for (int lane = 0; lane < kLanes; ++lane)
            total += (static_cast<int64_t>(high[lane]) << 16) + low[lane];
        return total;
    }
};

/* One position of which only some tokens may be drawn. What is said of it is said of distances below its
 * largest logit. */
class Truncated {
  public:
    /* Bytes of memory. */
    static int64_t memory_size(int64_t vocab) {
        return 2 * (round_up(vocab, kPadding) + 2 * kPadding) * static_cast<int64_t>(sizeof(float));
    }

    Truncated(const Draw &draw, int64_t vocab, float top, void *memory)
        : draw_(draw), vocab_(vocab), padded_(round_up(vocab, kPadding)),
          top_(top * draw.inverse_temperature), scaled_(static_cast<float *>(memory) + kPadding),
          others_(scaled_ + padded_ + kPadding) {}

    template <int kDtype>
    void take(const ConfidenceProblem &p, int64_t b, int64_t c) {
        const bool by_mass = draw_.top_p < 1.0f, counts = draw_.top_k > 0 && draw_.top_k < vocab_;
        std::fill(scaled_ - kPadding, scaled_, -kInf);
        std::fill(scaled_ + padded_, scaled_ + padded_ + kPadding, -kInf);
        for (int64_t first = 0; first < vocab_; first += kChunk) {
            const int64_t n = min_of(kChunk, vocab_ - first);
            float *const x = scaled_ + first;
            const char *const logits = logits_of<kDtype>(p, b, c) + first * element_size(kDtype);
            const char *from = logits;
            if (kDtype != ATTN_SAMPLER_FLOAT32 || n < kChunk || edits(p, first, n)) {
                convert_to_float(logits, kDtype, n, x);
                remove_absent(p, b, c, first, n, x);
                std::fill(x + n, x + round_up(n, kPadding), -kInf);
                from = reinterpret_cast<const char *>(x);
            }
            Mass mass;
            for (int64_t i = 0; i < round_up(n, kPadding); i += kLanes) {
                VecF y = load<VecF>(from + 4 * i) * draw_.inverse_temperature;
                y = y == y ? y : splat(-kInf);
                store(x + i, y);
                if (by_mass && !counts)
                    mass.add((VecU)token_weight<VectorLane>(distance(y)));
            }
            mass_ += mass.sum();
        }
        if (counts)
            kth_ = distance_below(top_, kth_largest(draw_.top_k));
        if (by_mass && counts)
            mass_ = mass_above(std::nextafter(kth_, -kInf));
    }

    /* The largest key among those that may be drawn. */
    State choose(Sampler sampler) const {
        sampler.inverse_temperature = 1.0f; /* it is multiplied in */
        const int64_t lead = sampler.vocab_start % 4;
        const bool by_mass = draw_.top_p < 1.0f;
        float least = std::max(kth_, draw_.least);
        if (by_mass) { /* so many tokens, this far below the largest, do not make up what is left out */
            const double left_out =
                0.99 * (1.0 - static_cast<double>(draw_.top_p)) * static_cast<double>(mass_);
            const double share = std::min(left_out / (static_cast<double>(vocab_) * 0x1p30), 1.0);
            least = std::max(least, static_cast<float>(std::log(share)));
        }
        for (;;) {
            State state;
            const auto logits = [&](int64_t i) {
                const VecF y = load<VecF>(scaled_ - lead + i);
                return distance(y) >= least ? y : splat(-kInf);
            };
            sampler.choose<true>(logits, lead + vocab_, -lead, state);
            const float drawn = distance_below(top_, state.best_logit);
            /* A draw from more than may be drawn is right if it may be. If not, nothing below it may. */
            if (!by_mass || drawn == 0.0f || is_within(draw_.top_p, mass_above(drawn), mass_))
                return state;
            least = std::nextafter(drawn, 1.0f);
        }
    }

  private:
    VecF distance(VecF y) const { return y < top_ ? y - top_ : VecF{}; }

    int64_t mass_above(float least) const {
        const float next = std::nextafter(least, 1.0f);
        int64_t total = 0;
        for (int64_t first = 0; first < padded_; first += Mass::kFew * kLanes) {
            Mass mass;
            for (int64_t i = first; i < min_of(first + Mass::kFew * kLanes, padded_); i += kLanes) {
                const VecF d = distance(load<VecF>(scaled_ + i));
                if (any_at_least(d, splat(next)))
                    mass.add((VecU)(token_weight<VectorLane>(d) & (d > least)));
            }
            total += mass.sum();
        }
        return total;
    }

    /* The k-th largest, k being less than the vocabulary. As many as k are no smaller than the k-th largest
     * of the maxima of groups, and few others where groups are many: those alone are searched then. */
    float kth_largest(int64_t k) {
        const int64_t vectors = padded_ / kLanes, group = padded_ / max_of(1024, 4 * k);
        if (group < kLanes)
            return kth_largest(scaled_, padded_, k, k);
        int64_t count = 0;
        for (int64_t first = 0; first < vectors; first += group / kLanes, count += kLanes) {
            VecF top = splat(-kInf);
            for (int64_t i = first; i < min_of(first + group / kLanes, vectors); ++i)
                top = larger(load<VecF>(scaled_ + i * kLanes), top);
            store(others_ + count, top);
        }
        const float bound = kth_largest(others_, count, k, k + k / 8);
        count = 0;
        for (int64_t i = 0; i < padded_; i += kLanes) {
            const VecF y = load<VecF>(scaled_ + i);
            if (any_at_least(y, splat(bound)))
                for (int lane = 0; lane < kLanes; ++lane) {
                    others_[count] = y[lane];
                    count += y[lane] >= bound;
                }
        }
        std::fill(others_ + count, others_ + round_up(count, kLanes), -kInf);
        return kth_largest(others_, round_up(count, kLanes), k, k);
    }

    /* The least of the k to `most` largest of n, a multiple of the lanes; those equal to it are not counted.
     * Found by halving what it may be, in the order of the bits. */
    static float kth_largest(const float *x, int64_t n, int64_t k, int64_t most) {
        const auto value = [](int64_t key) {
            const auto bits = static_cast<uint32_t>(key < 0 ? ~key | int64_t{0x80000000} : key);
            float y;
            memcpy(&y, &bits, sizeof(y));
            return y;
        };
        int64_t low = -0x7F800001, high = 0x7F800001; /* -inf, at which there are enough; beyond inf */
        while (high - low > 1) {
            const int64_t middle = low + (high - low) / 2;
            const int64_t count = count_from(x, n, value(middle));
            (count >= k ? low : high) = middle;
            if (count >= k && count <= most)
                break;
        }
        VecF least = splat(kInf);
        for (int64_t i = 0; i < n; i += kLanes) {
            const VecF y = load<VecF>(x + i);
            least = smaller(y >= value(low) ? y : splat(kInf), least);
        }
        return -largest_lane(-least);
    }

    static int64_t count_from(const float *x, int64_t n, float bound) {
        VecI count[4] = {};
        int64_t i = 0;
        for (; i + 4 * kLanes <= n; i += 4 * kLanes)
            for (int v = 0; v < 4; ++v)
                count[v] -= load<VecF>(x + i + v * kLanes) >= bound;
        for (; i < n; i += kLanes)
            count[0] -= load<VecF>(x + i) >= bound;
        int64_t total = 0;
        for (int lane = 0; lane < kLanes; ++lane)
            for (const VecI &part : count)
                total += part[lane];
        return total;
    }

    const Draw draw_;
    const int64_t vocab_, padded_;
    const float top_;
    float *const scaled_; /* logits by the inverse temperature, and -inf around them */
    float *const others_; /* room for as many */
    float kth_ = -kInf;   /* the top_k-th largest */
    int64_t mass_ = 0;    /* of those, where it is asked for */
};

/* The token that is drawn at a position of which all else is known. */
template <int kDtype>
void draw_truncated(const ConfidenceProblem &p, int64_t b, int64_t c, State &state, void *memory) {
    const Draw draw = draw_of<OneLane>(p.draws, b);
    Truncated truncated(draw, p.vocab, state.max, memory);
    truncated.take<kDtype>(p, b, c);
    const State drawn = truncated.choose({draw.seed, static_cast<uint32_t>(c), p.vocab_start, 0.0f});
    float logit;
    convert_to_float(logits_of<kDtype>(p, b, c) + drawn.best * element_size(kDtype), kDtype, 1, &logit);
    state.choose(drawn.best_key, logit, drawn.best);
}

} // namespace
} // namespace attn_sampler

#endif /* ATTN_SAMPLER_CPU_DRAW_H_ */
