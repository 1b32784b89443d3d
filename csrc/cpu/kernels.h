/* The CPU kernels: validated problems in, results out. */
#ifndef ATTN_SAMPLER_CPU_KERNELS_H_
#define ATTN_SAMPLER_CPU_KERNELS_H_

#include "problem.h"

namespace attn_sampler {

/* The kernels of one instruction set. They return false where memory ran out, with nothing written. */
struct CpuKernels {
    const char *isa;
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

/* The best set that this processor runs, or the one that ATTN_SAMPLER_CPU_ISA asks for. */
const CpuKernels &cpu_kernels();

/* Its name. */
const char *cpu_isa();

/* What is the same on every instruction set. A step throws std::bad_alloc, with the tokens as they were. */
namespace cpu {
void select_tokens(const SelectProblem &);
void decode_step(const StepProblem &);
} // namespace cpu

} // namespace attn_sampler

#endif /* ATTN_SAMPLER_CPU_KERNELS_H_ */
