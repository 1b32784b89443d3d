/* Column scores.
 *
 * A unit is a tile of columns of one sequence and layer and some steps. A step is 64 rows: a stretch of one
 * key head's list of rows or, where lists are short, of several lists side by side. A unit's sums stay in
 * registers over its steps; what remains is one partial sum of each column. Which steps are a unit depends on
 * the shape of one sequence and layer alone. Blocks take units as they come, next to each other; the one that
 * ends a tile adds up its partial sums in their order, so the result has the same bits in every run, in every
 * batch that starts on 16 bytes where the sequence does, and on every device of an architecture.
 */
#ifndef ATTN_SAMPLER_CUDA_COLUMN_SCORES_CUH_
#define ATTN_SAMPLER_CUDA_COLUMN_SCORES_CUH_

#include "cuda/plan.h"

namespace attn_sampler {
namespace cuda {

struct ScoreArgs {
    AttentionArgs attention;
    View<float, 4> out;               /* batch, head, none, column; of one layer */
    float *of_layers;                 /* of a step in its place: [batch, layers of all launches, columns] */
    float *partial;                   /* [groups of units that add up, units, columns of a tile] */
    uint32_t *arrived;                /* [groups] */
    int32_t layer_start, layer_count; /* of the launch's first layer in of_layers, and all of these */
    int32_t reduction;
    Divisor tiles, layers; /* of columns; of the launch */
    Divisor groups;        /* of a tile: of heads whose scores are one */
    Divisor units;         /* of a group: of its one bin or, where lists must not mix, of a bin for each */
    Divisor members;       /* units of a bin */
    Divisor steps_per_list, rows;
    int32_t unit_steps;                /* of a unit, but for a bin's last */
    int32_t group_lists, bin_lists;    /* lists of a group and of a bin */
    int32_t list_heads, rows_per_list; /* a list: a key head with all its query heads, or a query head */
    int32_t slots;                     /* lists side by side in a step: 1, 2 or 4 */
    int32_t steps;                     /* of a bin */
    bool accumulate;
};

/* A tile of columns of a sequence, and a layer. */
struct ScoreTile {
    int b, tile, layer;
    int64_t first_column;
    int count;
};

/* The rows that may see a column, for the mean; `lane` of `lanes` threads counts its share where there are
 * masks. */
__device__ inline int rows_seeing(const AttentionArgs &a, int b, int column, int lane, int lanes) {
    if (!find_key(a, Sequence(a, b), a.column_start + column))
        return 0;
    /* The row that stands at the column, where there is one. */
    const int64_t own = a.column_start + column - a.query_start;
    const auto bounded = [&](int64_t m) {
        return static_cast<int>(min(max(m, int64_t{0}), int64_t{a.rows}));
    };
    const int first = bounded(own - a.right), stop = bounded(own + a.left + 1);
    int count = 0;
    if (a.query_mask.data == nullptr && a.row_tokens.data == nullptr)
        return lane > 0 ? 0 : max(stop - first, 0) - (!a.diagonal && own >= first && own < stop);
    for (int m = first + lane; m < stop; m += lanes)
        count += row_counts(a, b, m) && (a.diagonal || m != own);
    return count;
}

/* The unit's value of column threadIdx.x % kColumns: its member's of the bin with this first list. `loaded`
 * says whose keys are in shared memory: the first of the lists, or -1. */
template <typename T, int kTiles, bool kMayBeUnaligned>
__device__ float score_unit(const ScoreArgs &s, const ScoreTile &at, int first_list, int member,
                            uint32_t seen, int &loaded) {
    constexpr int kColumns = 8 * kTiles;
    const AttentionArgs &a = s.attention;
    const bool is_max = s.reduction == ATTN_SAMPLER_REDUCTION_MAX;
    uint4 *const keys = reinterpret_cast<uint4 *>(dynamic_shared() + sizeof(Shared));
    const int slot_vectors = chunks<T>(a) * kColumns * 4;
    const int warps_per_slot = kWarps / s.slots, warp = threadIdx.x / 32;
    const int slot = warp / warps_per_slot;
    const int rows_per_step = kBlockRows / s.slots;
    const int lists_end = first_list + s.bin_lists;

    float total[kTiles][2];
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
        total[j][0] = total[j][1] = 0.0f;
    Tile<T, kTiles, kMayBeUnaligned> rows;
    const int last_step = min((member + 1) * s.unit_steps, s.steps);
    for (int step = member * s.unit_steps; step < last_step; ++step) {
        const int turn = s.steps_per_list.divide(step);
        const int lists = first_list + turn * s.slots, list = lists + slot; /* the first, its own */
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int f = (step - turn * s.steps_per_list.value) * rows_per_step +
                          warp % warps_per_slot * kWarpRows + r * 8 + threadIdx.x % 32 / 4;
            const int head = s.rows.divide(f);
            if (list < lists_end && f < s.rows_per_list)
                rows.row[r].find(a, at.layer, at.b, list * s.list_heads + head, f - head * a.rows,
                                 at.first_column, kColumns, true);
            else
                rows.row[r].clear();
        }
        const bool any = rows.any();
        if (any)
            rows.load(a);
        if (lists != loaded && __syncthreads_or(any)) {
            for (int i = 0; i < s.slots && lists + i < lists_end; ++i)
                load_keys<T, kColumns, kMayBeUnaligned>(a, at.layer, at.b,
                                                        (lists + i) * s.list_heads / a.group, at.first_column,
                                                        at.count, keys + i * slot_vectors);
            rows.template await_keys<0>();
            loaded = lists;
        }
        if (!any)
            continue;
        const float scale = logit_scale<T>(a, at.layer, at.b, list * s.list_heads / a.group);
        float weight[kTiles][4];
        rows.arrange();
        rows.multiply(a, keys + slot * slot_vectors, weight);
        rows.weigh(a, scale, seen, weight);
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
#pragma unroll
            for (int i = 0; i < 2; ++i)
                total[j][i] = is_max ? max_or_nan(weight[j][2 + i], max_or_nan(weight[j][i], total[j][i]))
                                     : total[j][i] + (weight[j][i] + weight[j][2 + i]);
    }

    /* Over the eight rows of a warp's lanes, then over the warps. */
    float *const of_warp = scratch<float>();
    __syncthreads(); /* of the unit before, all is read */
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float x = total[j][i];
#pragma unroll
            for (int distance = 4; distance < 32; distance *= 2) {
                const float other = __shfl_xor_sync(kAllLanes, x, distance);
                x = is_max ? max_or_nan(x, other) : x + other;
            }
            if (threadIdx.x % 32 < 4)
                of_warp[warp * kColumns + 8 * j + 2 * (threadIdx.x % 4) + i] = x;
        }
    __syncthreads();
    const int column = threadIdx.x % kColumns;
    float value = of_warp[column];
#pragma unroll
    for (int w = 1; w < kWarps; ++w)
        value = is_max ? max_or_nan(value, of_warp[w * kColumns + column])
                       : value + of_warp[w * kColumns + column];
    return value;
}

/* Adds up the partial sums of a group, and writes its columns. */
template <int kColumns>
__device__ void finish_scores(const ScoreArgs &s, const ScoreTile &at, int group_of_tile,
                              const float *partial, float value) {
    const AttentionArgs &a = s.attention;
    constexpr int kStripes = kThreads / kColumns;
    const int column = threadIdx.x % kColumns, stripe = threadIdx.x / kColumns;
    const int units = s.units.value;
    if (units > 1) {
        /* The maxima of lists are added up. */
        const bool combine_max = s.reduction == ATTN_SAMPLER_REDUCTION_MAX && units == s.members.value;
        value = 0.0f;
#pragma unroll 8
        for (int i = stripe; i < units; i += kStripes) {
            const float x = __ldcg(partial + i * kColumns + column);
            value = combine_max ? max_or_nan(x, value) : value + x;
        }
        float *const of_stripe = scratch<float>();
        __syncthreads();
        of_stripe[threadIdx.x] = value;
        __syncthreads();
        value = of_stripe[column];
        for (int i = 1; i < kStripes; ++i) {
            const float x = of_stripe[i * kColumns + column];
            value = combine_max ? max_or_nan(x, value) : value + x;
        }
    }
    const int own = at.tile * kColumns + column;
    if (s.reduction == ATTN_SAMPLER_REDUCTION_MEAN) {
        int *const of_stripe = scratch<int>() + kThreads;
        __syncthreads();
        of_stripe[threadIdx.x] = column < at.count ? rows_seeing(a, at.b, own, stripe, kStripes) : 0;
        __syncthreads();
        int seeing = 0;
        for (int i = 0; i < kStripes; ++i)
            seeing += of_stripe[i * kColumns + column];
        value /= static_cast<float>(max(seeing, 1));
    }
    if (stripe != 0 || column >= at.count)
        return;
    if (s.of_layers != nullptr) {
        const int64_t layer = static_cast<int64_t>(at.b) * s.layer_count + s.layer_start + at.layer;
        s.of_layers[layer * a.columns + own] = value;
        return;
    }
    float *const out =
        s.out.data + at.b * s.out.stride[0] + group_of_tile * s.out.stride[1] + own * s.out.stride[3];
    *out = s.accumulate ? *out + value : value;
}

/* Units of batch * tiles * layers * groups * units of a group. Calls done(b) in the one block of a group that
 * has written its columns. */
template <typename T, int kTiles, bool kMayBeUnaligned, typename Done>
__device__ void score_units(const ScoreArgs &s, Range units, Done done) {
    constexpr int kColumns = 8 * kTiles;
    const AttentionArgs &a = s.attention;
    for (int unit = units.first; unit < units.last;) {
        const int group = s.units.divide(unit), in_tile = s.groups.divide(group);
        const int group_of_tile = group - in_tile * s.groups.value, in_layer = s.layers.divide(in_tile);
        ScoreTile at;
        at.layer = in_tile - in_layer * s.layers.value;
        at.b = s.tiles.divide(in_layer);
        at.tile = in_layer - at.b * s.tiles.value;
        at.first_column = a.column_start + at.tile * kColumns;
        at.count = min(kColumns, a.columns - at.tile * kColumns);
        const uint32_t seen = seen_columns<kTiles>(a, at.b, at.first_column, at.count);
        const int stop = min((group + 1) * s.units.value, units.last);
        float value = 0.0f;
        int loaded = -1;
        for (; unit < stop; ++unit) {
            const int in_group = unit - group * s.units.value, bin = s.members.divide(in_group);
            value = score_unit<T, kTiles, kMayBeUnaligned>(s, at, group_of_tile * s.group_lists + bin,
                                                           in_group - bin * s.members.value, seen, loaded);
            if (s.units.value > 1 && threadIdx.x < kColumns)
                s.partial[static_cast<int64_t>(unit) * kColumns + threadIdx.x] = value;
        }
        const int first = max(group * s.units.value, units.first); /* it would take a register until here */
        if (s.units.value > 1 && !last_to_arrive(s.arrived + group, static_cast<uint32_t>(stop - first),
                                                 static_cast<uint32_t>(s.units.value)))
            continue;
        finish_scores<kColumns>(s, at, group_of_tile,
                                s.partial + static_cast<int64_t>(group) * s.units.value * kColumns, value);
        done(at.b);
    }
}

/* Columns of a tile: the narrowest that holds all of them, or the widest there is; of keys and queries that
 * may start anywhere, those of the one kernel that serves them. */
inline int tile_columns(int64_t columns, int dtype, bool aligned) {
    if (columns <= 8 && aligned)
        return 8;
    return columns <= 32 || !aligned || element_size(dtype) != 2 ? 32 : 64;
}

/* Scores of layers of one shape in tiles of so many columns, added up over so many heads: all, those of a key
 * head, or 1. */
ScoreArgs score_args(const AttentionProblem &p, const AttentionArgs &attention, int64_t heads,
                     int64_t columns, Launcher &launcher);

/* Launches the scores of one layer. */
void add_column_scores(const AttentionProblem &p, int64_t heads, Launcher &launcher);

inline int64_t score_unit_count(const ScoreArgs &s) {
    return static_cast<int64_t>(s.attention.batch) * s.tiles.value * s.layers.value * s.groups.value *
           s.units.value;
}

template <typename T>
int64_t score_shared_bytes(const ScoreArgs &s, int64_t columns) {
    return static_cast<int64_t>(sizeof(Shared)) + tile_bytes<T>(s.attention, columns) * s.slots;
}

/* Launches scores in tiles of tile_columns, in the kernel of a step. */
void launch_scores(const ScoreArgs &scores, int dtype, Launcher &launcher);

} // namespace cuda
} // namespace attn_sampler

#endif /* ATTN_SAMPLER_CUDA_COLUMN_SCORES_CUH_ */
