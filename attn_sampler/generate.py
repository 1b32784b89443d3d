"""Block-wise decoding of a masked-diffusion language model."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attn_sampler import checks
from attn_sampler.backends import choose_backend
from attn_sampler.caching import ForwardPasses
from attn_sampler.capture import AttentionCapture
from attn_sampler.options import QUERY_ROWS as ROWS
from attn_sampler.options import check_temperature
from attn_sampler.reference import StepResult
from attn_sampler.sampler import Policy, make_policy
from attn_sampler.trace import Commit, DecodeTrace

STEP_STRIDE = 0x9E3779B97F4A7C15 - (1 << 64)  # odd: no two (row seed, step) pairs nearby meet


@dataclasses.dataclass
class Generation:
    """What ``generate`` returns."""

    tokens: Tensor  # [B, T] int64, prompts (left-padded) and their continuations
    attention_mask: Tensor  # [B, T] bool, False at padding
    num_forward_passes: Tensor  # [B] int64, the passes that each sequence took
    forward_seconds: float  # in the model, attention capture included
    sampling_seconds: float  # in scores, confidence, selection and commit
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
    cache: str = "none",
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
    order. A sequence gets the same tokens alone and in a batch, as far as the model's logits (and, on a
    GPU, the last bits of its scores) are the same.

    Parameters
    ----------
    model
        Any callable ``model(tokens [B, T]) -> logits [B, T, V]`` (or an object with ``.logits``). A padded
        batch is passed as ``model(tokens, attention_mask=mask)`` with a boolean [B, T] mask. Policies that
        read attention need it to call ``F.scaled_dot_product_attention``. A model whose ``causal_block`` says
        that its attention is block-causal (``caching.CacheableModel``) is given the tokens up to the end
        of the current of those blocks.
    prompt_ids
        int64 [B, T], or a sequence of B prompts of any lengths, which are padded on the left and put on the
        device of the model's parameters. For a block-causal model their lengths agree modulo its
        ``causal_block``, so that padding moves none of its blocks.
    mask_token_id
        The id of ``[MASK]``.
    gen_length
        Masked positions appended to each prompt.
    block_length
        Positions decoded together. Blocks are counted from the end of the prompt, in both directions; for a
        block-causal model from position 0, and this must divide its ``causal_block``.
    policy, tau
        A name of ``sampler.POLICIES`` or a Policy; tau goes with names that take one.
    temperature, seed
        As in ``token_confidence``. An integer seed gives sequence i the stream ``seed + i``; a sequence
        of integers gives each its own. Noise follows a position's place in its block: masks in the first,
        incomplete block of a prompt draw other noise where padding makes that block longer.
    attention_mask
        Boolean [B, T] for a left-padded ``prompt_ids`` tensor: False at padding.
    eos_token_id
        A sequence that has committed this token and everything before it stops at the end of the
        block; its later masked positions become this token.
    pad_token_id
        What ragged prompts are padded with, not mask_token_id. Default: eos_token_id, or else 0 (or 1). It is
        masked from attention.
    logit_shift
        True for models that predict position j from hidden row j - 1 (Dream, Fast-dLLM v2). A sequence's
        first position, which nothing but padding precedes, is predicted from its own row.
    cache
        What a ``caching.CacheableModel`` need not compute again in each pass. ``"none"``; ``"prefix"``, the
        keys and values of all positions before the block; ``"dual"``, those behind it too (Fast-dLLM,
        arXiv 2505.22618).
        Where attention is block-causal, what precedes a block is final, and decoding with the prefix
        cached agrees with decoding without, but for rounding. Where it is bidirectional, every commit changes
        the keys of all positions: a cache holds those of the block's first pass, which runs all positions,
        and the passes after that are an approximation, so tokens may differ from ``cache="none"``; a
        block that takes one pass agrees. The attention that scores count is then that of the rows run.
    layers, rows, softmax_scope, diagonal
        Which attention counts: the calls by their order; the query rows, ``"all"`` or ``"masked"`` (those
        still masked); ``"sequence"`` or ``"block"``; whether attention to oneself does.
    keep_layers
        True reduces all layers in one call at the end of the forward pass, where their masks allow it, and
        holds their queries until then; False reduces each layer in the pass, which needs no memory for them.
        Policies that read an attention map always keep them.
    backend
        As in ``column_scores``.
    progress, trace, on_step
        A progress bar; a ``DecodeTrace`` in the result; a function that each step calls with a ``StepEvent``.

    Returns
    -------
    Generation
        Times are the host's: on an accelerator, which works behind the host, the wait for the model
        counts as sampling. A pass that only fills a cache counts as time, not as a pass.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError
        Naming the argument, before the model has run; or the model's output, of a wrong shape or dtype.
    RuntimeError
        The logits of a chosen position are undefined (NaN, +inf or all -inf), the attention scores are NaN
        at every masked position of a sequence, or the policy chooses none of these.
    """
    if not callable(model):
        raise TypeError(f"model: expected a callable, got {type(model).__name__}")
    chosen = make_policy(policy, **({} if tau is None else {"tau": tau}))
    checks.integer("mask_token_id", mask_token_id, 0)
    checks.integer("block_length", block_length, 1)
    check_temperature(temperature)
    checks.choice("rows", rows, ROWS)
    flags = {"logit_shift": logit_shift, "keep_layers": keep_layers, "progress": progress, "trace": trace}
    for name, flag in flags.items():
        checks.flag(name, flag)
    if on_step is not None and not callable(on_step):
        raise TypeError(f"on_step: expected a callable, got {type(on_step).__name__}")
    keep = keep_layers or chosen.needs_map
    capture = AttentionCapture(
        layers=layers, keep=keep, softmax_scope=softmax_scope, diagonal=diagonal, backend=backend
    )
    forward = ForwardPasses(model, cache, logit_shift)
    tokens, visible = _prompts(model, prompt_ids, attention_mask, mask_token_id, eos_token_id, pad_token_id)
    prompt_length = tokens.shape[1]
    if forward.causal_block is not None:
        _check_alignment(visible, forward.causal_block, block_length)
        prompt_length = 0  # where blocks are counted from
    tokens, visible = _append(tokens, visible, gen_length, mask_token_id)
    seeds = _sequence_seeds(seed, tokens)
    choose_backend("decode_step", backend, tokens)

    to_fill = tokens == mask_token_id
    if len(tokens) and not to_fill.any():
        raise ValueError("prompt_ids: expected masked positions to fill, got none and gen_length = 0")
    padded = not bool(visible.all())
    begins = visible & ~torch.nn.functional.pad(visible, (1, 0))[:, :-1]
    last_begin = int((~visible).sum(dim=1).max()) if padded and logit_shift else -1
    passes = torch.zeros_like(seeds)
    finished = torch.zeros_like(seeds, dtype=torch.bool)
    record = None
    if trace:
        name = policy if isinstance(policy, str) else repr(policy)
        record = DecodeTrace(tokens.tolist(), mask_token_id, name, padding=(~visible).sum(dim=1).tolist())
    num_steps, forward_seconds, sampling_seconds = 0, 0.0, 0.0

    with _progress_bar(progress, int(to_fill.sum())) as advance:
        for block in _blocks(prompt_length, tokens.shape[1], block_length):
            chosen.reset()
            active = (to_fill[:, block].any(dim=1) & ~finished).nonzero().squeeze(1)
            if len(active):
                began = time.perf_counter()
                forward.enter(tokens, visible if padded else None, block)
                forward_seconds += time.perf_counter() - began
            while len(active):
                began = time.perf_counter()
                batch, mask = tokens[active], visible[active]
                run = forward.rows(block, tokens.shape[1])
                if chosen.needs_scores:
                    voting = mask & (batch == mask_token_id) if rows == "masked" else mask
                    capture.columns = block
                    capture.query_mask = voting[:, run] if padded or rows == "masked" else None
                    capture.query_start = None if cache == "none" else run.start
                with capture if chosen.needs_scores else contextlib.nullcontext():
                    output = forward.logits(batch, mask if padded else None, block, active)
                between = time.perf_counter()
                attention, score_options = (
                    capture.step_input(chosen.needs_map) if chosen.needs_scores else (None, {})
                )
                if padded and chosen.needs_map:
                    score_options["padding"] = ~mask[:, block]
                result = chosen.step(
                    batch,
                    _block_logits(
                        output,
                        batch[:, run],
                        block,
                        run.start,
                        logit_shift,
                        mask_token_id,
                        forward.before(block, active),
                        begins[active, block] if block.start <= last_begin else None,
                    ),
                    attention,
                    block=block,
                    mask_token_id=mask_token_id,
                    sequence=active,
                    seeds=seeds[active] + passes[active] * STEP_STRIDE,
                    temperature=temperature,
                    backend=backend,
                    **score_options,
                )
                committed, open_rows = _check_progress(
                    result, active, block, mask_token_id, chosen.needs_scores
                )
                tokens[active] = batch
                forward_seconds += between - began
                sampling_seconds += time.perf_counter() - between
                num_steps += 1
                if record is not None:
                    record.commits += _commits(result, active, passes, block)
                passes[active] += 1
                advance(committed)
                if on_step is not None:
                    on_step(StepEvent(num_steps, block, active, result))
                active = active[open_rows]
            if eos_token_id is not None:
                filled = to_fill[:, : block.stop] & (tokens[:, : block.stop] == eos_token_id)
                finished |= filled.any(dim=1)
    if eos_token_id is not None:
        ended = to_fill & (((tokens == eos_token_id) & to_fill).cumsum(dim=1) > 0) & (tokens != eos_token_id)
        tokens = tokens.masked_fill(ended, eos_token_id)
        if record is not None:
            record.commits += [
                Commit(sequence, int(passes[sequence]), position, eos_token_id, float("nan"), float("nan"))
                for sequence, position in ended.nonzero().tolist()
            ]
    return Generation(tokens, visible, passes, forward_seconds, sampling_seconds, record)


def _prompts(
    model: Callable[..., Any],
    prompt_ids: Tensor | Sequence[Tensor] | Sequence[Sequence[int]],
    attention_mask: Tensor | None,
    mask_token_id: int,
    eos_token_id: int | None,
    pad_token_id: int | None,
) -> tuple[Tensor, Tensor]:
    """Tokens [B, T], a copy, and which of them are not padding."""
    for name, token_id in (("eos_token_id", eos_token_id), ("pad_token_id", pad_token_id)):
        if token_id is not None:
            checks.integer(name, token_id, 0)
            if token_id == mask_token_id:
                raise ValueError(f"{name}: expected another token than mask_token_id, got {token_id}")
    if isinstance(prompt_ids, Tensor):
        checks.tensor("prompt_ids", prompt_ids, "[B, T]", (torch.int64,))
        if attention_mask is None:
            return prompt_ids.clone(), torch.ones_like(prompt_ids, dtype=torch.bool)
        shape = prompt_ids.shape
        checks.tensor("attention_mask", attention_mask, "[B, T]", (torch.bool,), like=prompt_ids)
        checks.shape("attention_mask", attention_mask, "[B, T]", shape)
        if (attention_mask[:, :-1] & ~attention_mask[:, 1:]).any():
            raise ValueError("attention_mask: expected padding on the left: False, then True, in each row")
        if ((prompt_ids == mask_token_id) & ~attention_mask).any():
            raise ValueError("prompt_ids: expected no mask_token_id at the padding of attention_mask")
        return prompt_ids.clone(), attention_mask.clone()
    if attention_mask is not None:
        raise ValueError("attention_mask: goes with a prompt_ids tensor, not with a list of prompts")
    if isinstance(prompt_ids, str) or not isinstance(prompt_ids, Sequence):
        raise TypeError(f"prompt_ids: expected a tensor or a sequence, got {type(prompt_ids).__name__}")
    try:
        rows = [torch.as_tensor(row) for row in prompt_ids]
    except (TypeError, ValueError, RuntimeError) as error:  # text that is yet to be tokenized, for one
        raise TypeError(f"prompt_ids: expected a sequence of token ids for each prompt: {error}") from None
    if any(row.dim() != 1 or (len(row) and row.dtype != torch.int64) for row in rows):
        raise ValueError("prompt_ids: expected [B, T], or a sequence of 1-dimensional int64 prompts")
    if pad_token_id is None:
        pad_token_id = int(mask_token_id == 0) if eos_token_id is None else eos_token_id
    parameter = next(model.parameters(), None) if hasattr(model, "parameters") else None
    device = rows[0].device if parameter is None and rows else getattr(parameter, "device", None)
    length = max(map(len, rows), default=0)
    tokens = torch.full((len(rows), length), pad_token_id, dtype=torch.int64, device=device)
    visible = torch.zeros_like(tokens, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :] = row
        visible[i, length - len(row) :] = True
    return tokens, visible


def _check_alignment(visible: Tensor, causal_block: int, block_length: int) -> None:
    """The blocks that are decoded lie in those of a block-causal model."""
    if causal_block % block_length != 0:
        raise ValueError(
            f"block_length: expected a divisor of the model's blocks of {causal_block}, got {block_length}"
        )
    if ((~visible).sum(dim=1) % causal_block != 0).any():
        raise ValueError(
            f"prompt_ids: expected padding by multiples of the model's blocks of {causal_block}, so prompts "
            f"whose lengths agree modulo {causal_block}, got lengths {visible.sum(dim=1).tolist()}"
        )


def _append(tokens: Tensor, visible: Tensor, count: int, mask_token_id: int) -> tuple[Tensor, Tensor]:
    """The prompts with ``count`` masked positions behind each."""
    checks.integer("gen_length", count, 0)
    shape = (len(tokens), count)
    masked = tokens.new_full(shape, mask_token_id)
    return torch.cat([tokens, masked], dim=1), torch.cat([visible, visible.new_ones(shape)], dim=1)


def _sequence_seeds(seed: int | Sequence[int], tokens: Tensor) -> Tensor:
    """One int64 seed a sequence."""
    batch = len(tokens)
    if isinstance(seed, Sequence) and not isinstance(seed, str):
        values = [checks.integer("seed", s) for s in seed]
        if len(values) != batch:
            raise ValueError(f"seed: expected an integer or {batch} of them, got {len(values)}")
    else:
        first = checks.integer("seed", seed)
        values = [first + i for i in range(batch)]
    wrapped = [(value + (1 << 63)) % (1 << 64) - (1 << 63) for value in values]
    return torch.tensor(wrapped, dtype=torch.int64, device=tokens.device)


def _blocks(prompt_length: int, length: int, block_length: int) -> Iterator[slice]:
    """Windows from left to right, counted from the prompt's end so that left padding moves none of them."""
    first = prompt_length % block_length
    bounds = [0] * (first > 0) + [*range(first, length, block_length), length]
    for start, stop in itertools.pairwise(bounds):
        yield slice(start, stop)


def _block_logits(
    output: Any,
    tokens: Tensor,
    block: slice,
    start: int,
    logit_shift: bool,
    mask_token_id: int,
    before: Tensor | None = None,
    begins: Tensor | None = None,
) -> Tensor:
    """The predictions [B, C, V] for the block's positions; the output's rows stand at ``start`` and on.

    ``before`` holds the row before the first where the output lacks it; ``begins`` says where a sequence
    begins behind padding.
    """
    logits = getattr(output, "logits", output)
    checks.tensor("model output", logits, "[B, T, V]", checks.FLOAT_DTYPES, like=tokens)
    checks.shape("model output", logits, "[B, T, V]", (*tokens.shape, logits.shape[2]))
    checks.integer("mask_token_id", mask_token_id, 0, logits.shape[2])
    first, last = block.start - start, block.stop - start
    own = logits[:, first:last]
    if not logit_shift:
        return own
    if first > 0:
        shifted = logits[:, first - 1 : last - 1]
    else:  # nothing precedes row 0: it predicts its own position too
        shifted = torch.cat([own[:, :1] if before is None else before, own[:, :-1]], dim=1)
    return shifted if begins is None else torch.where(begins[..., None], own, shifted)


def _check_progress(
    result: StepResult, active: Tensor, block: slice, mask_token_id: int, needs_scores: bool
) -> tuple[int, Tensor]:
    """How many tokens the step committed, and which of its rows have more to fill, after one host sync."""
    undefined = result.selected & result.confidence.isnan()
    stuck = ~result.selected.any(dim=1)
    count, any_undefined, any_stuck = torch.stack(
        [result.selected.sum(), undefined.any(), stuck.any()]
    ).tolist()
    if any_undefined:
        row, column = undefined.nonzero()[0].tolist()
        raise RuntimeError(
            f"the model's logits at position {block.start + column} of sequence {int(active[row])} are "
            "undefined (NaN, +inf or all -inf), and the policy chose it"
        )
    if any_stuck:
        left = result.tokens[:, block] == mask_token_id
        scored = bool((left & ~result.scores.isnan())[stuck].any())
        reason = (
            "the policy chose no masked position"
            if scored or not needs_scores
            else "the attention scores are NaN at every masked position"
        )
        raise RuntimeError(f"nothing could be committed in sequences {active[stuck].tolist()}: {reason}")
    return count, (result.tokens[:, block] == mask_token_id).any(dim=1)


def _commits(result: StepResult, active: Tensor, passes: Tensor, block: slice) -> list[Commit]:
    row, column = result.selected.nonzero(as_tuple=True)
    sequence = active[row]
    fields = (
        sequence,
        passes[sequence],
        column + block.start,
        result.token_ids[row, column],
        result.scores[row, column],
        result.confidence[row, column],
    )
    return [Commit(*values) for values in zip(*(field.tolist() for field in fields), strict=True)]


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
