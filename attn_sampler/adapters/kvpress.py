"""kvpress: the scores of its presses by column scores, without an attention matrix.

Install: ``pip install 'attn_sampler[kvpress]'`` (with transformers before 5.3, as kvpress asks for).

    from attn_sampler.adapters.kvpress import SnapKVPress  # in the place of kvpress' own
    press = SnapKVPress(compression_ratio=0.5, window_size=64, kernel_size=5)
    pipe(context, question=question, press=press)  # or: with press(model): model.generate(ids, ...)

============================  ==========================================================================
``SnapKVPress``               the last ``window_size`` queries vote
``PyramidKVPress``            the same with a budget for each layer
``ObservedAttentionPress``    all queries vote (H2O's heavy hitters); needs no ``attn_implementation="eager"``
============================  ==========================================================================

Queries and log-sum-exp are those that the layer's own attention had where it is PyTorch's (``"sdpa"``) or one
of ``attn_sampler.adapters.transformers``; else, and inside other presses, they are computed once more.

Each is a kvpress press of the same name, options and scale of scores, and goes where that one goes: into its
pipeline, ``AdaKVPress``, ``ChunkPress`` and the like. The scores are kvpress' own of the attention weights
that ``"eager"`` computes, for any implementation: with the layer's scale, its sliding window and its padding,
whose own rows have no vote (kvpress' window attention takes ``head_dim ** -0.5`` and no mask). They are
float32 where kvpress rounds weights and sums to the model's dtype, so that in bfloat16 keys of all but equal
scores may change places. Where the model did compute its weights (``"eager"``), kvpress' own code reads them.

Not served, each a NotImplementedError that names it: soft-capped logits, attention sinks, a mask that is more
than padding and a sliding window, and for ``ObservedAttentionPress`` other numbers of keys than of queries.

Interface of version 0.5.5, which asks for transformers 4.56 to 5.2. These presses, used by themselves, run
with 5.24 too (``pip install --no-deps kvpress``), which names the cache otherwise and hands no positions to
its layers; kvpress' own presses, and what wraps a press, do not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import QuantizedCache
from transformers.models.llama.modeling_llama import rotate_half

from attn_sampler import checks
from attn_sampler.adapters._engine import require
from attn_sampler.attention import column_scores
from attn_sampler.attention_masks import read_mask
from attn_sampler.backends import BACKEND_CHOICES
from attn_sampler.capture import AttentionCapture


def _part(name: str) -> Any:
    """kvpress, or a module of it."""
    return require(name, "kvpress", "pip install 'attn_sampler[kvpress]'", "0.5.5", "0.6")


_kvpress: Any = _part("kvpress")
_utils: Any = _part("kvpress.utils")


class _ColumnScorePress:
    """What the presses share, before kvpress' own class among the bases."""

    compression_ratio: float
    backend: str

    def __post_init__(self) -> None:
        ratio = self.compression_ratio
        checks.number("compression_ratio", ratio, "a number in [0, 1)", lambda value: 0 <= value < 1)
        checks.choice("backend", self.backend, BACKEND_CHOICES)
        #: Of the layer that runs, or has just run, where its attention is watched.
        self._capture: AttentionCapture | None = None
        self._is_watching = False

    @contextlib.contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        """kvpress' context, in which the attention of a prompt shows its queries and their log-sum-exp."""
        language_model = getattr(model.model, "language_model", model.model)
        with contextlib.ExitStack() as hooks:
            hooks.callback(self._end)
            for layer in language_model.layers:
                hook = layer.self_attn.register_forward_pre_hook(self._begin, with_kwargs=True)
                hooks.callback(hook.remove)
            with super().__call__(model):  # type: ignore[misc]
                yield

    def _begin(self, module: Any, input: Any, kwargs: dict[str, Any]) -> None:
        self._end()
        cache = kwargs.get("past_key_values", kwargs.get("cache"))
        if cache is None or isinstance(cache, QuantizedCache) or torch.compiler.is_compiling():
            return
        if cache.get_seq_length(module.layer_idx) == 0:
            self._capture, self._is_watching = AttentionCapture(keep=True), True
            self._capture.__enter__()

    def _end(self) -> None:
        if self._is_watching and self._capture is not None:
            self._capture.__exit__(None, None, None)
        self._is_watching = False

    def forward_hook(
        self, module: nn.Module, input: list[Tensor], kwargs: dict[str, Any], output: list[Any]
    ) -> list[Any]:
        """kvpress' hook, given what newer transformers name otherwise or leave out."""
        self._end()
        given = dict(kwargs)
        cache = given.setdefault("past_key_values", given.get("cache"))
        if cache is None:
            raise ValueError("past_key_values: there is no cache to compress (use_cache=False)")
        if "cache_position" not in given:
            end = cache.get_seq_length(module.layer_idx)
            given["cache_position"] = torch.arange(end - given["hidden_states"].shape[1], end)
        try:
            return super().forward_hook(module, input, given, output)  # type: ignore[misc]
        finally:
            self._capture = None

    def _received(
        self, module: Any, hidden_states: Tensor, keys: Tensor, kwargs: dict[str, Any], n_columns: int
    ) -> Tensor:
        """Attention that the first columns receive from these rows, the last: [B, Hkv, C], added up over rows
        and averaged over the heads of a key head."""
        for name, what in {
            "attn_logit_softcapping": "soft-capped logits",
            "sinks": "attention sinks",
        }.items():
            if getattr(module, name, None) is not None:
                raise NotImplementedError(f"{name}: {what} are not served")
        watched = _watched(self._capture, hidden_states.shape[1], keys)
        if watched is None:
            cos, sin = kwargs["position_embeddings"]
            q = _rotated(_utils.get_prerope_query_states(module, hidden_states), cos, sin).detach()
            seen = _seen(module, q, keys, kwargs.get("attention_mask")) | {"softmax_scale": module.scaling}
        else:
            q, seen = watched
        how: dict[str, Any] = {"columns": slice(0, n_columns), "per_head": True, "backend": self.backend}
        scores = column_scores(q, keys.detach(), **seen, **how)
        return scores.unflatten(1, (keys.shape[1], -1)).mean(dim=2)


@dataclass
class SnapKVPress(_ColumnScorePress, _kvpress.SnapKVPress):
    """SnapKV (arXiv 2404.14469): keys are kept by the pooled attention that the last queries give them.

    Parameters
    ----------
    compression_ratio
        Share of the keys to drop, in [0, 1).
    window_size
        How many of the last queries vote; their own keys are kept. Shorter than the prompt.
    kernel_size
        Odd: over how many neighbours scores are averaged. Beyond the first and the last key outside the
        window there are zeros, and the divisor is ``kernel_size`` there too.
    backend
        As in ``column_scores``.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, when it is made; when the model runs, of a prompt no longer than the window.
    NotImplementedError
        The layer's attention is none that is served, by name.
    """

    backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.integer("window_size", self.window_size, low=1)
        checks.integer("kernel_size", self.kernel_size, low=1)
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, got {self.kernel_size}")

    def score(
        self,
        module: Any,
        hidden_states: Tensor,  # [B, M, hidden]
        keys: Tensor,  # [B, Hkv, N, D]
        values: Tensor,
        attentions: Tensor | None,  # [B, Hq, M, N]
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Scores [B, Hkv, N], float32; those of the window are one above the largest of the others."""
        window, shortest = self.window_size, min(hidden_states.shape[1], keys.shape[2])
        if shortest <= window:
            raise ValueError(
                f"window_size: expected less than the {shortest} keys of the prompt, got {window}"
            )
        if attentions is not None and attentions.shape[3] == keys.shape[2]:  # no layer that has dropped keys
            return super().score(module, hidden_states, keys, values, attentions, kwargs)
        rows = hidden_states[:, -window:]
        scores = self._received(module, rows, keys, kwargs, keys.shape[2] - window) / window
        scores = F.avg_pool1d(scores, self.kernel_size, stride=1, padding=self.kernel_size // 2)
        kept = (scores.amax() + 1).expand(*scores.shape[:2], window)
        return torch.cat([scores, kept], dim=-1)


@dataclass
class PyramidKVPress(SnapKVPress, _kvpress.PyramidKVPress):
    """PyramidKV (arXiv 2406.02069): SnapKV's scores, and more keys kept in the lower layers.

    ``beta`` as in kvpress, all else as in ``SnapKVPress``.
    """


@dataclass
class ObservedAttentionPress(_ColumnScorePress, _kvpress.ObservedAttentionPress):
    """H2O's heavy hitters (arXiv 2306.14048): the mean attention that a key receives from all later queries.

    No attention matrix is made: the memory grows with the prompt's length, not with its square.

    Parameters
    ----------
    compression_ratio
        Share of the keys to drop, in [0, 1).
    backend
        As in ``column_scores``.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As ``SnapKVPress``.
    """

    backend: str = "auto"

    def score(
        self,
        module: Any,
        hidden_states: Tensor,  # [B, N, hidden]
        keys: Tensor,  # [B, Hkv, N, D]
        values: Tensor,
        attentions: Tensor | None,  # [B, Hq, N, N]
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Scores [B, Hkv, N], float32."""
        n_queries, n_keys = hidden_states.shape[1], keys.shape[2]
        if n_queries != n_keys:
            raise NotImplementedError(
                f"ObservedAttentionPress: the cache of layer {module.layer_idx} has {n_keys} keys for "
                f"{n_queries} queries (a sliding window, or decoding): only a prompt's are served"
            )
        if attentions is not None:
            return super().score(module, hidden_states, keys, values, attentions, kwargs)
        scores = self._received(module, hidden_states, keys, kwargs, n_keys)
        return scores / torch.arange(n_keys, 0, -1, device=scores.device)


def _watched(
    capture: AttentionCapture | None, n_rows: int, keys: Tensor
) -> tuple[Tensor, dict[str, Any]] | None:
    """The last queries of the layer's own attention and what they see of its keys, with their log-sum-exp.

    None where that was not seen (it is none of PyTorch's), or is not over the keys that the cache has.
    """
    if capture is None or capture.num_calls != 1:
        return None
    try:
        (layer,), options = capture.layers, capture.step_options
    except NotImplementedError:
        return None
    if layer.k.shape[2] != keys.shape[2] or layer.softmax_lse is None:
        return None
    first = layer.q.shape[2] - n_rows
    for name in ("columns", "query_mask", "softmax_scope", "diagonal", "reduction"):
        del options[name]
    options["query_start"] += first
    return layer.q[:, :, first:], options | {"softmax_lse": layer.softmax_lse[:, :, first:]}


def _rotated(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The queries [B, Hq, M, D] at the last of the positions [B, N, R]; R may be less than D."""
    cos, sin = (x[:, None, -q.shape[2] :] for x in (cos, sin))
    turned, still = q.split((cos.shape[-1], q.shape[-1] - cos.shape[-1]), dim=-1)
    return torch.cat([turned * cos + rotate_half(turned) * sin, still], dim=-1)


def _seen(module: Any, q: Tensor, keys: Tensor, attention_mask: Any) -> dict[str, Any]:
    """What the rows, the last, see of the keys: in the words of ``column_scores``."""
    (batch, _, n_rows, _), n_keys = q.shape, keys.shape[2]
    if attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.dim() == 2):
        sliding = getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))
        seen: dict[str, Any] = {"causal": True, "window_size": (-1 if sliding is None else sliding - 1, -1)}
        if attention_mask is not None:  # as flash-attn has padding
            seen["key_mask"] = attention_mask[:, -n_keys:].bool()
            seen["query_mask"] = attention_mask[:, -n_rows:].bool()
        return seen
    window = visible = None
    if isinstance(attention_mask, Tensor):
        visible = read_mask(
            attention_mask[..., -n_rows:, -n_keys:], False, batch, n_rows, n_keys, spreads=False
        )
        window = visible.window_size(n_keys - n_rows)
    if visible is None or visible.bias is not None or window is None:
        raise NotImplementedError(
            "attention_mask: neither padding nor a sliding window, nor both; any other is not served"
        )
    return {"key_mask": visible.key_mask, "window_size": window}
