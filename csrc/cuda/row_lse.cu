/* The rows' log-sum-exp, where the caller has none: 64 rows of a key head's list stay in registers, keys
 * stream through two stages of shared memory. Each lane keeps the running maximum and sum of its own columns;
 * lanes, and the blocks among which the keys are cut where rows are few, are merged once at the end, in a
 * fixed order. */
#include "cuda/plan.h"

namespace attn_sampler {
namespace cuda {
namespace {

struct LseArgs {
    AttentionArgs attention;
    float2 *partial;   /* [units, splits, rows of a block] */
    uint32_t *arrived; /* [units] */
    int32_t row_tiles; /* of a list */
    int32_t splits, tiles_per_split;
};

/* Maximum and sum of 2^((x - maximum) unit) of a part of a row; a maximum that is not finite counts as 0
 * there. */
struct PartialLse {
    float max, sum;

    __device__ float shift() const { return is_finite(max) ? max : 0.0f; }
    __device__ void raise(float higher, float unit) {
        const float before = shift();
        max = higher;
        if (sum != 0.0f)
            sum *= exp2_fast((before - shift()) * unit);
    }
};

__device__ inline PartialLse merge(PartialLse x, PartialLse y, float unit) {
    const float higher = fmaxf(x.max, y.max);
    x.raise(higher, unit);
    y.raise(higher, unit);
    x.sum += y.sum;
    return x;
}

template <typename T, int kTiles>
__device__ void row_lse_block(const LseArgs &args) {
    constexpr int kColumns = 8 * kTiles;
    const AttentionArgs &a = args.attention;
    const int split = static_cast<int>(blockIdx.x) % args.splits,
              unit = static_cast<int>(blockIdx.x) / args.splits;
    /* Of causal rows, those that see most go first. */
    const int row_tile = args.row_tiles - 1 - unit % args.row_tiles, list = unit / args.row_tiles;
    const int kv_head = list % a.kv_heads, b = list / a.kv_heads % a.batch,
              layer = list / a.kv_heads / a.batch;
    const int n_rows = a.group * a.rows, first_row = row_tile * kBlockRows;

    const int warp = threadIdx.x / 32;
    Tile<T, kTiles> rows;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int f = first_row + warp * kWarpRows + r * 8 + threadIdx.x % 32 / 4;
        if (f < n_rows)
            rows.row[r].find(a, layer, b, kv_head * a.group + f / a.rows, f % a.rows, a.key_start, a.keys,
                             false);
        else
            rows.row[r].clear();
    }
    rows.load(a);
    const LogitUnits units = product_units(logit_scale<T>(a, layer, b, kv_head));

    /* From what the block's first row sees to what its last one does. */
    const int last_row = min(first_row + kBlockRows, n_rows) - 1;
    const bool in_one_head = first_row / a.rows == last_row / a.rows;
    const int64_t position = a.query_start - a.key_start; /* of row 0 */
    const int64_t from = position + (in_one_head ? first_row % a.rows : 0) - a.left;
    const int64_t to = position + (in_one_head ? last_row % a.rows : a.rows - 1) + a.right + 1;
    const int64_t first_there = max(Sequence(a, b).ahead - a.key_start, int64_t{0});
    const int first_key = static_cast<int>(max(from, first_there));
    const int keys = static_cast<int>(min(max(to, int64_t{0}), int64_t{a.keys}));
    const int first_tile = max(split * args.tiles_per_split, first_key / kColumns);
    const int last_tile = min((split + 1) * args.tiles_per_split, (keys + kColumns - 1) / kColumns);

    uint4 *const stages = reinterpret_cast<uint4 *>(dynamic_shared() + sizeof(Shared));
    const int stage_vectors = chunks<T>(a) * kColumns * 4;
    auto start = [&](int tile) {
        load_keys<T, kColumns>(a, layer, b, kv_head, a.key_start + tile * kColumns,
                               min(kColumns, keys - tile * kColumns), stages + tile % 2 * stage_vectors);
    };
    PartialLse state[2] = {{-infinity(), 0.0f}, {-infinity(), 0.0f}};
    if (first_tile < last_tile)
        start(first_tile);
    rows.arrange();
    for (int tile = first_tile; tile < last_tile; ++tile) {
        if (tile + 1 < last_tile) {
            start(tile + 1);
            rows.template await_keys<1>();
        } else {
            rows.template await_keys<0>();
        }
        const int first = tile * kColumns;
        const uint32_t seen = seen_columns<kTiles>(a, b, a.key_start + first, min(kColumns, keys - first));
        float x[kTiles][4];
        rows.multiply(a, stages + tile % 2 * stage_vectors, x);
        auto fold = [&](auto sees_all) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float max = state[r].max;
                const int first_seen = rows.row[r].position - a.left,
                          last_seen = rows.row[r].position + a.right;
#pragma unroll
                for (int j = 0; j < kTiles; ++j)
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const int column = first + 8 * j + 2 * (threadIdx.x % 4) + i;
                        const bool visible = decltype(sees_all)::value ||
                                             (rows.row[r].q != nullptr && (seen >> (2 * j + i) & 1) != 0 &&
                                              column >= first_seen && column <= last_seen);
                        float &logit = x[j][2 * r + i];
                        logit = visible ? logit * units.factor : -infinity();
                        max = fmaxf(max, logit);
                    }
                if (max > state[r].max)
                    state[r].raise(max, units.unit);
                const float shift = state[r].shift();
#pragma unroll
                for (int j = 0; j < kTiles; ++j)
#pragma unroll
                    for (int i = 0; i < 2; ++i)
                        state[r].sum += exp2_fast((x[j][2 * r + i] - shift) * units.unit);
            }
        };
        if (rows.sees_all(a, seen, first))
            fold(std::true_type{});
        else
            fold(std::false_type{});
        __syncthreads(); /* the stage is free again */
    }

    PartialLse *const of_row = scratch<PartialLse>();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int distance = 1; distance < 4; distance *= 2)
            state[r] = merge(state[r],
                             PartialLse{__shfl_xor_sync(kAllLanes, state[r].max, distance),
                                        __shfl_xor_sync(kAllLanes, state[r].sum, distance)},
                             units.unit);
        if (threadIdx.x % 4 == 0)
            of_row[warp * kWarpRows + r * 8 + threadIdx.x % 32 / 4] = state[r];
    }
    __syncthreads();
    const int own = threadIdx.x;
    PartialLse result = {-infinity(), 0.0f};
    if (own < kBlockRows)
        result = of_row[own];
    if (args.splits > 1) {
        float2 *const partial = args.partial + static_cast<int64_t>(unit) * args.splits * kBlockRows + own;
        if (own < kBlockRows)
            partial[split * kBlockRows] = make_float2(result.max, result.sum);
        if (!last_to_arrive(args.arrived + unit, 1, static_cast<uint32_t>(args.splits)))
            return;
        result = {-infinity(), 0.0f};
        for (int i = 0; own < kBlockRows && i < args.splits; ++i) {
            const float2 part = __ldcg(partial + i * kBlockRows);
            result = merge(result, PartialLse{part.x, part.y}, units.unit);
        }
    }
    const int f = first_row + own;
    if (own < kBlockRows && f < n_rows) {
        const int64_t head =
            (static_cast<int64_t>(layer) * a.batch + b) * a.heads + kv_head * a.group + f / a.rows;
        a.computed_lse[head * a.rows + f % a.rows] = make_float2(result.shift(), log2f(result.sum));
    }
}

template <typename T, int kTiles>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 2 : 3)
    row_lse_kernel(const __grid_constant__ LseArgs args) {
    let_next_start();
    await_launches();
    if constexpr (kServed<kTiles>)
        row_lse_block<T, kTiles>(args);
    else
        __trap();
}

template <typename T, int kTiles>
void launch(LseArgs &args, Launcher &launcher) {
    constexpr int kColumns = 8 * kTiles;
    const AttentionArgs &a = args.attention;
    const int64_t n_rows = static_cast<int64_t>(a.group) * a.rows;
    const int64_t lists = static_cast<int64_t>(a.layers) * a.batch * a.kv_heads;
    args.row_tiles = static_cast<int32_t>(ceil_div(n_rows, kBlockRows));
    const int64_t units = lists * args.row_tiles, key_tiles = ceil_div(a.keys, kColumns);
    /* How many splits there are is a matter of one sequence and layer, though with others beside them none
     * would be needed: each has so many tiles of keys that its rows and its end cost little next to them. */
    constexpr int64_t kLeastTiles = 16;
    const int64_t shared = static_cast<int64_t>(sizeof(Shared)) + 2 * tile_bytes<T>(a, kColumns);
    const int64_t wanted = kMostParts / clamp(a.kv_heads * args.row_tiles, 1, kMostParts);
    const int64_t splits = clamp(wanted, 1, clamp(key_tiles / kLeastTiles, 1, INT32_MAX));
    args.tiles_per_split = static_cast<int32_t>(ceil_div(key_tiles, splits));
    args.splits = static_cast<int32_t>(ceil_div(key_tiles, args.tiles_per_split));
    if (args.splits > 1) {
        args.partial = launcher.take<float2>(units * args.splits * kBlockRows);
        args.arrived = launcher.counters(units);
    }
    launcher.launch("row_lse", row_lse_kernel<T, kTiles>, args, units * args.splits, shared);
}

} // namespace

void compute_row_lse(AttentionArgs &a, int dtype, Launcher &launcher) {
    if (a.softmax_lse.data[0] != nullptr)
        return;
    a.computed_lse = launcher.take<float2>(static_cast<int64_t>(a.layers) * a.batch * a.heads * a.rows);
    LseArgs args{};
    args.attention = a;
    if (wgmma_serves(a, dtype, static_cast<int64_t>(a.group) * a.rows, a.keys, launcher)) {
        dispatch_wgmma_type(dtype, [&](auto type) { launch<decltype(type), kWgmmaTiles>(args, launcher); });
        return;
    }
    dispatch_type(dtype, [&](auto type) {
        using T = decltype(type);
        constexpr bool is_wide = sizeof(T) == 4;
        if (a.headdim <= 256)
            launch<T, is_wide ? 4 : 8>(args, launcher);
        else
            launch<T, is_wide ? 1 : 4>(args, launcher);
    });
}

} // namespace cuda
} // namespace attn_sampler
