#include "cuda/column_scores.cuh"

namespace attn_sampler {
namespace cuda {
namespace {

/* For many columns and rows, where wgmma_serves says so; the kernel of a step serves the others. */
template <typename T>
__global__ void __launch_bounds__(kThreads, resident_blocks(kWgmmaColumns, sizeof(T)))
    column_scores_kernel(const __grid_constant__ ScoreArgs args) {
    if constexpr (kHasWgmma)
        column_scores_block<T, kWgmmaTiles>(args, static_cast<int>(blockIdx.x));
    else
        __trap();
}

} // namespace

ScoreArgs score_args(const AttentionProblem &p, const AttentionArgs &attention, int64_t columns,
                     Launcher &launcher) {
    ScoreArgs s{};
    AttentionArgs &a = s.attention;
    a = attention;
    compute_row_lse(a, p.dtype, launcher);
    s.out = p.out;
    s.reduction = p.params.reduction;
    s.per_head = p.params.per_head != 0;
    s.accumulate = p.params.accumulate != 0;
    s.tiles = static_cast<int32_t>(ceil_div(a.columns, columns));
    const bool heads_apart = s.per_head || s.reduction == ATTN_SAMPLER_REDUCTION_MAX;
    s.heads_per_list = heads_apart ? 1 : a.group;
    s.lists = a.heads / s.heads_per_list;
    s.rows_per_list = a.rows * s.heads_per_list;
    check_extent("layers: layers times heads", static_cast<int64_t>(a.layers) * s.lists, kMaxPositions);
    s.bins = heads_apart ? a.layers * s.lists : 1;
    int64_t keys_bytes = 0;
    dispatch_type(p.dtype, [&](auto type) { keys_bytes = tile_bytes<decltype(type)>(a, columns); });
    s.slots = 1;
    while (s.bins == 1 && s.slots < kWarps && 2 * s.slots * s.rows_per_list <= kBlockRows &&
           2 * s.slots * keys_bytes <= 48 * 1024)
        s.slots *= 2;
    s.steps_per_list =
        static_cast<int32_t>(clamp(ceil_div(s.rows_per_list, kBlockRows / s.slots), 1, INT32_MAX));
    const int64_t lists = heads_apart ? 1 : static_cast<int64_t>(a.layers) * s.lists;
    const int64_t steps = ceil_div(lists, s.slots) * s.steps_per_list;
    if (steps > INT32_MAX)
        throw Error(ATTN_SAMPLER_UNSUPPORTED, "q: too many rows for one launch");
    s.steps = static_cast<int32_t>(steps);
    check_extent("q: sequences times layers times heads", static_cast<int64_t>(a.batch) * s.bins,
                 kMaxPositions);
    const int64_t outputs = static_cast<int64_t>(a.batch) * s.tiles * s.bins;
    check_extent("q: blocks of a launch", outputs, INT32_MAX);
    /* As few blocks as finish together. The maxima of heads are added up: one block for each. */
    const int64_t busy = launcher.target_blocks(
        resident_blocks(static_cast<int>(columns), static_cast<int>(element_size(p.dtype))),
        keys_bytes * s.slots);
    const int64_t most = s.bins > 1 && !s.per_head ? 1 : clamp(busy / outputs, 1, s.steps);
    s.members = static_cast<int32_t>(ceil_div(s.steps, ceil_div(s.steps, most)));
    const int64_t groups = s.per_head ? outputs : static_cast<int64_t>(a.batch) * s.tiles;
    if (outputs * s.members > groups) {
        s.partial = launcher.take<float>(outputs * s.members * columns);
        s.arrived = launcher.counters(groups);
    }
    return s;
}

int64_t column_scores(const AttentionProblem &p, const attn_sampler_exec &exec) {
    if (p.batch == 0)
        return 0;
    return run(exec, [&](Launcher &launcher) {
        const AttentionArgs a = attention_args(&p, 1);
        const bool heads_apart = p.params.per_head || p.params.reduction == ATTN_SAMPLER_REDUCTION_MAX;
        const int64_t rows = static_cast<int64_t>(a.rows) * (heads_apart ? 1 : a.group);
        if (!wgmma_serves(a, p.dtype, rows, a.columns, launcher)) {
            launch_scores(score_args(p, a, tile_columns(a.columns, p.dtype), launcher), p.dtype, launcher);
            return;
        }
        const ScoreArgs scores = score_args(p, a, kWgmmaColumns, launcher);
        dispatch_wgmma_type(p.dtype, [&](auto type) {
            using T = decltype(type);
            launcher.launch("column_scores", column_scores_kernel<T>, scores, score_blocks(scores),
                            score_shared_bytes<T>(scores, kWgmmaColumns));
        });
    });
}

} // namespace cuda
} // namespace attn_sampler
