/* Token confidence on the CPU: one pass over the vocabulary.
 *
 * Each logit is read once, where it lies, and everything is taken from it then: the largest values, and the
 * sum of exponentials relative to the largest value so far. Which token holds the largest is looked up at the
 * end, in the one chunk that has it. Chunks that need an edit (the end of the vocabulary, an excluded token)
 * and those to sample from are widened into a buffer in the first-level cache first. Where only some tokens
 * may be drawn, a second look at the whole position, whose largest logit is known then, finds them. This file
 * is compiled without contraction of multiply-adds, because the noise is fixed to the last bit.
 */
#include <algorithm>
#include <cmath>

#include "arithmetic.h"
#include "attn_sampler_random.h"
#include "cpu/kernels.h"
#include "cpu/launch.h"
#include "cpu/simd/simd.h"

namespace attn_sampler {
namespace {

constexpr int64_t kChunk = 4096;
constexpr int64_t kPadding = 64; /* of a chunk, with -inf: four vectors of the widest kind */
constexpr int64_t kPeek = 64;    /* logits that tell roughly how large the others are */
constexpr float kRoom = 8.0f;    /* how far above the shift logits may be */
constexpr int64_t kTasks = 64;
constexpr int64_t kMinSplit = 8192; /* tokens that are worth a task */

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

/* 2 kLanes logits as two vectors, in no particular order. */
template <int kDtype>
inline void load_two(const char *x, VecF &a, VecF &b) {
    if constexpr (kDtype == ATTN_SAMPLER_BFLOAT16) {
        const VecU pairs = load<VecU>(x);
        a = (VecF)(pairs << 16);
        b = (VecF)(pairs & 0xFFFF0000u);
    } else if constexpr (kDtype == ATTN_SAMPLER_FLOAT16) {
        a = fp16_to_float(load<VecH>(x));
        b = fp16_to_float(load<VecH>(x + 2 * kLanes));
    } else {
        a = load<VecF>(x);
        b = load<VecF>(x + 4 * kLanes);
    }
}

/* Logits of consecutive tokens, as many as a multiple of kPadding. */
template <int kDtype>
struct Chunk {
    static constexpr int64_t kSize = element_size(kDtype);
    const char *x;
    int64_t n;

    /* Of the first so many, a multiple of kPadding. */
    float largest(int64_t count) const {
        VecF max[4];
        for (VecF &m : max)
            m = splat(-kInf);
        for (int64_t i = 0; i < count; i += 4 * kLanes)
            for (int v = 0; v < 4; v += 2) {
                VecF a, b;
                load_two<kDtype>(x + (i + v * kLanes) * kSize, a, b);
                max[v] = larger(a, max[v]);
                max[v + 1] = larger(b, max[v + 1]);
            }
        return largest_lane(larger(larger(max[0], max[1]), larger(max[2], max[3])));
    }

    struct Sums {
        float max, runner_up;
        double sum, moment;
    };

    /* The largest logits, and the sums relative to a shift that is not far below; fetches as many logits from
     * `ahead` on the way. Sixteen accumulators at least, so that none adds up many terms. */
    template <int kMetric>
    Sums sums(float shift, const char *ahead) const {
        constexpr int kVectors = kLanes < 8 ? 16 / kLanes : 2;
        VecF sum[kVectors] = {}, moment[kVectors] = {}, max[kVectors], second[kVectors];
        for (int v = 0; v < kVectors; ++v)
            max[v] = second[v] = splat(-kInf);
        for (int64_t i = 0; i < n; i += kVectors * kLanes) {
            __builtin_prefetch(ahead + i * kSize);
            VecF logits[kVectors];
            for (int v = 0; v < kVectors; v += 2)
                load_two<kDtype>(x + (i + v * kLanes) * kSize, logits[v], logits[v + 1]);
            for (int v = 0; v < kVectors; ++v) {
                const VecF d = logits[v] - shift;
                if constexpr (kMetric == ATTN_SAMPLER_METRIC_MARGIN)
                    second[v] = larger(smaller(logits[v], max[v]), second[v]);
                max[v] = larger(logits[v], max[v]);
                if constexpr (kMetric == ATTN_SAMPLER_METRIC_ENTROPY) {
                    const VecF e = add_exp2(VecF{}, d, kLog2e);
                    sum[v] += e;
                    moment[v] += e * larger(splat(-1e4f), d); /* 0 * -inf is no term */
                } else {
                    sum[v] = add_exp2(sum[v], d, kLog2e);
                }
            }
        }
        /* The accumulators into the first. */
        VecF largest = max[0], next = second[0];
        double total = sum_of_lanes_in_double(sum[0]), total_moment = sum_of_lanes_in_double(moment[0]);
        for (int v = 1; v < kVectors; ++v) {
            next = larger(smaller(max[v], largest), larger(second[v], next));
            largest = larger(max[v], largest);
            total += sum_of_lanes_in_double(sum[v]);
            total_moment += sum_of_lanes_in_double(moment[v]);
        }
        const float top = largest_lane(largest);
        float runner_up = -kInf;
        if constexpr (kMetric == ATTN_SAMPLER_METRIC_MARGIN) {
            runner_up = largest_lane(next);
            bool found = false; /* the lane that holds the largest; others may be next to it */
            for (int i = 0; i < kLanes; ++i) {
                if (!found && largest[i] == top)
                    found = true;
                else
                    runner_up = largest[i] > runner_up ? largest[i] : runner_up;
            }
        }
        return {top, runner_up, total, total_moment};
    }

    /* Takes all that does not depend on which token is chosen into the state; returns the largest logit. */
    template <int kMetric>
    float add_to(State &state, const char *ahead) const {
        /* An entropy is the difference of two terms, large ones where most of the weight is far above the
         * shift: worth a look at the whole of a first chunk, of which otherwise a few logits tell enough. */
        constexpr bool kEntropy = kMetric == ATTN_SAMPLER_METRIC_ENTROPY;
        const bool first = state.max == -kInf;
        if (first)
            state.move_shift(largest(kEntropy ? n : kPeek));
        Sums chunk = sums<kMetric>(state.shift, ahead);
        const bool cancels = chunk.moment > chunk.sum; /* 0 unless it is the entropy */
        if (chunk.max - state.shift > kRoom || cancels || (first && chunk.max < state.shift)) {
            state.move_shift(chunk.max);
            chunk = sums<kMetric>(state.shift, ahead);
        }
        state.push(chunk.max, chunk.runner_up);
        state.sum += chunk.sum;
        state.moment += chunk.moment;
        return chunk.max;
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

/* The first token of a position, from `first` on, whose logit is no less than the value; there is one. */
template <int kDtype>
int64_t find(const ConfidenceProblem &p, int64_t b, int64_t c, int64_t first, float value) {
    constexpr int64_t kStep = 2 * kLanes;
    for (int64_t v = first;; v += kStep) {
        const char *const logits = logits_of<kDtype>(p, b, c) + v * element_size(kDtype);
        const int64_t n = min_of(kStep, p.vocab - v);
        if (n == kStep) {
            VecF x, y;
            load_two<kDtype>(logits, x, y);
            if (!any_at_least(x, splat(value)) && !any_at_least(y, splat(value)))
                continue;
        }
        float in_order[kStep];
        convert_to_float(logits, kDtype, n, in_order);
        for (int64_t i = 0; i < n; ++i)
            if (in_order[i] >= value && is_present(p, b, c, v + i))
                return v + i;
    }
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

/* Tokens [first, last) of one position; first is a multiple of 32. The chosen one is that with the largest
 * logit in the chunk from state.best on, or, when sampling, state.best itself. */
template <int kDtype, int kMetric>
State scan(const ConfidenceProblem &p, int64_t b, int64_t c, int64_t first, int64_t last) {
    constexpr int64_t kSize = element_size(kDtype);
    const char *const row = logits_of<kDtype>(p, b, c);
    const Draw draw = draw_of<OneLane>(p.draws, b);
    const bool sample = draw.samples() && !draw.truncates();
    const Sampler sampler{draw.seed, static_cast<uint32_t>(c), p.vocab_start, draw.inverse_temperature};
    State state;
    /* A chunk may begin within a group of the stream: the sampler then begins at `lead` logits of -inf. */
    const int64_t lead = p.vocab_start % 4;
    alignas(64) float buffer[kPadding + kChunk + kPadding];
    float *const widened = buffer + kPadding;
    for (int64_t i = 1; i <= lead; ++i)
        widened[-i] = -kInf;
    for (int64_t v = first; v < last; v += kChunk) {
        const int64_t n = min_of(kChunk, last - v), padded = round_up(n, kPadding);
        const char *const logits = row + v * kSize;
        const char *const next =
            row + min_of(v + kChunk, p.vocab - 1) * kSize; /* a fetch past the end is no read */
        const auto take = [&](const auto &chunk) {
            const float chunk_max = chunk.template add_to<kMetric>(state, next);
            /* Strictly larger ones only, so that the lowest wins ties. Which token of the chunk is found out
             * at the end. */
            if (!sample && chunk_max > state.best_key)
                state.choose(chunk_max, chunk_max, v);
        };
        if (n == padded && !sample && !edits(p, v, n)) {
            take(Chunk<kDtype>{logits, n});
        } else {
            convert_to_float(logits, kDtype, n, widened);
            for (int64_t i = n; i < round_up(lead + n, kPadding); ++i)
                widened[i] = -kInf;
            remove_absent(p, b, c, v, n, widened);
            take(Chunk<ATTN_SAMPLER_FLOAT32>{reinterpret_cast<const char *>(widened), padded});
        }
        /* Any token is better than none. */
        for (int64_t token = v; state.best < 0 && token < v + n; ++token)
            if (is_present(p, b, c, token)) {
                float logit;
                convert_to_float(row + token * kSize, kDtype, 1, &logit);
                state.choose(-kInf, logit, token);
            }
        if (sample)
            sampler.choose<false>([&](int64_t i) { return load<VecF>(widened - lead + i); }, lead + n,
                                  v - lead, state);
    }
    return state;
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

/* The code for a dtype and metric. */
struct Code {
    State (*scan)(const ConfidenceProblem &, int64_t b, int64_t c, int64_t first, int64_t last);
    int64_t (*find)(const ConfidenceProblem &, int64_t b, int64_t c, int64_t first, float value);
    void (*draw_truncated)(const ConfidenceProblem &, int64_t b, int64_t c, State &, void *memory);
};

template <int kDtype>
Code code_for(int metric) {
    return {metric == ATTN_SAMPLER_METRIC_ENTROPY  ? scan<kDtype, ATTN_SAMPLER_METRIC_ENTROPY>
            : metric == ATTN_SAMPLER_METRIC_MARGIN ? scan<kDtype, ATTN_SAMPLER_METRIC_MARGIN>
                                                   : scan<kDtype, ATTN_SAMPLER_METRIC_PROBABILITY>,
            find<kDtype>, draw_truncated<kDtype>};
}

Code code_for(int dtype, int metric) {
    return dtype == ATTN_SAMPLER_BFLOAT16  ? code_for<ATTN_SAMPLER_BFLOAT16>(metric)
           : dtype == ATTN_SAMPLER_FLOAT16 ? code_for<ATTN_SAMPLER_FLOAT16>(metric)
                                           : code_for<ATTN_SAMPLER_FLOAT32>(metric);
}

/* Whether there is a softmax: not of nothing but -inf, of +inf or of NaN. */
bool is_defined(const State &s) { return std::isfinite(s.max) && s.sum == s.sum; }

float confidence_of(const State &s, int metric) {
    if (metric == ATTN_SAMPLER_METRIC_ENTROPY)
        return static_cast<float>(s.moment / s.sum - std::log(s.sum));
    /* NaN logits never are chosen, and with one the sum was NaN: best_logit is a number. */
    const double chosen = std::exp(static_cast<double>(s.best_logit) - s.shift) / s.sum;
    if (metric == ATTN_SAMPLER_METRIC_PROBABILITY)
        return static_cast<float>(chosen);
    const float other = s.best_logit == s.max ? s.runner_up : s.max;
    return static_cast<float>(chosen - std::exp(static_cast<double>(other) - s.shift) / s.sum);
}

/* The probability of a token that is given. */
float probability_of(const ConfidenceProblem &p, const State &s, int64_t b, int64_t c, int64_t token) {
    if (token < 0 || token >= p.vocab)
        return __builtin_nanf("");
    if (!is_present(p, b, c, token))
        return 0.0f;
    const int64_t offset = b * p.logits.stride[0] + c * p.logits.stride[1] + token;
    float logit;
    convert_to_float(static_cast<const char *>(p.logits.data) + offset * element_size(p.dtype), p.dtype, 1,
                     &logit);
    return static_cast<float>(std::exp(static_cast<double>(logit) - s.shift) / s.sum);
}

void write_confidence(const ConfidenceProblem &p, const State &s, int64_t b, int64_t c) {
    const bool defined = is_defined(s);
    const float nan = __builtin_nanf("");
    element(p.confidence, b, c) = defined ? confidence_of(s, p.metric) : nan;
    if (p.log_prob.data != nullptr)
        element(p.log_prob, b, c) =
            defined ? static_cast<float>(static_cast<double>(s.best_logit) - s.shift - std::log(s.sum)) : nan;
    if (p.current.data != nullptr)
        element(p.current, b, c) = defined ? probability_of(p, s, b, c, element(p.current_ids, b, c)) : nan;
}

} // namespace

namespace ATTN_SAMPLER_ISA {

bool token_confidence(const ConfidenceProblem &p) {
    const int64_t rows = p.batch * p.positions;
    /* By the vocabulary alone: a position has the same bits alone and in a batch. */
    const int64_t splits = clamp(p.vocab / kMinSplit, 1, kTasks);
    const int64_t tokens_per_split = ceil_div(ceil_div(p.vocab, splits), kChunk) * kChunk;
    bool any_truncates = false;
    for (int64_t b = 0; b < p.batch; ++b) {
        const Draw draw = draw_of<OneLane>(p.draws, b);
        any_truncates = any_truncates || (draw.samples() && draw.truncates());
    }
    const Workspace work(any_truncates ? p.num_threads : 0,
                         Truncated::memory_size(any_truncates ? p.vocab : 0),
                         rows * splits * static_cast<int64_t>(sizeof(State)));
    if (!work)
        return false;
    State *const state = static_cast<State *>(work.shared());
    const Code code = code_for(p.dtype, p.metric);
    auto scan_split = [&](int64_t i, int) {
        const int64_t row = i / splits, first = min_of(i % splits * tokens_per_split, p.vocab);
        const int64_t last = min_of(first + tokens_per_split, p.vocab);
        state[i] = code.scan(p, row / p.positions, row % p.positions, first, last);
    };
    auto finish = [&](int64_t row, int worker) {
        State total = state[row * splits];
        for (int64_t split = 1; split < splits; ++split)
            total.merge(state[row * splits + split]);
        const int64_t b = row / p.positions, c = row % p.positions;
        const Draw draw = draw_of<OneLane>(p.draws, b);
        if (!draw.samples() && total.best_key > -kInf)
            total.best = code.find(p, b, c, total.best, total.best_logit);
        else if (draw.samples() && draw.truncates() && total.max > -kInf)
            code.draw_truncated(p, b, c, total, work.of_worker(worker));
        element(p.token_ids, b, c) = total.best >= 0 ? total.best : p.excluded == 0;
        write_confidence(p, total, b, c);
    };
    auto whole = [&](int64_t row, int worker) {
        for (int64_t split = 0; split < splits; ++split)
            scan_split(row * splits + split, worker);
        finish(row, worker);
    };
    /* A core fetches whole rows best, and finds them in its cache the second time. */
    if (rows >= (any_truncates ? p.num_threads : kTasks)) {
        parallel_for(p.num_threads, rows, whole);
    } else {
        parallel_for(p.num_threads, rows * splits, scan_split);
        parallel_for(any_truncates ? p.num_threads : 1, rows, finish);
    }
    return true;
}

} // namespace ATTN_SAMPLER_ISA
} // namespace attn_sampler
