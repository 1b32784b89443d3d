#include <cstdlib>
#include <cstring>

#if defined(ATTN_SAMPLER_X86)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/kernels.h"

namespace attn_sampler {
namespace {

#define ATTN_SAMPLER_KERNELS(isa, confidence)                                                                \
    {#isa, isa::column_scores, isa::attention_map, confidence::token_confidence}

/* Best first. */
const CpuKernels kKernels[] = {
#if defined(ATTN_SAMPLER_X86)
    ATTN_SAMPLER_KERNELS(amx, avx512),        ATTN_SAMPLER_KERNELS(avx512_bf16, avx512),
    ATTN_SAMPLER_KERNELS(avx512, avx512),     ATTN_SAMPLER_KERNELS(avx2, avx2),
#endif
    ATTN_SAMPLER_KERNELS(portable, portable),
};

#if defined(ATTN_SAMPLER_X86)
/* Whether the processor has AMX tiles for bfloat16 and the kernel lets this process use them. */
bool has_amx() {
#if defined(ATTN_SAMPLER_AMX_EMULATED)
    return true;
#else
    unsigned a = 0, b = 0, c = 0, d = 0;
    const unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & amx_bf16) == 0 || (d & amx_tile) == 0)
        return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#endif
}
#endif

bool processor_runs(const char *isa) {
#if defined(ATTN_SAMPLER_X86)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    if (strcmp(isa, "amx") == 0)
        return bf16 && has_amx();
    if (strcmp(isa, "avx512_bf16") == 0)
        return bf16;
    if (strcmp(isa, "avx512") == 0)
        return avx512;
    if (strcmp(isa, "avx2") == 0)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return strcmp(isa, "portable") == 0;
}

const CpuKernels &choose() {
    const char *const pinned = std::getenv("ATTN_SAMPLER_CPU_ISA");
    for (const CpuKernels &kernels : kKernels)
        if ((pinned == nullptr || strcmp(pinned, kernels.name) == 0) && processor_runs(kernels.name))
            return kernels;
    /* A pinned set that cannot run: the one that always does. attn_sampler_cpu_isa() tells which it is. */
    return kKernels[sizeof(kKernels) / sizeof(kKernels[0]) - 1];
}

} // namespace

const CpuKernels &cpu_kernels() {
    static const CpuKernels &kernels = choose();
    return kernels;
}

} // namespace attn_sampler
