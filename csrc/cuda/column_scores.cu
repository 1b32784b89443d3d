#include "cuda/column_scores.cuh"

namespace attn_sampler {
namespace cuda {
namespace {

/* For many columns and rows, where wgmma_serves says so; the kernel of a step serves the others. */
struct WideArgs {
    ScoreArgs scores;
    Deal units;
};

template <typename T>
__global__ void __launch_bounds__(kThreads, resident_blocks(kWgmmaColumns, sizeof(T)))
    column_scores_kernel(const __grid_constant__ WideArgs args) {
    await_launches();
    if constexpr (kHasWgmma)
        score_units<T, kWgmmaTiles, true>(args.scores, args.units.of(static_cast<int>(blockIdx.x)),
                                          [](int) {});
    else
        __trap();
}

} // namespace

/* Whether lists are of one query head: maxima are each head's own. */
static bool lists_are_heads(const AttentionArgs &a, int32_t reduction, int64_t heads) {
    return reduction == ATTN_SAMPLER_REDUCTION_MAX || heads < a.group;
}

ScoreArgs score_args(const AttentionProblem &p, const AttentionArgs &attention, int64_t heads,
                     int64_t columns, Launcher &launcher) {
    /* Of a sequence and layer: half as many as blocks that run at a time, for there are several of either. */
    constexpr int64_t kMostUnits = kMostParts / 2;
    ScoreArgs s{};
    AttentionArgs &a = s.attention;
    a = attention;
    compute_row_lse(a, p.dtype, launcher);
    s.out = p.out;
    s.reduction = p.params.reduction;
    s.accumulate = p.params.accumulate != 0;
    const int64_t tiles = ceil_div(a.columns, columns), groups = a.heads / heads;
    s.list_heads = lists_are_heads(a, s.reduction, heads) ? 1 : a.group;
    s.group_lists = static_cast<int32_t>(heads / s.list_heads);
    s.bin_lists = s.reduction == ATTN_SAMPLER_REDUCTION_MAX ? 1 : s.group_lists;
    s.rows_per_list = a.rows * s.list_heads;
    const int64_t bins = s.group_lists / s.bin_lists;
    int64_t keys_bytes = 0;
    dispatch_type(p.dtype, [&](auto type) { keys_bytes = tile_bytes<decltype(type)>(a, columns); });
    s.slots = 1;
    while (s.bin_lists > 1 && s.slots < kWarps && 2 * s.slots * s.rows_per_list <= kBlockRows &&
           2 * s.slots * keys_bytes <= 48 * 1024)
        s.slots *= 2;
    const int64_t steps_per_list = clamp(ceil_div(s.rows_per_list, kBlockRows / s.slots), 1, INT32_MAX);
    const int64_t steps = ceil_div(s.bin_lists, s.slots) * steps_per_list;
    if (steps > INT32_MAX)
        throw Error(ATTN_SAMPLER_UNSUPPORTED, "q: too many rows for one launch");
    s.steps = static_cast<int32_t>(steps);
    const int64_t most = bins > 1 ? 1 : clamp(kMostUnits / (tiles * groups), 1, steps);
    s.unit_steps = static_cast<int32_t>(ceil_div(steps, most));
    const int64_t members = ceil_div(steps, s.unit_steps), units = members * bins;
    const int64_t all_groups = static_cast<int64_t>(a.batch) * tiles * a.layers * groups;
    check_extent("q: sequences times layers times heads times tiles of columns", all_groups * units,
                 INT32_MAX);
    s.tiles = divisor(tiles);
    s.layers = divisor(a.layers);
    s.groups = divisor(groups);
    s.units = divisor(units);
    s.members = divisor(members);
    s.steps_per_list = divisor(steps_per_list);
    s.rows = divisor(max_of(a.rows, 1));
    if (units > 1) {
        s.partial = launcher.take<float>(all_groups * units * columns);
        s.arrived = launcher.counters(all_groups);
    }
    return s;
}

void add_column_scores(const AttentionProblem &p, int64_t heads, Launcher &launcher) {
    const AttentionArgs a = attention_args(&p, 1);
    const int64_t list_heads = lists_are_heads(a, p.params.reduction, heads) ? 1 : a.group;
    if (!wgmma_serves(a, p.dtype, a.rows * list_heads, a.columns, launcher)) {
        const int columns = tile_columns(a.columns, p.dtype, a.aligned);
        launch_scores(score_args(p, a, heads, columns, launcher), p.dtype, launcher);
        return;
    }
    const ScoreArgs scores = score_args(p, a, heads, kWgmmaColumns, launcher);
    dispatch_wgmma_type(p.dtype, [&](auto type) {
        using T = decltype(type);
        const int64_t shared = score_shared_bytes<T>(scores, kWgmmaColumns);
        const int64_t units = score_unit_count(scores);
        const int64_t blocks =
            min_of(units, launcher.target_blocks(resident_blocks(kWgmmaColumns, sizeof(T)), shared));
        launcher.launch("column_scores", column_scores_kernel<T>, WideArgs{scores, deal(units, blocks)},
                        blocks, shared);
    });
}

int64_t column_scores(const AttentionProblem &p, const attn_sampler_exec &exec) {
    if (p.batch == 0)
        return 0;
    return run(exec,
               [&](Launcher &launcher) { add_column_scores(p, p.params.per_head ? 1 : p.heads, launcher); });
}

} // namespace cuda
} // namespace attn_sampler
