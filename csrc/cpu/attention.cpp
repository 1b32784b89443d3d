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
 * 4. Work is cut by the shape of one sequence's problem, and partial sums are added in the order of the cuts:
 * a sequence has the same bits for any number of threads, alone or in a batch.
 */

#include <cmath>
#include <cstdlib>

#include "cpu/kernels.h"
#include "cpu/matmul.h"
#include "cpu/parallel.h"

namespace attn_sampler {
namespace {

constexpr int64_t kRowsPerUnit = 256; /* of one key head, the grain by which rows are dealt out */
constexpr int64_t kTasks = 64;        /* as many as this keep a large machine busy */
constexpr int64_t kKeysPerSplit = 1024;
constexpr int64_t kSoftmaxBytes =
    3 << 18; /* of a row tile's exponentials over all keys, in the second-level cache */
constexpr int64_t kSequenceBytes = 1 << 20; /* of a sequence's partial sums, at the most */
constexpr int64_t kPartialBytes = 8 << 20;  /* of all that are held at once */
constexpr double kLog2e = 1.4426950408889634;

/* What the kernels below share of one problem. */
struct Plan {
    const AttentionProblem &p;
    int64_t group;               /* query heads of a key head */
    int64_t row_start, row_stop; /* rows that can count */
    int64_t key_start, key_stop; /* keys of the softmax */
    const double *lse;           /* computed base-2 log-sum-exp, [B, Hq, M]; null where it is given */

    explicit Plan(const AttentionProblem &problem)
        : p(problem), group(problem.heads / problem.kv_heads), row_start(0), row_stop(problem.n_rows),
          key_start(0), key_stop(problem.n_keys), lse(nullptr) {
        if (p.params.softmax_scope == ATTN_SAMPLER_SCOPE_BLOCK) {
            key_start = p.params.columns.start;
            key_stop = p.params.columns.stop;
            row_start = min_of(max_of(key_start - p.params.query_start, 0), p.n_rows);
            row_stop = max_of(min_of(key_stop - p.params.query_start, p.n_rows), row_start);
        }
    }

    const void *element(const void *base, int64_t offset) const {
        return static_cast<const char *>(base) + offset * element_size(p.dtype);
    }
    const void *query(int64_t b, int64_t h, int64_t m) const {
        return element(p.q.data, b * p.q.stride[0] + h * p.q.stride[1] + m * p.q.stride[2]);
    }
    const void *key(int64_t b, int64_t hkv, int64_t n) const {
        return element(p.k.data, b * p.k.stride[0] + hkv * p.k.stride[1] + n * p.k.stride[2]);
    }
    bool row_counts(int64_t b, int64_t m) const {
        return p.query_mask.data == nullptr ||
               p.query_mask.data[b * p.query_mask.stride[0] + m * p.query_mask.stride[1]] != 0;
    }
    bool key_counts(int64_t b, int64_t n) const {
        return p.key_mask.data == nullptr ||
               p.key_mask.data[b * p.key_mask.stride[0] + n * p.key_mask.stride[1]] != 0;
    }
    /* From products of a key head to base-2 logits. */
    float scale(int64_t b, int64_t hkv) const {
        double scale = p.params.softmax_scale * kLog2e;
        if (p.q_descale.data != nullptr)
            scale *= static_cast<double>(
                p.q_descale.data[b * p.q_descale.stride[0] + hkv * p.q_descale.stride[1]]);
        if (p.k_descale.data != nullptr)
            scale *= static_cast<double>(
                p.k_descale.data[b * p.k_descale.stride[0] + hkv * p.k_descale.stride[1]]);
        return static_cast<float>(scale);
    }
    /* Where row m stands, counted from key `origin`; bounded, so that it fits the lanes. */
    int32_t position(int64_t m, int64_t origin) const {
        const int64_t from_start = p.params.query_start - origin + m;
        return static_cast<int32_t>(max_of(min_of(from_start, 1 << 30), -1));
    }
};

/* Memory of one thread. */
struct Scratch {
    float *packed;  /* [D][kTile] */
    float *rows;    /* [kTile][D] */
    float *product; /* [kTile][kTile], or what SoftmaxTask keeps */
    int32_t *keys;  /* the keys that count */
};

/* Scratch for all threads and a block beside it, from one allocation. */
class Workspace {
  public:
    Workspace(int num_threads, int64_t headdim, int64_t extra_bytes, int64_t product = kTile * kTile,
              int64_t keys = 0)
        : tile_(headdim * kTile), product_(product),
          per_thread_(round_up((2 * tile_ + product + keys) * 4, 64)), extra_(num_threads * per_thread_),
          memory_(static_cast<char *>(
              std::aligned_alloc(64, static_cast<size_t>(extra_ + round_up(max_of(extra_bytes, 1), 64))))) {}
    ~Workspace() { std::free(memory_); }
    Workspace(const Workspace &) = delete;
    Workspace &operator=(const Workspace &) = delete;

    explicit operator bool() const { return memory_ != nullptr; }
    Scratch scratch(int worker) const {
        float *const start = reinterpret_cast<float *>(memory_ + worker * per_thread_);
        float *const product = start + 2 * tile_;
        return {start, start + tile_, product, reinterpret_cast<int32_t *>(product + product_)};
    }
    template <typename T>
    T *extra() const {
        return reinterpret_cast<T *>(memory_ + extra_);
    }

  private:
    int64_t tile_, product_, per_thread_, extra_;
    char *memory_;
};

inline void prefetch(const void *p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64)
        __builtin_prefetch(static_cast<const char *>(p) + i);
}

template <typename Body>
void for_each_task(int num_threads, int64_t count, Body &body) {
    parallel_for(
        num_threads, count,
        [](void *context, int64_t index, int worker) { (*static_cast<Body *>(context))(index, worker); },
        &body);
}

/* What to subtract from logits whose maximum this is: never inf - inf, and far above what is not +inf beside
 * it. */
inline VecF shift_of(VecF top) {
    const VecF finite = splat(__FLT_MAX__);
    return top > finite ? finite : top < -finite ? VecF{} : top;
}

/* The softmax of a tile of rows, which stand across the lanes, over keys that come block by block. Logits are
 * kept in units, as products or, where the scale is negative, their opposites: no rounding, so that weights
 * of large logits agree with the log-sum-exp. Only a scale too small for that is multiplied in. */
template <typename Words>
struct Softmax {
    const Plan &plan;
    float scale, unit; /* of a product, and of what is kept of it, in base-2 logits */
    float top[kTile];  /* the largest logit of each row so far, in units */
    float sum[kTile];  /* of the exponentials relative to it */

    Softmax(const Plan &p, int64_t b, int64_t hkv) : plan(p), scale(p.scale(b, hkv)) {
        unit = std::fabs(scale) > 0x1p-100f ? std::fabs(scale) : 1.0f;
        for (int i = 0; i < kTile; ++i) {
            top[i] = -kInf;
            sum[i] = 0.0f;
        }
    }

    /* Whether the largest product is the largest logit. */
    bool keeps_products() const { return !plan.p.params.causal && scale > 0x1p-100f; }

    /* Takes in the keys at these addresses and positions, up to kTile of them, before those at `next`, for
     * the packed rows at their positions. Leaves the exponentials, 0 where a row does not see a key, in
     * x[count][width]. */
    void add(const void *const *address, const int32_t *at, int64_t count, const void *next,
             const int32_t *position, const Scratch &s, int width, float *x) {
        const int64_t depth = plan.p.headdim;
        float before[kTile];
        memcpy(before, top, sizeof(top));
        const Rows keys = as_rows<Words>(address, count, plan.p.dtype, depth, s.rows, next);
        multiply<Words>(keys, s.packed, width, depth / Words::kElements, x, keeps_products() ? top : nullptr);
        for (int j = 0; j < width; j += kLanes) {
            if (!keeps_products())
                scale_logits(at, count, load<VecI>(position + j), width, x + j, top + j);
            const VecF shift = shift_of(load<VecF>(top + j));
            const VecF earlier = load<VecF>(sum + j) * exp2_vec(load<VecF>(before + j) - shift, unit);
            VecF total{}; /* of this block: long sums lose precision */
            for (int64_t i = 0; i < count; ++i) {
                const VecF e = exp2_vec(load<VecF>(x + i * width + j) - shift, unit);
                store(x + i * width + j, e);
                total += e;
            }
            store(sum + j, earlier + total);
        }
    }

  private:
    void scale_logits(const int32_t *at, int64_t count, VecI position, int width, float *x,
                      float *largest) const {
        const float units = unit == 1.0f ? scale : scale > 0.0f ? 1.0f : -1.0f;
        VecF m = load<VecF>(largest);
        for (int64_t i = 0; i < count; ++i) {
            VecF logit = load<VecF>(x + i * width) * units;
            if (plan.p.params.causal)
                logit = position >= at[i] ? logit : splat(-kInf);
            store(x + i * width, logit);
            m = larger(logit, m);
        }
        store(largest, m);
    }
};

/* The largest logit, in units, and the sum of exponentials relative to it, of up to kTile of a key head's
 * rows, over keys [key, key_stop). Both have room for kTile. */
template <typename Words>
struct LseTask {
    const Plan &plan;
    int64_t b, hkv;

    /* Row f of the key head's list is row f % rows of query head f / rows of the group. */
    void operator()(int64_t first, int64_t n, int64_t key, int64_t key_stop, const Scratch &s, float *maximum,
                    float *sum) const {
        const AttentionProblem &p = plan.p;
        const int64_t rows = plan.row_stop - plan.row_start;
        const int width = static_cast<int>(round_up(n, kLanes));
        const void *address[kTile] = {};
        int32_t position[kTile];
        int32_t furthest = -1;
        for (int64_t i = 0; i < width; ++i) {
            const int64_t f = first + min_of(i, n - 1), m = plan.row_start + f % rows;
            address[i] = plan.query(b, hkv * plan.group + f / rows, m);
            position[i] = plan.position(m, 0);
            furthest = position[i] > furthest ? position[i] : furthest;
        }
        pack<Words>(address, n, p.dtype, p.headdim, width, s.rows, s.packed);
        Softmax<Words> softmax(plan, b, hkv);
        if (p.params.causal)
            key_stop = min_of(key_stop, static_cast<int64_t>(furthest) + 1);
        while (key < key_stop) {
            int32_t at[kTile];
            int64_t count = 0;
            for (; key < key_stop && count < kTile; ++key)
                if (plan.key_counts(b, key)) {
                    address[count] = plan.key(b, hkv, key);
                    at[count++] = static_cast<int32_t>(key);
                }
            if (count == 0)
                break;
            softmax.add(address, at, count, nullptr, position, s, width, s.product);
        }
        memcpy(maximum, softmax.top, sizeof(softmax.top));
        memcpy(sum, softmax.sum, sizeof(softmax.sum));
    }
};

/* The base-2 log-sum-exp of every row that can count, into lse [B, Hq, M], which the plan then reads. */
template <typename Words>
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
    const int64_t tasks = min_of(p.kv_heads * tiles, kTasks); /* of one sequence */
    const int64_t splits = max_of(1, min_of(kTasks / tasks, keys / kKeysPerSplit));
    const int64_t keys_per_split = ceil_div(keys, splits);
    const Workspace work(p.num_threads, p.headdim, units * splits * 2 * kTile * 4);
    if (!work)
        return false;
    float *const partial = work.extra<float>(); /* [units, splits, {maximum, sum}, kTile] */
    auto body = [&](int64_t index, int worker) {
        const int64_t split = index % splits, unit = index / splits, tile = unit % tiles;
        const LseTask<Words> task{plan, unit / tiles / p.kv_heads, unit / tiles % p.kv_heads};
        const int64_t first = tile * kTile, key = plan.key_start + split * keys_per_split;
        float *const result = partial + index * 2 * kTile;
        task(first, min_of(kTile, plan.group * rows - first), key,
             min_of(key + keys_per_split, plan.key_stop), work.scratch(worker), result, result + kTile);
    };
    for_each_task(p.num_threads, units * splits, body);

    for (int64_t unit = 0; unit < units; ++unit) {
        const int64_t tile = unit % tiles, bh = unit / tiles;
        const int64_t first = tile * kTile, n = min_of(kTile, plan.group * rows - first);
        const double scale = Softmax<Words>(plan, bh / p.kv_heads, bh % p.kv_heads).unit;
        for (int64_t i = 0; i < n; ++i) {
            const float *const result = partial + unit * splits * 2 * kTile + i;
            float maximum = -kInf;
            for (int64_t split = 0; split < splits; ++split)
                maximum = result[split * 2 * kTile] > maximum ? result[split * 2 * kTile] : maximum;
            const double shift = std::isfinite(maximum) ? static_cast<double>(maximum) : 0.0;
            double sum = 0.0;
            for (int64_t split = 0; split < splits; ++split) {
                const float *const part = result + split * 2 * kTile;
                const double part_shift = std::isfinite(part[0]) ? static_cast<double>(part[0]) : 0.0;
                if (part[kTile] != 0.0f) /* else nothing was seen, and its shift means nothing */
                    sum += std::exp2((part_shift - shift) * scale) * static_cast<double>(part[kTile]);
            }
            const int64_t f = first + i, h = bh % p.kv_heads * plan.group + f / rows;
            lse[(bh / p.kv_heads * p.heads + h) * p.n_rows + plan.row_start + f % rows] =
                shift * scale + std::log2(sum);
        }
    }
    return true;
}

/* A tile of columns of one sequence. */
struct Columns {
    int64_t b, first; /* key position of lane 0 */
    int n, width;
    int64_t kv_head;             /* whose keys are packed; -1 before the first */
    bool all_count;              /* no lane is masked for all rows */
    VecI counts[kTile / kLanes]; /* lanes that are columns with an unmasked key */

    Columns(const Plan &plan, int64_t b_, int64_t tile)
        : b(b_), first(plan.p.params.columns.start + tile * kTile),
          n(static_cast<int>(min_of(kTile, plan.p.params.columns.stop - first))),
          width(static_cast<int>(round_up(n, kLanes))), kv_head(-1), all_count(true) {
        int32_t lanes[kTile] = {};
        for (int i = 0; i < n; ++i) {
            lanes[i] = plan.key_counts(b, first + i) ? -1 : 0;
            all_count = all_count && lanes[i] != 0;
        }
        for (int v = 0; v < width / kLanes; ++v)
            counts[v] = load<VecI>(lanes + v * kLanes);
    }

    template <typename Words>
    void pack_keys(const Plan &plan, int64_t hkv, const Scratch &s) {
        if (kv_head == hkv)
            return;
        const void *address[kTile] = {};
        for (int i = 0; i < n; ++i)
            address[i] = plan.key(b, hkv, first + i);
        pack<Words>(address, n, plan.p.dtype, plan.p.headdim, width, s.rows, s.packed);
        kv_head = hkv;
        if (hkv + 1 < plan.p.kv_heads)
            for (int i = 0; i < n; ++i)
                prefetch(plan.key(b, hkv + 1, first + i), plan.p.headdim * element_size(plan.p.dtype));
    }
};

/* Up to kTile rows that count, gathered. */
struct RowTile {
    const void *address[kTile] = {};
    float lse_high[kTile], lse_low[kTile]; /* base 2; the sum of both has the precision of a double */
    int32_t position[kTile];               /* lane at which the row stands */
    int64_t row[kTile];
    int n = 0;
    const void *next = nullptr; /* where other rows are, if not after these */

    /* Adds rows m, m + 1, ... of head h, but for those that have no weight in any of the columns, until
     * `stop` or the tile is full; returns the row to go on with. */
    int64_t add(const Plan &plan, const Columns &columns, int64_t h, int64_t m, int64_t stop) {
        const AttentionProblem &p = plan.p;
        const int64_t b = columns.b, step = p.q.stride[2] * element_size(p.dtype);
        const char *q = static_cast<const char *>(plan.query(b, h, m));
        const double *const computed =
            plan.lse == nullptr ? nullptr : plan.lse + (b * p.heads + h) * p.n_rows;
        const float *const given =
            p.softmax_lse.data + b * p.softmax_lse.stride[0] + h * p.softmax_lse.stride[1];
        const int64_t given_step = p.softmax_lse.stride[2];
        const double given_unit = p.params.lse_base == ATTN_SAMPLER_LSE_BASE_2 ? 1.0 : kLog2e;
        const bool causal = p.params.causal != 0, masked = p.query_mask.data != nullptr;
        for (; m < stop && n < kTile; ++m, q += step) {
            const int32_t at = plan.position(m, columns.first);
            const double lse =
                computed != nullptr ? computed[m] : static_cast<double>(given[m * given_step]) * given_unit;
            if ((masked && !plan.row_counts(b, m)) || (causal && at < 0) || lse == -static_cast<double>(kInf))
                continue;
            address[n] = q;
            lse_high[n] = static_cast<float>(lse);
            lse_low[n] = std::isfinite(lse_high[n]) ? static_cast<float>(lse - lse_high[n]) : 0.0f;
            position[n] = at;
            row[n++] = m;
        }
        return m;
    }
};

/* The attention weights of a tile of rows for a tile of columns, a vector of columns at a time. */
class Weights {
  public:
    template <typename Words>
    Weights(const Plan &plan, const Columns &columns, const RowTile &rows, const Scratch &s, Words)
        : columns_(columns), rows_(rows), product_(s.product), scale_(plan.scale(columns.b, columns.kv_head)),
          causal_(plan.p.params.causal != 0), diagonal_(plan.p.params.diagonal != 0),
          select_(!columns.all_count || columns.n < columns.width || causal_ || !diagonal_) {
        const int64_t depth = plan.p.headdim;
        const Rows q = as_rows<Words>(rows.address, rows.n, plan.p.dtype, depth, s.rows, rows.next);
        multiply<Words>(q, s.packed, columns.width, depth / Words::kElements, s.product);
    }

    /* Calls use(row, weights) for vector v of all rows in turn. Exactly 0 where a row does not see a column.
     */
    template <typename Use>
    void for_each_row(int v, const Use &use) const {
        if (!select_) {
            for (int r = 0; r < rows_.n; ++r)
                use(r, weights(r, v));
            return;
        }
        const VecI lane = lane_index() + v * kLanes;
        for (int r = 0; r < rows_.n; ++r) {
            VecI keep = columns_.counts[v];
            if (causal_)
                keep &= lane <= rows_.position[r];
            if (!diagonal_)
                keep &= lane != rows_.position[r];
            use(r, keep ? weights(r, v) : VecF{});
        }
    }

  private:
    VecF weights(int r, int v) const {
        const VecF x = load<VecF>(product_ + r * columns_.width + v * kLanes);
        const VecF above = exact_multiply_add(x, splat(scale_), splat(-rows_.lse_high[r]));
        return exp2_vec(above - rows_.lse_low[r], 1.0f);
    }

    const Columns &columns_;
    const RowTile &rows_;
    const float *const product_;
    const float scale_;
    const bool causal_, diagonal_, select_;
};

/* The larger, NaN if one is. */
inline VecF max_or_nan(VecF a, VecF b) { return ((a > b) | (a != a)) ? a : b; }

inline void write(float *out, double value, bool accumulate) {
    *out = accumulate ? *out + static_cast<float>(value) : static_cast<float>(value);
}

/* The rows that may see a key, for the mean. */
int64_t rows_seeing(const Plan &plan, int64_t b, int64_t key) {
    const attn_sampler_attention_params &params = plan.p.params;
    const int64_t own = key - params.query_start; /* the row that stands at the key */
    const int64_t first = params.causal ? max_of(plan.row_start, own) : plan.row_start;
    if (!plan.key_counts(b, key))
        return 0;
    int64_t count = max_of(plan.row_stop - first, 0);
    if (plan.p.query_mask.data != nullptr) {
        count = 0;
        for (int64_t m = first; m < plan.row_stop; ++m)
            count += plan.row_counts(b, m);
    }
    const bool own_is_dropped =
        !params.diagonal && own >= first && own < plan.row_stop && plan.row_counts(b, own);
    return count - own_is_dropped;
}

/* Scores of one tile of columns, given the log-sum-exp. */
template <typename Words>
struct ScoreTask {
    const Plan &plan;
    Columns columns;
    const Scratch s;

    ScoreTask(const Plan &p, int64_t b, int64_t tile, const Scratch &scratch)
        : plan(p), columns(p, b, tile), s(scratch) {}

    /* Adds rows [first, last) of the key head's list to total, or their maximum. */
    void reduce(int64_t hkv, int64_t first, int64_t last, double *total) {
        const int64_t rows = plan.row_stop - plan.row_start;
        const bool is_max = plan.p.params.reduction == ATTN_SAMPLER_REDUCTION_MAX;
        columns.pack_keys<Words>(plan, hkv, s);
        VecF largest[kTile / kLanes] = {};
        while (first < last) {
            RowTile tile;
            while (first < last && tile.n < kTile) {
                const int64_t m = plan.row_start + first % rows;
                const int64_t stop = min_of(m + last - first, plan.row_stop);
                first += tile.add(plan, columns, hkv * plan.group + first / rows, m, stop) - m;
            }
            if (tile.n == 0)
                continue;
            if (first == last && first == plan.group * rows && hkv + 1 < plan.p.kv_heads)
                tile.next = plan.query(columns.b, (hkv + 1) * plan.group, plan.row_start);
            else if (first < last && first % rows == 0)
                tile.next = plan.query(columns.b, hkv * plan.group + first / rows, plan.row_start);
            const Weights weights(plan, columns, tile, s, Words());
            for (int v = 0; v < columns.width / kLanes; ++v) {
                if (is_max) {
                    weights.for_each_row(
                        v, [&](int, VecF weight) { largest[v] = max_or_nan(weight, largest[v]); });
                    continue;
                }
                VecF sum{};
                weights.for_each_row(v, [&](int, VecF weight) { sum += weight; });
                for (int i = 0; i < kLanes && v * kLanes + i < columns.n; ++i)
                    total[v * kLanes + i] += static_cast<double>(sum[i]);
            }
        }
        for (int i = 0; is_max && i < columns.n; ++i)
            total[i] += static_cast<double>(largest[i / kLanes][i % kLanes]);
    }
};

/* Scores of all columns, with the softmax taken on the way: a tile of rows meets all keys once, and its
 * logits stay in the second-level cache until they are weights. Rows stand across the lanes. */
template <typename Words>
struct SoftmaxTask {
    const Plan &plan;
    const int64_t b;
    const int64_t lanes; /* rows at a time */
    const Scratch s;
    float *const factors; /* [blocks of kTile keys][kTile] */
    float *const largest; /* [columns], for the maximum */
    int64_t n_keys = 0;   /* in s.keys */

    SoftmaxTask(const Plan &p, int64_t b_, int64_t lanes_, const Scratch &scratch, float *largest_)
        : plan(p), b(b_), lanes(lanes_), s(scratch), factors(s.product + lanes * (p.key_stop - p.key_start)),
          largest(largest_) {
        for (int64_t key = plan.key_start; key < plan.key_stop; ++key)
            if (plan.key_counts(b, key))
                s.keys[n_keys++] = static_cast<int32_t>(key);
    }

    void reduce(int64_t hkv, int64_t first, int64_t last, double *total) {
        const attn_sampler_attention_params &params = plan.p.params;
        const bool is_max = params.reduction == ATTN_SAMPLER_REDUCTION_MAX;
        const int64_t columns = params.columns.stop - params.columns.start;
        for (int64_t c = 0; is_max && c < columns; ++c)
            largest[c] = 0.0f;
        while (first < last)
            first = add_tile(hkv, first, last, total);
        for (int64_t c = 0; is_max && c < columns; ++c)
            total[c] += static_cast<double>(largest[c]);
    }

  private:
    /* Takes as many rows as the lanes hold; returns where the next tile starts. */
    int64_t add_tile(int64_t hkv, int64_t first, int64_t last, double *total) {
        const AttentionProblem &p = plan.p;
        const int64_t rows = plan.row_stop - plan.row_start;
        const void *address[kTile] = {};
        int32_t position[kTile];
        int32_t furthest = -1;
        int64_t n = 0;
        for (; first < last && n < lanes; ++first) {
            const int64_t m = plan.row_start + first % rows;
            if (!plan.row_counts(b, m))
                continue;
            address[n] = plan.query(b, hkv * plan.group + first / rows, m);
            position[n] = plan.position(m, 0);
            furthest = position[n] > furthest ? position[n] : furthest;
            ++n;
        }
        int64_t seen = n_keys;
        while (p.params.causal && seen > 0 && s.keys[seen - 1] > furthest)
            --seen;
        if (n == 0 || seen == 0)
            return first;
        const int width = static_cast<int>(round_up(n, kLanes));
        for (int64_t i = n; i < width; ++i)
            position[i] = -1;
        pack<Words>(address, n, p.dtype, p.headdim, width, s.rows, s.packed);

        Softmax<Words> softmax(plan, b, hkv);
        for (int64_t i = 0; i < seen; i += kTile) {
            const int64_t count = min_of(kTile, seen - i);
            for (int64_t r = 0; r < count; ++r)
                address[r] = plan.key(b, hkv, s.keys[i + r]);
            const bool next_head = i + count == seen && first == last && hkv + 1 < p.kv_heads;
            const void *const next = next_head ? plan.key(b, hkv + 1, s.keys[0]) : nullptr;
            softmax.add(address, s.keys + i, count, next, position, s, width, s.product + i * width);
            memcpy(factors_of(i), softmax.top, sizeof(softmax.top));
        }
        /* From exponentials relative to the largest logit up to their block to weights. */
        for (int64_t i = 0; i < seen; i += kTile)
            for (int j = 0; j < width; j += kLanes) {
                const VecF top = load<VecF>(factors_of(i) + j), sum = load<VecF>(softmax.sum + j);
                const VecF shift = shift_of(load<VecF>(softmax.top + j));
                const VecF factor = exp2_vec(shift_of(top) - shift, softmax.unit) / sum;
                /* Where all logits so far are -inf, unless one was NaN, which makes all of the row NaN. */
                const VecI nothing = (top == -kInf) & (sum == sum);
                store(factors_of(i) + j, nothing | (sum == 0.0f) ? VecF{} : factor);
            }

        const auto weight = [&](int64_t i, int j) {
            return load<VecF>(s.product + i * width + j) * load<VecF>(factors_of(i) + j);
        };
        const auto selected = [&](int64_t i, int j) {
            const int32_t key = s.keys[i];
            const VecI at = load<VecI>(position + j);
            const VecI padding = lane_index() + j >= static_cast<int32_t>(n);
            const VecI unseen = p.params.causal ? at < key : VecI{};
            const VecI dropped = p.params.diagonal ? VecI{} : at == key;
            return (unseen | dropped | padding) ? VecF{} : weight(i, j);
        };
        const int64_t from = first_key_from(p.params.columns.start, seen);
        const int64_t to = first_key_from(p.params.columns.stop, seen);
        if (p.params.causal || !p.params.diagonal || n < width)
            add_columns(from, to, width, selected, total);
        else
            add_columns(from, to, width, weight, total);
        return first;
    }

    float *factors_of(int64_t key) const { return factors + key / kTile * kTile; }

    /* The first of s.keys[0, count) that is no less, or count. */
    int64_t first_key_from(int64_t key, int64_t count) const {
        int64_t first = 0;
        while (first < count) {
            const int64_t middle = (first + count) / 2;
            if (s.keys[middle] < key)
                first = middle + 1;
            else
                count = middle;
        }
        return first;
    }

    /* Reduces the weights of keys s.keys[from, to) over the rows. */
    template <typename Weight>
    void add_columns(int64_t from, int64_t to, int width, const Weight &weight, double *total) {
        const attn_sampler_attention_params &params = plan.p.params;
        for (; from < to; from += kLanes) {
            const int count = static_cast<int>(min_of(kLanes, to - from));
            const int32_t *const keys = s.keys + from;
            VecF row[kLanes] = {};
            if (params.reduction == ATTN_SAMPLER_REDUCTION_MAX) {
                for (int i = 0; i < count; ++i) {
                    for (int j = 0; j < width; j += kLanes)
                        row[i] = max_or_nan(weight(from + i, j), row[i]);
                    float &x = largest[keys[i] - params.columns.start];
                    for (int l = 0; l < kLanes; ++l)
                        x = row[i][l] > x || row[i][l] != row[i][l] ? row[i][l] : x;
                }
                continue;
            }
            for (int i = 0; i < count; ++i)
                for (int j = 0; j < width; j += kLanes)
                    row[i] += weight(from + i, j);
            float sum[kLanes];
            store(sum, sums_of_lanes(row));
            for (int i = 0; i < count; ++i)
                total[keys[i] - params.columns.start] += static_cast<double>(sum[i]);
        }
    }
};

/* How a column reduction is dealt out. A unit is a stretch of a key head's list of rows, or, where heads must
 * not mix (per head, maximum), the rows of one query head; the units of a tile of columns are shared among
 * splits. */
struct Cut {
    int64_t tiles, tile_columns, unit_rows, units_per_list, units, splits;
    int64_t batch;     /* sequences at a time */
    bool partial_sums; /* the splits' sums are added up at the end */

    Cut(const Plan &plan, int64_t columns, int64_t most_columns, int64_t rows_per_unit)
        : tiles(ceil_div(columns, most_columns)), tile_columns(min_of(columns, most_columns)) {
        const AttentionProblem &p = plan.p;
        const bool heads_apart = p.params.per_head || p.params.reduction == ATTN_SAMPLER_REDUCTION_MAX;
        const int64_t rows = plan.row_stop - plan.row_start, list = plan.group * rows;
        unit_rows = heads_apart ? rows : rows_per_unit;
        units_per_list = heads_apart ? plan.group : ceil_div(list, rows_per_unit);
        units = p.kv_heads * units_per_list;
        const int64_t sequence_bytes = tiles * tile_columns * 8;
        splits = min_of(units, min_of(kTasks / tiles, kSequenceBytes / sequence_bytes));
        splits = max_of(splits, 1);
        partial_sums = splits > 1 && !p.params.per_head;
        batch =
            partial_sums ? max_of(1, min_of(p.batch, kPartialBytes / (splits * sequence_bytes))) : p.batch;
    }
    /* Columns' sums that are held at once: all partial ones, or one tile for each thread. */
    int64_t totals(const AttentionProblem &p) const {
        return (partial_sums ? batch * tiles * splits : p.num_threads) * tile_columns;
    }
};

/* Runs the reduction: make_task(b, tile, worker) gives an object whose reduce() adds rows to a tile's
 * columns. */
template <typename MakeTask>
void reduce_columns(const Plan &plan, const Cut &cut, double *totals, const MakeTask &make_task) {
    const AttentionProblem &p = plan.p;
    const int64_t columns = p.params.columns.stop - p.params.columns.start;
    const int64_t list = plan.group * (plan.row_stop - plan.row_start);
    auto write_columns = [&](int64_t b, int64_t h, int64_t tile, const double *total) {
        float *const out = p.out.data + b * p.out.stride[0] + h * p.out.stride[1];
        const bool is_mean = p.params.reduction == ATTN_SAMPLER_REDUCTION_MEAN;
        const int64_t first = tile * cut.tile_columns;
        for (int64_t c = first; c < min_of(first + cut.tile_columns, columns); ++c) {
            const int64_t rows = is_mean ? max_of(rows_seeing(plan, b, p.params.columns.start + c), 1) : 1;
            write(out + c * p.out.stride[3], total[c - first] / static_cast<double>(rows),
                  p.params.accumulate != 0);
        }
    };
    int64_t first_sequence = 0;
    auto body = [&](int64_t index, int worker) {
        const int64_t split = index % cut.splits, tile = index / cut.splits % cut.tiles;
        const int64_t b = first_sequence + index / cut.splits / cut.tiles;
        double *const total = totals + (cut.partial_sums ? index : worker) * cut.tile_columns;
        const size_t bytes = static_cast<size_t>(cut.tile_columns) * sizeof(double);
        memset(total, 0, bytes);
        auto task = make_task(b, tile, worker);
        for (int64_t u = cut.units * split / cut.splits; u < cut.units * (split + 1) / cut.splits; ++u) {
            const int64_t first = u % cut.units_per_list * cut.unit_rows;
            task.reduce(u / cut.units_per_list, first, min_of(first + cut.unit_rows, list), total);
            if (p.params.per_head) {
                write_columns(b, u, tile, total);
                memset(total, 0, bytes);
            }
        }
        if (!cut.partial_sums && !p.params.per_head)
            write_columns(b, 0, tile, total);
    };
    for (; first_sequence < p.batch; first_sequence += cut.batch) {
        const int64_t sequences = min_of(cut.batch, p.batch - first_sequence);
        for_each_task(p.num_threads, sequences * cut.tiles * cut.splits, body);
        for (int64_t i = 0; cut.partial_sums && i < sequences * cut.tiles; ++i) {
            double *const total = totals + i * cut.splits * cut.tile_columns;
            for (int64_t split = 1; split < cut.splits; ++split)
                for (int64_t c = 0; c < cut.tile_columns; ++c)
                    total[c] += total[split * cut.tile_columns + c];
            write_columns(first_sequence + i / cut.tiles, 0, i % cut.tiles, total);
        }
    }
}

/* How many rows may meet all keys at once; 0 where there are too many keys for one vector of rows. */
int64_t softmax_lanes(int64_t rows, int64_t keys) {
    int64_t lanes = kTile;
    while (lanes > kLanes && (lanes / 2 >= rows || lanes * keys * 4 > kSoftmaxBytes))
        lanes /= 2;
    return lanes * keys * 4 > kSoftmaxBytes ? 0 : lanes;
}

template <typename Words>
bool column_scores_of(const AttentionProblem &p) {
    Plan plan(p);
    const int64_t columns = p.params.columns.stop - p.params.columns.start;
    const int64_t rows = plan.row_stop - plan.row_start, keys = plan.key_stop - plan.key_start;
    const bool heads_apart = p.params.per_head || p.params.reduction == ATTN_SAMPLER_REDUCTION_MAX;
    const int64_t lanes = softmax_lanes(heads_apart ? rows : plan.group * rows, keys);
    if (p.softmax_lse.data == nullptr && lanes > 0) {
        const Cut cut(plan, columns, columns, lanes);
        const int64_t totals = cut.totals(p);
        const Workspace work(p.num_threads, p.headdim, totals * 8 + p.num_threads * columns * 4,
                             keys * lanes + round_up(keys, kTile), keys);
        if (!work)
            return false;
        float *const largest = reinterpret_cast<float *>(work.extra<double>() + totals);
        reduce_columns(plan, cut, work.extra<double>(), [&](int64_t b, int64_t, int worker) {
            return SoftmaxTask<Words>(plan, b, lanes, work.scratch(worker), largest + worker * columns);
        });
        return true;
    }
    const Cut cut(plan, columns, kTile, kRowsPerUnit);
    const int64_t lse_count = p.softmax_lse.data == nullptr ? p.batch * p.heads * p.n_rows : 0;
    const Workspace work(p.num_threads, p.headdim, (lse_count + cut.totals(p)) * 8);
    if (!work || (lse_count > 0 && !compute_lse<Words>(plan, work.extra<double>())))
        return false;
    reduce_columns(plan, cut, work.extra<double>() + lse_count, [&](int64_t b, int64_t tile, int worker) {
        return ScoreTask<Words>(plan, b, tile, work.scratch(worker));
    });
    return true;
}

template <typename Words>
bool attention_map_of(const AttentionProblem &p) {
    Plan plan(p);
    const int64_t map_rows = p.params.rows.stop - p.params.rows.start;
    const int64_t row_tiles = ceil_div(map_rows, kTile);
    const int64_t column_tiles = ceil_div(p.params.columns.stop - p.params.columns.start, kTile);
    const int64_t units = p.batch * row_tiles * column_tiles;
    const int64_t splits = max_of(1, min_of(p.heads, kTasks / 4 / (row_tiles * column_tiles)));
    const bool partial_sums = splits > 1 && !p.params.per_head;
    const int64_t lse_count = p.softmax_lse.data == nullptr ? p.batch * p.heads * p.n_rows : 0;
    const int64_t partial_count = partial_sums ? units * splits : p.num_threads;
    const Workspace work(p.num_threads, p.headdim, lse_count * 8 + partial_count * kTile * kTile * 4);
    if (!work || (lse_count > 0 && !compute_lse<Words>(plan, work.extra<double>())))
        return false;
    float *const partial = reinterpret_cast<float *>(work.extra<double>() + lse_count);

    auto write_tile = [&](const Columns &columns, int64_t unit, int64_t h, const float *total) {
        const int64_t row0 = unit / column_tiles % row_tiles * kTile;
        float *const out = p.out.data + columns.b * p.out.stride[0] + h * p.out.stride[1];
        for (int64_t r = 0; r < min_of(kTile, map_rows - row0); ++r)
            for (int i = 0; i < columns.n; ++i)
                write(out + (row0 + r) * p.out.stride[2] +
                          (columns.first + i - p.params.columns.start) * p.out.stride[3],
                      static_cast<double>(total[r * kTile + i]), p.params.accumulate != 0);
    };
    auto body = [&](int64_t index, int worker) {
        const int64_t split = index % splits, unit = index / splits;
        Columns columns(plan, unit / column_tiles / row_tiles, unit % column_tiles);
        const Scratch s = work.scratch(worker);
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

#if defined(ATTN_SAMPLER_BF16_WORDS)
/* Whether q and k are multiplied in pairs of bfloat16, as they are or, from float8, without loss. */
bool in_pairs(const AttentionProblem &p) {
    return (p.dtype == ATTN_SAMPLER_BFLOAT16 || p.dtype == ATTN_SAMPLER_FLOAT8_E4M3) && p.headdim % 2 == 0;
}
#endif

} // namespace

namespace ATTN_SAMPLER_ISA {

bool column_scores(const AttentionProblem &p) {
#if defined(ATTN_SAMPLER_BF16_WORDS)
    if (in_pairs(p))
        return column_scores_of<Bf16Words>(p);
#endif
    return column_scores_of<FloatWords>(p);
}

bool attention_map(const AttentionProblem &p) {
#if defined(ATTN_SAMPLER_BF16_WORDS)
    if (in_pairs(p))
        return attention_map_of<Bf16Words>(p);
#endif
    return attention_map_of<FloatWords>(p);
}

} // namespace ATTN_SAMPLER_ISA
} // namespace attn_sampler
