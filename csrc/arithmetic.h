/* Small numbers that more than one device needs. */
#ifndef ATTN_SAMPLER_ARITHMETIC_H_
#define ATTN_SAMPLER_ARITHMETIC_H_

#include <cstdint>

namespace attn_sampler {

constexpr double kLog2e = 1.4426950408889634;

/* Internal linkage, as in cpu/simd/simd.h. */
static inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t clamp(int64_t x, int64_t low, int64_t high) { return max_of(low, min_of(x, high)); }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

} // namespace attn_sampler

#endif /* ATTN_SAMPLER_ARITHMETIC_H_ */
