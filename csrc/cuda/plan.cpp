#include "cuda/plan.h"

namespace attn_sampler {
namespace cuda {
namespace {

/* Whether every row of q or k starts on 16 bytes. */
bool is_aligned(const View<const void, 3> &x, const int64_t (&shape)[3], int64_t element_size) {
    if (reinterpret_cast<uintptr_t>(x.data) % 16 != 0)
        return false;
    for (int i = 0; i < 3; ++i)
        if (shape[i] > 1 && x.stride[i] * element_size % 16 != 0)
            return false;
    return true;
}

} // namespace

bool is_aligned(const AttentionProblem &p) {
    const int64_t size = element_size(p.dtype);
    const bool paged = p.pages.table.data != nullptr;
    const int64_t q_shape[] = {p.batch, p.heads, p.n_rows};
    const int64_t k_shape[] = {paged ? p.pages.count : p.batch, p.kv_heads, paged ? p.pages.size : p.n_keys};
    return p.headdim * size % 16 == 0 && is_aligned(p.q, q_shape, size) && is_aligned(p.k, k_shape, size);
}

/* A tile of rows and one of columns are to be filled; narrower ones waste what wgmma gains. */
bool wgmma_serves(const AttentionArgs &a, int dtype, int64_t rows, int64_t columns,
                  const Launcher &launcher) {
    return kBuildsWgmma && launcher.is_hopper() && a.together &&
           (dtype == ATTN_SAMPLER_FLOAT16 || dtype == ATTN_SAMPLER_BFLOAT16) &&
           a.headdim <= kSliceChunks<Half> * kChunk<Half> && rows >= kBlockRows &&
           columns > kWgmmaColumns / 2;
}

AttentionArgs attention_args(const AttentionProblem *layers, int64_t num_layers) {
    const AttentionProblem &p = layers[0];
    const attn_sampler_attention_params &params = p.params;
    check_extent("q: head dimension", p.headdim, ATTN_SAMPLER_MAX_HEADDIM);
    check_extent("q: sequences times heads", p.batch * p.heads, kMaxPositions);
    check_extent("q: rows times heads", p.n_rows * p.heads, kMaxPositions);
    AttentionArgs a{};
    const Window window(p);
    int64_t row_start = 0, row_stop = p.n_rows, key_start = 0, key_stop = p.n_keys;
    if (params.softmax_scope == ATTN_SAMPLER_SCOPE_BLOCK) {
        key_start = params.columns.start;
        key_stop = params.columns.stop;
        row_start = clamp(key_start - window.query_start, 0, p.n_rows);
        row_stop = clamp(key_stop - window.query_start, row_start, p.n_rows);
    }
    a.aligned = is_aligned(p);
    for (int64_t i = 0; i < num_layers; ++i) {
        const AttentionProblem &layer = layers[i];
        a.q.set(i, layer.q);
        a.k.set(i, layer.k);
        a.softmax_lse.set(i, layer.softmax_lse);
        a.q_descale.set(i, layer.q_descale);
        a.k_descale.set(i, layer.k_descale);
    }
    a.key_mask = p.key_mask;
    a.query_mask = p.query_mask;
    a.seqlens_k = p.seqlens_k;
    a.pages = p.pages;
    a.positions = static_cast<int32_t>(p.n_keys);
    a.together = p.pages.table.data == nullptr && p.seqlens_k.data == nullptr;
    a.query_start = window.query_start + row_start;
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
    a.scale = static_cast<float>(params.softmax_scale * kLog2e);
    a.left = static_cast<int32_t>(window.left);
    a.right = static_cast<int32_t>(window.right);
    a.diagonal = params.diagonal != 0;
    a.lse_is_base2 = params.lse_base == ATTN_SAMPLER_LSE_BASE_2;
    return a;
}

} // namespace cuda
} // namespace attn_sampler
