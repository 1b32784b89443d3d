/* The attention map: a block owns 64 rows times 32 columns and adds up heads in registers. Reduced, it owns
 * 64 rows, and adds up what remains of their tiles of columns too. Where that is too few blocks, heads and
 * tiles are cut among several, and the last to arrive adds their sums in a fixed order. */
#include "cuda/plan.h"

namespace attn_sampler {
namespace cuda {
namespace {

constexpr int kMapTiles = 4, kMapColumns = 8 * kMapTiles;

struct MapArgs {
    AttentionArgs attention;
    View<const uint8_t, 2> column_mask; /* may be null */
    View<float, 4> out;                 /* batch, head, row, column */
    float *partial;                     /* [tiles, members, elements, threads] */
    uint32_t *arrived;                  /* [tiles] */
    int32_t first_row; /* of the map, counted from the rows that count: negative before them */
    int32_t rows;      /* of the map */
    int32_t row_tiles, column_tiles;
    int32_t bins, members;        /* heads apart, or 1; blocks among which a bin's steps are cut */
    bool accumulate, own_columns; /* the latter: of a reduced map, only the entries at the rows' positions */
};

/* As seen_columns, of those that count. */
__device__ inline uint32_t counted_columns(const MapArgs &args, int b, int tile) {
    const AttentionArgs &a = args.attention;
    const int first = tile * kMapColumns, count = min(kMapColumns, a.columns - first);
    uint32_t seen = seen_columns<kMapTiles>(a, b, a.column_start + first, count);
    if (args.column_mask.data != nullptr)
#pragma unroll
        for (int n = 0; n < 2 * kMapTiles; ++n) {
            const int column = 8 * (n / 2) + 2 * (threadIdx.x % 4) + n % 2;
            if (column < count && element(args.column_mask, b, first + column) == 0)
                seen &= ~(1u << n);
        }
    return seen;
}

template <typename T, bool kReduced>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 2 : 3)
    attention_map_kernel(const __grid_constant__ MapArgs args) {
    await_launches();
    const AttentionArgs &a = args.attention;
    const int index = static_cast<int>(blockIdx.x), member = index % args.members,
              tile = index / args.members;
    const int tiles_per_row = kReduced ? 1 : args.column_tiles;
    const int bin = tile % args.bins, row_tile = tile / args.bins / tiles_per_row % args.row_tiles;
    const int b = tile / args.bins / tiles_per_row / args.row_tiles;
    int column_tile = kReduced ? 0 : tile / args.bins % args.column_tiles;
    uint32_t seen = kReduced ? 0 : counted_columns(args, b, column_tile);
    const int own_row = row_tile * kBlockRows + threadIdx.x / 32 * kWarpRows + threadIdx.x % 32 / 4;

    /* Steps are heads or, of a reduced map, heads of a tile of columns after those of another. */
    const int heads = args.bins > 1 ? 1 : a.heads, first_head = args.bins > 1 ? bin : 0;
    const int group = args.bins > 1 ? 1 : a.group;
    int first_tile = 0, tiles = kReduced ? args.column_tiles : 1;
    if (kReduced && args.own_columns) {
        const int64_t own = a.query_start + args.first_row + row_tile * kBlockRows - a.column_start;
        const int64_t columns = a.columns;
        first_tile = static_cast<int>(min(max(own, int64_t{0}), columns) / kMapColumns);
        tiles = static_cast<int>((min(max(own + kBlockRows, int64_t{0}), columns) + kMapColumns - 1) /
                                 kMapColumns) -
                first_tile;
    }
    using Step = std::conditional_t<kReduced, int64_t, int>;
    const Step steps = static_cast<Step>(tiles) * heads;

    uint4 *const keys = reinterpret_cast<uint4 *>(dynamic_shared() + sizeof(Shared));
    constexpr int kElements = kReduced ? 2 : 4 * kMapTiles;
    float total[kElements];
#pragma unroll
    for (int e = 0; e < kElements; ++e)
        total[e] = 0.0f;
    const Step last = static_cast<Step>(static_cast<int64_t>(steps) * (member + 1) / args.members);
    Step loaded = -1;
    WarpTile<T, kMapTiles> rows;
    for (Step step = static_cast<Step>(static_cast<int64_t>(steps) * member / args.members); step < last;
         ++step) {
        const int head = first_head + static_cast<int>(kReduced ? step % heads : step);
        if (kReduced)
            column_tile = first_tile + static_cast<int>(step / heads);
        const int64_t first_column = a.column_start + column_tile * kMapColumns;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = own_row + 8 * r, m = args.first_row + row;
            if (row < args.rows && m >= 0 && m < a.rows)
                rows.row[r].find(a, 0, b, head, m, first_column, kMapColumns, true);
            else
                rows.row[r].clear();
        }
        const bool any = rows.any();
        if (any)
            rows.load(a);
        if (step / group != loaded && __syncthreads_or(any)) {
            loaded = step / group;
            load_keys<T, kMapColumns>(a, 0, b, head / a.group, first_column,
                                      min(kMapColumns, a.columns - column_tile * kMapColumns), keys);
            if (kReduced)
                seen = counted_columns(args, b, column_tile);
            copy_wait<0>();
            __syncthreads();
        }
        if (!any)
            continue;
        const float scale = logit_scale<T>(a, 0, b, head / a.group);
        float weight[kMapTiles][4];
        rows.multiply(a, keys, weight);
        rows.weigh(a, scale, seen, weight);
        float sum[2] = {};
#pragma unroll
        for (int e = 0; e < 4 * kMapTiles; ++e) {
            const float x = weight[e / 4][e % 4];
            const int r = e % 4 / 2, column = 8 * (e / 4) + 2 * (threadIdx.x % 4) + e % 2;
            if constexpr (!kReduced)
                total[e] += x;
            else if (!args.own_columns || column == rows.row[r].position)
                sum[r] += x;
        }
        if constexpr (kReduced)
            for (int r = 0; r < 2; ++r)
                total[r] += sum[r];
    }
    if constexpr (kReduced)
        for (int r = 0; r < 2; ++r)
            for (int distance = 1; distance < 4; distance *= 2)
                total[r] += __shfl_xor_sync(kAllLanes, total[r], distance);

    if (args.members > 1) {
        float *const partial =
            args.partial + static_cast<int64_t>(tile) * args.members * kElements * kThreads + threadIdx.x;
#pragma unroll
        for (int e = 0; e < kElements; ++e)
            partial[(member * kElements + e) * kThreads] = total[e];
        if (!last_to_arrive(args.arrived + tile, 1, static_cast<uint32_t>(args.members)))
            return;
#pragma unroll
        for (int e = 0; e < kElements; ++e) {
            float sum = 0.0f;
            for (int m = 0; m < args.members; ++m)
                sum += __ldcg(partial + (m * kElements + e) * kThreads);
            total[e] = sum;
        }
    }
    float *const out = args.out.data + b * args.out.stride[0] + bin * args.out.stride[1];
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
        const int row = own_row + 8 * (kReduced ? e : e % 4 / 2);
        const int column = kReduced ? threadIdx.x % 4
                                    : column_tile * kMapColumns + 8 * (e / 4) + 2 * (threadIdx.x % 4) + e % 2;
        if (row < args.rows && column < (kReduced ? 1 : a.columns)) {
            float *const at = out + row * args.out.stride[2] + column * args.out.stride[3];
            *at = args.accumulate ? *at + total[e] : total[e];
        }
    }
}

} // namespace

int64_t attention_map(const AttentionProblem &p, const attn_sampler_exec &exec) {
    if (p.batch == 0)
        return 0;
    return run(exec, [&](Launcher &launcher) {
        MapArgs args{};
        AttentionArgs &a = args.attention;
        a = attention_args(&p, 1);
        compute_row_lse(a, p.dtype, launcher);
        args.column_mask = p.column_mask;
        args.out = p.out;
        args.first_row = static_cast<int32_t>(p.params.rows.start - a.row_start);
        args.rows = static_cast<int32_t>(p.params.rows.stop - p.params.rows.start);
        args.row_tiles = static_cast<int32_t>(ceil_div(args.rows, kBlockRows));
        args.column_tiles = static_cast<int32_t>(ceil_div(a.columns, kMapColumns));
        args.bins = p.params.per_head ? a.heads : 1;
        args.accumulate = p.params.accumulate != 0;
        args.own_columns = p.params.reduction == ATTN_SAMPLER_MAP_REDUCTION_DIAGONAL;
        const bool is_reduced = p.params.reduction != ATTN_SAMPLER_MAP_REDUCTION_NONE;
        const int64_t rows = static_cast<int64_t>(a.batch) * args.row_tiles * args.bins;
        const int64_t tiles = is_reduced ? rows : rows * args.column_tiles;
        check_extent("q: blocks of a launch", tiles, INT32_MAX);
        /* At most three tiles have the positions of 64 rows. */
        const int64_t tiles_of_step = !is_reduced ? 1 : args.own_columns ? 3 : args.column_tiles;
        const int64_t tiles_of_sequence = max_of(tiles / max_of(a.batch, 1), 1);
        args.members = static_cast<int32_t>(
            clamp(kMostParts / 2 / tiles_of_sequence, 1, tiles_of_step * (args.bins > 1 ? 1 : a.heads)));
        if (args.members > 1) {
            const int64_t elements = is_reduced ? 2 : 4 * kMapTiles;
            args.partial = launcher.take<float>(tiles * args.members * elements * kThreads);
            args.arrived = launcher.counters(tiles);
        }
        dispatch_type(p.dtype, [&](auto type) {
            using T = decltype(type);
            launcher.launch("attention_map",
                            is_reduced ? attention_map_kernel<T, true> : attention_map_kernel<T, false>, args,
                            tiles * args.members,
                            static_cast<int64_t>(sizeof(Shared)) + tile_bytes<T>(a, kMapColumns));
        });
    });
}

} // namespace cuda
} // namespace attn_sampler
