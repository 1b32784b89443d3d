/* Validated problems, as csrc/api.cpp hands them to the kernels of either device. */
#ifndef ATTN_SAMPLER_PROBLEM_H_
#define ATTN_SAMPLER_PROBLEM_H_

#include <cstdint>

#include "attn_sampler.h"

namespace attn_sampler {

/* One layer's attention and what is wanted of it. Strides are in elements; q and k have last stride 1. */
struct AttentionProblem {
    int64_t batch, heads, kv_heads, n_rows, n_keys, headdim;
    int dtype; /* attn_sampler_dtype of q and k */
    const void *q, *k;
    int64_t q_stride[3], k_stride[3]; /* batch, head, row */
    const float *softmax_lse;         /* may be null, as what follows and the masks */
    int64_t lse_stride[3];
    const float *q_descale, *k_descale; /* null unless dtype is float8 */
    int64_t q_descale_stride[2], k_descale_stride[2];
    const uint8_t *key_mask, *query_mask;
    int64_t key_mask_stride[2], query_mask_stride[2];
    attn_sampler_attention_params params;
    float *out;
    int64_t out_stride[4]; /* batch, head (0 without), row (0 without), column */
    int num_threads;
};

/* Internal linkage, as in cpu/simd.h. */
static inline int64_t element_size(int dtype) {
    return dtype == ATTN_SAMPLER_FLOAT32 ? 4 : dtype == ATTN_SAMPLER_FLOAT8_E4M3 ? 1 : 2;
}

struct ConfidenceProblem {
    int64_t batch, positions, vocab;
    int dtype;
    const void *logits;
    int64_t logits_stride[2];
    const int64_t *seeds; /* may be null */
    int64_t seeds_stride;
    attn_sampler_confidence_params params;
    int64_t *token_ids;
    int64_t token_ids_stride[2];
    float *confidence;
    int64_t confidence_stride[2];
    int num_threads;
};

} // namespace attn_sampler

#endif /* ATTN_SAMPLER_PROBLEM_H_ */
