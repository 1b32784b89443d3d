/* The attention map: a block owns 64 rows times 32 columns and adds up heads in registers. Where tiles are
 * few, heads are cut among blocks, and the last to arrive adds their tiles in the order of the heads. */
#include "cuda/plan.h"

namespace attn_sampler {
namespace cuda {
namespace {

constexpr int kMapTiles = 4, kMapColumns = 8 * kMapTiles;

struct MapArgs {
    AttentionArgs attention;
    View<float, 4> out; /* batch, head, row, column */
    float *partial;     /* [tiles, members, elements, threads] */
    uint32_t *arrived;  /* [tiles] */
    int32_t first_row;  /* of the map, counted from the rows that count: negative before them */
    int32_t rows;       /* of the map */
    int32_t row_tiles, column_tiles;
    int32_t bins, members; /* heads apart, or 1; blocks among which a bin's heads are cut */
    bool accumulate;
};

template <typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 2 : 3)
    attention_map_kernel(const __grid_constant__ MapArgs args) {
    const AttentionArgs &a = args.attention;
    const int index = static_cast<int>(blockIdx.x), member = index % args.members,
              tile = index / args.members;
    const int bin = tile % args.bins, column_tile = tile / args.bins % args.column_tiles;
    const int row_tile = tile / args.bins / args.column_tiles % args.row_tiles;
    const int b = tile / args.bins / args.column_tiles / args.row_tiles;
    const int64_t first_column = a.column_start + column_tile * kMapColumns;
    const int count = min(kMapColumns, a.columns - column_tile * kMapColumns);
    const uint32_t seen = seen_columns<kMapTiles>(a, b, first_column, count);
    const int own_row = row_tile * kBlockRows + threadIdx.x / 32 * kWarpRows + threadIdx.x % 32 / 4;

    uint4 *const keys = reinterpret_cast<uint4 *>(dynamic_shared() + sizeof(Shared));
    float total[kMapTiles][4];
#pragma unroll
    for (int j = 0; j < kMapTiles; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            total[j][i] = 0.0f;
    const int heads = args.bins > 1 ? 1 : a.heads, first_head = args.bins > 1 ? bin : 0;
    const int last = first_head + static_cast<int>(static_cast<int64_t>(heads) * (member + 1) / args.members);
    int loaded = -1;
    WarpTile<T, kMapTiles> rows;
    for (int head = first_head + static_cast<int>(static_cast<int64_t>(heads) * member / args.members);
         head < last; ++head) {
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
        if (head / a.group != loaded && __syncthreads_or(any)) {
            loaded = head / a.group;
            load_keys<T, kMapColumns>(a, 0, b, loaded, first_column, count, keys);
            copy_wait<0>();
            __syncthreads();
        }
        if (!any)
            continue;
        const float scale = logit_scale<T>(a, 0, b, head / a.group);
        float weight[kMapTiles][4];
        rows.multiply(a, keys, weight);
        rows.weigh(a, scale, seen, weight);
#pragma unroll
        for (int j = 0; j < kMapTiles; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                total[j][i] += weight[j][i];
    }

    if (args.members > 1) {
        constexpr int kElements = 4 * kMapTiles;
        float *const partial =
            args.partial + static_cast<int64_t>(tile) * args.members * kElements * kThreads + threadIdx.x;
#pragma unroll
        for (int e = 0; e < kElements; ++e)
            partial[(member * kElements + e) * kThreads] = total[e / 4][e % 4];
        if (!last_to_arrive(args.arrived + tile, static_cast<uint32_t>(args.members)))
            return;
#pragma unroll
        for (int e = 0; e < kElements; ++e) {
            float sum = 0.0f;
            for (int m = 0; m < args.members; ++m)
                sum += __ldcg(partial + (m * kElements + e) * kThreads);
            total[e / 4][e % 4] = sum;
        }
    }
    float *const out = args.out.data + b * args.out.stride[0] + bin * args.out.stride[1];
#pragma unroll
    for (int j = 0; j < kMapTiles; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = own_row + 8 * (i / 2), column = 8 * j + 2 * (threadIdx.x % 4) + i % 2;
            if (row < args.rows && column < count) {
                float *const at = out + row * args.out.stride[2] +
                                  (column_tile * kMapColumns + column) * args.out.stride[3];
                *at = args.accumulate ? *at + total[j][i] : total[j][i];
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
        args.out = p.out;
        args.first_row = static_cast<int32_t>(p.params.rows.start - a.row_start);
        args.rows = static_cast<int32_t>(p.params.rows.stop - p.params.rows.start);
        args.row_tiles = static_cast<int32_t>(ceil_div(args.rows, kBlockRows));
        args.column_tiles = static_cast<int32_t>(ceil_div(a.columns, kMapColumns));
        args.bins = p.params.per_head ? a.heads : 1;
        args.accumulate = p.params.accumulate != 0;
        const int64_t tiles = static_cast<int64_t>(a.batch) * args.row_tiles * args.column_tiles * args.bins;
        check_extent("q: blocks of a launch", tiles, INT32_MAX);
        args.members =
            static_cast<int32_t>(clamp(launcher.target_blocks(2, 0) / tiles, 1, args.bins > 1 ? 1 : a.heads));
        if (args.members > 1) {
            args.partial = launcher.take<float>(tiles * args.members * kBlockRows * kMapColumns);
            args.arrived = launcher.counters(tiles);
        }
        dispatch_type(p.dtype, [&](auto type) {
            using T = decltype(type);
            launcher.launch("attention_map", attention_map_kernel<T>, args, tiles * args.members,
                            static_cast<int64_t>(sizeof(Shared)) + tile_bytes<T>(a, kMapColumns));
        });
    });
}

} // namespace cuda
} // namespace attn_sampler
