#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"

namespace attn_sampler {
namespace {

#define ATTN_SAMPLER_KERNELS(isa) {#isa, isa::column_scores, isa::attention_map, isa::token_confidence}

/* Best first. */
const CpuKernels kKernels[] = {
#if defined(ATTN_SAMPLER_X86)
    ATTN_SAMPLER_KERNELS(avx512),
    ATTN_SAMPLER_KERNELS(avx2),
#endif
    ATTN_SAMPLER_KERNELS(portable),
};

bool processor_runs(const char *isa) {
#if defined(ATTN_SAMPLER_X86)
    __builtin_cpu_init();
    if (strcmp(isa, "avx512") == 0)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (strcmp(isa, "avx2") == 0)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return strcmp(isa, "portable") == 0;
}

const CpuKernels &choose() {
    const char *const pinned = std::getenv("ATTN_SAMPLER_CPU_ISA");
    for (const CpuKernels &kernels : kKernels)
        if (processor_runs(kernels.name) && (pinned == nullptr || strcmp(pinned, kernels.name) == 0))
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
