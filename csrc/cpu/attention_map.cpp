/* The attention map: tiles of rows and columns, summed over heads; or what remains of its rows. */
#include "cpu/row_lse.h"

namespace attn_sampler {
namespace {

template <typename Words>
bool attention_map_of(const AttentionProblem &p) {
    Plan plan(p);
    const int64_t map_rows = p.params.rows.stop - p.params.rows.start;
    const int64_t row_tiles = ceil_div(map_rows, kTile);
    const int64_t column_tiles = ceil_div(plan.columns(), kTile);
    const int64_t units = p.batch * row_tiles * column_tiles;
    const int64_t splits = max_of(1, min_of(p.heads, kTasks / 4 / (row_tiles * column_tiles)));
    const bool partial_sums = splits > 1 && !p.params.per_head;
    const int64_t totals = partial_sums ? units * splits : p.num_threads;
    const Workspace work(p.num_threads, Scratch::bytes(p.headdim),
                         lse_count(p) * static_cast<int64_t>(sizeof(RowLse)) + totals * kTile * kTile * 4);
    if (!work || !compute_lse(plan, work.shared()))
        return false;
    float *const partial = static_cast<float *>(after_lse(p, work.shared()));

    auto write_tile = [&](const Columns &columns, int64_t unit, int64_t h, const float *total) {
        const int64_t row0 = unit / column_tiles % row_tiles * kTile;
        float *const out = p.out.data + columns.b * p.out.stride[0] + h * p.out.stride[1];
        for (int64_t r = 0; r < min_of(kTile, map_rows - row0); ++r)
            for (int i = 0; i < columns.n; ++i)
                write(out + (row0 + r) * p.out.stride[2] +
                          (columns.first + i - p.params.columns.start) * p.out.stride[3],
                      static_cast<double>(total[r * kTile + i]), p.params.accumulate != 0);
    };
    auto task = [&](int64_t index, int worker) {
        const int64_t split = index % splits, unit = index / splits;
        Columns columns(plan, unit / column_tiles / row_tiles, unit % column_tiles);
        const Scratch s = plan.scratch(work.of_worker(worker));
        const int64_t row0 = p.params.rows.start + unit / column_tiles % row_tiles * kTile;
        const int64_t first = max_of(row0, plan.row_start);
        const int64_t last = min_of(min_of(row0 + kTile, p.params.rows.stop), plan.row_stop);
        float *const total = partial + (partial_sums ? index : worker) * kTile * kTile;
        memset(total, 0, kTile * kTile * 4);
        for (int64_t h = p.heads * split / splits; h < p.heads * (split + 1) / splits; ++h) {
            RowTile tile;
            tile.add(plan, columns, h, first, last);
            if (tile.n > 0) {
                columns.pack_keys<Words>(plan, h / plan.group, s);
                const Weights weights(plan, columns, tile, s, Words());
                for (int v = 0; v < columns.width / kLanes; ++v)
                    weights.for_each_row(v, [&](int r, VecF weight) {
                        float *const at = total + (tile.row[r] - row0) * kTile + v * kLanes;
                        store(at, load<VecF>(at) + weight);
                    });
            }
            if (p.params.per_head) {
                write_tile(columns, unit, h, total);
                memset(total, 0, kTile * kTile * 4);
            }
        }
        if (!partial_sums && !p.params.per_head)
            write_tile(columns, unit, 0, total);
    };
    parallel_for(p.num_threads, units * splits, task);

    for (int64_t unit = 0; partial_sums && unit < units; ++unit) {
        float *const total = partial + unit * splits * kTile * kTile;
        for (int64_t split = 1; split < splits; ++split)
            for (int i = 0; i < kTile * kTile; ++i)
                total[i] += total[split * kTile * kTile + i];
        write_tile(Columns(plan, unit / column_tiles / row_tiles, unit % column_tiles), unit, 0, total);
    }
    return true;
}

/* Of each row of the map the sum, or the entry at its own position. A tile of rows walks along all columns.
 */
template <typename Words>
bool reduced_map_of(const AttentionProblem &p) {
    Plan plan(p);
    const bool diagonal = p.params.reduction == ATTN_SAMPLER_MAP_REDUCTION_DIAGONAL;
    const int64_t map_rows = p.params.rows.stop - p.params.rows.start;
    const int64_t row_tiles = ceil_div(map_rows, kTile), column_tiles = ceil_div(plan.columns(), kTile);
    const int64_t units = p.batch * row_tiles; /* and as many totals of a tile's rows for each head */
    const Workspace work(p.num_threads, Scratch::bytes(p.headdim),
                         lse_count(p) * static_cast<int64_t>(sizeof(RowLse)) + units * p.heads * kTile * 8);
    if (!work || !compute_lse(plan, work.shared()))
        return false;
    double *const totals = static_cast<double *>(after_lse(p, work.shared()));
    auto task = [&](int64_t index, int worker) {
        const int64_t h = index % p.heads, b = index / p.heads / row_tiles;
        const int64_t row0 = p.params.rows.start + index / p.heads % row_tiles * kTile;
        const int64_t first = max_of(row0, plan.row_start);
        const int64_t last = min_of(min_of(row0 + kTile, p.params.rows.stop), plan.row_stop);
        const Scratch s = plan.scratch(work.of_worker(worker));
        double *const total = totals + index * kTile;
        memset(total, 0, kTile * 8);
        for (int64_t t = 0; t < column_tiles; ++t) {
            Columns columns(plan, b, t);
            const int64_t own = plan.window.query_start - columns.first; /* the lane of row 0 */
            if (diagonal && (own + last <= 0 || own + first >= columns.n))
                continue;
            RowTile tile;
            tile.add(plan, columns, h, first, last);
            if (tile.n == 0)
                continue;
            columns.pack_keys<Words>(plan, h / plan.group, s);
            const Weights weights(plan, columns, tile, s, Words());
            VecF sum[kTile] = {};
            for (int v = 0; v < columns.width / kLanes; ++v) {
                const VecI lane = lane_index() + v * kLanes;
                weights.for_each_row(v, [&](int r, VecF weight) {
                    const auto at = static_cast<int32_t>(clamp(own + tile.row[r], -1, kTile));
                    sum[r] += diagonal ? ((lane == at) ? weight : VecF{}) : weight;
                });
            }
            for (int r = 0; r < tile.n; ++r)
                total[tile.row[r] - row0] += sum_of_lanes_in_double(sum[r]);
        }
    };
    parallel_for(p.num_threads, units * p.heads, task);

    for (int64_t unit = 0; unit < units; ++unit) {
        const int64_t b = unit / row_tiles, row0 = unit % row_tiles * kTile;
        for (int64_t r = 0; r < min_of(kTile, map_rows - row0); ++r) {
            double sum = 0.0;
            for (int64_t h = 0; h < p.heads; ++h) {
                float *const out =
                    p.out.data + b * p.out.stride[0] + h * p.out.stride[1] + (row0 + r) * p.out.stride[2];
                sum += totals[(unit * p.heads + h) * kTile + r];
                if (p.params.per_head || h + 1 == p.heads)
                    write(out, sum, p.params.accumulate != 0);
                if (p.params.per_head)
                    sum = 0.0;
            }
        }
    }
    return true;
}

template <typename Words>
bool map_of(const AttentionProblem &p) {
    return p.params.reduction == ATTN_SAMPLER_MAP_REDUCTION_NONE ? attention_map_of<Words>(p)
                                                                 : reduced_map_of<Words>(p);
}

} // namespace

namespace ATTN_SAMPLER_ISA {

bool attention_map(const AttentionProblem &p) {
    return in_pairs(p) ? map_of<PairWords>(p) : map_of<FloatWords>(p);
}

} // namespace ATTN_SAMPLER_ISA
} // namespace attn_sampler
