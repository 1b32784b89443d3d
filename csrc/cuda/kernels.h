/* The CUDA kernels, as csrc/api.cpp sees them: validated problems in, launches on the caller's stream out. */
#ifndef ATTN_SAMPLER_CUDA_KERNELS_H_
#define ATTN_SAMPLER_CUDA_KERNELS_H_

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <exception>

#include "problem.h"

namespace attn_sampler {
namespace cuda {

/* What a launch can fail with; the message is formatted as by printf. */
class Error : public std::exception {
  public:
    __attribute__((format(printf, 3, 4))) Error(attn_sampler_status status, const char *format, ...)
        : status_(status) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(message_, sizeof(message_), format, arguments);
        va_end(arguments);
    }
    attn_sampler_status status() const { return status_; }
    const char *what() const noexcept override { return message_; }

  private:
    attn_sampler_status status_;
    char message_[384];
};

/* Why no CUDA device can be used here; null where one can. The answer is found once. */
const char *device_problem();

struct SelectProblem {
    int64_t batch, columns;
    const float *scores, *confidence;
    int64_t scores_stride[2], confidence_stride[2];
    const uint8_t *masked; /* select_tokens only */
    int64_t masked_stride[2];
    uint8_t *selected;
    int64_t selected_stride[2];
    attn_sampler_select_params params;
};

struct StepProblem {
    const AttentionProblem *layers; /* each accumulates into the scores, which start at 0 */
    int64_t num_layers;
    ConfidenceProblem predict;
    SelectProblem select;
    int64_t *tokens; /* [B, C] of the block */
    int64_t tokens_stride[2];
    int64_t mask_token_id;
    const int64_t *row_tokens; /* null, or a row counts only where its token, from here on, is masked */
};

/* Each returns the bytes of workspace that it needs. With `launch` it also runs, and throws Error where the
 * workspace is smaller or a launch fails. */
int64_t column_scores(const AttentionProblem &, const attn_sampler_exec &, bool launch);
int64_t attention_map(const AttentionProblem &, const attn_sampler_exec &, bool launch);
int64_t token_confidence(const ConfidenceProblem &, const attn_sampler_exec &, bool launch);
int64_t select_tokens(const SelectProblem &, const attn_sampler_exec &, bool launch);
int64_t decode_step(const StepProblem &, const attn_sampler_exec &, bool launch);

} // namespace cuda
} // namespace attn_sampler

#endif /* ATTN_SAMPLER_CUDA_KERNELS_H_ */
