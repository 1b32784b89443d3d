#include "cuda/token_confidence.cuh"

#include "cuda/launch.h"
#include "cuda/select_tokens.cuh"

namespace attn_sampler {
namespace cuda {
namespace {

struct ConfidenceStepArgs {
    ConfidenceArgs confidence;
    SelectArgs select;
    Deal units;
};

/* Of token_confidence, or of a decoding step to which the scores are given. */
__global__ void __launch_bounds__(kThreads, 4)
    token_confidence_or_step_kernel(const __grid_constant__ ConfidenceStepArgs args) {
    await_launches();
    confidence_units(args.confidence, args.units.of(static_cast<int>(blockIdx.x)),
                     [&](int b) { finish_part(args.select, b); });
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
    /* A unit is some turns of four groups a thread, as few as one sequence has work for. */
    const int64_t rows = p.batch * p.positions, groups = ceil_div(p.vocab, kGroup);
    constexpr int64_t kTurn = 4 * kThreads;
    const int64_t turns = clamp(p.positions * groups / (kTurn * kMostParts / 2), 2, 8);
    a.groups_per_split = static_cast<int32_t>(turns * kTurn);
    a.splits = divisor(ceil_div(groups, a.groups_per_split));
    a.by_positions = divisor(p.positions);
    if (a.splits.value > 1) {
        a.partial = launcher.take<Confidence>(rows * a.splits.value);
        a.arrived = launcher.counters(rows);
    }
    return a;
}

void launch_confidence(const char *name, const ConfidenceArgs &confidence, const SelectArgs &select,
                       Launcher &launcher) {
    const int64_t units = confidence_unit_count(confidence);
    check_extent("logits: units of a launch", units, INT32_MAX);
    const int64_t blocks = min_of(units, launcher.target_blocks(4, 0));
    launcher.launch(name, token_confidence_or_step_kernel,
                    ConfidenceStepArgs{confidence, select, deal(units, blocks)}, blocks,
                    static_cast<int64_t>(sizeof(Shared)));
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
