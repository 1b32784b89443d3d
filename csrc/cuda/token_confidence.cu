/* Token confidence and selection where they are not part of a launch of column scores. */
#include "cuda/plan.h"

namespace attn_sampler {
namespace cuda {
namespace {

struct ConfidenceStepArgs {
    ConfidenceArgs confidence;
    SelectArgs select;
};

__global__ void __launch_bounds__(kThreads, 4)
    token_confidence_kernel(const __grid_constant__ ConfidenceStepArgs args) {
    const int block = static_cast<int>(blockIdx.x);
    if (confidence_block(args.confidence, block))
        finish_part(args.select, block / args.confidence.splits / args.confidence.positions);
}

__global__ void __launch_bounds__(kThreads) select_tokens_kernel(const __grid_constant__ SelectArgs args) {
    select_sequence(args, static_cast<int>(blockIdx.x));
}

} // namespace

void launch_confidence(const char *name, const ConfidenceArgs &confidence, const SelectArgs &select,
                       Launcher &launcher) {
    launcher.launch(name, token_confidence_kernel, ConfidenceStepArgs{confidence, select},
                    confidence_blocks(confidence), static_cast<int64_t>(sizeof(Shared)));
}

int64_t token_confidence(const ConfidenceProblem &p, const attn_sampler_exec &exec, bool run_it) {
    if (p.batch * p.positions == 0)
        return 0;
    return run(exec, run_it, [&](Launcher &launcher) {
        launch_confidence("token_confidence", confidence_args(p, launcher), SelectArgs{}, launcher);
    });
}

int64_t select_tokens(const SelectProblem &p, const attn_sampler_exec &exec, bool run_it) {
    if (p.batch * p.columns == 0)
        return 0;
    return run(exec, run_it, [&](Launcher &launcher) {
        launcher.launch("select_tokens", select_tokens_kernel, select_args(p), p.batch,
                        static_cast<int64_t>(sizeof(Shared)));
    });
}

} // namespace cuda
} // namespace attn_sampler
