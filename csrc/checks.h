/* From the arguments of the C API to validated problems. An argument that breaks the contract in
 * attn_sampler.h throws Error, with a message that names it. */
#ifndef ATTN_SAMPLER_CHECKS_H_
#define ATTN_SAMPLER_CHECKS_H_

#include <vector>

#include "device.h"

namespace attn_sampler {

/* Where to run; the device can. */
const Device &check_exec(const attn_sampler_exec *exec);

AttentionProblem check_column_scores(const attn_sampler_layer *layer, const attn_sampler_masks *masks,
                                     const attn_sampler_attention_params &params,
                                     const attn_sampler_tensor *out, const attn_sampler_exec &exec);

AttentionProblem check_attention_map(const attn_sampler_layer *layer, const attn_sampler_masks *masks,
                                     const attn_sampler_attention_params &params,
                                     const attn_sampler_tensor *out, const attn_sampler_exec &exec);

TopProblem check_top_columns(const attn_sampler_layer *layer, const attn_sampler_masks *masks,
                             const attn_sampler_top_columns_params &params,
                             const attn_sampler_tensor *positions, const attn_sampler_tensor *scores,
                             const attn_sampler_exec &exec);

ConfidenceProblem
check_token_confidence(const attn_sampler_tensor *logits, const attn_sampler_tensor *current_ids,
                       const attn_sampler_sampling_params &params, const attn_sampler_tensor *token_ids,
                       const attn_sampler_tensor *confidence, const attn_sampler_tensor *log_prob,
                       const attn_sampler_tensor *current, const attn_sampler_exec &exec);

SelectProblem check_select_tokens(const attn_sampler_tensor *scores, const attn_sampler_tensor *confidence,
                                  const attn_sampler_tensor *masked,
                                  const attn_sampler_selection_params &params,
                                  const attn_sampler_tensor *selected, const attn_sampler_revision *revision);

/* The step's problem points to those of its layers, which are put into `problems`. */
StepProblem check_decode_step(const attn_sampler_tensor *tokens, const attn_sampler_tensor *logits,
                              const attn_sampler_layer *layers, int64_t num_layers,
                              const attn_sampler_masks *masks, const attn_sampler_decode_step_params &params,
                              const attn_sampler_tensor *scores, const attn_sampler_tensor *token_ids,
                              const attn_sampler_tensor *confidence, const attn_sampler_tensor *selected,
                              const attn_sampler_revision *revision, const attn_sampler_exec &exec,
                              std::vector<AttentionProblem> &problems);

} // namespace attn_sampler

#endif /* ATTN_SAMPLER_CHECKS_H_ */
