"""Block-wise decoding of a masked-diffusion language model."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attn_sampler import checks
from attn_sampler.capture import AttentionCapture
from attn_sampler.reference import StepResult
from attn_sampler.sampler import Policy, make_policy
from attn_sampler.trace import Commit, DecodeTrace

_STEP_STRIDE = 0x9E3779B97F4A7C15 - (1 << 64)  # odd: no two (row seed, step) pairs nearby meet


@dataclasses.dataclass
class Generation:
    """What ``generate`` returns."""

    tokens: Tensor  # [B, T] int64, prompts (left-padded) and their continuations
    attention_mask: Tensor  # [B, T] bool, False at padding
    num_forward_passes: Tensor  # [B] int64, the passes that each sequence took
    forward_seconds: float  # host time in the model, attention capture included
    sampling_seconds: float  # host time in scores, confidence, selection and commit
    trace: DecodeTrace | None  # where asked for


class StepEvent(NamedTuple):
    """What ``on_step`` is called with after each step."""

    step: int  # forward passes so far, over the whole run
    block: slice  # token positions
    sequence: Tensor  # [B'] int64, the sequences that took part
    result: StepResult  # of these sequences


@torch.no_grad()
def generate(
    model: Callable[..., Any],
    prompt_ids: Tensor | Sequence[Tensor] | Sequence[Sequence[int]],
    *,
    mask_token_id: int,
    gen_length: int = 0,
    block_length: int = 32,
    policy: str | Policy = "attn",
    tau: float | None = None,
    temperature: float = 0.0,
    seed: int | Sequence[int] = 0,
    attention_mask: Tensor | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    logit_shift: bool = False,
    layers: str | slice | Sequence[int] = "all",
    rows: str = "all",
    softmax_scope: str = "sequence",
    diagonal: bool = True,
    keep_layers: bool = True,
    backend: str = "auto",
    progress: bool = False,
    trace: bool = False,
    on_step: Callable[[StepEvent], None] | None = None,
) -> Generation:
    """Fill the masked positions of prompts with a masked-diffusion language model.

    Every masked position is filled: those in the prompt (infilling) and ``gen_length`` more appended to it.
    Blocks of ``block_length`` positions are decoded from left to right; inside a block the policy chooses the
    order. The same call gives the same tokens, alone or in a batch.

    Parameters
    ----------
    model
        Any callable ``model(tokens [B, T]) -> logits [B, T, V]`` (or an object with ``.logits``). A padded batch
        is passed as ``model(tokens, attention_mask=mask)`` with a boolean [B, T] mask. Policies that read
        attention need it to call ``F.scaled_dot_product_attention``.
    prompt_ids
        int64 [B, T], or a sequence of B prompts of any lengths, which are padded on the left.
    mask_token_id
        The id of ``[MASK]``.
    gen_length
        Masked positions appended to each prompt.
    block_length
        Positions decoded together. Blocks are counted from the end of the prompt, in both directions.
    policy, tau
        A name of ``sampler.POLICIES`` or a Policy; tau goes with names that take one.
    temperature, seed
        As in ``token_confidence``. An integer seed gives sequence i the stream ``seed + i``; a sequence
        of integers gives each its own.
    attention_mask
        Boolean [B, T] for a padded ``prompt_ids`` tensor: False at padding.
    eos_token_id
        A sequence that has committed this token and everything before it stops at the end of the
        block; its later masked positions become this token.
    pad_token_id
        What ragged prompts are padded with. Default: eos_token_id, or 0. It is masked from attention.
    logit_shift
        True for models that predict position j from hidden row j - 1 (Dream, Fast-dLLM v2).
    layers, rows, softmax_scope, diagonal
        Which attention counts: the calls by their order; the query rows, ``"all"`` or ``"masked"`` (those still
        masked); ``"sequence"`` or ``"block"``; whether attention to oneself does.
    keep_layers
        True reduces all layers in one call at the end of the forward pass; False each layer in the pass,
        which needs no memory for them.
    backend
        As in ``column_scores``.
    progress, trace, on_step
        A progress bar; a ``DecodeTrace`` in the result; a function called with a ``StepEvent`` after each step.

    Returns
    -------
    Generation

    Raises
    ------
    TypeError, ValueError
        Naming the argument; nothing has run then.
    RuntimeError
        The model's logits are undefined (NaN) at every masked position of a sequence.
    """
    chosen = make_policy(policy, **({} if tau is None else {"tau": tau}))
    checks.integer("gen_length", gen_length, 0)
    checks.integer("block_length", block_length, 1)
    checks.integer("mask_token_id", mask_token_id, 0)
    checks.non_negative("temperature", temperature)
    checks.choice("rows", rows, ("all", "masked"))
    if eos_token_id is not None and eos_token_id == mask_token_id:
        raise ValueError("eos_token_id: expected another token than mask_token_id")
    pad = pad_token_id if pad_token_id is not None else (eos_token_id or 0)
    tokens, visible = _pad_left(prompt_ids, attention_mask, pad)
    prompt_length = tokens.shape[1]
    if gen_length:
        extra = (tokens.shape[0], gen_length)
        tokens = torch.cat([tokens, tokens.new_full(extra, mask_token_id)], dim=1)
        visible = torch.cat([visible, visible.new_ones(extra)], dim=1)
    to_fill = (tokens == mask_token_id) & visible
    if tokens.shape[0] and not to_fill.any():
        raise ValueError(
            "prompt_ids: expected masked positions to fill, got none and gen_length = 0"
        )
    seeds = _sequence_seeds(seed, tokens)
    padded = not bool(visible.all())
    passes = torch.zeros(tokens.shape[0], dtype=torch.int64, device=tokens.device)
    record = None
    if trace:
        name = policy if isinstance(policy, str) else type(policy).__name__
        record = DecodeTrace(tokens.tolist(), mask_token_id, name)
    clock = {"forward": 0.0, "sampling": 0.0}
    finished = ~to_fill.any(dim=1)
    capture_options = {
        "layers": layers,
        "keep": keep_layers,
        "softmax_scope": softmax_scope,
        "diagonal": diagonal,
        "backend": backend,
    }

    with _progress_bar(progress, int(to_fill.sum())) as advance:
        for block in _blocks(prompt_length, tokens.shape[1], block_length):
            chosen.reset()
            while True:
                open_rows = (to_fill[:, block] & (tokens[:, block] == mask_token_id)).any(dim=1)
                sequence = (open_rows & ~finished).nonzero().squeeze(1)
                if sequence.numel() == 0:
                    break
                batch, mask = tokens[sequence], visible[sequence]
                began = time.perf_counter()
                with contextlib.ExitStack() as stack:
                    capture = None
                    if chosen.needs_scores:
                        voting = mask if rows == "all" else mask & (batch == mask_token_id)
                        query_mask = voting if padded or rows == "masked" else None
                        capture = AttentionCapture(block, query_mask=query_mask, **capture_options)
                        stack.enter_context(capture)
                    output = model(batch, attention_mask=mask) if padded else model(batch)
                logits = _block_logits(output, batch, block, logit_shift, mask_token_id)
                between = time.perf_counter()
                options: dict[str, Any] = {}
                attention: Any = None
                if capture is not None and keep_layers:
                    attention, options = capture.layers, capture.step_options
                elif capture is not None:
                    attention = capture.scores
                result = chosen.step(
                    batch,
                    logits,
                    attention,
                    block=block,
                    mask_token_id=mask_token_id,
                    temperature=temperature,
                    seeds=seeds[sequence] + passes[sequence] * _STEP_STRIDE,
                    sequence=sequence,
                    backend=backend,
                    **options,
                )
                tokens[sequence] = batch
                clock["forward"] += between - began
                clock["sampling"] += time.perf_counter() - between
                committed = result.selected.sum(dim=1)
                if not bool((committed > 0).all()):
                    stuck = sequence[committed == 0].tolist()
                    raise RuntimeError(
                        f"nothing could be committed in sequences {stuck}: the model's logits or "
                        "attention scores are NaN at every masked position"
                    )
                if record is not None:
                    record.commits += _commits(result, sequence, passes, block)
                passes[sequence] += 1
                advance(int(committed.sum()))
                if on_step is not None:
                    on_step(StepEvent(int(passes.max()), block, sequence, result))
            if eos_token_id is not None:
                ended = (tokens[:, : block.stop] == eos_token_id) & to_fill[:, : block.stop]
                finished |= ended.any(dim=1)
    if eos_token_id is not None:
        after_end = ((tokens == eos_token_id) & to_fill).cumsum(dim=1) > 0
        tokens = tokens.masked_fill(after_end & to_fill, eos_token_id)
    return Generation(tokens, visible, passes, clock["forward"], clock["sampling"], record)


def _pad_left(
    prompt_ids: Tensor | Sequence[Tensor] | Sequence[Sequence[int]],
    attention_mask: Tensor | None,
    pad_token_id: int,
) -> tuple[Tensor, Tensor]:
    """Tokens [B, T], a copy, and which of them are not padding."""
    if isinstance(prompt_ids, Tensor):
        checks.tensor("prompt_ids", prompt_ids, "[B, T]", (torch.int64,))
        if attention_mask is None:
            return prompt_ids.clone(), torch.ones_like(prompt_ids, dtype=torch.bool)
        shape = prompt_ids.shape
        checks.optional("attention_mask", attention_mask, "[B, T]", shape, (torch.bool,), prompt_ids)
        return prompt_ids.clone(), attention_mask.clone()
    if attention_mask is not None:
        raise ValueError("attention_mask: goes with a prompt_ids tensor, not with a list of prompts")
    rows = [torch.as_tensor(row, dtype=torch.int64) for row in prompt_ids]
    if not rows or any(row.dim() != 1 for row in rows):
        raise ValueError("prompt_ids: expected [B, T], or a non-empty sequence of 1-dimensional prompts")
    length = max(len(row) for row in rows)
    tokens = rows[0].new_full((len(rows), length), pad_token_id)
    visible = torch.zeros_like(tokens, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :] = row
        visible[i, length - len(row) :] = True
    return tokens, visible


def _sequence_seeds(seed: int | Sequence[int], tokens: Tensor) -> Tensor:
    """One int64 seed a sequence."""
    batch = tokens.shape[0]
    if isinstance(seed, int):
        return seed + torch.arange(batch, dtype=torch.int64, device=tokens.device)
    if len(seed) != batch:
        raise ValueError(f"seed: expected an integer or {batch} of them, got {len(seed)}")
    return torch.tensor(list(seed), dtype=torch.int64, device=tokens.device)


def _blocks(prompt_length: int, length: int, block_length: int) -> Iterator[slice]:
    """Windows from left to right, counted from the prompt's end so that left padding moves none of them."""
    first = prompt_length % block_length
    bounds = [*range(first, prompt_length, block_length)]
    bounds += [*range(prompt_length, length, block_length), length]
    if first:
        bounds.insert(0, 0)
    for start, stop in zip(bounds, bounds[1:], strict=False):
        yield slice(start, stop)


def _block_logits(
    output: Any, tokens: Tensor, block: slice, logit_shift: bool, mask_token_id: int
) -> Tensor:
    """The predictions [B, C, V] for the block's positions."""
    logits = getattr(output, "logits", output)
    checks.tensor("model output", logits, "[B, T, V]", checks.FLOAT_DTYPES, like=tokens)
    checks.shape("model output", logits, "[B, T, V]", (*tokens.shape, logits.shape[2]))
    checks.integer("mask_token_id", mask_token_id, 0, logits.shape[2])
    if not logit_shift:
        return logits[:, block]
    if block.start > 0:
        return logits[:, block.start - 1 : block.stop - 1]
    return torch.cat([logits[:, :1], logits[:, : block.stop - 1]], dim=1)  # nothing precedes row 0


def _commits(
    result: StepResult, sequence: Tensor, passes: Tensor, block: slice
) -> list[Commit]:
    row, column = result.selected.nonzero(as_tuple=True)
    return [
        Commit(*fields)
        for fields in zip(
            sequence[row].tolist(),
            passes[sequence[row]].tolist(),
            (column + block.start).tolist(),
            result.token_ids[row, column].tolist(),
            result.scores[row, column].tolist(),
            result.confidence[row, column].tolist(),
            strict=True,
        )
    ]


@contextlib.contextmanager
def _progress_bar(enabled: bool, total: int) -> Iterator[Callable[[int], None]]:
    if not enabled:
        yield lambda _: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("tokens"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("decode", total=total)
        yield lambda count: bar.advance(task, count)
