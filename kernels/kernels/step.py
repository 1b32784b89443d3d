"""One decoding step: at most three launches, however many layers.

1. The vocabulary's partials of every position, which also clears the counters of the third.
2. The row log-sum-exp of all layers, unless it is given.
3. The column scores of all layers; the last program of each row of the batch selects and commits.

Nothing is kept from one step to the next and nothing is sent from the host but kernel arguments (the
layers' addresses are among them), so a captured step replays as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import attention, launch, selection
from .confidence import token_partials


def decode_step(
    tokens: Tensor,
    scores: Tensor,
    token_ids: Tensor,
    confidence: Tensor,
    selected: Tensor,
    logits: Tensor,
    q: list[Tensor],
    k: list[Tensor],
    softmax_lse: list[Tensor],
    q_descale: list[Tensor],
    k_descale: list[Tensor],
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    seeds: Tensor | None,
    block_start: int,
    block_stop: int,
    mask_token_id: int,
    masked_rows_only: bool,
    column_start: int,
    column_stop: int,
    query_start: int,
    softmax_scale: float | None,
    lse_base: str,
    causal: bool,
    softmax_scope: str,
    diagonal: bool,
    reduction: str,
    metric: str,
    temperature: float,
    seed: int,
    policy: str,
    tau: float,
    fallback: str,
) -> None:
    batch = tokens.shape[0]
    if batch == 0:
        return
    plan = layers = counters = None
    if q:
        layers = attention.gather(q, k, q_descale, k_descale)
        plan = attention.plan_columns(
            layers, q[0], column_start, column_stop, query_start, softmax_scope, reduction, False
        )
        counters = launch.workspace(scores, plan.counters + batch, dtype=torch.int32)
    partials = token_partials(logits, seeds, metric, temperature, seed, mask_token_id, counters=counters)
    commit = selection.Commit(
        tokens,
        block_start,
        mask_token_id,
        masked_rows_only,
        partials,
        token_ids,
        confidence,
        selected,
        metric,
        policy,
        tau,
        fallback,
    )
    if plan is None or layers is None:
        commit.launch(scores)
        return
    attention.reduce_columns(
        plan,
        layers,
        scores,
        q,
        softmax_lse,
        key_mask,
        query_mask,
        column_start,
        column_stop,
        query_start,
        layers.headdim**-0.5 if softmax_scale is None else softmax_scale,
        lse_base,
        causal,
        softmax_scope,
        diagonal,
        reduction,
        False,
        False,
        k[0].shape[2],
        commit,
        counters,
    )
