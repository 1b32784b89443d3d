/* Everything that is written in PTX, or done in another way where tests run on a CPU: the rest of csrc/cuda
 * is plain C++.
 *
 * The narrow types are storage; arithmetic on them is the tensor cores' or, after widening, float32.
 */
#ifndef ATTN_SAMPLER_CUDA_PTX_CUH_
#define ATTN_SAMPLER_CUDA_PTX_CUH_

#include <cstdint>
#include <cuda_fp16.h>
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
/* e4m3 */
struct Float8 {
    uint8_t bits;
};

/* A function that is called. */
#define ATTN_SAMPLER_NOINLINE __noinline__

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
    extern __shared__ __align__(128) unsigned char memory[];
    return memory;
}

/* Lets what is launched next take its place as soon as all blocks of this kernel have started. */
__device__ inline void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
/* Waits until all that was launched before has ended. Nothing that it may have written is read earlier. Older
 * code does not wait, on whatever device: it is launched after the end (Launcher). */
__device__ inline void await_launches() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* 2^x within 2 ulp; results below 2^-126 are 0. */
__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* Adds to a counter and returns what it was. What this block wrote before a barrier is visible to whoever
 * sees the new count, and what others wrote before theirs to this block after a barrier. */
__device__ inline uint32_t take_tickets(uint32_t *counter, uint32_t count) {
    uint32_t old;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
                 : "=r"(old)
                 : "l"(counter), "r"(count)
                 : "memory");
    return old;
}

/* Of the sampling stream; the tests count them. */
__device__ inline PhiloxWords<uint64_t> noise_words(uint64_t seed, uint32_t group, uint32_t position) {
    return philox(seed, group, position);
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

/* Asynchronous products of a warpgroup, the four warps of a block, where the architecture has them. "PTX
 * ISA", chapter "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions", fixes what follows.
 */
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasWgmma = true;
#else
constexpr bool kHasWgmma = false;
#endif
constexpr int kWgmmaTiles = 16; /* of 8 columns, in one product */

/* As matrix descriptors count it. */
__device__ inline uint32_t shared_address(const void *shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

/* Shows this thread's completed writes of shared memory to products that start after a barrier. */
__device__ inline void wgmma_publish() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

/* What an empty statement may change is in place before it, and is not read earlier than after it. */
__device__ inline void pin(float (&c)[kWgmmaTiles][4]) {
#pragma unroll
    for (int j = 0; j < kWgmmaTiles; ++j)
        asm volatile("" : "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])::"memory");
}

/* Before products that read a and add to c: what was written there is visible to them. */
template <int kCount>
__device__ inline void wgmma_fence(uint4 (&a)[kCount][2], float (&c)[kWgmmaTiles][4]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#pragma unroll
    for (int i = 0; i < 2 * kCount; ++i) {
        uint4 &q = a[i / 2][i % 2];
        asm volatile("" : "+r"(q.x), "+r"(q.y), "+r"(q.z), "+r"(q.w)::"memory");
    }
    pin(c);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

/* Starts c[64 x 128] += a[64 x 16] b[16 x 128]; neither c nor a may be touched before wgmma_wait. Warp w
 * holds rows 16 w ... of a and c, as `mma` holds its 16 rows, and column 8 j + 2 t + i % 2 in c[j][i]. The
 * matrix descriptor b says where in shared memory the columns lie. */
#define ATTN_SAMPLER_ACCUMULATORS(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define ATTN_SAMPLER_PRODUCT(type)                                                                           \
    asm volatile("{.reg .pred accumulate; setp.eq.u32 accumulate, 0, 0; "                                    \
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " "                            \
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                   \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "          \
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "          \
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "         \
                 "{%64, %65, %66, %67}, %68, accumulate, 1, 1, 0;}"                                          \
                 : ATTN_SAMPLER_ACCUMULATORS(0), ATTN_SAMPLER_ACCUMULATORS(1), ATTN_SAMPLER_ACCUMULATORS(2), \
                   ATTN_SAMPLER_ACCUMULATORS(3), ATTN_SAMPLER_ACCUMULATORS(4), ATTN_SAMPLER_ACCUMULATORS(5), \
                   ATTN_SAMPLER_ACCUMULATORS(6), ATTN_SAMPLER_ACCUMULATORS(7), ATTN_SAMPLER_ACCUMULATORS(8), \
                   ATTN_SAMPLER_ACCUMULATORS(9), ATTN_SAMPLER_ACCUMULATORS(10),                              \
                   ATTN_SAMPLER_ACCUMULATORS(11), ATTN_SAMPLER_ACCUMULATORS(12),                             \
                   ATTN_SAMPLER_ACCUMULATORS(13), ATTN_SAMPLER_ACCUMULATORS(14),                             \
                   ATTN_SAMPLER_ACCUMULATORS(15)                                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
__device__ inline void wgmma(float (&c)[kWgmmaTiles][4], const uint32_t (&a)[4], uint64_t b, BFloat16) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    ATTN_SAMPLER_PRODUCT("bf16");
#endif
}
__device__ inline void wgmma(float (&c)[kWgmmaTiles][4], const uint32_t (&a)[4], uint64_t b, Half) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    ATTN_SAMPLER_PRODUCT("f16");
#endif
}
#undef ATTN_SAMPLER_PRODUCT
#undef ATTN_SAMPLER_ACCUMULATORS

/* Waits for all products of this warpgroup, the latest of which added to c. */
__device__ inline void wgmma_wait(float (&c)[kWgmmaTiles][4]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    pin(c);
#endif
}

} // namespace cuda
} // namespace attn_sampler

#endif /* ATTN_SAMPLER_CUDA_PTX_CUH_ */
