#include "cuda/token_confidence.cuh"

#include "cuda/launch.h"
#include "cuda/select_tokens.cuh"

namespace attn_sampler {
namespace cuda {
namespace {

constexpr int64_t kMinSplitGroups = 256; /* 2048 tokens: what a block reads of a row at least */

struct ConfidenceStepArgs {
    ConfidenceArgs confidence;
    SelectArgs select;
};

/* Of token_confidence, or of a decoding step to which the scores are given. */
__global__ void __launch_bounds__(kThreads, 4)
    token_confidence_or_step_kernel(const __grid_constant__ ConfidenceStepArgs args) {
    const int block = static_cast<int>(blockIdx.x);
    if (confidence_block(args.confidence, block))
        finish_part(args.select, block / args.confidence.splits / args.confidence.positions);
}

} // namespace

ConfidenceArgs confidence_args(const ConfidenceProblem &p, Launcher &launcher) {
    check_extent("logits: vocabulary", p.vocab, kMaxPositions);
    check_extent("logits: positions", p.batch * p.positions, kMaxPositions);
    ConfidenceArgs a{};
    a.logits = p.logits;
    a.draws = p.draws;
    a.bitmask = p.bitmask;
    a.current_ids = p.current_ids;
    a.token_ids = p.token_ids;
    a.confidence = p.confidence;
    a.log_prob = p.log_prob;
    a.current = p.current;
    a.batch = static_cast<int32_t>(p.batch);
    a.positions = static_cast<int32_t>(p.positions);
    a.vocab = static_cast<int32_t>(p.vocab);
    a.excluded = p.excluded >= 0 && p.excluded < p.vocab ? static_cast<int32_t>(p.excluded) : -1;
    a.noise_group = static_cast<uint32_t>(p.vocab_start / 4);
    a.noise_place = static_cast<int32_t>(p.vocab_start % 4);
    a.dtype = p.dtype;
    a.metric = p.metric;
    /* A group more than the vocabulary fills: rows may start within one. */
    const int64_t rows = p.batch * p.positions, groups = p.vocab / kGroup + 2;
    const int64_t wanted = 2 * launcher.target_blocks(4, 0) / clamp(rows, 1, INT32_MAX);
    a.groups_per_split = static_cast<int32_t>(
        ceil_div(groups, clamp(wanted, 1, clamp(groups / kMinSplitGroups, 1, kThreads))));
    a.splits = static_cast<int32_t>(ceil_div(groups, a.groups_per_split));
    if (a.splits > 1) {
        a.partial = launcher.take<Confidence>(rows * a.splits);
        a.arrived = launcher.counters(rows);
    }
    return a;
}

void launch_confidence(const char *name, const ConfidenceArgs &confidence, const SelectArgs &select,
                       Launcher &launcher) {
    launcher.launch(name, token_confidence_or_step_kernel, ConfidenceStepArgs{confidence, select},
                    confidence_blocks(confidence), static_cast<int64_t>(sizeof(Shared)));
}

int64_t token_confidence(const ConfidenceProblem &p, const attn_sampler_exec &exec) {
    if (p.batch * p.positions == 0)
        return 0;
    return run(exec, [&](Launcher &launcher) {
        launch_confidence("token_confidence", confidence_args(p, launcher), SelectArgs{}, launcher);
    });
}

} // namespace cuda
} // namespace attn_sampler
