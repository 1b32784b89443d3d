"""What the engine adapters share: the engine's version, a policy on blocks, the blocks' column scores.

Engines with paged caches show an attention layer's block as flat tokens: queries ``[B * C, Hq, D]`` and the
block's own keys ``[B * C, Hkv, D]``. That is all that column scores need, with the rows' log-sum-exp over the
whole context; without it, the softmax is over the block's keys alone (``softmax_scope="block"``, the
approximation of arXiv 2604.08564), or the pages are read too, where the engine shows them.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Collection, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from attn_sampler import checks
from attn_sampler.adapters import untested_version
from attn_sampler.attention import column_scores
from attn_sampler.backends import BACKEND_CHOICES
from attn_sampler.capture import check_layer_choice, chosen_layers
from attn_sampler.distributed import sum_scores
from attn_sampler.errors import DecodingError
from attn_sampler.generate import STEP_STRIDE
from attn_sampler.options import REDUCTIONS, check_temperature, signed_seed
from attn_sampler.policy import Policy, StepState, check_progress
from attn_sampler.reference import StepResult
from attn_sampler.sampler import make_policy

_BLOCK_STRIDE = 0xD1342543DE82EF95 - (1 << 64)  # odd, and another than that of steps


#: As an adapter's ``temperature``: each request's own.
OF_REQUEST = "request"


def require(module: str, distribution: str, install: str, oldest: str, below: str) -> ModuleType:
    """The engine's module, of a version that the adapter was written for.

    Raises
    ------
    ImportError
        It cannot be imported: in one line, why, and what installs it.
    RuntimeError
        Its version is not in [oldest, below).
    """
    engine = module.partition(".")[0]
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{engine} cannot be imported ({error}): {install}") from None
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        version = getattr(importlib.import_module(engine), "__version__", "0")
    if (reason := untested_version(engine, version, oldest, below)) is not None:
        raise RuntimeError(f"{reason}: {install}")
    return found


def unserved(
    options: Mapping[str, Any],
    served: Collection[str] = (),
    neutral: Mapping[str, Collection[Any]] | None = None,
) -> str:
    """What is to be said of a caller's options that would have no effect; nothing where there are none.

    Parameters
    ----------
    options
        As they were given. None asks for nothing.
    served
        The names that have an effect, here or in the engine around.
    neutral
        Of other names, the values with which they ask for nothing.

    >>> unserved({"top_k": 0, "top_p": 0.9, "until": ["."]}, ["until"], {"top_k": [0], "top_p": [1.0]})
    'top_p: expected 1.0, got 0.9'
    """
    neutral = neutral or {}
    return "; ".join(
        f"{name}: expected {' or '.join(map(repr, neutral.get(name) or [None]))}, got {value!r}"
        for name, value in options.items()
        if name not in served and value is not None and value not in neutral.get(name, ())
    )


def refuse_attention(block_length: int, **kinds: Any) -> None:
    """Raise where a layer's attention is more than the softmax of its scaled products.

    Parameters
    ----------
    block_length
        A ``...window...`` that reaches over so many positions hides nothing of a block.
    **kinds
        By the engine's names: None, False and numbers that are not positive ask for nothing.

    Raises
    ------
    NotImplementedError
        Naming the kind and its value.
    """
    for name, value in kinds.items():
        if "window" in name:
            sizes = value if isinstance(value, (tuple, list)) else (value,)
            asked = any(size is not None and 0 <= size < block_length for size in sizes)
        elif isinstance(value, (bool, int, float)):
            asked = value > 0
        else:
            asked = value is not None
        if asked:
            given = f"a {type(value).__name__}" if isinstance(value, Tensor) else repr(value)
            raise NotImplementedError(f"{name}: attention with it is not served, got {given}")


def read_policy(policy: str | Policy, tau: float | None, *, revises: bool = False) -> Policy:
    """A policy that reads column scores at most, and one that takes back only where ``revises`` says so."""
    chosen = make_policy(policy, **({} if tau is None else {"tau": tau}))
    if chosen.needs_map:
        raise ValueError(
            f"policy: {policy!r} reads the block's attention map, and of an engine's attention the adapters "
            "keep the column scores alone"
        )
    if chosen.revises and not revises:
        raise ValueError(
            f"policy: {policy!r} takes back what was committed, and this adapter keeps no budget of "
            "revisions for an engine's requests"
        )
    if chosen.shadows:
        raise ValueError(f"policy: {policy!r} judges tokens at shadow positions, which no engine runs")
    return chosen


def stateless_policy(policy: str | Policy, tau: float | None) -> Policy:
    """A policy for batches that mix requests and blocks: not one that carries something over."""
    chosen = read_policy(policy, tau)
    if carries_over(chosen):
        raise ValueError(
            f"policy: {policy!r} carries something over from step to step of one block, and the engine's "
            "batches mix requests and blocks"
        )
    return chosen


def key_pages(kv_cache: Tensor, head_size: int) -> Tensor:
    """The keys of a paged cache, ``[pages, Hkv, page_size, D]``, without a copy.

    Of a cache that holds keys and values side by side, ``[pages, Hkv, page_size, 2 * D]``, or in two halves,
    ``[2, pages, page_size, Hkv, D]`` or ``[pages, 2, page_size, Hkv, D]``.

    Raises
    ------
    NotImplementedError
        It is of another shape, or of quantized elements.
    """
    if kv_cache.dtype in (torch.float32, torch.float16, torch.bfloat16):
        if kv_cache.dim() == 4 and kv_cache.shape[3] == 2 * head_size:
            return kv_cache[..., :head_size]
        if kv_cache.dim() == 5 and kv_cache.shape[4] == head_size and 2 in kv_cache.shape[:2]:
            return kv_cache.unbind(int(kv_cache.shape[0] != 2))[0].transpose(1, 2)
    raise NotImplementedError(
        f"kv_cache: expected unquantized pages of keys of {head_size} numbers, got {tuple(kv_cache.shape)} "
        f"of {kv_cache.dtype}"
    )


def paged_column_scores(
    q: Tensor,  # [B, Hq, C, D]
    k_cache: Tensor,  # [pages, Hkv, page_size, D]
    block_table: Tensor,  # [B, P] int32
    seqlens_k: Tensor,  # [B] int32
    **options: Any,
) -> Tensor:
    """Column scores [B, C] of each sequence's last C positions, where its queries stand too."""
    columns = slice(-q.shape[2], None)
    return column_scores(q, k_cache, columns=columns, block_table=block_table, seqlens_k=seqlens_k, **options)


def carries_over(policy: Policy) -> bool:
    """Whether the policy carries something over from step to step of one block."""
    return type(policy).reset is not Policy.reset


def step_seeds(seed: int, step: int, sequence: Tensor) -> Tensor:
    """int64 [B]: a stream for each row of each step."""
    return sequence + signed_seed(seed + step * STEP_STRIDE)


def on_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[B], without a wait for the device."""
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def of_rows(value: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A number for all rows, or a tensor [B] on the device, of that or of a sequence of numbers."""
    if isinstance(value, Tensor):
        return value.to(device, dtype, non_blocking=True)
    if not isinstance(value, Sequence):
        return value
    return value[0] if len(set(value)) == 1 else on_device(value, dtype, device)


class BlockDecoder:
    """A policy on the blocks of an engine's batch: predict, select, commit.

    Parameters
    ----------
    policy, tau
        As in ``generate``; not one that reads an attention map.
    mask_token_id, temperature, backend
        As in ``decode_step``.
    seed
        Integer. Each step, and in a step each row, draws from a stream of its own, so that the draws follow
        the order in which an engine serves its requests. The ranks of a tensor-parallel engine give the same.
    one_block
        Whether all rows are at the same block and ``policy.reset()`` is called before each. Rules that carry
        something over from step to step need that.
    revises
        Whether each step is given a ``budget``, which rules that take back need.
    """

    def __init__(
        self,
        policy: str | Policy = "attn",
        *,
        mask_token_id: int,
        tau: float | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        backend: str = "auto",
        one_block: bool = False,
        revises: bool = False,
    ) -> None:
        if one_block:
            self.policy = read_policy(policy, tau, revises=revises)
        else:
            self.policy = stateless_policy(policy, tau)
        self.mask_token_id = checks.integer("mask_token_id", mask_token_id, 0)
        self.temperature = check_temperature(temperature)
        self.seed = checks.integer("seed", seed)
        checks.choice("backend", backend, BACKEND_CHOICES)
        self.backend = backend
        self._steps = 0

    def step(
        self,
        tokens: Tensor,  # [B, C]
        logits: Tensor,  # [B, C, V]
        attention: Tensor | Sequence[Any] | None,
        *,
        temperature: float | Sequence[float] | Tensor | None = None,  # [B], as what follows
        top_k: int | Sequence[int] | Tensor = 0,
        top_p: float | Sequence[float] | Tensor = 1.0,
        min_p: float | Sequence[float] | Tensor = 0.0,
        seeds: Sequence[int | None] | Tensor | None = None,
        position: Tensor | None = None,
        token_bitmask: Tensor | None = None,  # [B, W] or [B, C, W]
        budget: Tensor | None = None,  # [B, C]
        recheck: Tensor | None = None,  # [B]
        **score_options: Any,
    ) -> StepResult:
        """One step on blocks ``[B, C]``, int64, updated in place.

        Parameters
        ----------
        attention, budget, recheck
            What ``Policy.step`` takes.
        temperature, top_k, top_p, min_p, token_bitmask
            As in ``decode_step``; a number, or one for each row. The temperature's default is the decoder's.
        seeds, position
            What the rows' requests draw by, and int64 [B], where in their sequences the blocks are: the draws
            follow from these and from how far a block is, and are the same in any batch. A row without a seed
            draws from the decoder's streams.

        Raises
        ------
        RuntimeError
            The logits of a chosen position are undefined, or nothing could be chosen in a row: the engine
            would wait forever.
        """
        batch, count = tokens.shape
        device = tokens.device
        masked = tokens == self.mask_token_id
        sequence = torch.arange(batch, device=device)
        streams = self._streams(sequence, seeds, position, masked, budget)
        temperature = self.temperature if temperature is None else temperature
        options: dict[str, Any] = {
            "block": slice(0, count),
            "mask_token_id": self.mask_token_id,
            "backend": self.backend,
            "temperature": of_rows(temperature, torch.float32, device),
            "top_k": of_rows(top_k, torch.int32, device),
            "top_p": of_rows(top_p, torch.float32, device),
            "min_p": of_rows(min_p, torch.float32, device),
            "token_bitmask": token_bitmask,
        }
        if not self.policy.needs_scores:
            attention = None
        else:
            options |= score_options
        if budget is not None:
            options |= {"budget": budget, "recheck": recheck}
        result = self.policy.step(tokens, logits, attention, sequence=sequence, seeds=streams, **options)
        scores = result.scores if self.policy.needs_scores else None
        if result.revised is not None:
            masked = tokens == self.mask_token_id
        check_progress(masked, result.selected, result.confidence, scores, sequence, revised=result.revised)
        return result

    def _streams(
        self,
        sequence: Tensor,  # [B]
        seeds: Sequence[int | None] | Tensor | None,
        position: Tensor | None,
        masked: Tensor,  # [B, C]
        budget: Tensor | None,  # [B, C]
    ) -> Tensor:
        """int64 [B]: what the rows draw from in this step."""
        own = step_seeds(self.seed, self._steps, sequence)
        self._steps += 1
        seeded: bool | Tensor = True
        given: Any = [None] if seeds is None else seeds
        if not isinstance(given, Tensor):
            seeded = of_rows([seed is not None for seed in given], torch.bool, masked.device)
            given = of_rows([signed_seed(seed or 0) for seed in given], torch.int64, masked.device)
        if seeded is False:
            return own
        progress = (~masked).sum(dim=1)
        if budget is not None:  # where a position is masked again, a revision is gone
            progress = progress - 2 * budget.sum(dim=1)
        drawn = given + progress * STEP_STRIDE
        if position is not None:
            drawn = drawn + position * _BLOCK_STRIDE
        return drawn if seeded is True else torch.where(seeded, drawn, own)

    def step_predicted(
        self,
        tokens: Tensor,  # [B, C]
        token_ids: Tensor,  # [B, C]
        probability: Tensor,  # [B, C]
        scores: Tensor | None,  # [B, C]
    ) -> StepResult:
        """As ``step``, where an engine tells no more than each most probable token and its probability.

        Raises
        ------
        RuntimeError
            As ``step``; the decoder's policy or temperature needs the logits; or a chosen position's most
            probable token is the mask token, beside which nothing is known.
        """
        if self.policy.metric != "probability" or self.temperature > 0.0:
            raise RuntimeError(
                f"the engine tells each position's most probable token alone, and {self.policy!r} at "
                f"temperature {self.temperature} needs all logits"
            )
        masked = tokens == self.mask_token_id
        sequence = torch.arange(len(tokens), device=tokens.device)
        seeds = step_seeds(self.seed, self._steps, sequence)
        self._steps += 1
        if not self.policy.needs_scores:
            scores = None
        confidence = probability.float().masked_fill(token_ids == self.mask_token_id, torch.nan)
        seen = (masked, token_ids, confidence, scores, confidence.new_empty(*tokens.shape, 0))
        answer = self.policy.select(StepState(*seen, self.mask_token_id, sequence, seeds, self.backend))
        assert isinstance(answer, Tensor)
        selected = masked & answer
        try:
            check_progress(masked, selected, confidence, scores, sequence)
        except DecodingError as error:
            raise DecodingError(f"{error}; of the mask token's rivals the engine tells nothing") from None
        tokens.copy_(torch.where(selected, token_ids, tokens))
        nothing = torch.full_like(confidence, torch.nan)
        return StepResult(tokens, token_ids, confidence, nothing if scores is None else scores, selected)


class BlockScores:
    """Column scores of the blocks that an engine is decoding, added up as its attention layers run.

    Parameters
    ----------
    block_length
        C.
    group
        The ranks that share the attention heads. Their scores are added up when the last layer has run, on
        every rank: engines that sample on one rank alone need nothing more.
    diagonal, reduction, backend
        As in ``column_scores``.

    Notes
    -----
    The sums live in one buffer that is kept and used again, so that a captured CUDA graph can hold them. A
    batch larger than any before needs another buffer, which graphs that hold the first would not see:
    the largest batch is run and captured first, as engines do.
    """

    def __init__(
        self,
        block_length: int,
        *,
        group: dist.ProcessGroup | None = None,
        diagonal: bool = True,
        reduction: str = "sum",
        backend: str = "auto",
    ) -> None:
        self.block_length = checks.integer("block_length", block_length, 1)
        checks.flag("diagonal", diagonal)
        checks.choice("reduction", reduction, REDUCTIONS)
        checks.choice("backend", backend, BACKEND_CHOICES)
        self._group = group
        self._options: dict[str, Any] = {"diagonal": diagonal, "reduction": reduction, "backend": backend}
        self._buffer: Tensor | None = None
        self._in_graph = False

    def add(
        self,
        q: Tensor,  # [T, Hq, D]
        k: Tensor,  # [T, Hkv, D]
        *,
        first: bool,
        last: bool,
        softmax_scale: float | None = None,
        softmax_lse: Tensor | None = None,  # [T, Hq]
        lse_base: str = "e",
        index: Tensor | None = None,  # [B * C]
    ) -> None:
        """One layer's attention. ``index`` says which of the T tokens are the blocks'; default: all of them.

        ``first`` starts a forward pass, ``last`` ends it. A batch that is not of whole blocks is left out.
        """
        if index is not None:
            q, k = q[index], k[index]
            softmax_lse = None if softmax_lse is None else softmax_lse[index]
        if len(q) % self.block_length != 0:
            return
        sums = self._sums(len(q) // self.block_length, q.device)
        if first:
            sums.zero_()
        column_scores(
            self._blocks(q).transpose(1, 2),
            self._blocks(k).transpose(1, 2),
            softmax_lse=None if softmax_lse is None else self._blocks(softmax_lse.float()).transpose(1, 2),
            lse_base=lse_base,
            softmax_scale=softmax_scale,
            softmax_scope="block" if softmax_lse is None else "sequence",
            out=sums,
            **self._options,
        )
        if last and self._group is not None:
            sums.copy_(sum_scores(sums, self._group))

    def add_paged(
        self,
        q: Tensor,  # [B, Hq, C, D]
        k_cache: Tensor,  # [pages, Hkv, page_size, D]
        block_table: Tensor,  # [B, P] int32
        seqlens_k: Tensor,  # [B] int32
        *,
        first: bool,
        last: bool,
        **options: Any,
    ) -> None:
        """One layer's attention of each sequence's last C positions to all of it, its keys in pages.

        ``options`` are those of ``column_scores`` that differ by layer or pass.
        """
        sums = self._sums(len(q), q.device)
        if first:
            sums.zero_()
        if len(q):
            options |= self._options
            paged_column_scores(q, k_cache, block_table, seqlens_k, out=sums, **options)
        if last and self._group is not None:
            sums.copy_(sum_scores(sums, self._group))

    def read(self, batch: int) -> Tensor:
        """float32 [B, C]: the scores of the last forward pass.

        Raises
        ------
        RuntimeError
            No forward pass of so many blocks was seen.
        """
        if self._buffer is None or batch > len(self._buffer):
            raise RuntimeError(
                "no attention of the model was seen: it has not run, or in a CUDA graph captured before the "
                "adapter was switched on, in another process, or with other attention layers"
            )
        return self._buffer[:batch]

    def _blocks(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, self.block_length))

    def _sums(self, batch: int, device: torch.device) -> Tensor:
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if self._buffer is None or batch > len(self._buffer):
            if capturing or self._in_graph:
                raise RuntimeError(
                    f"a CUDA graph needs scores of {batch} blocks, more than there is room for: run and "
                    "capture the largest batch first"
                )
            self._buffer = torch.zeros(batch, self.block_length, device=device)
        self._in_graph = self._in_graph or capturing
        return self._buffer[:batch]


def attention_layers(
    model: nn.Module, kind: type[nn.Module], layers: str | slice | Sequence[int] = "all"
) -> list[nn.Module]:
    """The model's attention layers of this class, in order, those that ``layers`` chooses.

    Raises
    ------
    RuntimeError
        There are none, or ``layers`` does not fit them.
    """
    found = [module for module in model.modules() if isinstance(module, kind)]
    if not found:
        raise RuntimeError(
            f"{type(model).__name__} has no {kind.__name__} layer: its attention cannot be seen"
        )
    chosen = sorted(chosen_layers(check_layer_choice(layers), len(found)))
    if not chosen or chosen[0] < 0 or chosen[-1] >= len(found):
        raise RuntimeError(f"layers: {layers} does not fit the {len(found)} attention layers of the model")
    return [found[index] for index in chosen]


def last_tokens(ends: Tensor, count: int) -> Tensor:
    """The indices [B * C] of the last ``count`` of each request's tokens, which end at ``ends`` [B]."""
    offsets = torch.arange(-count, 0, device=ends.device)
    return (ends[:, None] + offsets[None, :]).clamp(min=0).flatten()
