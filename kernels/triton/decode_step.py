"""One decoding step: at most three launches, however many layers.

1. The vocabulary's partials of every position, which also clears the counters of the third.
2. The row log-sum-exp of all layers, unless it is given.
3. The column scores of all layers; the last program of each row of the batch selects, revises and commits.

Nothing is kept from one step to the next and nothing is sent from the host but kernel arguments (the
layers' addresses are among them), so a captured step replays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_sampler.options import Layer, Masks, Step
from attn_sampler.reference import StepResult

from . import launch
from .column_scores import plan_columns, reduce_columns
from .select_tokens import Commit, Options, Revision, Rules, commit_row
from .tile import Matrix, gather, place
from .token_confidence import Bitmask, Logits, token_partials

MAX_LAYERS = 128


@triton.jit(do_not_specialize=["block_start", "mask_token_id", "plane", "n_splits", "n_positions"])
def commit_kernel(
    scores,
    n_positions,
    tokens,
    block_start,
    mask_token_id,
    commit,
    plane,
    n_splits,
    COMMIT: tl.constexpr,
):
    """One program for each row: finish a step whose scores are there."""
    commit_row(
        tl.program_id(0),
        scores,
        tokens,
        block_start,
        mask_token_id,
        commit,
        plane,
        n_splits,
        n_positions,
        COMMIT,
    )


def _commit_arguments(out: StepResult, logits: Tensor, partials: Tensor, options: Step) -> dict[str, Any]:
    """What a kernel needs to know to finish a step."""
    _, rows, splits = partials.shape
    how, metric = options.selection, options.sampling.metric
    revision = Revision.of(out, out.current, None, how)
    rules, rule, tau = Rules.of(how)
    width = launch.next_power_of_2(splits)
    block = min(launch.next_power_of_2(out.selected.shape[1]), 256, max(1, 1024 // width))
    return {
        "tokens": Matrix.of(out.tokens),
        "block_start": options.block.start,
        "mask_token_id": options.mask_token_id,
        "commit": Commit(
            partials,
            out.token_ids,
            out.confidence,
            out.selected,
            rules,
            tau,
            None if revision is None else Logits.of(logits),
            None if revision is None else Bitmask.optional(options.sampling.token_bitmask),
            out.log_prob,
            revision,
        ),
        "plane": rows * splits,
        "n_splits": splits,
        "COMMIT": Options(rule, how.fallback, block, metric, width, how.revision_order),
    }


def decode_step(out: StepResult, logits: Tensor, layers: list[Layer], masks: Masks, options: Step) -> None:
    batch, positions = out.selected.shape
    if batch == 0:
        return
    plan = problem = counters = None
    attention = options.attention
    if layers:
        problem = gather(layers, masks, attention.softmax_scale)
        attention = place(attention, masks, problem)
        plan = plan_columns(problem, attention)
        counters = launch.workspace(logits.device, plan.counters + batch, dtype=torch.int32)
    sampling = options.sampling._replace(exclude_token_id=options.mask_token_id)
    step = _commit_arguments(out, logits, token_partials(logits, sampling, counters), options)
    # Where the last program may not, a launch of its own commits.
    in_kernel = layers and launch.last_program_commits(logits.device)
    if layers:
        reduce_columns(
            plan,
            problem,
            out.scores,
            [layer.softmax_lse for layer in layers],
            masks.query_mask,
            attention,
            step=step if in_kernel else {**step, "commit": None, "COMMIT": None},
            masked_rows=options.query_rows == "masked",
            counters=counters,
        )
    if not in_kernel:
        scores = Matrix.of(out.scores)
        launch.launch(
            commit_kernel,
            batch,
            {"scores": scores, "n_positions": positions, **step},
            launch.Config(1, 1, 4, 1),
            device=logits.device,
        )
