/* The whole decoding step in one launch: the first blocks read the logits, the others score columns, and the
 * last part of a sequence to finish, scores or confidence, selects and commits. Without logits and selection
 * the same kernel is column_scores. */
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
    int32_t confidence_blocks;
};

template <typename T, int kTiles>
__global__ void __launch_bounds__(kThreads, resident_blocks(8 * kTiles, sizeof(T)))
    column_scores_or_step_kernel(const __grid_constant__ StepArgs args) {
    const int block = static_cast<int>(blockIdx.x);
    if (block < args.confidence_blocks) {
        if (confidence_block(args.confidence, block))
            finish_part(args.select, block / args.confidence.splits / args.confidence.positions);
        return;
    }
    const int index = block - args.confidence_blocks;
    if (column_scores_block<T, kTiles>(args.scores, index))
        finish_part(args.select, index / args.scores.members / args.scores.bins / args.scores.tiles);
}

void launch(const char *name, const StepArgs &args, int dtype, Launcher &launcher) {
    const int columns = tile_columns(args.scores.attention.columns, dtype);
    dispatch_type(dtype, [&](auto type) {
        using T = decltype(type);
        constexpr int kWidest = sizeof(T) == 2 ? 8 : 4;
        const auto kernel = columns == 8    ? column_scores_or_step_kernel<T, 1>
                            : columns == 32 ? column_scores_or_step_kernel<T, 4>
                                            : column_scores_or_step_kernel<T, kWidest>;
        launcher.launch(name, kernel, args, args.confidence_blocks + score_blocks(args.scores),
                        score_shared_bytes<T>(args.scores, columns));
    });
}

/* Whether two layers can share a launch: everything equal but the addresses. */
bool same_shape(const AttentionProblem &a, const AttentionProblem &b) {
    auto same = [](const auto &x, const auto &y) {
        return memcmp(x.stride, y.stride, sizeof(x.stride)) == 0;
    };
    return a.heads == b.heads && a.kv_heads == b.kv_heads && a.n_rows == b.n_rows && a.n_keys == b.n_keys &&
           a.headdim == b.headdim && a.dtype == b.dtype && same(a.q, b.q) && same(a.k, b.k) &&
           a.pages.count == b.pages.count && a.pages.size == b.pages.size &&
           (a.softmax_lse.data == nullptr) == (b.softmax_lse.data == nullptr) &&
           same(a.softmax_lse, b.softmax_lse) && same(a.q_descale, b.q_descale) &&
           same(a.k_descale, b.k_descale);
}

} // namespace

void launch_scores(const ScoreArgs &scores, int dtype, Launcher &launcher) {
    launch("column_scores", StepArgs{scores, {}, {}, 0}, dtype, launcher);
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
        check_extent("logits: blocks of a launch", confidence_blocks(args.confidence), INT32_MAX);
        args.confidence_blocks = static_cast<int32_t>(confidence_blocks(args.confidence));
        SelectArgs &select = args.select;
        select = select_args(p.select);
        select.tokens = p.tokens;
        select.token_ids = p.predict.token_ids;
        select.mask_token_id = p.mask_token_id;
        select.arrived = launcher.counters(select.batch);
        /* The parts of a sequence's step: the confidence of each position, and each launch's tiles. */
        int64_t parts = select.columns;
        for (int64_t first = 0; first < p.num_layers; first = end_of_group(first))
            parts += ceil_div(select.columns, tile_columns(select.columns, p.layers[first].dtype));
        check_extent("layers: parts of a step", parts, INT32_MAX);
        select.parts = static_cast<uint32_t>(parts);
        if (p.num_layers == 0)
            launch_confidence("decode_step", args.confidence, select, launcher);
        for (int64_t first = 0, end; first < p.num_layers; first = end) {
            end = end_of_group(first);
            const AttentionProblem &layer = p.layers[first];
            AttentionArgs attention = attention_args(&layer, end - first);
            attention.row_tokens = {p.row_tokens, {p.tokens.stride[0], p.tokens.stride[1]}};
            attention.mask_token_id = p.mask_token_id;
            args.scores = score_args(layer, attention, tile_columns(select.columns, layer.dtype), launcher);
            args.scores.accumulate = first > 0;
            launch("decode_step", args, layer.dtype, launcher);
            args.confidence_blocks = 0;
        }
    });
}

} // namespace cuda
} // namespace attn_sampler
