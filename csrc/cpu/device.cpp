#include <cstdlib>
#include <cstring>
#include <iterator>
#include <new>
#include <string>

#if defined(ATTN_SAMPLER_X86)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/kernels.h"
#include "device.h"

namespace attn_sampler {
namespace {

#define ATTN_SAMPLER_KERNELS(isa, confidence)                                                                \
    {#isa, isa::column_scores, isa::attention_map, confidence::token_confidence}

/* Best first. */
const CpuKernels kKernels[] = {
#if defined(ATTN_SAMPLER_WITH_AMX)
    ATTN_SAMPLER_KERNELS(amx, avx512),
#endif
#if defined(ATTN_SAMPLER_WITH_AVX512_BF16)
    ATTN_SAMPLER_KERNELS(avx512_bf16, avx512),
#endif
#if defined(ATTN_SAMPLER_X86)
    ATTN_SAMPLER_KERNELS(avx512, avx512),      ATTN_SAMPLER_KERNELS(avx2, avx2),
#endif
    ATTN_SAMPLER_KERNELS(portable, portable),
};

#if defined(ATTN_SAMPLER_WITH_AVX512_BF16)
/* Whether the processor has AMX tiles for bfloat16 and the kernel lets this process use them, or
 * tests/support/amx_emulator.cpp is linked in. */
bool has_amx() {
#if defined(ATTN_SAMPLER_EMULATE_AMX)
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
#if defined(ATTN_SAMPLER_WITH_AVX512_BF16)
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    if (strcmp(isa, "amx") == 0)
        return bf16 && has_amx();
    if (strcmp(isa, "avx512_bf16") == 0)
        return bf16;
#endif
    if (strcmp(isa, "avx512") == 0)
        return avx512;
    if (strcmp(isa, "avx2") == 0)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return strcmp(isa, "portable") == 0;
}

struct Choice {
    const CpuKernels *kernels;
    std::string problem; /* empty where the kernels run */
};

const Choice &choice() {
    static const Choice made = []() -> Choice {
        const char *const pinned = std::getenv("ATTN_SAMPLER_CPU_ISA");
        const bool is_pinned = pinned != nullptr && pinned[0] != '\0';
        std::string names;
        for (const CpuKernels &kernels : kKernels) {
            if (!processor_runs(kernels.isa))
                continue;
            if (!is_pinned || strcmp(pinned, kernels.isa) == 0)
                return {&kernels, ""};
            names += (names.empty() ? "" : ", ") + std::string(kernels.isa);
        }
        return {std::end(kKernels) - 1,
                "ATTN_SAMPLER_CPU_ISA: expected one of " + names + " here, got " + std::string(pinned)};
    }();
    return made;
}

const char *unavailable() { return choice().problem.empty() ? nullptr : choice().problem.c_str(); }

/* Runs one of the chosen kernels. */
template <typename Problem, bool (*CpuKernels::*kKernel)(const Problem &)>
int64_t run(const Problem &problem, const attn_sampler_exec &) {
    if (!(cpu_kernels().*kKernel)(problem))
        throw std::bad_alloc();
    return 0;
}

/* Runs what needs no choice. */
template <typename Problem, void (*kFunction)(const Problem &)>
int64_t run(const Problem &problem, const attn_sampler_exec &) {
    kFunction(problem);
    return 0;
}

} // namespace

const CpuKernels &cpu_kernels() { return *choice().kernels; }

const char *cpu_isa() { return cpu_kernels().isa; }

const Device kCpuDevice = {
    unavailable,
    run<AttentionProblem, &CpuKernels::column_scores>,
    run<AttentionProblem, &CpuKernels::attention_map>,
    run<ConfidenceProblem, &CpuKernels::token_confidence>,
    run<SelectProblem, cpu::select_tokens>,
    run<StepProblem, cpu::decode_step>,
};

} // namespace attn_sampler
