/* What a device does for the C API: one table of functions for each. */
#ifndef ATTN_SAMPLER_DEVICE_H_
#define ATTN_SAMPLER_DEVICE_H_

#include "problem.h"

namespace attn_sampler {

/* The functions run a validated problem and answer 0; or they run nothing and answer the bytes of workspace
 * that it needs, where those of exec are fewer. They throw Error (error.h) or std::bad_alloc. */
struct Device {
    const char *(*unavailable)(); /* why nothing can run here; null where it can. The answer is found once. */
    const char *(*ordinal_unavailable)(int index); /* the same of one of several, if anything can run here */
    int64_t (*column_scores)(const AttentionProblem &, const attn_sampler_exec &);
    int64_t (*attention_map)(const AttentionProblem &, const attn_sampler_exec &);
    int64_t (*top_columns)(const TopProblem &, const attn_sampler_exec &);
    int64_t (*token_confidence)(const ConfidenceProblem &, const attn_sampler_exec &);
    int64_t (*select_tokens)(const SelectProblem &, const attn_sampler_exec &);
    int64_t (*decode_step)(const StepProblem &, const attn_sampler_exec &);
};

extern const Device kCpuDevice;  /* cpu/device.cpp */
extern const Device kCudaDevice; /* cuda/device.cpp, or cuda/unavailable.cpp in a build without CUDA */

} // namespace attn_sampler

#endif /* ATTN_SAMPLER_DEVICE_H_ */
