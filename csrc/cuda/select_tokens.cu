#include "cuda/select_tokens.cuh"

#include "cuda/launch.h"

namespace attn_sampler {
namespace cuda {
namespace {

/* Registers for four blocks: with its own choice ptxas spills on sm_80. */
__global__ void __launch_bounds__(kThreads, 4) select_tokens_kernel(const __grid_constant__ SelectArgs args) {
    await_launches();
    select_sequence(args, static_cast<int>(blockIdx.x));
}

} // namespace

/* All kernels are compiled for the same architectures. */
cudaError_t find_code(int *architecture) {
    cudaFuncAttributes attributes{};
    const cudaError_t status = cudaFuncGetAttributes(&attributes, select_tokens_kernel);
    *architecture = attributes.ptxVersion;
    return status;
}

SelectArgs select_args(const SelectProblem &p) {
    check_extent("scores: columns", p.columns, kMaxPositions);
    SelectArgs s{};
    s.scores = p.scores;
    s.confidence = p.confidence;
    s.masked = p.masked;
    s.selected = p.selected;
    s.batch = static_cast<int32_t>(p.batch);
    s.columns = static_cast<int32_t>(p.columns);
    s.rules = selection_rules(p);
    s.budget = p.budget;
    s.revised = p.revised;
    s.current = p.current;
    s.differs = p.differs;
    s.revision = revision_rule(p.params);
    return s;
}

int64_t select_tokens(const SelectProblem &p, const attn_sampler_exec &exec) {
    if (p.batch * p.columns == 0)
        return 0;
    return run(exec, [&](Launcher &launcher) {
        launcher.launch("select_tokens", select_tokens_kernel, select_args(p), p.batch,
                        static_cast<int64_t>(sizeof(Shared)));
    });
}

} // namespace cuda
} // namespace attn_sampler
