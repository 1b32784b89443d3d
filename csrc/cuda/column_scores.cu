/* Column scores, and the whole decoding step in one launch.
 *
 * A block owns a tile of columns of one sequence and a contiguous range of steps. A step is 64 rows: a
 * stretch of one key head's list of rows or, where lists are short, of several lists side by side. Its sums
 * stay in registers over all steps, layers and heads; what remains is one partial sum of each column for each
 * block. The last block to arrive adds these in the order of the blocks, so the result has the same bits in
 * every run.
 *
 * In a decoding step the first blocks of the same launch read the logits, and the last part of a sequence to
 * finish, scores or confidence, selects and commits.
 */
#include "cuda/plan.h"

namespace attn_sampler {
namespace cuda {
namespace {

struct ScoreArgs {
    AttentionArgs attention;
    float *out;
    int64_t out_stride[3]; /* batch, head, column */
    float *partial;        /* [groups of blocks that add up, members, columns of a tile] */
    uint32_t *arrived;     /* [groups] */
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

struct StepArgs {
    ScoreArgs scores;
    ConfidenceArgs confidence;
    SelectArgs select;
    int32_t confidence_blocks;
};

/* The rows that may see a column, for the mean; `lane` of `lanes` threads counts its share where there are
 * masks. */
__device__ int rows_seeing(const AttentionArgs &a, int b, int column, int lane, int lanes) {
    if (!key_counts(a, b, a.column_start + column))
        return 0;
    /* The row that stands at the column, where there is one. */
    const int64_t own = a.column_start + column - a.query_start;
    const int first =
        a.causal ? static_cast<int>(min(max(own, int64_t{0}), static_cast<int64_t>(a.rows))) : 0;
    int count = 0;
    if (a.query_mask == nullptr && a.row_tokens == nullptr)
        return lane > 0 ? 0 : a.rows - first - (!a.diagonal && own >= first && own < a.rows);
    for (int m = first + lane; m < a.rows; m += lanes)
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
                                 first_column, true);
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
        float *const out = s.out + b * s.out_stride[0] + bin * s.out_stride[1] +
                           (tile * kColumns + column) * s.out_stride[2];
        *out = s.accumulate ? *out + value : value;
    }
    return true;
}

template <typename T, int kTiles>
__global__ void __launch_bounds__(kThreads, resident_blocks(8 * kTiles, sizeof(T)))
    decode_step_kernel(const __grid_constant__ StepArgs args) {
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

/* For many columns and rows, where wgmma_serves says so. */
template <typename T>
__global__ void __launch_bounds__(kThreads, resident_blocks(kWgmmaColumns, sizeof(T)))
    column_scores_kernel(const __grid_constant__ ScoreArgs args) {
    if constexpr (kHasWgmma)
        column_scores_block<T, kWgmmaTiles>(args, static_cast<int>(blockIdx.x));
    else
        __trap();
}

/* Columns of a tile: the narrowest that holds all of them, or the widest there is. */
int tile_columns(int64_t columns, int dtype) {
    if (columns <= 8)
        return 8;
    return columns <= 32 || element_size(dtype) != 2 ? 32 : 64;
}

int32_t tiles(int64_t columns, int dtype) {
    return static_cast<int32_t>(ceil_div(columns, tile_columns(columns, dtype)));
}

/* Scores of layers of one shape in tiles of so many columns: fills in args.scores. */
void plan_scores(ScoreArgs &s, const AttentionProblem &p, int64_t columns, Launcher &launcher) {
    AttentionArgs &a = s.attention;
    compute_row_lse(a, p.dtype, launcher);
    s.out = p.out;
    s.out_stride[0] = p.out_stride[0];
    s.out_stride[1] = p.params.per_head ? p.out_stride[1] : 0;
    s.out_stride[2] = p.out_stride[3];
    s.reduction = p.params.reduction;
    s.per_head = p.params.per_head != 0;
    s.accumulate = p.params.accumulate != 0;
    s.tiles = static_cast<int32_t>(ceil_div(a.columns, columns));
    const bool heads_apart = s.per_head || s.reduction == ATTN_SAMPLER_REDUCTION_MAX;
    s.heads_per_list = heads_apart ? 1 : a.group;
    s.lists = a.heads / s.heads_per_list;
    s.rows_per_list = a.rows * s.heads_per_list;
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
    const int64_t outputs = static_cast<int64_t>(a.batch) * s.tiles * s.bins;
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
}

int64_t score_blocks(const ScoreArgs &s) {
    return static_cast<int64_t>(s.attention.batch) * s.tiles * s.bins * s.members;
}

template <typename T>
int64_t shared_bytes(const ScoreArgs &s, int64_t columns) {
    return static_cast<int64_t>(sizeof(Shared)) + tile_bytes<T>(s.attention, columns) * s.slots;
}

template <typename T, int kTiles>
void launch(const char *name, const StepArgs &args, Launcher &launcher) {
    launcher.launch(name, decode_step_kernel<T, kTiles>, args,
                    args.confidence_blocks + score_blocks(args.scores),
                    shared_bytes<T>(args.scores, 8 * kTiles));
}

void launch(const char *name, const StepArgs &args, int dtype, Launcher &launcher) {
    const int columns = tile_columns(args.scores.attention.columns, dtype);
    dispatch_type(dtype, [&](auto type) {
        using T = decltype(type);
        if (columns == 8)
            launch<T, 1>(name, args, launcher);
        else if (columns == 32)
            launch<T, 4>(name, args, launcher);
        else if constexpr (sizeof(T) == 2)
            launch<T, 8>(name, args, launcher);
    });
}

} // namespace

int64_t column_scores(const AttentionProblem &p, const attn_sampler_exec &exec, bool run_it) {
    if (p.batch == 0)
        return 0;
    return run(exec, run_it, [&](Launcher &launcher) {
        StepArgs args{};
        AttentionArgs &a = args.scores.attention;
        a = attention_args(&p, 1);
        const bool heads_apart = p.params.per_head || p.params.reduction == ATTN_SAMPLER_REDUCTION_MAX;
        const int64_t rows = static_cast<int64_t>(a.rows) * (heads_apart ? 1 : a.group);
        if (wgmma_serves(a, p.dtype, rows, a.columns, launcher)) {
            plan_scores(args.scores, p, kWgmmaColumns, launcher);
            dispatch_wgmma_type(p.dtype, [&](auto type) {
                using T = decltype(type);
                launcher.launch("column_scores", column_scores_kernel<T>, args.scores,
                                score_blocks(args.scores), shared_bytes<T>(args.scores, kWgmmaColumns));
            });
            return;
        }
        plan_scores(args.scores, p, tile_columns(a.columns, p.dtype), launcher);
        launch("column_scores", args, p.dtype, launcher);
    });
}

/* Layers of one shape share a launch; the first brings the confidence with it, the last to finish selects. */
int64_t decode_step(const StepProblem &p, const attn_sampler_exec &exec, bool run_it) {
    if (p.predict.batch == 0)
        return 0;
    auto end_of_group = [&](int64_t first) {
        int64_t end = first + 1;
        while (end < p.num_layers && end - first < kMaxLayers && same_shape(p.layers[first], p.layers[end]))
            ++end;
        return end;
    };
    return run(exec, run_it, [&](Launcher &launcher) {
        StepArgs args{};
        args.confidence = confidence_args(p.predict, launcher);
        args.confidence_blocks = static_cast<int32_t>(confidence_blocks(args.confidence));
        SelectArgs &select = args.select;
        select = select_args(p.select);
        select.tokens = p.tokens;
        copy_strides(p.tokens_stride, select.tokens_stride, 2);
        select.token_ids = p.predict.token_ids;
        copy_strides(p.predict.token_ids_stride, select.token_ids_stride, 2);
        select.mask_token_id = p.mask_token_id;
        select.arrived = launcher.counters(select.batch);
        /* The parts of a sequence's step: the confidence of each position, and each launch's tiles. */
        select.parts = static_cast<uint32_t>(select.columns);
        for (int64_t first = 0; first < p.num_layers; first = end_of_group(first))
            select.parts += tiles(select.columns, p.layers[first].dtype);
        if (p.num_layers == 0)
            launch_confidence("decode_step", args.confidence, select, launcher);
        for (int64_t first = 0, end; first < p.num_layers; first = end) {
            end = end_of_group(first);
            ScoreArgs &scores = args.scores;
            scores = ScoreArgs{};
            scores.attention = attention_args(p.layers + first, end - first);
            scores.attention.row_tokens = p.row_tokens;
            copy_strides(p.tokens_stride, scores.attention.row_tokens_stride, 2);
            scores.attention.mask_token_id = p.mask_token_id;
            const int dtype = p.layers[first].dtype;
            plan_scores(scores, p.layers[first], tile_columns(select.columns, dtype), launcher);
            scores.accumulate = first > 0;
            launch("decode_step", args, dtype, launcher);
            args.confidence_blocks = 0;
        }
    });
}

} // namespace cuda
} // namespace attn_sampler
