/* Everything that is written in PTX, and nothing else: the rest of csrc/cuda is plain C++.
 *
 * The narrow types are storage; arithmetic on them is the tensor cores' or, after widening, float32.
 */
#ifndef ATTN_SAMPLER_CUDA_PTX_CUH_
#define ATTN_SAMPLER_CUDA_PTX_CUH_

#include <cstdint>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace attn_sampler {
namespace cuda {

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};
/* e4m3 */
struct Float8 {
    uint8_t bits;
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ inline float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }

#if __CUDA_ARCH__ >= 890
/* Two e4m3 numbers as float16, the low one in the low half. */
__device__ inline uint32_t convert_e4m3x2(uint16_t x) {
    uint32_t y;
    asm volatile("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(y) : "h"(x));
    return y;
}
#endif

/* The products of two pairs of float16. */
__device__ inline uint32_t multiply_f16x2(uint32_t a, uint32_t b) {
    uint32_t y;
    asm volatile("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}

/* The shared memory that the launch asked for. */
__device__ inline unsigned char *dynamic_shared() {
    extern __shared__ __align__(16) unsigned char memory[];
    return memory;
}

/* 2^x within 2 ulp; results below 2^-126 are 0. */
__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* Adds one to a counter and returns what it was; at `limit` it starts again from 0. What this block wrote
 * before a barrier is visible to whoever sees the new count, and what others wrote before theirs to this
 * block after a barrier. */
__device__ inline uint32_t take_ticket(uint32_t *counter, uint32_t limit) {
    uint32_t old;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
                 : "=r"(old)
                 : "l"(counter), "r"(limit)
                 : "memory");
    return old;
}

/* 16 bytes that this kernel reads once. */
__device__ inline uint4 load_streaming(const void *p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

/* 16 bytes from global to shared memory, or zeros. Nothing is read where `valid` is false. */
__device__ inline void copy_async(uint4 *shared, const void *global, bool valid) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(address), "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}

/* Closes a group of this thread's copies. */
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/* Waits for all but the latest kPending groups of this thread. */
template <int kPending>
__device__ inline void copy_wait() {
    asm volatile("cp.async.wait_group %0;" : : "n"(kPending) : "memory");
}

/* c[16 x 8] += a[16 x 16] b[16 x 8] for a warp. With g = lane / 4 and t = lane % 4 a lane holds
 * a[0], a[1]: rows g and g + 8 at k = 2t, 2t + 1; a[2], a[3]: the same rows at k + 8; b0, b1: column g at the
 * same k; c[0], c[1]: row g, columns 2t and 2t + 1; c[2], c[3]: row g + 8. */
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, BFloat16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Half) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

} // namespace cuda
} // namespace attn_sampler

#endif /* ATTN_SAMPLER_CUDA_PTX_CUH_ */
