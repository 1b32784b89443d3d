/* For tests: csrc/cuda/ptx.cuh on the CPU, fragment layouts included. */
#ifndef ATTN_SAMPLER_CUDA_PTX_CUH_
#define ATTN_SAMPLER_CUDA_PTX_CUH_

#include <cuda_runtime.h>

#include "attn_sampler_random.h"

namespace attn_sampler {
namespace cuda {

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};
struct Float8 {
    uint8_t bits;
};

#define ATTN_SAMPLER_NOINLINE __attribute__((noinline))

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Half x) {
    /* Exponent and fraction moved into place; the product rebases the exponent, subnormals included. */
    const float magnitude = __uint_as_float((x.bits & 0x7FFFu) << 13) * 0x1p112f;
    const uint32_t special = magnitude >= 65536.0f ? 0x7F800000u : 0u;
    return __uint_as_float(__float_as_uint(magnitude) | special | (x.bits & 0x8000u) << 16);
}

/* Of results that are 0, normal or NaN; exact where they have a float16. */
inline uint32_t multiply_f16x2(uint32_t a, uint32_t b) {
    auto product = [&](int shift) -> uint32_t {
        const float x = to_float(Half{static_cast<uint16_t>(a >> shift)}) *
                        to_float(Half{static_cast<uint16_t>(b >> shift)});
        const uint32_t bits = __float_as_uint(x), magnitude = bits & 0x7FFFFFFFu;
        return (bits >> 16 & 0x8000u) | (x != x           ? 0x7FFFu
                                         : magnitude == 0 ? 0
                                                          : (magnitude >> 13) - (112u << 10));
    };
    return product(0) | product(16) << 16;
}

inline unsigned char *dynamic_shared() { return cuda_host::shared_memory(); }

inline void let_next_start() {}
inline void await_launches() { cuda_host::await_launches(); }

inline float exp2_fast(float x) {
    const float y = std::exp2(x);
    return y < 0x1p-126f ? 0.0f : y;
}

inline uint32_t take_tickets(uint32_t *counter, uint32_t count) {
    const uint32_t old = *counter;
    *counter = old + count;
    return old;
}

inline PhiloxWords<uint64_t> noise_words(uint64_t seed, uint32_t group, uint32_t position) {
    ++cuda_host::noise_groups;
    return philox(seed, group, position);
}

/* Aligned, as the sanitizer checks. */
inline uint4 load_streaming(const void *p) { return *static_cast<const uint4 *>(p); }

inline void copy_async(uint4 *shared, const void *global, bool valid) {
    cuda_host::copy_later(shared, valid ? global : nullptr);
}
inline void copy_commit() { cuda_host::close_copy_group(); }
template <int kPending>
void copy_wait() {
    cuda_host::await_copies(kPending);
}

struct MmaOperands {
    uint32_t a[4], b[2];
};

/* Element k of a fragment that holds it in this pair. */
template <typename T>
float element(uint32_t pair, int k) {
    return to_float(T{static_cast<uint16_t>(pair >> (16 * (k % 2)))});
}

template <typename T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T, CUDA_HOST_CALLER) {
    const MmaOperands *const lanes =
        cuda_host::meet_warp(MmaOperands{{a[0], a[1], a[2], a[3]}, {b0, b1}}, file, line);
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for (int i = 0; i < 4; ++i) {
        const int row_half = i / 2, column = 2 * t + i % 2; /* row g + 8 row_half */
        for (int k = 0; k < 16; ++k) {
            const uint32_t of_row = lanes[g * 4 + k % 8 / 2].a[row_half + 2 * (k / 8)];
            const uint32_t of_column = lanes[column * 4 + k % 8 / 2].b[k / 8];
            c[i] += element<T>(of_row, k) * element<T>(of_column, k);
        }
    }
}

constexpr bool kHasWgmma = true;
constexpr int kWgmmaTiles = 16;

inline uint32_t shared_address(const void *shared) { return cuda_host::shared_address(shared); }
inline void wgmma_publish() { cuda_host::publish_copies(); }

template <int kCount>
void wgmma_fence(uint4 (&)[kCount][2], float (&)[kWgmmaTiles][4], CUDA_HOST_CALLER) {
    cuda_host::meet_warp(0, file, line);
    cuda_host::fence_products();
}

template <typename T>
void wgmma(float (&c)[kWgmmaTiles][4], const uint32_t (&a)[4], uint64_t b, T, CUDA_HOST_CALLER) {
    const MmaOperands *const lanes =
        cuda_host::meet_warp(MmaOperands{{a[0], a[1], a[2], a[3]}, {}}, file, line);
    cuda_host::Product product{{}, b, [](uint16_t bits) { return to_float(T{bits}); }};
    const int g = threadIdx.x % 32 / 4;
    for (int r = 0; r < 2; ++r)
        for (int k = 0; k < 16; ++k)
            product.a[r][k] = element<T>(lanes[g * 4 + k % 8 / 2].a[r + 2 * (k / 8)], k);
    cuda_host::multiply_later(c[0], product);
}

inline void wgmma_wait(float (&c)[kWgmmaTiles][4], CUDA_HOST_CALLER) {
    cuda_host::meet_warp(0, file, line);
    cuda_host::await_products(c[0]);
}

} // namespace cuda
} // namespace attn_sampler

#endif /* ATTN_SAMPLER_CUDA_PTX_CUH_ */
