/* The whole decoding step in one launch of as many blocks as run at a time. Each has an equal share of the
 * bytes: some units of the column scores, whose ends take longest, then some of the logits. The last part of
 * a sequence to finish, a tile of scores or the confidence of a position, selects and commits. Without logits
 * and selection the same kernel is column_scores.
 */
#include "cuda/column_scores.cuh"
#include "cuda/select_tokens.cuh"
#include "cuda/token_confidence.cuh"

namespace attn_sampler {
namespace cuda {
namespace {

struct StepArgs {
    ScoreArgs scores;
    ConfidenceArgs confidence;
    SelectArgs select;
    Deal score_units;
    /* Of the logits: of the blocks with a unit of scores more than the others, and of those others. */
    Deal first_logits, other_logits;
    int32_t first_blocks, first_units;
};

__device__ inline Range logit_units(const StepArgs &args, int block) {
    if (block < args.first_blocks)
        return args.first_logits.of(block);
    const Range range = args.other_logits.of(block - args.first_blocks);
    return {args.first_units + range.first, args.first_units + range.last};
}

/* Compiled once: it is as long as all kinds of tiles together, and has registers of its own. */
__device__ ATTN_SAMPLER_NOINLINE void read_logits(const StepArgs &args, int block) {
    confidence_units(args.confidence, logit_units(args, block), [&](int b) { finish_part(args.select, b); });
}

template <typename T, int kTiles, bool kMayBeUnaligned>
__global__ void __launch_bounds__(kThreads, resident_blocks(8 * kTiles, sizeof(T), kMayBeUnaligned))
    column_scores_or_step_kernel(const __grid_constant__ StepArgs args) {
    const int block = static_cast<int>(blockIdx.x);
    await_launches();
    score_units<T, kTiles, kMayBeUnaligned>(args.scores, args.score_units.of(block),
                                            [&](int b) { finish_part(args.select, b); });
    read_logits(args, block);
}

/* Deals units of scores and of logits, of so many bytes each, to blocks. */
void share(StepArgs &args, int64_t blocks, int64_t scores, int64_t score_bytes, int64_t logits,
           int64_t logit_bytes) {
    args.score_units = deal(scores, blocks);
    const int64_t first = args.score_units.extra, others = blocks - first;
    const int64_t more =
        others * score_bytes / max_of(logit_bytes, 1); /* of logits, for a unit of scores less */
    const int64_t of_first = clamp((logits - more) * first / blocks, 0, logits);
    args.first_blocks = static_cast<int32_t>(first);
    args.first_units = static_cast<int32_t>(of_first);
    args.first_logits = deal(of_first, first);
    args.other_logits = deal(logits - of_first, others);
}

void launch(const char *name, StepArgs &args, int dtype, Launcher &launcher) {
    const ScoreArgs &scores = args.scores;
    const AttentionArgs &a = scores.attention;
    const int columns = tile_columns(a.columns, dtype, a.aligned);
    dispatch_type(dtype, [&](auto type) {
        using T = decltype(type);
        constexpr int kWidest = sizeof(T) == 2 ? 8 : 4;
        const auto kernel = !a.aligned      ? column_scores_or_step_kernel<T, 4, true>
                            : columns == 8  ? column_scores_or_step_kernel<T, 1, false>
                            : columns == 32 ? column_scores_or_step_kernel<T, 4, false>
                                            : column_scores_or_step_kernel<T, kWidest, false>;
        const int64_t shared = score_shared_bytes<T>(scores, columns);
        const int64_t score_count = score_unit_count(scores);
        const int64_t logit_count = confidence_unit_count(args.confidence);
        check_extent("logits: units of a launch", logit_count, INT32_MAX);
        const int64_t blocks =
            min_of(score_count + logit_count,
                   launcher.target_blocks(resident_blocks(columns, sizeof(T), !a.aligned), shared));
        const int64_t row_bytes = a.headdim * static_cast<int64_t>(sizeof(T));
        const int64_t logit_bytes = args.confidence.groups_per_split * kGroup *
                                    (args.confidence.dtype == ATTN_SAMPLER_FLOAT32 ? 4 : 2);
        share(args, blocks, score_count, int64_t{scores.unit_steps} * kBlockRows * row_bytes, logit_count,
              logit_bytes);
        launcher.launch(name, kernel, args, blocks, shared);
    });
}

/* Whether two layers can share a launch: everything equal but the addresses, of which none decides by which
 * kernel another layer is read, and so the bits of its sums. */
bool same_shape(const AttentionProblem &a, const AttentionProblem &b) {
    auto same = [](const auto &x, const auto &y) {
        return memcmp(x.stride, y.stride, sizeof(x.stride)) == 0;
    };
    return a.heads == b.heads && a.kv_heads == b.kv_heads && a.n_rows == b.n_rows && a.n_keys == b.n_keys &&
           a.headdim == b.headdim && a.dtype == b.dtype && same(a.q, b.q) && same(a.k, b.k) &&
           a.pages.count == b.pages.count && a.pages.size == b.pages.size &&
           (a.softmax_lse.data == nullptr) == (b.softmax_lse.data == nullptr) &&
           same(a.softmax_lse, b.softmax_lse) && same(a.q_descale, b.q_descale) &&
           same(a.k_descale, b.k_descale) && is_aligned(a) == is_aligned(b);
}

} // namespace

void launch_scores(const ScoreArgs &scores, int dtype, Launcher &launcher) {
    StepArgs args{};
    args.scores = scores;
    args.confidence.splits = args.confidence.by_positions = divisor(1);
    launch("column_scores", args, dtype, launcher);
}

/* Layers of one shape share a launch; the first brings the confidence with it, the last to finish selects. */
int64_t decode_step(const StepProblem &p, const attn_sampler_exec &exec) {
    if (p.predict.batch == 0)
        return 0;
    auto end_of_group = [&](int64_t first) {
        int64_t end = first + 1;
        while (end < p.num_layers && end - first < kMaxLayers && same_shape(p.layers[first], p.layers[end]))
            ++end;
        return end;
    };
    return run(exec, [&](Launcher &launcher) {
        StepArgs args{};
        args.confidence = confidence_args(p.predict, launcher);
        SelectArgs &select = args.select;
        select = select_args(p.select);
        select.tokens = p.tokens;
        select.token_ids = p.predict.token_ids;
        select.mask_token_id = p.mask_token_id;
        select.arrived = launcher.counters(select.batch);
        /* The parts of a sequence's step: the confidence of each position, and each layer's tiles. */
        int64_t parts = select.columns;
        for (int64_t first = 0, end; first < p.num_layers; first = end) {
            end = end_of_group(first);
            const AttentionProblem &layer = p.layers[first];
            parts += (end - first) *
                     ceil_div(select.columns, tile_columns(select.columns, layer.dtype, is_aligned(layer)));
        }
        check_extent("layers: parts of a step", parts, INT32_MAX);
        select.parts = static_cast<uint32_t>(parts);
        if (p.num_layers == 0) {
            launch_confidence("decode_step", args.confidence, select, launcher);
            return;
        }
        select.layers = static_cast<int32_t>(p.num_layers);
        float *const of_layers = launcher.take<float>(select.batch * p.num_layers * select.columns);
        select.scores_of_layers = of_layers;
        const View<float, 4> &out = p.layers[0].out;
        select.summed = {out.data, {out.stride[0], out.stride[3]}};
        for (int64_t first = 0, end; first < p.num_layers; first = end) {
            end = end_of_group(first);
            const AttentionProblem &layer = p.layers[first];
            AttentionArgs attention = attention_args(&layer, end - first);
            attention.row_tokens = {p.row_tokens, {p.tokens.stride[0], p.tokens.stride[1]}};
            attention.mask_token_id = p.mask_token_id;
            args.scores = score_args(layer, attention, layer.heads,
                                     tile_columns(select.columns, layer.dtype, attention.aligned), launcher);
            args.scores.of_layers = of_layers;
            args.scores.layer_start = static_cast<int32_t>(first);
            args.scores.layer_count = select.layers;
            launch("decode_step", args, layer.dtype, launcher);
            args.confidence.batch = 0; /* the first launch alone brings it */
        }
    });
}

} // namespace cuda
} // namespace attn_sampler
