/* Column scores: tiles of columns against all rows, or, where the softmax is not known, tiles of rows against
 * all keys. */
#include "cpu/row_lse.h"

namespace attn_sampler {
namespace {

constexpr int64_t kRowsPerUnit = 256; /* of one key head, the grain by which rows are dealt out */
constexpr int64_t kSoftmaxBytes =
    3 << 18; /* of a row tile's exponentials over all keys, in the second-level cache */
constexpr int64_t kSequenceBytes = 1 << 20; /* of a sequence's partial sums, at the most */
constexpr int64_t kPartialBytes = 8 << 20;  /* of all that are held at once */

/* The larger, NaN if one is. */
inline VecF max_or_nan(VecF a, VecF b) { return ((a > b) | (a != a)) ? a : b; }

/* The rows that may see a key, for the mean. */
int64_t rows_seeing(const Plan &plan, int64_t b, int64_t key) {
    const attn_sampler_attention_params &params = plan.p.params;
    const int64_t own = key - plan.window.query_start; /* the row that stands at the key */
    const int64_t first = max_of(plan.row_start, own - plan.window.right);
    const int64_t stop = min_of(plan.row_stop, own + plan.window.left + 1);
    if (!Keys(plan, b).counts(key))
        return 0;
    int64_t count = max_of(stop - first, 0);
    if (plan.p.query_mask.data != nullptr) {
        count = 0;
        for (int64_t m = first; m < stop; ++m)
            count += plan.row_counts(b, m);
    }
    const bool own_is_dropped = !params.diagonal && own >= first && own < stop && plan.row_counts(b, own);
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
        const int64_t rows = plan.rows();
        const bool is_max = plan.p.params.reduction == ATTN_SAMPLER_REDUCTION_MAX;
        if (first < last)
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
        Keys all(plan, b);
        for (int64_t key = plan.first_key(b); key < plan.key_stop; ++key)
            if (all.counts(key))
                s.keys[n_keys++] = static_cast<int32_t>(key);
    }

    void reduce(int64_t hkv, int64_t first, int64_t last, double *total) {
        const bool is_max = plan.p.params.reduction == ATTN_SAMPLER_REDUCTION_MAX;
        for (int64_t c = 0; is_max && c < plan.columns(); ++c)
            largest[c] = 0.0f;
        while (first < last)
            first = add_tile(hkv, first, last, total);
        for (int64_t c = 0; is_max && c < plan.columns(); ++c)
            total[c] += static_cast<double>(largest[c]);
    }

  private:
    /* Takes as many rows as the lanes hold; returns where the next tile starts. */
    int64_t add_tile(int64_t hkv, int64_t first, int64_t last, double *total) {
        const AttentionProblem &p = plan.p;
        Softmax<Words> softmax(plan, b, hkv, s);
        first = softmax.take_rows(first, last, lanes, false);
        const int width = softmax.width;
        const int64_t unseen = first_key_from(softmax.nearest, n_keys) / kTile * kTile; /* in whole blocks */
        const int64_t seen = first_key_from(softmax.furthest + 1, n_keys);
        if (softmax.n == 0 || seen <= unseen)
            return first;

        for (int64_t i = unseen; i < seen; i += kTile) {
            const int64_t count = min_of(kTile, seen - i);
            const bool next_head = i + count == seen && first == last && hkv + 1 < p.kv_heads;
            const void *next = nullptr;
            if (i + count < seen)
                next = Keys(plan, b, hkv).at(s.keys[i + count]);
            else if (next_head)
                next = Keys(plan, b, hkv + 1).at(s.keys[0]);
            softmax.add(s.keys + i, count, next, s.product + i * width);
            memcpy(factors_of(i), softmax.top, sizeof(softmax.top));
        }
        /* From exponentials relative to the largest logit up to their block to weights. */
        for (int64_t i = unseen; i < seen; i += kTile)
            for (int j = 0; j < width; j += kLanes) {
                const VecF top = load<VecF>(factors_of(i) + j), sum = load<VecF>(softmax.sum + j);
                const VecF shift = shift_of(load<VecF>(softmax.top + j));
                const VecF factor = exp2_vec(shift_of(top) - shift, softmax.kept.unit) / sum;
                /* Where all logits so far are -inf, unless one was NaN, which makes all of the row NaN. */
                const VecI nothing = (top == -kInf) & (sum == sum);
                store(factors_of(i) + j, nothing | (sum == 0.0f) ? VecF{} : factor);
            }

        const auto weight = [&](int64_t i, int j) {
            return load<VecF>(s.product + i * width + j) * load<VecF>(factors_of(i) + j);
        };
        const auto selected = [&](int64_t i, int j) {
            const int32_t key = s.keys[i];
            const VecI from = load<VecI>(softmax.first + j), to = load<VecI>(softmax.last + j);
            const VecI padding = lane_index() + j >= static_cast<int32_t>(softmax.n);
            const VecI beyond = plan.window.limited ? (from > key) | (to < key) : VecI{};
            const VecI dropped = p.params.diagonal ? VecI{} : load<VecI>(softmax.own + j) == key;
            return (beyond | dropped | padding) ? VecF{} : weight(i, j);
        };
        const int64_t from = max_of(first_key_from(p.params.columns.start, seen), unseen);
        const int64_t to = first_key_from(p.params.columns.stop, seen);
        if (plan.window.limited || !p.params.diagonal || softmax.n < width)
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

/* Whether rows of different heads are not reduced together at once. */
bool heads_apart(const AttentionProblem &p) {
    return p.params.per_head || p.params.reduction == ATTN_SAMPLER_REDUCTION_MAX;
}

/* How a column reduction is dealt out. A unit is a stretch of a key head's list of rows, or, where heads are
 * apart, the rows of one query head; the units of a tile of columns are shared among
 * splits. */
struct Cut {
    int64_t tiles, tile_columns, unit_rows, units_per_list, units, splits;
    int64_t batch;     /* sequences at a time */
    bool partial_sums; /* the splits' sums are added up at the end */

    Cut(const Plan &plan, int64_t most_columns, int64_t rows_per_unit)
        : tiles(ceil_div(plan.columns(), most_columns)), tile_columns(min_of(plan.columns(), most_columns)) {
        const AttentionProblem &p = plan.p;
        const bool apart = heads_apart(p);
        unit_rows = apart ? plan.rows() : rows_per_unit;
        units_per_list = apart ? plan.group : ceil_div(plan.group * plan.rows(), rows_per_unit);
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
    const int64_t list = plan.group * plan.rows();
    auto write_columns = [&](int64_t b, int64_t h, int64_t tile, const double *total) {
        float *const out = p.out.data + b * p.out.stride[0] + h * p.out.stride[1];
        const bool is_mean = p.params.reduction == ATTN_SAMPLER_REDUCTION_MEAN;
        const int64_t first = tile * cut.tile_columns;
        for (int64_t c = first; c < min_of(first + cut.tile_columns, plan.columns()); ++c) {
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
        parallel_for(p.num_threads, sequences * cut.tiles * cut.splits, body);
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
    const int64_t columns = plan.columns(), keys = plan.key_stop - plan.key_start;
    const int64_t lanes = softmax_lanes(heads_apart(p) ? plan.rows() : plan.group * plan.rows(), keys);
    if (p.softmax_lse.data == nullptr && lanes > 0) {
        const Cut cut(plan, columns, lanes);
        const int64_t totals = cut.totals(p), product = keys * lanes + round_up(keys, kTile);
        const Workspace work(p.num_threads, Scratch::bytes(p.headdim, product, keys),
                             totals * 8 + p.num_threads * columns * 4);
        if (!work)
            return false;
        double *const total = static_cast<double *>(work.shared());
        float *const largest = reinterpret_cast<float *>(total + totals);
        reduce_columns(plan, cut, total, [&](int64_t b, int64_t, int worker) {
            return SoftmaxTask<Words>(plan, b, lanes, plan.scratch(work.of_worker(worker), product),
                                      largest + worker * columns);
        });
        return true;
    }
    const Cut cut(plan, kTile, kRowsPerUnit);
    const Workspace work(p.num_threads, Scratch::bytes(p.headdim),
                         lse_count(p) * static_cast<int64_t>(sizeof(RowLse)) + cut.totals(p) * 8);
    if (!work || !compute_lse(plan, work.shared()))
        return false;
    double *const total = static_cast<double *>(after_lse(p, work.shared()));
    reduce_columns(plan, cut, total, [&](int64_t b, int64_t tile, int worker) {
        return ScoreTask<Words>(plan, b, tile, plan.scratch(work.of_worker(worker)));
    });
    return true;
}

} // namespace

namespace ATTN_SAMPLER_ISA {

bool column_scores(const AttentionProblem &p) {
    return in_pairs(p) ? column_scores_of<PairWords>(p) : column_scores_of<FloatWords>(p);
}

} // namespace ATTN_SAMPLER_ISA
} // namespace attn_sampler
