/* Token confidence on the CPU: one pass over the vocabulary.
 *
 * Each logit is read once, where it lies, and everything is taken from it then: the largest values, and the
 * sum of exponentials relative to the largest value so far. Which token holds the largest is looked up at the
 * end, in the one chunk that has it. Chunks that need an edit (the end of the vocabulary, an excluded token)
 * and those to sample from are widened into a buffer in the first-level cache first. Where only some tokens
 * may be drawn, a second look at the whole position, whose largest logit is known then, finds them. This file
 * is compiled without contraction of multiply-adds, because the noise is fixed to the last bit.
 */
#include <cmath>

#include "arithmetic.h"
#include "attn_sampler_random.h"
#include "cpu/draw.h"
#include "cpu/kernels.h"
#include "cpu/launch.h"
#include "cpu/simd/simd.h"

namespace attn_sampler {
namespace {

constexpr int64_t kPeek = 64; /* logits that tell roughly how large the others are */
constexpr float kRoom = 8.0f; /* how far above the shift logits may be */
constexpr int64_t kTasks = 64;
constexpr int64_t kMinSplit = 8192; /* tokens that are worth a task */

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
