"""dInfer: attention-guided decoding as its ``ParallelDecoder``.

Install: ``pip install git+https://github.com/inclusionAI/dInfer`` (the ``dinfer`` on PyPI is something else).

    from attn_sampler.adapters.dinfer import AttnParallelDecoder
    decoder = AttnParallelDecoder(model, tau=0.9, mask_id=126336, eos_id=126081)
    llm = BlockWiseDiffusionLLM(model, decoder, BlockIteratorFactory(True))
    llm.generate(prompt, gen_length=256, block_length=32)

Serves all its runners, without a cache and with the prefix, dual and vicinity caches. The decoder watches the
model's attention, which has to be PyTorch's ``scaled_dot_product_attention`` and outside of CUDA graphs.
Under tensor parallelism, give the ``group`` of the attention heads. Interface of version 0.1, commit fce4e32.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from attn_sampler import checks
from attn_sampler.adapters._engine import BlockDecoder, require
from attn_sampler.capture import AttentionCapture
from attn_sampler.checks import Span
from attn_sampler.distributed import partial_scores, sum_scores
from attn_sampler.policy import Policy

_strategy: Any = require(
    "dinfer.decoding.parallel_strategy",
    "dinfer",
    "pip install git+https://github.com/inclusionAI/dInfer (not the dinfer on PyPI)",
    "0.1",
    "0.2",
)


class AttnParallelDecoder(_strategy.ParallelDecoder):
    """Commits by the attention that positions receive, or by another policy.

    Parameters
    ----------
    model
        The model that dInfer runs: its forward passes are watched.
    policy, tau, temperature, seed, layers, softmax_scope, diagonal, backend
        As in ``generate``. A threshold that dInfer gives for a step (its smoothed runners do) takes the place
        of ``tau``; of a policy that reads none, that is warned of once.
    mask_id, eos_id
        Token ids.
    logit_shift
        True with dInfer's shifted runner (Dream): it hands over tokens without the first.
    group
        The ranks that share the attention heads.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        policy: str | Policy = "attn",
        tau: float | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        mask_id: int = 126336,
        eos_id: int = 126081,
        logit_shift: bool = False,
        layers: str | slice | Sequence[int] = "all",
        softmax_scope: str = "sequence",
        diagonal: bool = True,
        group: dist.ProcessGroup | None = None,
        backend: str = "auto",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model: expected the torch.nn.Module that dInfer runs, got {type(model).__name__}"
            )
        checks.flag("logit_shift", logit_shift)
        super().__init__(temperature, mask_id=mask_id)
        self.eos_id = eos_id
        self._decoder = BlockDecoder(
            policy,
            tau=tau,
            mask_token_id=mask_id,
            temperature=temperature,
            seed=seed,
            backend=backend,
            one_block=True,
        )
        self.policy = self._decoder.policy
        self.threshold = getattr(self.policy, "tau", 0.9)  # where dInfer's smoothed runners start from
        self._warned = False
        self._shift = int(logit_shift)
        self._group = group
        self._exact_rows = softmax_scope == "block" or not diagonal
        self._capture = AttentionCapture(
            layers=layers, keep=True, softmax_scope=softmax_scope, diagonal=diagonal, backend=backend
        )
        if self.policy.needs_scores:
            model.register_forward_pre_hook(self._begin)
            model.register_forward_hook(self._end, always_call=True)

    def _begin(self, *_: Any) -> None:
        self._capture.__enter__()

    def _end(self, *_: Any) -> None:
        self._capture.__exit__(None, None, None)

    def block_init(self, block_x: Tensor, block_id: int) -> None:
        """Called by dInfer before each block."""
        self.policy.reset()

    @torch.no_grad()
    def decode(
        self, logits: Tensor, block_start: int, block_end: int, x: Any, iter_threshold: float | None = None
    ) -> None:
        """Commit in ``x``, a TokenArray, from the logits [B, C, V] of [block_start, block_end)."""
        tokens = x[:, block_start:block_end].clone()
        checks.shape("logits", logits, "[B, C, V]", (*tokens.shape, logits.shape[2]))
        attention: Any = None
        options: dict[str, Any] = {}
        if self.policy.needs_scores:
            columns = slice(block_start + self._shift, block_end + self._shift)
            attention, options = self._attention(tokens, columns)
        sequential = getattr(self.policy, "mode", None) == "sequential"
        tau = None if sequential else getattr(self.policy, "tau", None)
        if iter_threshold is not None:
            if tau is not None:
                self.policy.tau = iter_threshold  # type: ignore[attr-defined]
            elif not self._warned:
                self._warned = True
                name = type(self.policy).__name__
                warnings.warn(
                    f"iter_threshold: {name} reads no threshold, got {iter_threshold}", stacklevel=2
                )
        try:
            self._decoder.step(tokens, logits, attention, **options)
        finally:
            if tau is not None:
                self.policy.tau = tau  # type: ignore[attr-defined]
        x[:, block_start:block_end] = tokens

    def _attention(self, tokens: Tensor, columns: slice) -> tuple[Any, dict[str, Any]]:
        """The attention of the last forward pass to these key positions, as ``Policy.step`` takes it."""
        attention, options = self._capture.step_input()
        if isinstance(attention, Tensor):
            attention = attention[:, columns].contiguous()
        else:
            options |= {"columns": columns, "query_start": self._first_row(attention[0], columns)}
        self._capture.reset()  # lets go of the queries, and of this pass
        if self._group is None:
            return attention, options
        if not isinstance(attention, Tensor):
            block, mask = Span(0, tokens.shape[1]), self._decoder.mask_token_id
            options["backend"] = self._decoder.backend
            attention = partial_scores(tokens, attention, block, mask, **options)
        return sum_scores(attention, self._group), {}

    def _first_row(self, layer: Any, columns: slice) -> int:
        """The key position of the first query: all tokens run, those from the block on, or the block."""
        n_rows, n_keys = layer.q.shape[2], layer.k.shape[2]
        if n_rows == n_keys:
            return 0
        if n_rows in (columns.stop - columns.start, n_keys - columns.start):
            return columns.start
        if self._exact_rows:
            raise NotImplementedError(
                "softmax_scope, diagonal: with the vicinity cache the rows' positions are not known; use "
                "softmax_scope='sequence' and diagonal=True"
            )
        return n_keys - n_rows  # not read
