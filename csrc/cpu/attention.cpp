/* Column scores and the attention map on the CPU.
 *
 * The ladder of ideas:
 * 1. With the row log-sum-exp known, a column's score needs that column's key and nothing else: the work is
 *    one [rows] x [columns] product, however long the context is.
 * 2. One tile serves everything: up to 64 rows times 64 keys, float32. The operand across the lanes is packed
 *    transposed once and reused; the other is walked row by row. Scores put columns across the lanes, so that
 *    the sum over rows is a vertical add; the log-sum-exp puts rows there, so that the sum over keys is.
 * 3. Query heads that share a key head are one long list of rows. Rows that cannot count are not even
 *    gathered.
 * 4. Work is cut by the problem's shape alone, and partial sums are added in the order of the cuts: any
 *    number of threads gives the same bits.
 */

#include <cmath>
#include <cstdlib>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace attn_sampler {
namespace {

constexpr int kTile = 64;             /* rows and columns of a tile */
constexpr int64_t kRowsPerUnit = 256; /* of one key head, the grain by which rows are dealt out */
constexpr int64_t kTasks = 64;        /* as many as this keep a large machine busy */
constexpr int64_t kKeysPerSplit = 1024;
constexpr double kLog2e = 1.4426950408889634;

constexpr int kMaxVectors = kLanes == 16 ? 4 : 2; /* accumulators of a micro-kernel fit the registers */

inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

/* c[kRows][kVectors * kLanes] = a[kRows][depth] b[depth][...] */
template <int kRows, int kVectors>
inline void micro_kernel(const float *a, int64_t a_stride, const float *b, int width, int64_t depth,
                         float *c) {
    VecF sum[kRows][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
            sum[r][v] = VecF{};
    for (int64_t d = 0; d < depth; ++d) {
        VecF column[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
            column[v] = load<VecF>(b + d * width + v * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
            const VecF x = splat(a[r * a_stride + d]);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v)
                sum[r][v] += x * column[v];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
            store(c + r * width + v * kLanes, sum[r][v]);
}

/* The same for any number of rows: as many as possible at a time, then half as many. */
template <int kRows, int kVectors>
inline void micro_rows(const float *a, int64_t a_stride, int64_t rows, const float *b, int width,
                       int64_t depth, float *c) {
    for (; rows >= kRows; rows -= kRows, a += kRows * a_stride, c += kRows * width)
        micro_kernel<kRows, kVectors>(a, a_stride, b, width, depth, c);
    if constexpr (kRows > 1)
        micro_rows<kRows / 2, kVectors>(a, a_stride, rows, b, width, depth, c);
}

/* c[rows][width] = a[rows][depth] b[depth][width]; width a multiple of kLanes. */
inline void multiply(const float *a, int64_t a_stride, int64_t rows, const float *b, int width, int64_t depth,
                     float *c) {
    int j = 0;
    if constexpr (kMaxVectors == 4)
        for (; j + 4 * kLanes <= width; j += 4 * kLanes)
            micro_rows<6, 4>(a, a_stride, rows, b + j, width, depth, c + j);
    for (; j + 2 * kLanes <= width; j += 2 * kLanes)
        micro_rows<kLanes == 16 ? 12 : 6, 2>(a, a_stride, rows, b + j, width, depth, c + j);
    for (; j + kLanes <= width; j += kLanes)
        micro_rows<kLanes == 16 ? 12 : 8, 1>(a, a_stride, rows, b + j, width, depth, c + j);
}

/* Rows of q or k at these addresses: a float32 matrix as `multiply` walks it, in place where it is one. */
struct Rows {
    const float *data;
    int64_t stride;
};

inline Rows as_rows(const void *const *address, int64_t n, int dtype, int64_t depth, float *buffer) {
    if (dtype == ATTN_SAMPLER_FLOAT32) {
        const float *const first = static_cast<const float *>(address[0]);
        const int64_t stride = n > 1 ? static_cast<const float *>(address[1]) - first : depth;
        bool regular = true;
        for (int64_t i = 2; i < n; ++i)
            regular = regular && static_cast<const float *>(address[i]) - first == i * stride;
        if (regular)
            return {first, stride};
    }
    for (int64_t i = 0; i < n; ++i)
        convert_to_float(address[i], dtype, depth, buffer + i * depth);
    return {buffer, depth};
}

/* packed[depth][width], the rows across the lanes; zeros in the lanes beyond n. */
inline void pack(const void *const *address, int64_t n, int dtype, int64_t depth, int width, float *buffer,
                 float *packed) {
    const Rows rows = as_rows(address, n, dtype, depth, buffer);
    for (int64_t d0 = 0; d0 < depth; d0 += kLanes) { /* in strips whose destination stays in the cache */
        const int64_t d1 = min_of(d0 + kLanes, depth);
        for (int64_t i = 0; i < n; ++i)
            for (int64_t d = d0; d < d1; ++d)
                packed[d * width + i] = rows.data[i * rows.stride + d];
        for (int64_t d = d0; d < d1; ++d)
            for (int64_t i = n; i < width; ++i)
                packed[d * width + i] = 0.0f;
    }
}

/* What the kernels below share of one problem. */
struct Plan {
    const AttentionProblem &p;
    int64_t group;               /* query heads of a key head */
    int64_t row_start, row_stop; /* rows that can count */
    int64_t key_start, key_stop; /* keys of the softmax */
    float scale;                 /* to base-2 logits */
    const double *lse;           /* computed base-2 log-sum-exp, [B, Hq, M]; null where it is given */

    explicit Plan(const AttentionProblem &problem)
        : p(problem), group(problem.heads / problem.kv_heads), row_start(0), row_stop(problem.n_rows),
          key_start(0), key_stop(problem.n_keys),
          scale(static_cast<float>(problem.params.softmax_scale * kLog2e)), lse(nullptr) {
        if (p.params.softmax_scope == ATTN_SAMPLER_SCOPE_BLOCK) {
            key_start = p.params.column_start;
            key_stop = p.params.column_stop;
            row_start = min_of(max_of(key_start - p.params.query_start, 0), p.n_rows);
            row_stop = max_of(min_of(key_stop - p.params.query_start, p.n_rows), row_start);
        }
    }

    const void *element(const void *base, int64_t offset) const {
        const int64_t size = p.dtype == ATTN_SAMPLER_FLOAT32 ? 4 : 2;
        return static_cast<const char *>(base) + offset * size;
    }
    const void *query(int64_t b, int64_t h, int64_t m) const {
        return element(p.q, b * p.q_stride[0] + h * p.q_stride[1] + m * p.q_stride[2]);
    }
    const void *key(int64_t b, int64_t hkv, int64_t n) const {
        return element(p.k, b * p.k_stride[0] + hkv * p.k_stride[1] + n * p.k_stride[2]);
    }
    bool row_counts(int64_t b, int64_t m) const {
        return p.query_mask == nullptr ||
               p.query_mask[b * p.query_mask_stride[0] + m * p.query_mask_stride[1]] != 0;
    }
    bool key_counts(int64_t b, int64_t n) const {
        return p.key_mask == nullptr || p.key_mask[b * p.key_mask_stride[0] + n * p.key_mask_stride[1]] != 0;
    }
    double row_lse(int64_t b, int64_t h, int64_t m) const {
        if (lse != nullptr)
            return lse[(b * p.heads + h) * p.n_rows + m];
        const double given = static_cast<double>(
            p.softmax_lse[b * p.lse_stride[0] + h * p.lse_stride[1] + m * p.lse_stride[2]]);
        return p.params.lse_base == ATTN_SAMPLER_LSE_BASE_2 ? given : given * kLog2e;
    }
    /* Where row m stands, counted from key `origin`; bounded, so that it fits the lanes. */
    int32_t position(int64_t m, int64_t origin) const {
        const int64_t from_start = p.params.query_start - origin + m;
        return static_cast<int32_t>(max_of(min_of(from_start, 1 << 30), -1));
    }
};

/* Memory of one thread: three tiles. */
struct Scratch {
    float *packed;  /* [D][kTile] */
    float *rows;    /* [kTile][D] */
    float *product; /* [kTile][kTile] */
};

/* Scratch for all threads and a block beside it, from one allocation. */
class Workspace {
  public:
    Workspace(int num_threads, int64_t headdim, int64_t extra_bytes)
        : headdim_(headdim), per_thread_(round_up((2 * headdim + kTile) * kTile * 4, 64)),
          extra_(num_threads * per_thread_),
          memory_(static_cast<char *>(
              std::aligned_alloc(64, static_cast<size_t>(extra_ + round_up(max_of(extra_bytes, 1), 64))))) {}
    ~Workspace() { std::free(memory_); }
    Workspace(const Workspace &) = delete;
    Workspace &operator=(const Workspace &) = delete;

    explicit operator bool() const { return memory_ != nullptr; }
    Scratch scratch(int worker) const {
        float *const start = reinterpret_cast<float *>(memory_ + worker * per_thread_);
        return {start, start + headdim_ * kTile, start + 2 * headdim_ * kTile};
    }
    template <typename T>
    T *extra() const {
        return reinterpret_cast<T *>(memory_ + extra_);
    }

  private:
    int64_t headdim_, per_thread_, extra_;
    char *memory_;
};

template <typename Body>
void for_each_task(int num_threads, int64_t count, Body &body) {
    parallel_for(
        num_threads, count,
        [](void *context, int64_t index, int worker) { (*static_cast<Body *>(context))(index, worker); },
        &body);
}

/* ---- Row log-sum-exp -------------------------------------------------------------------------------------
 */

/* Base-2 log-sum-exp of up to kTile of a key head's rows, over keys [key, key_stop): maximum and sum by lane.
 */
struct LseTask {
    const Plan &plan;
    int64_t b, hkv;

    /* Row f of the key head's list is row f % rows of query head f / rows of the group. */
    void operator()(int64_t first, int64_t n, int64_t key, int64_t key_stop, const Scratch &s, float *maximum,
                    float *sum) const {
        const AttentionProblem &p = plan.p;
        const int64_t rows = plan.row_stop - plan.row_start;
        const int width = static_cast<int>(round_up(n, kLanes));
        const void *address[kTile];
        int32_t position[kTile];
        int32_t furthest = -1;
        for (int64_t i = 0; i < width; ++i) {
            const int64_t f = first + min_of(i, n - 1), m = plan.row_start + f % rows;
            address[i] = plan.query(b, hkv * plan.group + f / rows, m);
            position[i] = plan.position(m, 0);
            furthest = position[i] > furthest ? position[i] : furthest;
        }
        pack(address, n, p.dtype, p.headdim, width, s.rows, s.packed);
        for (int i = 0; i < width; ++i) {
            maximum[i] = -kInf;
            sum[i] = 0.0f;
        }
        if (p.params.causal)
            key_stop = min_of(key_stop, static_cast<int64_t>(furthest) + 1);
        while (key < key_stop) {
            int64_t at[kTile];
            int64_t count = 0;
            for (; key < key_stop && count < kTile; ++key)
                if (plan.key_counts(b, key)) {
                    address[count] = plan.key(b, hkv, key);
                    at[count++] = key;
                }
            if (count == 0)
                break;
            const Rows keys = as_rows(address, count, p.dtype, p.headdim, s.rows);
            multiply(keys.data, keys.stride, count, s.packed, width, p.headdim, s.product);
            for (int j = 0; j < width; j += kLanes)
                update(s.product + j, width, count, at, load<VecI>(position + j), maximum + j, sum + j);
        }
    }

    void update(float *logits, int width, int64_t count, const int64_t *at, VecI position, float *maximum,
                float *sum) const {
        const VecF old_max = load<VecF>(maximum);
        VecF new_max = old_max;
        for (int64_t i = 0; i < count; ++i) {
            VecF x = load<VecF>(logits + i * width) * plan.scale;
            if (plan.p.params.causal)
                x = position >= static_cast<int32_t>(at[i]) ? x : splat(-kInf);
            store(logits + i * width, x);
            new_max = x > new_max ? x : new_max;
        }
        /* A maximum that is not finite would make inf - inf. */
        const VecF shift = new_max - new_max == 0.0f ? new_max : VecF{};
        VecF total = load<VecF>(sum) * exp2_vec(old_max - shift);
        for (int64_t i = 0; i < count; ++i)
            total += exp2_vec(load<VecF>(logits + i * width) - shift);
        store(maximum, new_max);
        store(sum, total);
    }
};

/* The base-2 log-sum-exp of every row that can count, into lse [B, Hq, M], which the plan then reads. */
bool compute_lse(Plan &plan, double *lse) {
    const AttentionProblem &p = plan.p;
    plan.lse = lse;
    const int64_t rows = plan.row_stop - plan.row_start;
    const int64_t tiles = ceil_div(plan.group * rows, kTile);
    const int64_t keys = plan.key_stop - plan.key_start;
    const int64_t units = p.batch * p.kv_heads * tiles;
    if (units == 0)
        return true;
    /* Few rows, many keys: cut the keys too. */
    const int64_t splits = max_of(1, min_of(kTasks / units, keys / kKeysPerSplit));
    const int64_t keys_per_split = ceil_div(keys, splits);
    const Workspace work(p.num_threads, p.headdim, units * splits * 2 * kTile * 4);
    if (!work)
        return false;
    float *const partial = work.extra<float>(); /* [units, splits, {maximum, sum}, kTile] */
    auto body = [&](int64_t index, int worker) {
        const int64_t split = index % splits, unit = index / splits, tile = unit % tiles;
        const LseTask task{plan, unit / tiles / p.kv_heads, unit / tiles % p.kv_heads};
        const int64_t first = tile * kTile, key = plan.key_start + split * keys_per_split;
        float *const result = partial + index * 2 * kTile;
        task(first, min_of(kTile, plan.group * rows - first), key,
             min_of(key + keys_per_split, plan.key_stop), work.scratch(worker), result, result + kTile);
    };
    for_each_task(p.num_threads, units * splits, body);

    for (int64_t unit = 0; unit < units; ++unit) {
        const int64_t tile = unit % tiles, bh = unit / tiles;
        const int64_t first = tile * kTile, n = min_of(kTile, plan.group * rows - first);
        for (int64_t i = 0; i < n; ++i) {
            const float *const result = partial + unit * splits * 2 * kTile + i;
            float maximum = -kInf;
            for (int64_t split = 0; split < splits; ++split)
                maximum = result[split * 2 * kTile] > maximum ? result[split * 2 * kTile] : maximum;
            const float shift = std::isfinite(maximum) ? maximum : 0.0f;
            double sum = 0.0;
            for (int64_t split = 0; split < splits; ++split) {
                const float *const part = result + split * 2 * kTile;
                const float part_shift = std::isfinite(part[0]) ? part[0] : 0.0f;
                sum += std::exp2(static_cast<double>(part_shift) - shift) * part[kTile];
            }
            const int64_t f = first + i, h = bh % p.kv_heads * plan.group + f / rows;
            lse[(bh / p.kv_heads * p.heads + h) * p.n_rows + plan.row_start + f % rows] =
                shift + std::log2(sum);
        }
    }
    return true;
}

/* ---- The tile of attention weights -----------------------------------------------------------------------
 */

/* A tile of columns of one sequence. */
struct Columns {
    int64_t b, first; /* key position of lane 0 */
    int n, width;
    int64_t kv_head;             /* whose keys are packed; -1 before the first */
    bool all_count;              /* no lane is masked for all rows */
    VecI counts[kTile / kLanes]; /* lanes that are columns with an unmasked key */

    Columns(const Plan &plan, int64_t b_, int64_t tile)
        : b(b_), first(plan.p.params.column_start + tile * kTile),
          n(static_cast<int>(min_of(kTile, plan.p.params.column_stop - first))),
          width(static_cast<int>(round_up(n, kLanes))), kv_head(-1), all_count(true) {
        int32_t lanes[kTile] = {};
        for (int i = 0; i < n; ++i) {
            lanes[i] = plan.key_counts(b, first + i) ? -1 : 0;
            all_count = all_count && lanes[i] != 0;
        }
        for (int v = 0; v < width / kLanes; ++v)
            counts[v] = load<VecI>(lanes + v * kLanes);
    }

    void pack_keys(const Plan &plan, int64_t hkv, const Scratch &s) {
        if (kv_head == hkv)
            return;
        const void *address[kTile];
        for (int i = 0; i < n; ++i)
            address[i] = plan.key(b, hkv, first + i);
        pack(address, n, plan.p.dtype, plan.p.headdim, width, s.rows, s.packed);
        kv_head = hkv;
    }
};

/* Up to kTile rows that count, gathered. */
struct RowTile {
    const void *address[kTile];
    float lse_high[kTile], lse_low[kTile]; /* base 2; the sum of both has the precision of a double */
    int32_t position[kTile];               /* lane at which the row stands */
    int64_t row[kTile];
    int n = 0;

    bool full() const { return n == kTile; }

    /* Adds row m of head h, unless it has no weight in any of the columns. */
    void add(const Plan &plan, const Columns &columns, int64_t h, int64_t m) {
        if (!plan.row_counts(columns.b, m))
            return;
        const int32_t at = plan.position(m, columns.first);
        if (plan.p.params.causal && at < 0)
            return;
        const double lse = plan.row_lse(columns.b, h, m);
        if (lse == -static_cast<double>(kInf))
            return;
        address[n] = plan.query(columns.b, h, m);
        lse_high[n] = static_cast<float>(lse);
        lse_low[n] = std::isfinite(lse_high[n]) ? static_cast<float>(lse - lse_high[n]) : 0.0f;
        position[n] = at;
        row[n++] = m;
    }
};

/* s.product[rows.n][columns.width] = the attention weights; exactly 0 where a row does not see a column. */
inline void weights_tile(const Plan &plan, const Columns &columns, const RowTile &rows, const Scratch &s) {
    const attn_sampler_attention_params &params = plan.p.params;
    const Rows q = as_rows(rows.address, rows.n, plan.p.dtype, plan.p.headdim, s.rows);
    multiply(q.data, q.stride, rows.n, s.packed, columns.width, plan.p.headdim, s.product);
    const bool select = !columns.all_count || columns.n < columns.width || params.causal || !params.diagonal;
    for (int r = 0; r < rows.n; ++r) {
        const int32_t last_seen = params.causal ? rows.position[r] : kTile;
        const int32_t dropped = params.diagonal ? -1 : rows.position[r];
        for (int v = 0; v < columns.width / kLanes; ++v) {
            float *const at = s.product + r * columns.width + v * kLanes;
            VecF x = load<VecF>(at) * plan.scale - rows.lse_high[r];
            x = exp2_vec(x - rows.lse_low[r]);
            if (select) {
                const VecI lane = lane_index() + v * kLanes;
                const VecI keep = columns.counts[v] & (lane <= last_seen) & (lane != dropped);
                x = keep ? x : VecF{};
            }
            store(at, x);
        }
    }
}

/* The larger, NaN if one is. */
inline VecF max_or_nan(VecF a, VecF b) { return (a > b) | (a != a) ? a : b; }

inline void write(float *out, double value, bool accumulate) {
    *out = accumulate ? *out + static_cast<float>(value) : static_cast<float>(value);
}

/* ---- Column scores ---------------------------------------------------------------------------------------
 */

/* Scores of one tile of columns over a range of units. A unit is a stretch of a key head's list of rows, or,
 * where heads must not mix (per head, maximum), the rows of one query head. */
struct ScoreTask {
    const Plan &plan;
    Columns &columns;
    const Scratch &s;

    /* Adds rows [first, last) of the key head's list to total. */
    void reduce(int64_t hkv, int64_t first, int64_t last, double *total) const {
        const int64_t rows = plan.row_stop - plan.row_start;
        const int vectors = columns.width / kLanes;
        const bool is_max = plan.p.params.reduction == ATTN_SAMPLER_REDUCTION_MAX;
        columns.pack_keys(plan, hkv, s);
        VecF largest[kTile / kLanes] = {};
        while (first < last) {
            RowTile tile;
            for (; first < last && !tile.full(); ++first)
                tile.add(plan, columns, hkv * plan.group + first / rows, plan.row_start + first % rows);
            if (tile.n == 0)
                continue;
            weights_tile(plan, columns, tile, s);
            for (int v = 0; v < vectors; ++v) {
                const float *const column = s.product + v * kLanes;
                if (is_max) {
                    for (int r = 0; r < tile.n; ++r)
                        largest[v] = max_or_nan(load<VecF>(column + r * columns.width), largest[v]);
                    continue;
                }
                VecF sum{};
                for (int r = 0; r < tile.n; ++r)
                    sum += load<VecF>(column + r * columns.width);
                for (int i = 0; i < kLanes; ++i)
                    total[v * kLanes + i] += static_cast<double>(sum[i]);
            }
        }
        if (is_max)
            for (int i = 0; i < columns.n; ++i)
                total[i] += static_cast<double>(largest[i / kLanes][i % kLanes]);
    }

    /* The rows that may see column i, for the mean. */
    int64_t rows_seeing(int i) const {
        const attn_sampler_attention_params &params = plan.p.params;
        if (!plan.key_counts(columns.b, columns.first + i))
            return 0;
        int64_t count = 0;
        for (int64_t m = plan.row_start; m < plan.row_stop; ++m) {
            const int64_t at = params.query_start + m - columns.first;
            count +=
                plan.row_counts(columns.b, m) && (!params.causal || i <= at) && (params.diagonal || i != at);
        }
        return count;
    }
};

} // namespace

namespace ATTN_SAMPLER_ISA {

bool column_scores(const AttentionProblem &p) {
    Plan plan(p);
    const int64_t rows = plan.row_stop - plan.row_start, list = plan.group * rows;
    const int64_t tiles = ceil_div(p.params.column_stop - p.params.column_start, kTile);
    const bool heads_apart = p.params.per_head || p.params.reduction == ATTN_SAMPLER_REDUCTION_MAX;
    const int64_t unit_rows = heads_apart ? rows : kRowsPerUnit;
    const int64_t units_per_list = heads_apart ? plan.group : ceil_div(list, kRowsPerUnit);
    const int64_t units = p.kv_heads * units_per_list;
    const int64_t splits = max_of(1, min_of(units, kTasks / max_of(p.batch * tiles, 1)));
    const bool partial_sums = splits > 1 && !p.params.per_head;
    const int64_t lse_count = p.softmax_lse == nullptr ? p.batch * p.heads * p.n_rows : 0;
    const int64_t partial_count = partial_sums ? p.batch * tiles * splits * kTile : 0;
    const Workspace work(p.num_threads, p.headdim, (lse_count + partial_count) * 8);
    if (!work || (lse_count > 0 && !compute_lse(plan, work.extra<double>())))
        return false;
    double *const partial = work.extra<double>() + lse_count; /* [B, tiles, splits, kTile] */

    auto write_columns = [&](const ScoreTask &task, int64_t h, const double *total) {
        const Columns &columns = task.columns;
        float *const out = p.out + columns.b * p.out_stride[0] + h * p.out_stride[1];
        const bool is_mean = p.params.reduction == ATTN_SAMPLER_REDUCTION_MEAN;
        for (int i = 0; i < columns.n; ++i) {
            const double count = is_mean ? static_cast<double>(max_of(task.rows_seeing(i), 1)) : 1.0;
            const int64_t column = columns.first + i - p.params.column_start;
            write(out + column * p.out_stride[3], total[i] / count, p.params.accumulate != 0);
        }
    };
    auto body = [&](int64_t index, int worker) {
        const int64_t split = index % splits, tile = index / splits % tiles;
        Columns columns(plan, index / splits / tiles, tile);
        const Scratch scratch = work.scratch(worker);
        const ScoreTask task{plan, columns, scratch};
        double total[kTile] = {};
        for (int64_t u = units * split / splits; u < units * (split + 1) / splits; ++u) {
            const int64_t first = u % units_per_list * unit_rows;
            task.reduce(u / units_per_list, first, min_of(first + unit_rows, list), total);
            if (p.params.per_head) {
                write_columns(task, u, total);
                memset(total, 0, sizeof(total));
            }
        }
        if (partial_sums)
            memcpy(partial + index * kTile, total, sizeof(total));
        else if (!p.params.per_head)
            write_columns(task, 0, total);
    };
    for_each_task(p.num_threads, p.batch * tiles * splits, body);

    const Scratch scratch = work.scratch(0);
    for (int64_t bt = 0; partial_sums && bt < p.batch * tiles; ++bt) {
        Columns columns(plan, bt / tiles, bt % tiles);
        double total[kTile] = {};
        for (int64_t split = 0; split < splits; ++split)
            for (int i = 0; i < columns.n; ++i)
                total[i] += partial[(bt * splits + split) * kTile + i];
        write_columns(ScoreTask{plan, columns, scratch}, 0, total);
    }
    return true;
}

bool attention_map(const AttentionProblem &p) {
    Plan plan(p);
    const int64_t map_rows = p.params.row_stop - p.params.row_start;
    const int64_t row_tiles = ceil_div(map_rows, kTile);
    const int64_t column_tiles = ceil_div(p.params.column_stop - p.params.column_start, kTile);
    const int64_t units = p.batch * row_tiles * column_tiles;
    const int64_t splits = max_of(1, min_of(p.heads, kTasks / max_of(units, 1)));
    const bool partial_sums = splits > 1 && !p.params.per_head;
    const int64_t lse_count = p.softmax_lse == nullptr ? p.batch * p.heads * p.n_rows : 0;
    const int64_t partial_count = partial_sums ? units * splits : p.num_threads;
    const Workspace work(p.num_threads, p.headdim, lse_count * 8 + partial_count * kTile * kTile * 4);
    if (!work || (lse_count > 0 && !compute_lse(plan, work.extra<double>())))
        return false;
    float *const partial = reinterpret_cast<float *>(work.extra<double>() + lse_count);

    auto write_tile = [&](const Columns &columns, int64_t unit, int64_t h, const float *total) {
        const int64_t row0 = unit / column_tiles % row_tiles * kTile;
        float *const out = p.out + columns.b * p.out_stride[0] + h * p.out_stride[1];
        for (int64_t r = 0; r < min_of(kTile, map_rows - row0); ++r)
            for (int i = 0; i < columns.n; ++i)
                write(out + (row0 + r) * p.out_stride[2] +
                          (columns.first + i - p.params.column_start) * p.out_stride[3],
                      static_cast<double>(total[r * kTile + i]), p.params.accumulate != 0);
    };
    auto body = [&](int64_t index, int worker) {
        const int64_t split = index % splits, unit = index / splits;
        Columns columns(plan, unit / column_tiles / row_tiles, unit % column_tiles);
        const Scratch s = work.scratch(worker);
        const int64_t row0 = p.params.row_start + unit / column_tiles % row_tiles * kTile;
        const int64_t first = max_of(row0, plan.row_start);
        const int64_t last = min_of(min_of(row0 + kTile, p.params.row_stop), plan.row_stop);
        float *const total = partial + (partial_sums ? index : worker) * kTile * kTile;
        memset(total, 0, kTile * kTile * 4);
        for (int64_t h = p.heads * split / splits; h < p.heads * (split + 1) / splits; ++h) {
            RowTile tile;
            for (int64_t m = first; m < last; ++m)
                tile.add(plan, columns, h, m);
            if (tile.n > 0) {
                columns.pack_keys(plan, h / plan.group, s);
                weights_tile(plan, columns, tile, s);
                for (int r = 0; r < tile.n; ++r)
                    for (int i = 0; i < columns.n; ++i)
                        total[(tile.row[r] - row0) * kTile + i] += s.product[r * columns.width + i];
            }
            if (p.params.per_head) {
                write_tile(columns, unit, h, total);
                memset(total, 0, kTile * kTile * 4);
            }
        }
        if (!partial_sums && !p.params.per_head)
            write_tile(columns, unit, 0, total);
    };
    for_each_task(p.num_threads, units * splits, body);

    for (int64_t unit = 0; partial_sums && unit < units; ++unit) {
        float *const total = partial + unit * splits * kTile * kTile;
        for (int64_t split = 1; split < splits; ++split)
            for (int i = 0; i < kTile * kTile; ++i)
                total[i] += total[split * kTile * kTile + i];
        write_tile(Columns(plan, unit / column_tiles / row_tiles, unit % column_tiles), unit, 0, total);
    }
    return true;
}

} // namespace ATTN_SAMPLER_ISA
} // namespace attn_sampler
