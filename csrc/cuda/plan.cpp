#include "cuda/plan.h"

namespace attn_sampler {
namespace cuda {
namespace {

constexpr double kExactLog2e = 1.4426950408889634;
constexpr int64_t kMaxHeaddim = 512;       /* a tile of keys fits the shared memory of every architecture */
constexpr int64_t kMaxPositions = 1 << 30; /* of any kind: they are 32-bit on the device */
constexpr int64_t kMinSplitGroups = 256;   /* 2048 tokens: what a block reads of a row at least */

void check_extent(const char *name, int64_t extent, int64_t limit) {
    if (extent > limit)
        throw Error(ATTN_SAMPLER_UNSUPPORTED, "%s: the CUDA kernels take at most %lld, got %lld", name,
                    static_cast<long long>(limit), static_cast<long long>(extent));
}

bool equal(const int64_t *a, const int64_t *b, int count) {
    for (int i = 0; i < count; ++i)
        if (a[i] != b[i])
            return false;
    return true;
}

/* Whether every row of q or k starts on 16 bytes. */
bool is_aligned(const void *data, const int64_t *shape, const int64_t *stride, int64_t element_size) {
    if (reinterpret_cast<uintptr_t>(data) % 16 != 0)
        return false;
    for (int i = 0; i < 3; ++i)
        if (shape[i] > 1 && stride[i] * element_size % 16 != 0)
            return false;
    return true;
}

} // namespace

bool same_shape(const AttentionProblem &a, const AttentionProblem &b) {
    return a.heads == b.heads && a.kv_heads == b.kv_heads && a.n_rows == b.n_rows && a.n_keys == b.n_keys &&
           a.headdim == b.headdim && a.dtype == b.dtype && equal(a.q_stride, b.q_stride, 3) &&
           equal(a.k_stride, b.k_stride, 3) && (a.softmax_lse == nullptr) == (b.softmax_lse == nullptr) &&
           (a.softmax_lse == nullptr || equal(a.lse_stride, b.lse_stride, 3)) &&
           equal(a.q_descale_stride, b.q_descale_stride, 2) &&
           equal(a.k_descale_stride, b.k_descale_stride, 2);
}

/* A tile of rows and one of columns are to be filled; narrower ones waste what wgmma gains. */
bool wgmma_serves(const AttentionArgs &a, int dtype, int64_t rows, int64_t columns,
                  const Launcher &launcher) {
    return kBuildsWgmma && launcher.is_hopper() &&
           (dtype == ATTN_SAMPLER_FLOAT16 || dtype == ATTN_SAMPLER_BFLOAT16) &&
           a.headdim <= kSliceChunks<Half> * kChunk<Half> && rows >= kBlockRows &&
           columns > kWgmmaColumns / 2;
}

AttentionArgs attention_args(const AttentionProblem *layers, int64_t num_layers) {
    const AttentionProblem &p = layers[0];
    const attn_sampler_attention_params &params = p.params;
    check_extent("q: head dimension", p.headdim, kMaxHeaddim);
    check_extent("q: sequences times heads", p.batch * p.heads, kMaxPositions);
    check_extent("q: rows times heads", p.n_rows * p.heads, kMaxPositions);
    AttentionArgs a{};
    int64_t row_start = 0, row_stop = p.n_rows, key_start = 0, key_stop = p.n_keys;
    if (params.softmax_scope == ATTN_SAMPLER_SCOPE_BLOCK) {
        key_start = params.columns.start;
        key_stop = params.columns.stop;
        row_start = clamp(key_start - params.query_start, 0, p.n_rows);
        row_stop = clamp(key_stop - params.query_start, row_start, p.n_rows);
    }
    const int64_t size = element_size(p.dtype);
    const int64_t q_shape[] = {p.batch, p.heads, p.n_rows}, k_shape[] = {p.batch, p.kv_heads, p.n_keys};
    a.aligned = p.headdim * size % 16 == 0;
    for (int64_t i = 0; i < num_layers; ++i) {
        a.q[i] = layers[i].q;
        a.k[i] = layers[i].k;
        a.lse[i] = layers[i].softmax_lse;
        a.q_descale[i] = layers[i].q_descale;
        a.k_descale[i] = layers[i].k_descale;
        a.aligned = a.aligned && is_aligned(layers[i].q, q_shape, p.q_stride, size) &&
                    is_aligned(layers[i].k, k_shape, p.k_stride, size);
    }
    copy_strides(p.q_stride, a.q_stride, 3);
    copy_strides(p.k_stride, a.k_stride, 3);
    copy_strides(p.lse_stride, a.lse_stride, 3);
    copy_strides(p.q_descale_stride, a.q_descale_stride, 2);
    copy_strides(p.k_descale_stride, a.k_descale_stride, 2);
    a.key_mask = p.key_mask;
    a.query_mask = p.query_mask;
    copy_strides(p.key_mask_stride, a.key_mask_stride, 2);
    copy_strides(p.query_mask_stride, a.query_mask_stride, 2);
    a.query_start = params.query_start + row_start;
    a.key_start = key_start;
    a.column_start = params.columns.start;
    a.layers = static_cast<int32_t>(num_layers);
    a.batch = static_cast<int32_t>(p.batch);
    a.heads = static_cast<int32_t>(p.heads);
    a.kv_heads = static_cast<int32_t>(p.kv_heads);
    a.group = static_cast<int32_t>(p.heads / p.kv_heads);
    a.headdim = static_cast<int32_t>(p.headdim);
    a.row_start = static_cast<int32_t>(row_start);
    a.rows = static_cast<int32_t>(row_stop - row_start);
    a.keys = static_cast<int32_t>(key_stop - key_start);
    a.columns = static_cast<int32_t>(params.columns.stop - params.columns.start);
    a.scale = static_cast<float>(params.softmax_scale * kExactLog2e);
    a.causal = params.causal != 0;
    a.diagonal = params.diagonal != 0;
    a.lse_is_base2 = params.lse_base == ATTN_SAMPLER_LSE_BASE_2;
    return a;
}

ConfidenceArgs confidence_args(const ConfidenceProblem &p, Launcher &launcher) {
    check_extent("logits: vocabulary", p.vocab, kMaxPositions);
    check_extent("logits: positions", p.batch * p.positions, kMaxPositions);
    ConfidenceArgs a{};
    a.logits = p.logits;
    copy_strides(p.logits_stride, a.logits_stride, 2);
    a.seeds = p.seeds;
    a.seeds_stride = p.seeds_stride;
    a.seed = p.params.seed;
    a.token_ids = p.token_ids;
    copy_strides(p.token_ids_stride, a.token_ids_stride, 2);
    a.confidence = p.confidence;
    copy_strides(p.confidence_stride, a.confidence_stride, 2);
    a.batch = static_cast<int32_t>(p.batch);
    a.positions = static_cast<int32_t>(p.positions);
    a.vocab = static_cast<int32_t>(p.vocab);
    const int64_t excluded = p.params.exclude_token_id;
    a.excluded = excluded >= 0 && excluded < p.vocab ? static_cast<int32_t>(excluded) : -1;
    a.noise_group = static_cast<uint32_t>(p.params.vocab_start / 4);
    a.noise_place = static_cast<int32_t>(p.params.vocab_start % 4);
    a.dtype = p.dtype;
    a.metric = p.params.metric;
    a.sample = p.params.temperature > 0.0;
    a.inverse_temperature = a.sample ? static_cast<float>(1.0 / p.params.temperature) : 0.0f;
    /* A group more than the vocabulary fills: rows may start within one. */
    const int64_t rows = p.batch * p.positions, groups = p.vocab / kGroup + 2;
    const int64_t wanted = 2 * launcher.target_blocks(4, 0) / clamp(rows, 1, INT32_MAX);
    a.groups_per_split = static_cast<int32_t>(
        ceil_div(groups, clamp(wanted, 1, clamp(groups / kMinSplitGroups, 1, kThreads))));
    a.splits = static_cast<int32_t>(ceil_div(groups, a.groups_per_split));
    if (a.splits > 1) {
        a.partial = launcher.take<Confidence>(rows * a.splits);
        a.arrived = launcher.counters(rows);
    }
    return a;
}

SelectArgs select_args(const SelectProblem &p) {
    check_extent("scores: columns", p.columns, kMaxPositions);
    SelectArgs s{};
    s.scores = p.scores;
    s.confidence = p.confidence;
    s.masked = p.masked;
    s.selected = p.selected;
    copy_strides(p.scores_stride, s.scores_stride, 2);
    copy_strides(p.confidence_stride, s.confidence_stride, 2);
    copy_strides(p.masked_stride, s.masked_stride, 2);
    copy_strides(p.selected_stride, s.selected_stride, 2);
    s.batch = static_cast<int32_t>(p.batch);
    s.columns = static_cast<int32_t>(p.columns);
    s.tau = static_cast<float>(p.params.tau);
    s.parallel = p.params.rule == ATTN_SAMPLER_RULE_PARALLEL;
    s.by_confidence = s.parallel && p.params.fallback == ATTN_SAMPLER_FALLBACK_CONFIDENCE;
    return s;
}

} // namespace cuda
} // namespace attn_sampler
