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

/* The best set that this processor runs, or the one that ATTN_SAMPLER_CPU_ISA asks for. */
const CpuKernels &cpu_kernels();

/* Its name. */
const char *cpu_isa();

/* Why an AMX unit that is there does not serve, or null. */
const char *cpu_amx_refusal();

/* What is the same on every instruction set, as device.h has it. */
namespace cpu {
int64_t top_columns(const TopProblem &, const attn_sampler_exec &);
int64_t select_tokens(const SelectProblem &, const attn_sampler_exec &);
int64_t decode_step(const StepProblem &, const attn_sampler_exec &);
} // namespace cpu

} // namespace attn_sampler

#endif /* ATTN_SAMPLER_CPU_KERNELS_H_ */
