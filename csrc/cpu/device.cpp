#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <new>
#include <string>

#if defined(__x86_64__) || defined(__i386__)
#define ATTN_SAMPLER_X86 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/kernels.h"
#include "device.h"

namespace attn_sampler {

/* cpu_isas.h, which CMakeLists.txt writes, has ISA(name, whose token_confidence it takes) for each
 * instruction set of this build, best first. Their kernels are in namespaces of those names. */
#define ISA(isa, confidence)                                                                                 \
    namespace isa {                                                                                          \
    bool column_scores(const AttentionProblem &);                                                            \
    bool attention_map(const AttentionProblem &);                                                            \
    bool token_confidence(const ConfidenceProblem &);                                                        \
    }
#include "cpu_isas.h"
#undef ISA

namespace {

#define ISA(isa, confidence) {#isa, isa::column_scores, isa::attention_map, confidence::token_confidence},
const CpuKernels kKernels[] = {
#include "cpu_isas.h"
};
#undef ISA

#if defined(ATTN_SAMPLER_X86)
/* Whether the processor has AMX tiles for bfloat16, or tests/support/amx_emulator.cpp is linked in. */
bool has_amx() {
#if defined(ATTN_SAMPLER_EMULATE_AMX)
    return true;
#else
    unsigned a = 0, b = 0, c = 0, d = 0;
    const unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & amx_bf16) != 0 && (d & amx_tile) != 0;
#endif
}

/* Asks the operating system for the tiles' registers, 8 KiB more to be saved for each signal; 0, or why not.
 */
int request_amx() {
#if defined(ATTN_SAMPLER_EMULATE_AMX)
    /* As the test says that the system answers. */
    const char *const answer = std::getenv("ATTN_SAMPLER_EMULATED_AMX_ERROR");
    return answer == nullptr ? 0 : std::atoi(answer);
#else
    constexpr long kRequestPermission = 0x1023, kTileData = 18; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 ? 0 : errno;
#endif
}
#endif

/* Why an AMX unit that is there does not serve; empty where there is none, or it does. */
const std::string &amx_refusal() {
    static const std::string reason = []() -> std::string {
#if defined(ATTN_SAMPLER_X86)
        const int error = has_amx() ? request_amx() : 0;
        if (error == ENOSPC)
            return "the signal stack of a thread of this program (sigaltstack) has no room for its registers";
        if (error != 0)
            return std::string("the operating system refuses its registers: ") + std::strerror(error);
#endif
        return "";
    }();
    return reason;
}

/* Whether the processor and the operating system run an instruction set. */
bool runs(const std::string &isa) {
#if defined(ATTN_SAMPLER_X86)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    /* Not every compiler knows of bfloat16. */
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool bf16 = avx512 && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & 1u << 5) != 0;
    if (isa == "amx")
        return bf16 && has_amx() && amx_refusal().empty();
    if (isa == "avx512_bf16")
        return bf16;
    if (isa == "avx512")
        return avx512;
    if (isa == "avx2")
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return isa == "portable";
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
            if (!runs(kernels.isa))
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

} // namespace

const CpuKernels &cpu_kernels() { return *choice().kernels; }

const char *cpu_isa() { return cpu_kernels().isa; }

const char *cpu_amx_refusal() { return amx_refusal().empty() ? nullptr : amx_refusal().c_str(); }

const Device kCpuDevice = {
    unavailable,
    [](int) -> const char * { return nullptr; },
    run<AttentionProblem, &CpuKernels::column_scores>,
    run<AttentionProblem, &CpuKernels::attention_map>,
    cpu::top_columns,
    run<ConfidenceProblem, &CpuKernels::token_confidence>,
    cpu::select_tokens,
    cpu::decode_step,
};

} // namespace attn_sampler
