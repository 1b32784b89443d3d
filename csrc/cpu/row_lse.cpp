#include "cpu/row_lse.h"

namespace attn_sampler {
namespace {

constexpr int64_t kKeysPerSplit = 1024;

/* Of a tile of rows over some of the keys: the largest logit, in units, and the sum of exponentials relative
 * to it. */
struct Partial {
    float maximum[kTile], sum[kTile];
};

/* Rows [first, last) of a key head's list, up to kTile of them, over keys [key, key_stop). */
template <typename Words>
void partial_lse(const Plan &plan, int64_t b, int64_t hkv, int64_t first, int64_t last, int64_t key,
                 int64_t key_stop, const Scratch &s, Partial &result) {
    Softmax<Words> softmax(plan, b, hkv, s);
    softmax.take_rows(first, last, kTile, true);
    Keys all(plan, b);
    key = max_of(key, max_of(softmax.nearest, plan.first_key(b)));
    key_stop = min_of(key_stop, softmax.furthest + 1);
    while (key < key_stop) {
        int32_t keys[kTile];
        int64_t count = 0;
        for (; key < key_stop && count < kTile; ++key)
            if (all.counts(key))
                keys[count++] = static_cast<int32_t>(key);
        if (count > 0)
            softmax.add(keys, count, nullptr, s.product);
    }
    memcpy(result.maximum, softmax.top, sizeof(softmax.top));
    memcpy(result.sum, softmax.sum, sizeof(softmax.sum));
}

/* The log-sum-exp of row i of a tile from its splits. */
RowLse merge(const Partial *partial, int64_t splits, int64_t i, double unit) {
    float maximum = -kInf;
    for (int64_t split = 0; split < splits; ++split)
        maximum = partial[split].maximum[i] > maximum ? partial[split].maximum[i] : maximum;
    const double shift = std::isfinite(maximum) ? static_cast<double>(maximum) : 0.0;
    double sum = 0.0;
    for (int64_t split = 0; split < splits; ++split) {
        const double top = static_cast<double>(partial[split].maximum[i]);
        const double part_shift = std::isfinite(top) ? top : 0.0;
        const float part = partial[split].sum[i];
        if (part != 0.0f) /* else nothing was seen, and its shift means nothing */
            sum += std::exp2((part_shift - shift) * unit) * static_cast<double>(part);
    }
    return {std::log2(sum), static_cast<float>(shift)};
}

template <typename Words>
bool row_lse_of(const AttentionProblem &p, RowLse *lse) {
    const Plan plan(p);
    const int64_t list = plan.group * plan.rows(), keys = plan.key_stop - plan.key_start;
    const int64_t tiles = ceil_div(list, kTile), units = p.batch * p.kv_heads * tiles;
    if (units == 0)
        return true;
    /* Few rows, many keys: cut the keys too. */
    const int64_t tasks = min_of(p.kv_heads * tiles, kTasks); /* of one sequence */
    const int64_t splits = max_of(1, min_of(kTasks / tasks, keys / kKeysPerSplit));
    const int64_t keys_per_split = ceil_div(keys, splits);
    const Workspace work(p.num_threads, Scratch::bytes(p.headdim),
                         units * splits * static_cast<int64_t>(sizeof(Partial)));
    if (!work)
        return false;
    Partial *const partial = static_cast<Partial *>(work.shared()); /* [units, splits] */
    auto task = [&](int64_t index, int worker) {
        const int64_t split = index % splits, unit = index / splits, head = unit / tiles;
        const int64_t first = unit % tiles * kTile, key = plan.key_start + split * keys_per_split;
        partial_lse<Words>(plan, head / p.kv_heads, head % p.kv_heads, first, list, key,
                           min_of(key + keys_per_split, plan.key_stop), plan.scratch(work.of_worker(worker)),
                           partial[index]);
    };
    parallel_for(p.num_threads, units * splits, task);

    for (int64_t unit = 0; unit < units; ++unit) {
        const int64_t b = unit / tiles / p.kv_heads, hkv = unit / tiles % p.kv_heads;
        const double scale_unit = LogitUnits(plan.scale(b, hkv)).unit;
        for (int64_t i = 0, f = unit % tiles * kTile; i < kTile && f < list; ++i, ++f) {
            const int64_t h = hkv * plan.group + f / plan.rows(), m = plan.row_start + f % plan.rows();
            lse[(b * p.heads + h) * p.n_rows + m] = merge(partial + unit * splits, splits, i, scale_unit);
        }
    }
    return true;
}

} // namespace

namespace ATTN_SAMPLER_ISA {

bool row_lse(const AttentionProblem &p, RowLse *lse) {
    return in_pairs(p) ? row_lse_of<PairWords>(p, lse) : row_lse_of<FloatWords>(p, lse);
}

} // namespace ATTN_SAMPLER_ISA
} // namespace attn_sampler
