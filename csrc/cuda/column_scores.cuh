/* Column scores.
 *
 * A block owns a tile of columns of one sequence and a contiguous range of steps. A step is 64 rows: a
 * stretch of one key head's list of rows or, where lists are short, of several lists side by side. Its sums
 * stay in registers over all steps, layers and heads; what remains is one partial sum of each column for each
 * block. The last block to arrive adds these in the order of the blocks, so the result has the same bits in
 * every run.
 */
#ifndef ATTN_SAMPLER_CUDA_COLUMN_SCORES_CUH_
#define ATTN_SAMPLER_CUDA_COLUMN_SCORES_CUH_

#include "cuda/plan.h"

namespace attn_sampler {
namespace cuda {

struct ScoreArgs {
    AttentionArgs attention;
    View<float, 4> out; /* batch, head, none, column */
    float *partial;     /* [groups of blocks that add up, members, columns of a tile] */
    uint32_t *arrived;  /* [groups] */
    int32_t reduction;
    int32_t tiles;                /* of columns */
    int32_t bins;                 /* lists that must not mix, or 1: all do */
    int32_t members;              /* blocks of a bin */
    int32_t lists, rows_per_list; /* of a layer: key heads with all their query heads, or query heads */
    int32_t heads_per_list;
    int32_t slots;                 /* lists side by side in a step: 1, 2 or 4 */
    int32_t steps_per_list, steps; /* of a group of `slots` lists; of a bin */
    bool per_head, accumulate;
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

/* Block `index` of B * tiles * bins * members. True in the one block of a tile that has written its columns.
 */
template <typename T, int kTiles>
__device__ bool column_scores_block(const ScoreArgs &s, int index) {
    constexpr int kColumns = 8 * kTiles;
    const AttentionArgs &a = s.attention;
    const int member = index % s.members, bin = index / s.members % s.bins;
    const int bt = index / s.members / s.bins, tile = bt % s.tiles, b = bt / s.tiles;
    const int64_t first_column = a.column_start + tile * kColumns;
    const int count = min(kColumns, a.columns - tile * kColumns);
    const bool is_max = s.reduction == ATTN_SAMPLER_REDUCTION_MAX;

    uint4 *const keys = reinterpret_cast<uint4 *>(dynamic_shared() + sizeof(Shared));
    const int slot_vectors = chunks<T>(a) * kColumns * 4;
    const int warps_per_slot = kWarps / s.slots, warp = threadIdx.x / 32;
    const int slot = warp / warps_per_slot;
    const int rows_per_step = kBlockRows / s.slots;
    const int first_list = s.bins > 1 ? bin : 0, n_lists = s.bins > 1 ? 1 : a.layers * s.lists;
    const uint32_t seen = seen_columns<kTiles>(a, b, first_column, count);

    float total[kTiles][2];
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
        total[j][0] = total[j][1] = 0.0f;
    Tile<T, kTiles> rows;
    int loaded = -1;
    const int64_t steps = s.steps;
    const int last_step = static_cast<int>(steps * (member + 1) / s.members);
    for (int step = static_cast<int>(steps * member / s.members); step < last_step; ++step) {
        const int lists = step / s.steps_per_list * s.slots;
        const int own_list = lists + slot, list = first_list + own_list;
        const int layer = list / s.lists, in_layer = list % s.lists;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int f = step % s.steps_per_list * rows_per_step + warp % warps_per_slot * kWarpRows +
                          r * 8 + threadIdx.x % 32 / 4;
            if (own_list < n_lists && f < s.rows_per_list)
                rows.row[r].find(a, layer, b, in_layer * s.heads_per_list + f / a.rows, f % a.rows,
                                 first_column, kColumns, true);
            else
                rows.row[r].clear();
        }
        const bool any = rows.any();
        if (any)
            rows.load(a);
        if (lists != loaded && __syncthreads_or(any)) {
            for (int i = 0; i < s.slots && lists + i < n_lists; ++i) {
                const int other = first_list + lists + i;
                load_keys<T, kColumns>(a, other / s.lists, b, other % s.lists * s.heads_per_list / a.group,
                                       first_column, count, keys + i * slot_vectors);
            }
            rows.template await_keys<0>();
            loaded = lists;
        }
        if (!any)
            continue;
        const float scale = logit_scale<T>(a, layer, b, in_layer * s.heads_per_list / a.group);
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
    for (int w = 1; w < kWarps; ++w)
        value = is_max ? max_or_nan(value, of_warp[w * kColumns + column])
                       : value + of_warp[w * kColumns + column];

    /* The blocks whose columns add up: a bin's where heads stay apart, else the tile's. */
    const int expected = s.per_head ? s.members : s.bins * s.members;
    constexpr int kStripes = kThreads / kColumns;
    const int stripe = threadIdx.x / kColumns;
    if (expected > 1) {
        const int64_t group = s.per_head ? static_cast<int64_t>(bt) * s.bins + bin : bt;
        float *const partial = s.partial + group * expected * kColumns + column;
        if (stripe == 0)
            partial[(s.per_head ? member : bin * s.members + member) * kColumns] = value;
        if (!last_to_arrive(s.arrived + group, static_cast<uint32_t>(expected)))
            return false;
        const bool combine_max = is_max && (s.per_head || s.bins == 1);
        value = 0.0f;
        for (int i = stripe; i < expected; i += kStripes) {
            const float x = __ldcg(partial + i * kColumns);
            value = combine_max ? max_or_nan(x, value) : value + x;
        }
        float *const of_stripe = scratch<float>();
        of_stripe[threadIdx.x] = value;
        __syncthreads();
        value = of_stripe[column];
        for (int i = 1; i < kStripes; ++i) {
            const float x = of_stripe[i * kColumns + column];
            value = combine_max ? max_or_nan(x, value) : value + x;
        }
    }
    if (s.reduction == ATTN_SAMPLER_REDUCTION_MEAN) {
        int *const of_stripe = scratch<int>() + kThreads;
        __syncthreads();
        of_stripe[threadIdx.x] =
            column < count ? rows_seeing(a, b, tile * kColumns + column, stripe, kStripes) : 0;
        __syncthreads();
        int seeing = 0;
        for (int i = 0; i < kStripes; ++i)
            seeing += of_stripe[i * kColumns + column];
        value /= static_cast<float>(max(seeing, 1));
    }
    if (stripe == 0 && column < count) {
        float *const out = s.out.data + b * s.out.stride[0] + bin * s.out.stride[1] +
                           (tile * kColumns + column) * s.out.stride[3];
        *out = s.accumulate ? *out + value : value;
    }
    return true;
}

/* Columns of a tile: the narrowest that holds all of them, or the widest there is. */
inline int tile_columns(int64_t columns, int dtype) {
    if (columns <= 8)
        return 8;
    return columns <= 32 || element_size(dtype) != 2 ? 32 : 64;
}

/* Scores of layers of one shape in tiles of so many columns. */
ScoreArgs score_args(const AttentionProblem &p, const AttentionArgs &attention, int64_t columns,
                     Launcher &launcher);

inline int64_t score_blocks(const ScoreArgs &s) {
    return static_cast<int64_t>(s.attention.batch) * s.tiles * s.bins * s.members;
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
