/* Tiles of the attention matrix: the operands of their products, and their weights.
 *
 * The ladder of ideas for column scores and the attention map:
 * 1. With the row log-sum-exp known, a column's score needs that column's key and nothing else: the work is
 *    one [rows] x [columns] product, however long the context is.
 * 2. One tile serves everything: up to 64 rows times 64 keys, float32. The operand across the lanes is packed
 *    transposed once and reused; the other is walked row by row. Scores put columns across the lanes, so that
 *    the sum over rows is a vertical add; the log-sum-exp puts rows there, so that the sum over keys is.
 * 3. Query heads that share a key head are one long list of rows. Rows that cannot count are not even
 *    gathered.
 * 4. Work is cut by the shape of one sequence's problem, and partial sums are added in the order of the cuts:
 *    a sequence has the same bits for any number of threads, alone or in a batch.
 */
#ifndef ATTN_SAMPLER_CPU_TILE_H_
#define ATTN_SAMPLER_CPU_TILE_H_

#include <cmath>

#include "cpu/kernels.h"
#include "cpu/launch.h"
#include "cpu/matmul.h"

namespace attn_sampler {
namespace {

constexpr int64_t kTasks = 64; /* as many as this keep a large machine busy */

/* Lanes, or keys, of a row: the first and the last that its window holds, and the one at which it stands. */
struct Sight {
    int32_t first, last, own;
};

/* How logits are kept: as products or, where the scale is negative, their opposites. No rounding, so that
 * weights of large logits agree with the log-sum-exp. Only a scale too small for that is multiplied in. */
struct LogitUnits {
    float factor; /* of a product, to be kept: 1, -1 or the scale */
    float unit;   /* of what is kept, in base-2 logits */

    explicit LogitUnits(float scale) : factor(scale), unit(1.0f) {
        if (std::fabs(scale) > 0x1p-100f) {
            factor = scale > 0.0f ? 1.0f : -1.0f;
            unit = std::fabs(scale);
        }
    }
};

/* A row's log-sum-exp in base 2: `top` in units (LogitUnits) and `rest`, as their sum does not always tell:
 * it may be so large that the rest is lost in it, or beyond float32. */
struct RowLse {
    double rest;
    float top;
};

/* What the kernels share of one problem. */
struct Plan {
    const AttentionProblem &p;
    Window window;
    int64_t group;               /* query heads of a key head */
    int64_t row_start, row_stop; /* rows that can count */
    int64_t key_start, key_stop; /* keys of the softmax */
    const RowLse *lse;           /* computed, [B, Hq, M]; null where it is given */

    explicit Plan(const AttentionProblem &problem)
        : p(problem), window(problem), group(problem.heads / problem.kv_heads), row_start(0),
          row_stop(problem.n_rows), key_start(0), key_stop(problem.n_keys), lse(nullptr) {
        if (p.params.softmax_scope == ATTN_SAMPLER_SCOPE_BLOCK) {
            key_start = p.params.columns.start;
            key_stop = p.params.columns.stop;
            row_start = clamp(key_start - window.query_start, 0, p.n_rows);
            row_stop = clamp(key_stop - window.query_start, row_start, p.n_rows);
        }
    }

    Scratch scratch(void *memory, int64_t product_size = kTile * kTile) const {
        float *const packed = static_cast<float *>(memory), *const rows = packed + p.headdim * kTile;
        float *const product = rows + p.headdim * kTile;
        return {p.dtype, p.headdim, packed,
                rows,    product,   reinterpret_cast<int32_t *>(product + product_size)};
    }
    int64_t rows() const { return row_stop - row_start; }
    int64_t columns() const { return p.params.columns.stop - p.params.columns.start; }

    const void *query(int64_t b, int64_t h, int64_t m) const {
        const int64_t offset = b * p.q.stride[0] + h * p.q.stride[1] + m * p.q.stride[2];
        return static_cast<const char *>(p.q.data) + offset * element_size(p.dtype);
    }
    bool row_counts(int64_t b, int64_t m) const {
        return p.query_mask.data == nullptr || element(p.query_mask, b, m) != 0;
    }
    /* The first key of the softmax that sequence b may have. */
    int64_t first_key(int64_t b) const { return max_of(key_start, keys_ahead(p.seqlens_k, p.n_keys, b)); }
    /* From products of a key head to base-2 logits. */
    float scale(int64_t b, int64_t hkv) const {
        double scale = p.params.softmax_scale * kLog2e;
        if (p.q_descale.data != nullptr)
            scale *= static_cast<double>(element(p.q_descale, b, hkv));
        if (p.k_descale.data != nullptr)
            scale *= static_cast<double>(element(p.k_descale, b, hkv));
        return static_cast<float>(scale);
    }
    /* Of row m, counted from key `origin`; bounded, so that it fits the lanes. */
    Sight sight(int64_t m, int64_t origin) const {
        const int64_t at = window.query_start - origin + m;
        const auto lane = [](int64_t i) { return static_cast<int32_t>(clamp(i, -1, 1 << 30)); };
        if (!window.limited)
            return {-1, 1 << 30, lane(at)};
        return {lane(at - window.left), lane(at + window.right), lane(at)};
    }
};

/* Which keys of a sequence there are, and where those of one key head lie, by their positions. Asked in
 * order, it looks a page up where the one before ends; keys that lie together are one page. */
class Keys {
  public:
    Keys(const Plan &plan, int64_t b, int64_t hkv = 0)
        : p_(plan.p), b_(b), ahead_(keys_ahead(p_.seqlens_k, p_.n_keys, b)), size_(element_size(p_.dtype)),
          head_(static_cast<const char *>(p_.k.data) + hkv * p_.k.stride[1] * size_) {}

    bool counts(int64_t position) {
        const int64_t n = find(position);
        return page_ != nullptr && (p_.key_mask.data == nullptr || element(p_.key_mask, b_, n) != 0);
    }
    /* The rows of `count` keys from the first on, before those at `next`, if they are evenly apart in one
     * page; else none of them. */
    Rows rows(const int32_t *keys, int64_t count, const void *next) {
        const char *const data = static_cast<const char *>(at(keys[0]));
        const int64_t last = keys[count - 1], stride = p_.k.stride[2] * size_;
        if (data == nullptr || last - keys[0] != count - 1 || last - ahead_ >= stop_)
            return {};
        return {data, stride, count,
                next == nullptr ? data + count * stride : static_cast<const char *>(next)};
    }
    /* Masked or not; null where there is none. */
    const void *at(int64_t position) {
        const int64_t n = find(position);
        return page_ == nullptr ? nullptr : page_ + (n - first_) * p_.k.stride[2] * size_;
    }

  private:
    int64_t find(int64_t position) {
        const int64_t n = position - ahead_;
        if (n < first_ || n >= stop_)
            turn_to(n);
        return n;
    }
    void turn_to(int64_t n) {
        const Pages &pages = p_.pages;
        int64_t page = b_;
        first_ = n < 0 ? -p_.n_keys : 0;
        stop_ = n < 0 ? 0 : p_.n_keys;
        if (n >= 0 && pages.table.data != nullptr) {
            const int64_t index = pages.index_of(n);
            first_ = index * pages.size;
            stop_ = first_ + pages.size;
            page = pages.page(b_, index);
        }
        page_ = n < 0 || page < 0 ? nullptr : head_ + page * p_.k.stride[0] * size_;
    }

    const AttentionProblem &p_;
    const int64_t b_, ahead_, size_;
    const char *const head_, *page_ = nullptr;
    int64_t first_ = 0, stop_ = 0; /* keys of the page */
};

/* Whether q and k are multiplied in pairs of bfloat16, as they are or, from float8, without loss. */
inline bool in_pairs(const AttentionProblem &p) {
    return (p.dtype == ATTN_SAMPLER_BFLOAT16 || p.dtype == ATTN_SAMPLER_FLOAT8_E4M3) && p.headdim % 2 == 0;
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
        const View<const uint8_t, 2> &mask = plan.p.column_mask;
        Keys keys(plan, b);
        for (int i = 0; i < n; ++i) {
            const bool counts =
                keys.counts(first + i) && (mask.data == nullptr || element(mask, b, tile * kTile + i) != 0);
            lanes[i] = counts ? -1 : 0;
            all_count = all_count && lanes[i] != 0;
        }
        for (int v = 0; v < width / kLanes; ++v)
            counts[v] = load<VecI>(lanes + v * kLanes);
    }

    /* For rows of which there is one at least. */
    template <typename Words>
    void pack_keys(const Plan &plan, int64_t hkv, const Scratch &s) {
        if (kv_head == hkv)
            return;
        const void *address[kTile] = {};
        Keys keys(plan, b, hkv);
        for (int i = 0; i < n; ++i) {
            address[i] = keys.at(first + i);
            if (address[i] == nullptr) /* any row will do where nothing is made of its products */
                address[i] = plan.query(b, hkv * plan.group, plan.row_start);
        }
        pack<Words>(s, address, n, width);
        kv_head = hkv;
        const int64_t size = element_size(plan.p.dtype), bytes = plan.p.headdim * size;
        const int64_t to_next_head = plan.p.k.stride[1] * size;
        for (int i = 0; hkv + 1 < plan.p.kv_heads && i < n; ++i)
            for (int64_t at = 0; at < bytes; at += 64)
                __builtin_prefetch(static_cast<const char *>(address[i]) + to_next_head + at);
    }
};

/* From here on a difference of two logits in their last place leaves the lower one no weight. */
constexpr double kOnlyTopCounts = 0x1p32;

/* Up to kTile rows that count, gathered. */
struct RowTile {
    const void *address[kTile] = {};
    float lse_high[kTile], lse_low[kTile]; /* base 2; the sum of both has the precision of a double */
    bool any_only_top = false;             /* whether the largest logits of a row share all of its weight */
    float top[kTile], top_weight[kTile];   /* then: of those in units, and of each, or 0 */
    Sight sight[kTile];
    int64_t row[kTile];
    int n = 0;
    const void *next = nullptr; /* where other rows are, if not after these */

    /* Adds rows m, m + 1, ... of head h, but for those that have no weight in any of the columns, until
     * `stop` or the tile is full; returns the row to go on with. */
    int64_t add(const Plan &plan, const Columns &columns, int64_t h, int64_t m, int64_t stop) {
        const AttentionProblem &p = plan.p;
        const int64_t b = columns.b, step = p.q.stride[2] * element_size(p.dtype);
        const char *q = static_cast<const char *>(plan.query(b, h, m));
        const RowLse *const computed =
            plan.lse == nullptr ? nullptr : plan.lse + (b * p.heads + h) * p.n_rows;
        const double unit = LogitUnits(plan.scale(b, h / plan.group)).unit;
        const float *const given =
            p.softmax_lse.data + b * p.softmax_lse.stride[0] + h * p.softmax_lse.stride[1];
        const int64_t given_step = p.softmax_lse.stride[2];
        const double given_unit = p.params.lse_base == ATTN_SAMPLER_LSE_BASE_2 ? 1.0 : kLog2e;
        const bool masked = p.query_mask.data != nullptr;
        const bool asks = plan.window.limited || p.params.diagonal == 0; /* where a row stands */
        for (; m < stop && n < kTile; ++m, q += step) {
            const Sight at = asks ? plan.sight(m, columns.first) : Sight{};
            const bool sees = at.first < columns.n && at.last >= 0;
            const double lse = computed != nullptr
                                   ? static_cast<double>(computed[m].top) * unit + computed[m].rest
                                   : static_cast<double>(given[m * given_step]) * given_unit;
            if ((masked && !plan.row_counts(b, m)) || !sees || lse == -static_cast<double>(kInf))
                continue;
            address[n] = q;
            lse_high[n] = static_cast<float>(lse);
            lse_low[n] = std::isfinite(lse_high[n]) ? static_cast<float>(lse - lse_high[n]) : 0.0f;
            if (computed != nullptr) {
                const bool only_top = std::fabs(lse) >= kOnlyTopCounts && std::isfinite(lse);
                top[n] = computed[m].top;
                top_weight[n] = only_top ? static_cast<float>(std::exp2(-computed[m].rest)) : 0.0f;
                any_only_top = any_only_top || only_top;
            }
            sight[n] = at;
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
          limited_(plan.window.limited), diagonal_(plan.p.params.diagonal != 0),
          select_(!columns.all_count || columns.n < columns.width || limited_ || !diagonal_ ||
                  rows.any_only_top) {
        multiply<Words>(s, rows.address, rows.n, rows.next, columns.width, s.product);
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
            if (limited_)
                keep &= (lane >= rows_.sight[r].first) & (lane <= rows_.sight[r].last);
            if (!diagonal_)
                keep &= lane != rows_.sight[r].own;
            if (rows_.any_only_top && rows_.top_weight[r] > 0.0f)
                use(r, keep ? top_weights(r, v) : VecF{});
            else
                use(r, keep ? weights(r, v) : VecF{});
        }
    }

  private:
    VecF top_weights(int r, int v) const {
        const VecF kept = load<VecF>(product_ + r * columns_.width + v * kLanes) * LogitUnits(scale_).factor;
        return kept >= rows_.top[r] ? splat(rows_.top_weight[r]) : VecF{};
    }
    VecF weights(int r, int v) const {
        const VecF x = load<VecF>(product_ + r * columns_.width + v * kLanes);
        const VecF above = exact_multiply_add(x, splat(scale_), splat(-rows_.lse_high[r]));
        return exp2_vec(above - rows_.lse_low[r], 1.0f);
    }

    const Columns &columns_;
    const RowTile &rows_;
    const float *const product_;
    const float scale_;
    const bool limited_, diagonal_, select_;
};

inline void write(float *out, double value, bool accumulate) {
    *out = accumulate ? *out + static_cast<float>(value) : static_cast<float>(value);
}

} // namespace
} // namespace attn_sampler

#endif /* ATTN_SAMPLER_CPU_TILE_H_ */
