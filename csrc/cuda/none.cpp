/* What a build without CUDA answers. */
#include "cuda/kernels.h"

namespace attn_sampler {
namespace cuda {
namespace {

int64_t refuse() { throw Error(ATTN_SAMPLER_UNSUPPORTED, "%s", device_problem()); }

} // namespace

const char *device_problem() {
    return "this build has no CUDA part (nvcc was not found, or ATTN_SAMPLER_CUDA=0 was set)";
}

int64_t column_scores(const AttentionProblem &, const attn_sampler_exec &, bool) { return refuse(); }
int64_t attention_map(const AttentionProblem &, const attn_sampler_exec &, bool) { return refuse(); }
int64_t token_confidence(const ConfidenceProblem &, const attn_sampler_exec &, bool) { return refuse(); }
int64_t select_tokens(const SelectProblem &, const attn_sampler_exec &, bool) { return refuse(); }
int64_t decode_step(const StepProblem &, const attn_sampler_exec &, bool) { return refuse(); }

} // namespace cuda
} // namespace attn_sampler
