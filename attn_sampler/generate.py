"""Block-wise decoding of a masked-diffusion language model."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attn_sampler import checks, prompts
from attn_sampler.backends import choose_backend
from attn_sampler.caching import AdaptiveCache, ForwardPasses, SparseCache
from attn_sampler.capture import AttentionCapture
from attn_sampler.endings import GOES_ON, TextEnds
from attn_sampler.functional import token_confidence
from attn_sampler.logits import LogitEdits, guided
from attn_sampler.options import (
    QUERY_ROWS,
    check_bitmask,
    check_min_p,
    check_temperature,
    check_top_k,
    check_top_p,
    renamed,
)
from attn_sampler.policy import Policy, check_progress
from attn_sampler.reference import StepResult, masked_rows
from attn_sampler.sampler import make_policy
from attn_sampler.token_record import TokenRecord
from attn_sampler.trace import Commit, DecodeTrace, step_commits

STEP_STRIDE = 0x9E3779B97F4A7C15 - (1 << 64)  # odd: no two (row seed, step) pairs nearby meet


@dataclasses.dataclass
class Generation:
    """What ``generate`` returns."""

    tokens: Tensor  # [B, T] int64, prompts (left-padded) and their continuations
    attention_mask: Tensor  # [B, T] bool, False at padding
    num_forward_passes: Tensor  # [B] int64, the passes that each sequence took, those that guide left out
    forward_seconds: float  # in the model, attention capture included
    sampling_seconds: float  # in scores, confidence, selection and commit
    trace: DecodeTrace | None  # where asked for
    num_rows: Tensor  # [B] int64, the query rows that those passes, and passes that fill a cache, ran
    commit_steps: Tensor  # [B, T] int64, the passes of its sequence before the one that wrote it; -1: given
    # Where asked for, of the tokens when they were written; NaN at given ones and behind the end of a text:
    log_probs: Tensor | None = None  # [B, T] float32
    top_token_ids: Tensor | None = None  # [B, T, n] int64, the n most probable ones, in descending order
    top_log_probs: Tensor | None = None  # [B, T, n] float32


class StepEvent(NamedTuple):
    """What ``on_step`` is called with after each step."""

    step: int  # forward passes so far, over the whole run
    block: slice  # token positions
    sequence: Tensor  # [B'] int64, the sequences that took part
    result: StepResult  # of these sequences
    #: [B'] float32, the share of attention that cache="sparse" leaves out: measured in exact passes; in the
    #: others reckoned where its ``max_dropped`` is below 1, else what the last exact one measured.
    dropped: Tensor | None = None


def generate(
    model: Callable[..., Any],
    prompt_ids: Tensor | Sequence[Tensor] | Sequence[Sequence[int]],
    *,
    mask_token_id: int,
    gen_length: int = 0,
    block_length: int = 32,
    policy: str | Policy = "attn",
    tau: float | None = None,
    temperature: float | Sequence[float] | Tensor = 0.0,
    top_k: int | Sequence[int] | Tensor = 0,
    top_p: float | Sequence[float] | Tensor = 1.0,
    min_p: float | Sequence[float] | Tensor = 0.0,
    seed: int | Sequence[int] = 0,
    attention_mask: Tensor | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    eos_last: bool = False,
    stop: Sequence[str] = (),
    decode: Callable[[list[int]], str] | None = None,
    pad_token_id: int | None = None,
    suppress_token_ids: Sequence[int] = (),
    logit_bias: Mapping[int, float] | Tensor | None = None,
    token_bitmask: Callable[[Tensor, slice, Tensor], Tensor | None] | None = None,
    top_log_probs: int | None = None,
    guidance_scale: float = 0.0,
    unconditional_prompt_ids: Tensor | Sequence[Tensor] | Sequence[Sequence[int]] | None = None,
    logit_shift: bool = False,
    cache: str | SparseCache | AdaptiveCache = "none",
    layers: str | slice | Sequence[int] = "all",
    query_rows: str = "all",
    softmax_scope: str = "sequence",
    diagonal: bool = True,
    keep_layers: bool = True,
    backend: str = "auto",
    progress: bool = False,
    trace: bool = False,
    on_step: Callable[[StepEvent], None] | None = None,
    rows: str | None = None,
) -> Generation:
    """Fill the masked positions of prompts with a masked-diffusion language model.

    Every masked position is filled: those in the prompt (infilling) and ``gen_length`` more appended to it.
    Blocks of ``block_length`` positions are decoded from left to right; inside a block the policy chooses the
    order. A sequence gets the same tokens alone and in a batch, as far as the model's logits (and, on a
    GPU, the last bits of its scores) are the same.

    A policy that revises may replace or mask again what was filled in the block, at most ``max_edits`` times
    at each position, and may go on where nothing is masked: until a pass changes nothing or no budget is
    left. Each pass but the last then fills or revises, and a block of C masked positions takes at most
    ``C * (1 + 2 * max_edits) + 1`` passes.

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
    temperature, top_k, top_p, min_p, seed
        As in ``token_confidence``; each a number, or one for each sequence. An integer seed gives sequence i
        the stream ``seed + i``. Noise follows a position's place in its block: masks in the first, incomplete
        block of a prompt draw other noise where padding makes that block longer.
    attention_mask
        Boolean [B, T] for a left-padded ``prompt_ids`` tensor: False at padding.
    eos_token_id
        A sequence that has committed this token, or the first of several, and everything before it stops at
        the end of the block; its later masked positions become this token (of several, the one named first).
    eos_last
        True leaves a position that predicts the end of text masked while the sequence has a masked position
        in the block that predicts something else; the policy does not see it as masked then. Models that
        were trained on texts filled up with that token predict it early, and surely. Costs a second
        prediction in each step.
    stop, decode
        Texts that end a sequence as eos_token_id does, and what gives the text of token ids (a tokenizer's
        ``decode``). The tokens filled in, given ones left out, are searched after each block, and the one
        that completes a stop text is the last. What follows becomes eos_token_id, or else pad_token_id.
    pad_token_id
        What ragged prompts are padded with, not mask_token_id. Default: eos_token_id, or else 0 (or 1). It is
        masked from attention.
    suppress_token_ids, logit_bias
        Tokens that are never predicted, and what is added to the logits: a finite number or -inf for each of
        some tokens, or a tensor [V], taken in float32.
    token_bitmask
        ``token_bitmask(tokens [B', T], block, sequence [B'])``, called in each step with the sequences that
        take part, says which tokens are allowed, as a grammar does: words of 32 bits as in
        ``token_confidence``, int32 ``[B', W]`` or ``[B', C, W]`` for the C positions of the block; or None:
        all.
    top_log_probs
        The log-probabilities of the tokens that are written are wanted, and those of this many most
        probable ones: of the softmax of the logits that the rule saw, the mask token and what is not
        allowed left out, whatever the temperature. Default: none are.
    guidance_scale, unconditional_prompt_ids
        Classifier-free guidance, as in LLaDA's generate.py (arXiv 2502.09992): above 0 the logits
        are ``u + (guidance_scale + 1) * (c - u)``, c the model's and u those of another pass, in which all
        given tokens are mask_token_id, or those of unconditional_prompt_ids, prompts of the same lengths.
        Scores count the attention of the pass for c alone. Goes with ``cache="none"``.
    logit_shift
        True for models that predict position j from hidden row j - 1 (Dream, Fast-dLLM v2). A sequence's
        first position, which nothing but padding precedes, is predicted from its own row.
    cache
        What a ``caching.CacheableModel`` need not compute again in each pass. ``"none"``; ``"prefix"``, the
        keys and values of all positions before the block; ``"dual"``, those behind it too (Fast-dLLM,
        arXiv 2505.22618). ``"sparse"`` or a ``SparseCache``: as ``"dual"``, and the passes after the first
        read the keys alone that receive most attention from the block (MAGE, arXiv 2602.14209), so that
        their cost does not grow with the context. ``"adaptive"`` or an ``AdaptiveCache``: as ``"dual"``, and
        rows whose attended tokens have drifted are computed again. (A name takes options in the way of
        ``"sparse:budget=256,refresh=4"``.) Where attention is bidirectional, these two, and ``"dual"``, are
        also served to a ``caching.PlacedModel``, which needs no cache of its own. Where the library keeps the
        keys, a compiled model's graph breaks at its attention calls.
        Where attention is block-causal, what precedes a block is final: decoding with ``"prefix"``, and with
        ``"adaptive"``, which is then the same, agrees with decoding without, but for rounding; ``"sparse"``
        still leaves keys out. Where it is bidirectional, every commit changes the keys of all positions: a
        cache holds those of the block's first pass, which runs all positions, and the passes after that are
        an approximation, so tokens may differ from ``cache="none"``. A block that takes one pass agrees. The
        attention that scores count is that of the rows run, to the keys that they read.
    layers, query_rows, softmax_scope, diagonal
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
    rows
        The former name of query_rows, taken for one release more.

    Returns
    -------
    Generation
        Times are the host's: on an accelerator, which works behind the host, the wait for the model
        counts as sampling. A pass that only fills a cache, or only guides, counts as time, not as a pass.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError
        Naming the argument, before the model has run; or the model's output, of a wrong shape or dtype.
    RuntimeError
        The logits of a chosen position are undefined (NaN, +inf or all -inf), the attention scores are NaN
        at every masked position of a sequence, or the policy chooses none of these.
    NotImplementedError
        The library keeps the keys, and an attention call of the model has a bias, a mask that is not the
        padding's, or rows or keys that are not those of the tokens.
    """
    query_rows = renamed("query_rows", query_rows, "rows", rows)
    if not callable(model):
        raise TypeError(f"model: expected a callable, got {type(model).__name__}")
    chosen = make_policy(policy, **({} if tau is None else {"tau": tau}))
    checks.integer("mask_token_id", mask_token_id, 0, checks.INT64_END)
    checks.integer("block_length", block_length, 1)
    checks.choice("query_rows", query_rows, QUERY_ROWS)
    flags = {
        "eos_last": eos_last,
        "logit_shift": logit_shift,
        "keep_layers": keep_layers,
        "progress": progress,
        "trace": trace,
    }
    for name, flag in flags.items():
        checks.flag(name, flag)
    if on_step is not None and not callable(on_step):
        raise TypeError(f"on_step: expected a callable, got {type(on_step).__name__}")
    if token_bitmask is not None and not callable(token_bitmask):
        raise TypeError(f"token_bitmask: expected a callable, got {type(token_bitmask).__name__}")
    if top_log_probs is not None:
        checks.integer("top_log_probs", top_log_probs, 0, checks.INT64_END)
    ends = TextEnds(eos_token_id, stop, decode, mask_token_id)
    if eos_last and not ends.token_ids:
        raise ValueError("eos_last: expected an eos_token_id to go with it, got none")
    edits = LogitEdits(suppress_token_ids, {} if logit_bias is None else logit_bias, mask_token_id)
    keep = keep_layers or chosen.needs_map
    capture = AttentionCapture(
        layers=layers, keep=keep, softmax_scope=softmax_scope, diagonal=diagonal, backend=backend
    )
    forward = ForwardPasses(model, cache, logit_shift, chosen.shadows, backend)
    if pad_token_id is None:
        pad_token_id = next(iter(ends.token_ids), int(mask_token_id == 0))
    source = (model, attention_mask, mask_token_id, pad_token_id)
    tokens, visible = prompts.read("prompt_ids", prompt_ids, *source)
    unconditional = None
    if checks.non_negative("guidance_scale", guidance_scale) > 0.0:
        if cache != "none":
            raise ValueError(f"guidance_scale: goes with cache='none', got {cache!r}")
        unconditional = prompts.unconditional(unconditional_prompt_ids, tokens, visible, *source)
    elif unconditional_prompt_ids is not None:
        raise ValueError("unconditional_prompt_ids: goes with a guidance_scale > 0, got 0")
    prompt_length = tokens.shape[1]
    if forward.causal_block is not None:
        prompts.check_alignment(visible, forward.causal_block, block_length)
        prompt_length = 0  # where blocks are counted from
    tokens, visible = prompts.append_masked(tokens, visible, gen_length, mask_token_id)
    if unconditional is not None:
        unconditional = torch.nn.functional.pad(unconditional, (0, gen_length), value=mask_token_id)
    seeds = prompts.sequence_seeds(seed, tokens)
    draws = {
        name: prompts.of_sequences(name, value, tokens, dtype, check)
        for name, value, dtype, check in (
            ("temperature", temperature, torch.float32, check_temperature),
            ("top_k", top_k, torch.int32, check_top_k),
            ("top_p", top_p, torch.float32, check_top_p),
            ("min_p", min_p, torch.float32, check_min_p),
        )
    }
    choose_backend("decode_step", backend, tokens)
    to_fill = tokens == mask_token_id
    if len(tokens) and not to_fill.any():
        raise ValueError("prompt_ids: expected masked positions to fill, got none and gen_length = 0")
    record = None
    if trace:
        name = policy if isinstance(policy, str) else repr(policy)
        record = DecodeTrace(tokens.tolist(), mask_token_id, name, padding=(~visible).sum(dim=1).tolist())

    with torch.no_grad(), _progress_bar(progress, int(to_fill.sum())) as advance:
        run = _Run(
            chosen,
            forward,
            capture,
            tokens,
            visible,
            to_fill,
            seeds,
            mask_token_id=mask_token_id,
            ends=ends,
            eos_last=eos_last,
            filler=next(iter(ends.token_ids), pad_token_id),
            edits=edits,
            unconditional=unconditional,
            guidance_scale=guidance_scale,
            query_rows=query_rows,
            options={**draws, "backend": backend},
            token_bitmask=token_bitmask,
            top_log_probs=top_log_probs,
            trace=record,
            advance=advance,
            on_step=on_step,
        )
        for block in _blocks(prompt_length, tokens.shape[1], block_length):
            run.decode_block(block)
        run.end_texts()
    probabilities = (run.record.log_probs, run.record.top_token_ids, run.record.top_log_probs)
    return Generation(
        *(run.tokens, visible, run.passes, run.forward_seconds, run.sampling_seconds, record),
        *(forward.num_rows, run.record.commit_steps, *probabilities),
    )


@dataclasses.dataclass
class _Run:
    """A decoding run: what it decodes with, and how far it is."""

    policy: Policy
    forward: ForwardPasses
    capture: AttentionCapture
    tokens: Tensor  # [B, T] int64
    visible: Tensor  # [B, T] bool, False at padding
    to_fill: Tensor  # [B, T] bool, masked at the start
    seeds: Tensor  # [B] int64
    mask_token_id: int
    ends: TextEnds
    eos_last: bool
    filler: int  # behind the end of a text
    edits: LogitEdits
    unconditional: Tensor | None  # [B, T] int64, what stands in the place of given tokens in a guiding pass
    guidance_scale: float
    query_rows: str
    options: dict[str, Any]  # of the policy's step; tensors have a value for each sequence
    token_bitmask: Callable[[Tensor, slice, Tensor], Tensor | None] | None
    top_log_probs: int | None
    trace: DecodeTrace | None
    advance: Callable[[int], None]
    on_step: Callable[[StepEvent], None] | None

    def __post_init__(self) -> None:
        self.padded = not bool(self.visible.all())
        self.begins = self.visible & ~torch.nn.functional.pad(self.visible, (1, 0))[:, :-1]
        shifts_padding = self.padded and self.forward.logit_shift
        self.last_begin = int((~self.visible).sum(dim=1).max()) if shifts_padding else -1
        self.passes = torch.zeros_like(self.seeds)  # [B]
        self.last = torch.full_like(self.seeds, GOES_ON)  # [B], the position where the text ends
        self.budget = torch.zeros_like(self.tokens, dtype=torch.int32)  # [B, T], of revisions
        if self.policy.revises:
            self.budget.masked_fill_(self.to_fill, checks.integer("max_edits", self.policy.max_edits, 0))
        self.forward.begin(self.tokens, self.visible if self.padded else None)
        self.record = TokenRecord(self.tokens, self.mask_token_id, self.top_log_probs)
        self.num_steps, self.forward_seconds, self.sampling_seconds = 0, 0.0, 0.0

    def decode_block(self, block: slice) -> None:
        """Fill a block of the sequences whose text has not ended."""
        self.policy.reset()
        started = (self.to_fill[:, block].any(dim=1) & (self.last == GOES_ON)).nonzero().squeeze(1)
        active = started
        if len(active):
            began = time.perf_counter()
            self.forward.enter(self.tokens, self.visible if self.padded else None, block)
            self.forward_seconds += time.perf_counter() - began
        while len(active):
            active = active[self._step(block, active)]
        if self.ends:
            so_far = slice(block.stop)
            self.last[started] = self.ends.find(self.tokens[started, so_far], self.to_fill[started, so_far])

    def _step(self, block: slice, active: Tensor) -> Tensor:
        """One step of the sequences ``active``, and which of them are not done with the block."""
        began = time.perf_counter()
        needs_scores = self.policy.needs_scores
        tokens, visible = self.tokens[active], self.visible[active]
        positions = self.forward.rows(block, tokens.shape[1])
        with self._captured(tokens, visible, block, positions) if needs_scores else contextlib.nullcontext():
            output = self.forward.logits(tokens, visible if self.padded else None, block, active)
        logits = self._block_logits(output, tokens[:, positions], block, positions.start, active)
        if self.unconditional is not None:
            logits = self._guided(logits, tokens, visible, block, active)
        passed = time.perf_counter()
        logits = self.edits(logits)
        attention, options = self.capture.step_input(self.policy.needs_map) if needs_scores else (None, {})
        draw: dict[str, Any] = {
            name: x[active] if isinstance(x, Tensor) else x for name, x in self.options.items()
        }
        bitmask = None if self.token_bitmask is None else self.token_bitmask(tokens, block, active)
        check_bitmask(bitmask, logits)
        draw["token_bitmask"] = bitmask
        if self.padded and self.policy.needs_map:
            options["padding"] = ~visible[:, block]
        if self.policy.revises:
            options["budget"] = self.budget[active, block]
            options["recheck"] = torch.zeros_like(active, dtype=torch.bool)
        masked = tokens[:, block] == self.mask_token_id
        seeds = self.seeds[active] + self.passes[active] * STEP_STRIDE
        held = self._held(logits, masked, seeds, draw) if self.eos_last else None
        if held is not None:  # to the policy these positions are neither masked nor its own to revise
            tokens[:, block].masked_fill_(held, self.filler)
            if self.policy.revises:
                options["budget"].masked_fill_(held, 0)
        result = self.policy.step(
            tokens,
            logits,
            attention,
            block=block,
            mask_token_id=self.mask_token_id,
            sequence=active,
            seeds=seeds,
            **draw,
            **options,
        )
        if held is not None:
            tokens[:, block].masked_fill_(held, self.mask_token_id)
            if self.policy.revises:
                budget = self.budget[active, block]
                options["budget"] = torch.where(held, budget, options["budget"])
        left = result.tokens[:, block] == self.mask_token_id
        scores, revised = result.scores if needs_scores else None, result.revised
        count = check_progress(left, result.selected, result.confidence, scores, active, block.start, revised)
        self.tokens[active] = tokens
        self.record.add(result, logits, bitmask, active, block, self.passes[active])
        more = left.any(dim=1)
        if revised is not None:
            self.budget[active, block] = options["budget"]
            changed = (masked | (revised > 0)).any(dim=1)  # a check that changes nothing is the last
            more |= options["recheck"] & changed & options["budget"].any(dim=1)
        self.forward_seconds += passed - began
        self.sampling_seconds += time.perf_counter() - passed
        self.num_steps += 1
        if self.trace is not None:
            self.trace.commits += step_commits(result, active, self.passes[active], block, self.mask_token_id)
        self.passes[active] += 1
        self.advance(count)
        if self.on_step is not None:
            self.on_step(StepEvent(self.num_steps, block, active, result, self.forward.dropped))
        return more

    def _guided(
        self, logits: Tensor, tokens: Tensor, visible: Tensor, block: slice, active: Tensor
    ) -> Tensor:
        """The block's logits, guided by those of a pass without the given tokens."""
        assert self.unconditional is not None
        tokens = torch.where(self.to_fill[active], tokens, self.unconditional[active])
        output = self.forward.logits(tokens, visible if self.padded else None, block, active)
        rows = self.forward.rows(block, tokens.shape[1])
        without = self._block_logits(output, tokens[:, rows], block, rows.start, active)
        return guided(logits, without, self.guidance_scale)

    def _held(self, logits: Tensor, masked: Tensor, seeds: Tensor, draw: dict[str, Any]) -> Tensor:
        """The masked positions [B, C] that predict the end of text where others of their row do not."""
        predicted = token_confidence(
            logits, seed=seeds, exclude_token_id=self.mask_token_id, **draw
        ).token_ids
        ends = masked & self.ends.is_end(predicted)
        return ends & (masked & ~ends).any(dim=1, keepdim=True)

    def _captured(self, tokens: Tensor, visible: Tensor, block: slice, positions: slice) -> AttentionCapture:
        """The capture, for a pass whose queries stand at ``positions``."""
        capture = self.capture
        capture.columns, capture.query_start = self.forward.places(block, tokens.shape[1])
        # Shadows, and rows that only renew a cache, stand behind the others and do not count.
        extra = block.stop - block.start if self.forward.shadows else self.forward.num_extra
        query_mask = visible[:, positions] if self.padded or extra else None
        if self.query_rows == "masked":
            query_mask = masked_rows(tokens, self.mask_token_id, positions, query_mask)
        if query_mask is not None and extra:
            query_mask = torch.nn.functional.pad(query_mask, (0, extra))
        capture.query_mask = query_mask
        return capture

    def _block_logits(self, output: Any, tokens: Tensor, block: slice, start: int, active: Tensor) -> Tensor:
        """The predictions [B, C, V] for the block; its output's rows, of ``tokens``, begin at ``start``."""
        logits = getattr(output, "logits", output)
        checks.tensor("model output", logits, "[B, T, V]", checks.FLOAT_DTYPES, like=tokens)
        count, shadows = tokens.shape[1], block.stop - block.start if self.forward.shadows else 0
        checks.shape("model output", logits, "[B, T, V]", (len(tokens), count + shadows, logits.shape[2]))
        checks.integer("mask_token_id", self.mask_token_id, 0, logits.shape[2])
        first, last = block.start - start, block.stop - start
        own = logits[:, first:last]
        if shadows:
            masked = tokens[:, first:last, None] == self.mask_token_id
            return torch.where(masked, own, logits[:, count:])
        if not self.forward.logit_shift:
            return own
        if first > 0:
            shifted = logits[:, first - 1 : last - 1]
        else:  # nothing precedes row 0: it predicts its own position too
            before = self.forward.before(block, active)
            shifted = torch.cat([own[:, :1] if before is None else before, own[:, :-1]], dim=1)
        if block.start > self.last_begin:
            return shifted
        return torch.where(self.begins[active, block][..., None], own, shifted)

    def end_texts(self) -> None:
        """The filler behind the last token of the texts that have ended."""
        position = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        ended = self.to_fill & (position > self.last[:, None]) & (self.tokens != self.filler)
        self.tokens = self.tokens.masked_fill(ended, self.filler)
        self.record.end(ended, self.passes)
        if self.trace is not None:
            nan = float("nan")
            self.trace.commits += [
                Commit(sequence, int(self.passes[sequence]), position, self.filler, nan, nan)
                for sequence, position in ended.nonzero().tolist()
            ]


def _blocks(prompt_length: int, length: int, block_length: int) -> Iterator[slice]:
    """Windows from left to right, counted from the prompt's end so that left padding moves none of them."""
    first = prompt_length % block_length
    bounds = [0] * (first > 0) + [*range(first, length, block_length), length]
    for start, stop in itertools.pairwise(bounds):
        yield slice(start, stop)


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
