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

ScoreArgs score_args(const AttentionProblem &p, const AttentionArgs &attention, int64_t columns,
                     Launcher &launcher) {
    /* Of a sequence and layer: half as many as blocks that run at a time, for there are several of either. */
    constexpr int64_t kMostUnits = kMostParts / 2;
    ScoreArgs s{};
    AttentionArgs &a = s.attention;
    a = attention;
    compute_row_lse(a, p.dtype, launcher);
    s.out = p.out;
    s.reduction = p.params.reduction;
    s.per_head = p.params.per_head != 0;
    s.accumulate = p.params.accumulate != 0;
    const int64_t tiles = ceil_div(a.columns, columns);
    s.has_bins = s.per_head || s.reduction == ATTN_SAMPLER_REDUCTION_MAX;
    s.heads_per_list = s.has_bins ? 1 : a.group;
    s.lists = a.heads / s.heads_per_list;
    s.rows_per_list = a.rows * s.heads_per_list;
    int64_t keys_bytes = 0;
    dispatch_type(p.dtype, [&](auto type) { keys_bytes = tile_bytes<decltype(type)>(a, columns); });
    s.slots = 1;
    while (!s.has_bins && s.slots < kWarps && 2 * s.slots * s.rows_per_list <= kBlockRows &&
           2 * s.slots * keys_bytes <= 48 * 1024)
        s.slots *= 2;
    const int64_t steps_per_list = clamp(ceil_div(s.rows_per_list, kBlockRows / s.slots), 1, INT32_MAX);
    const int64_t steps = ceil_div(s.has_bins ? 1 : s.lists, s.slots) * steps_per_list;
    if (steps > INT32_MAX)
        throw Error(ATTN_SAMPLER_UNSUPPORTED, "q: too many rows for one launch");
    s.steps = static_cast<int32_t>(steps);
    /* The maxima of heads are added up: one unit for each. */
    const int64_t bins = s.has_bins ? s.lists : 1, groups = s.per_head ? bins : 1;
    const int64_t most = s.has_bins && !s.per_head ? 1 : clamp(kMostUnits / (tiles * bins), 1, steps);
    s.unit_steps = static_cast<int32_t>(ceil_div(steps, most));
    const int64_t members = ceil_div(steps, s.unit_steps), units = members * bins / groups;
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

int64_t column_scores(const AttentionProblem &p, const attn_sampler_exec &exec) {
    if (p.batch == 0)
        return 0;
    return run(exec, [&](Launcher &launcher) {
        const AttentionArgs a = attention_args(&p, 1);
        const bool heads_apart = p.params.per_head || p.params.reduction == ATTN_SAMPLER_REDUCTION_MAX;
        const int64_t rows = static_cast<int64_t>(a.rows) * (heads_apart ? 1 : a.group);
        if (!wgmma_serves(a, p.dtype, rows, a.columns, launcher)) {
            launch_scores(score_args(p, a, tile_columns(a.columns, p.dtype, a.aligned), launcher), p.dtype,
                          launcher);
            return;
        }
        const ScoreArgs scores = score_args(p, a, kWgmmaColumns, launcher);
        dispatch_wgmma_type(p.dtype, [&](auto type) {
            using T = decltype(type);
            const int64_t shared = score_shared_bytes<T>(scores, kWgmmaColumns);
            const int64_t units = score_unit_count(scores);
            const int64_t blocks =
                min_of(units, launcher.target_blocks(resident_blocks(kWgmmaColumns, sizeof(T)), shared));
            launcher.launch("column_scores", column_scores_kernel<T>, WideArgs{scores, deal(units, blocks)},
                            blocks, shared);
        });
    });
}

} // namespace cuda
} // namespace attn_sampler
