#ifndef ATTN_SAMPLER_CUDA_DEVICE_H_
#define ATTN_SAMPLER_CUDA_DEVICE_H_

namespace attn_sampler {

/* Why no CUDA device can be used here; null where one can. The answer is found once. */
const char *cuda_device_problem();

} // namespace attn_sampler

#endif /* ATTN_SAMPLER_CUDA_DEVICE_H_ */
