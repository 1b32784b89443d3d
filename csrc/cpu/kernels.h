/* The CPU kernels, as csrc/api.cpp sees them: validated problems in, results out. */
#ifndef ATTN_SAMPLER_CPU_KERNELS_H_
#define ATTN_SAMPLER_CPU_KERNELS_H_

#include <cstdint>

#include "attn_sampler.h"

namespace attn_sampler {

/* One layer's attention and what is wanted of it. Strides are in elements; q and k have last stride 1. */
struct AttentionProblem {
    int64_t batch, heads, kv_heads, n_rows, n_keys, headdim;
    int dtype; /* attn_sampler_dtype of q and k */
    const void *q, *k;
    int64_t q_stride[3], k_stride[3]; /* batch, head, row */
    const float *softmax_lse;         /* may be null, as the masks */
    int64_t lse_stride[3];
    const uint8_t *key_mask, *query_mask;
    int64_t key_mask_stride[2], query_mask_stride[2];
    attn_sampler_attention_params params;
    float *out;
    int64_t out_stride[4]; /* batch, head (0 without), row (0 without), column */
    int num_threads;
};

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

/* The kernels of one instruction set. They return false where memory ran out, with nothing written. */
struct CpuKernels {
    const char *name;
    bool (*column_scores)(const AttentionProblem &);
    bool (*attention_map)(const AttentionProblem &);
    bool (*token_confidence)(const ConfidenceProblem &);
};

/* attention.cpp and confidence.cpp are compiled once for each instruction set, into a namespace of its name.
 */
#define ATTN_SAMPLER_DECLARE_ATTENTION(isa)                                                                  \
    namespace isa {                                                                                          \
    bool column_scores(const AttentionProblem &);                                                            \
    bool attention_map(const AttentionProblem &);                                                            \
    }
#define ATTN_SAMPLER_DECLARE_CONFIDENCE(isa)                                                                 \
    namespace isa {                                                                                          \
    bool token_confidence(const ConfidenceProblem &);                                                        \
    }
ATTN_SAMPLER_DECLARE_ATTENTION(portable)
ATTN_SAMPLER_DECLARE_ATTENTION(avx2)
ATTN_SAMPLER_DECLARE_ATTENTION(avx512)
ATTN_SAMPLER_DECLARE_ATTENTION(avx512_bf16)
ATTN_SAMPLER_DECLARE_ATTENTION(amx)
ATTN_SAMPLER_DECLARE_CONFIDENCE(portable)
ATTN_SAMPLER_DECLARE_CONFIDENCE(avx2)
ATTN_SAMPLER_DECLARE_CONFIDENCE(avx512)
#undef ATTN_SAMPLER_DECLARE_ATTENTION
#undef ATTN_SAMPLER_DECLARE_CONFIDENCE

/* The best set that this processor runs; ATTN_SAMPLER_CPU_ISA pins another by its name. */
const CpuKernels &cpu_kernels();

} // namespace attn_sampler

#endif /* ATTN_SAMPLER_CPU_KERNELS_H_ */
