"""Column scores of any model that calls ``torch.nn.functional.scaled_dot_product_attention``.

The model is neither edited nor patched: a ``TorchFunctionMode`` sees its attention calls while the context is
open, runs the same fused attention that the model would have run, and keeps the row log-sum-exp which that
kernel computes and normally throws away. With it, scoring the candidate columns costs a small fraction of
the attention itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from attn_sampler.functional import column_scores


class CapturedLayer(NamedTuple):
    """What one attention call left behind, in the form that ``decode_step`` takes."""

    q: Tensor  # [B, Hq, M, D], after RoPE, as the model passed it
    k: Tensor  # [B, Hkv, C, D], the candidate columns alone
    softmax_lse: Tensor | None  # [B, Hq, M], natural logarithm; None in block scope, which has no use for it


class AttentionCapture(TorchFunctionMode):
    """Record or add up the attention that a slice of key positions receives in a forward pass.

    >>> with AttentionCapture(columns=slice(lo, hi)) as capture:
    ...     logits = model(tokens)
    >>> capture.scores  # float32 [B, C], summed over the rows, heads and layers

    Parameters
    ----------
    columns
        Slice of key positions (of ``key`` as the model passes it). Default: all.
    layers
        Which attention calls of the forward pass count, by their order: ``"all"``, a slice, or a
        sequence of indices. Negative ones count from the end.
    keep
        False: each layer is reduced at once, and the extra memory is one [B, C] buffer. True: ``layers`` keeps
        (q, k of the columns, softmax_lse), for one reduction of all layers by
        ``decode_step(tokens, logits, capture.layers, ..., **capture.step_options)``.
    query_mask
        Boolean [B, M]: the query rows that count. Default: all (pass the attention mask of a padded
        batch, so that padding rows do not vote).
    query_start
        Key position of query row 0. Default: N - M.
    softmax_scope, diagonal, reduction, backend
        As in ``column_scores``.

    Notes
    -----
    Enter the context anew (or call ``reset``) for each forward pass. It is thread-local, as all
    ``TorchFunctionMode``s are, and does not see ``nn.MultiheadAttention`` or attention written out by hand.
    A boolean ``attn_mask`` that is the same for all heads and rows ([B, 1, 1, N]) and ``is_causal`` are handed to
    the kernels; any other mask or bias is served by plain PyTorch over the candidate columns, and cannot be
    kept.
    """

    def __init__(
        self,
        columns: slice | None = None,
        layers: str | slice | Sequence[int] = "all",
        *,
        keep: bool = False,
        query_mask: Tensor | None = None,
        query_start: int | None = None,
        softmax_scope: str = "sequence",
        diagonal: bool = True,
        reduction: str = "sum",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if isinstance(layers, str) and layers != "all":
            raise ValueError(f"layers: expected 'all', a slice or indices, got {layers!r}")
        if not isinstance(layers, (str, slice)):
            layers = tuple(layers)
            if not layers:
                raise ValueError("layers: expected at least one index, got none")
        self.columns = columns
        self.keep = keep
        self._selection = layers
        # Which of the last layers a negative index means is known only when the forward pass is over.
        ends = (layers.start, layers.stop) if isinstance(layers, slice) else layers
        self._from_end = layers != "all" and any(isinstance(i, int) and i < 0 for i in ends)
        self._query_mask = query_mask
        self._query_start = query_start
        self._options: dict[str, Any] = {
            "softmax_scope": softmax_scope,
            "diagonal": diagonal,
            "reduction": reduction,
        }
        self._backend = backend
        self.reset()

    def reset(self) -> None:
        """Forget the last forward pass."""
        self.num_calls = 0
        self._records: list[tuple[int, _Record]] = []
        self._sum: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    @property
    def scores(self) -> Tensor:
        """float32 [B, C]: attention received by each column, added up over heads and chosen layers."""
        if self.num_calls == 0:
            raise RuntimeError(
                "AttentionCapture saw no call of torch.nn.functional.scaled_dot_product_attention: the "
                "model may use nn.MultiheadAttention, a fused custom operator or attention "
                "written out by hand, or no forward pass ran inside the context"
            )
        total = None if self._sum is None else self._sum.clone()
        for record in self._chosen_records():
            total = self._reduce(record, total)
        if total is None:
            raise RuntimeError(
                f"layers: {self._selection} chooses none of the {self.num_calls} attention calls"
            )
        return total

    @property
    def layers(self) -> list[CapturedLayer]:
        """The chosen layers' tensors (with ``keep=True``)."""
        if not self.keep:
            raise RuntimeError("AttentionCapture keeps no layers: create it with keep=True")
        for record in self._chosen_records():
            if record.bias is not None:
                raise NotImplementedError(
                    "a layer's attn_mask is neither a key mask [B, 1, 1, N] nor is_causal and cannot be "
                    "handed to decode_step: use keep=False and pass capture.scores"
                )
        block_scope = self._options["softmax_scope"] == "block"
        return [
            CapturedLayer(r.q, r.k, None if block_scope else r.softmax_lse)
            for r in self._chosen_records()
        ]

    @property
    def step_options(self) -> dict[str, Any]:
        """The keywords with which ``decode_step`` reads ``layers``."""
        first, *others = self._chosen_records()
        for other in others:
            if not _same_geometry(first, other):
                raise NotImplementedError(
                    "the layers differ in mask, scale or positions and cannot be reduced in one "
                    "call: use keep=False and pass capture.scores"
                )
        return {
            "columns": slice(0, first.k.shape[2]),
            "query_start": first.query_start,
            "softmax_scale": first.softmax_scale,
            "causal": first.causal,
            "key_mask": first.key_mask,
            "query_mask": self._query_mask,
            **self._options,
        }

    def _chosen_records(self) -> list[_Record]:
        if not self._from_end:
            return [record for _, record in self._records]
        chosen = _choose(self._selection, self.num_calls)
        return [record for index, record in self._records if index in chosen]

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        index = self.num_calls
        self.num_calls += 1
        if not (self._from_end or index in _choose(self._selection, index + 1)):
            return F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=attn_mask,
                dropout_p=dropout_p,
                is_causal=is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )
        if query.dim() != 4:
            raise ValueError(
                f"AttentionCapture: expected attention inputs [B, H, M, D], got {list(query.shape)}"
            )
        output, lse = attention_with_lse(
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
        record = self._record(query.detach(), key.detach(), lse.detach(), attn_mask, is_causal, scale)
        if self.keep or self._from_end:
            self._records.append((index, record))
        else:
            self._sum = self._reduce(record, self._sum)
        return output

    def _record(
        self,
        q: Tensor,
        k: Tensor,
        softmax_lse: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
    ) -> _Record:
        n_rows, n_keys = q.shape[2], k.shape[2]
        lo, hi, _ = (self.columns or slice(None)).indices(n_keys)
        # F.scaled_dot_product_attention aligns a causal mask at the top left.
        aligned = 0 if is_causal else n_keys - n_rows
        start = aligned if self._query_start is None else self._query_start
        key_mask = bias = None
        if attn_mask is not None:
            mask = attn_mask.detach()
            mask = mask[(None,) * (4 - mask.dim())].expand(-1, -1, -1, n_keys)
            if mask.dtype == torch.bool and mask.shape[1] == mask.shape[2] == 1:
                key_mask = mask[:, 0, 0, lo:hi].expand(q.shape[0], hi - lo)
            else:
                bias = mask[..., lo:hi]
        if hi - lo < n_keys:  # the columns alone: a view would keep all keys alive
            k = k[:, :, lo:hi].clone()
        return _Record(q, k, softmax_lse, start - lo, key_mask, bias, is_causal, scale)

    def _reduce(self, record: _Record, total: Tensor | None) -> Tensor:
        options = dict(self._options)
        if record.bias is not None:
            scores = _biased_column_scores(record, self._query_mask, **options)
            return scores if total is None else total.add_(scores)
        block_scope = options["softmax_scope"] == "block"
        return column_scores(
            record.q,
            record.k,
            softmax_lse=None if block_scope else record.softmax_lse,
            softmax_scale=record.softmax_scale,
            causal=record.causal,
            key_mask=record.key_mask,
            query_mask=self._query_mask,
            query_start=record.query_start,
            backend=self._backend,
            out=total,
            **options,
        )


class _Record(NamedTuple):
    """One attention call, with the key axis reduced to the candidate columns."""

    q: Tensor
    k: Tensor  # [B, Hkv, C, D]
    softmax_lse: Tensor
    query_start: int  # column (may be negative or beyond C) at which row 0 stands
    key_mask: Tensor | None  # [B, C] bool
    bias: Tensor | None  # [B | 1, Hq | 1, M | 1, C], boolean or added to the logits
    causal: bool
    softmax_scale: float | None


def _same_geometry(a: _Record, b: _Record) -> bool:
    same_mask = a.key_mask is b.key_mask or (
        a.key_mask is not None
        and b.key_mask is not None
        and a.key_mask.data_ptr() == b.key_mask.data_ptr()
        and a.key_mask.stride() == b.key_mask.stride()
    )
    return (
        same_mask
        and a.query_start == b.query_start
        and a.causal == b.causal
        and a.softmax_scale == b.softmax_scale
    )


def _choose(selection: str | slice | Sequence[int], count: int) -> set[int]:
    """The chosen indices among ``count`` calls."""
    if isinstance(selection, slice):
        return set(range(*selection.indices(count)))
    if isinstance(selection, str):
        return set(range(count))
    return {i + count if i < 0 else i for i in selection}


def attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """``F.scaled_dot_product_attention`` and the row log-sum-exp [B, Hq, M] that it computes inside.

    The output has the bits of the call it replaces. Where PyTorch would pick a kernel without a log-sum-exp
    (the math path), the output is that path's and the log-sum-exp is computed beside it.
    """
    arguments = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal}
    arguments |= {"scale": scale, "enable_gqa": enable_gqa}
    aten = torch.ops.aten
    flash, efficient = 1, 2  # values of at::SDPBackend
    choice = torch._fused_sdp_choice(query, key, value, **arguments)
    if query.device.type == "cpu" and choice == flash:
        output, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=_additive(attn_mask, query), scale=scale
        )
        return output, lse
    if query.device.type == "cuda" and choice == flash and query.shape[-1] % 8 == 0:
        output, lse, *_ = aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )
        return output, lse
    if query.device.type == "cuda" and choice == efficient and not enable_gqa:
        bias = _additive(attn_mask, query)
        if bias is not None:
            bias = bias.expand(*query.shape[:3], key.shape[2])
        if bias is None or bias.shape[-1] % 8 == 0:
            output, lse, *_ = aten._scaled_dot_product_efficient_attention(
                query, key, value, bias, True, dropout_p, is_causal, scale=scale
            )
            return output, lse[:, :, : query.shape[2]]  # its rows are padded
    output = F.scaled_dot_product_attention(query, key, value, **arguments)  # type: ignore[arg-type]
    logits = _logits(query, key, attn_mask, scale)
    if is_causal:
        n_rows, n_keys = logits.shape[-2:]
        above = torch.ones(n_rows, n_keys, dtype=torch.bool, device=query.device).triu(1)
        logits = logits.masked_fill(above, -math.inf)
    return output, torch.logsumexp(logits, dim=-1)


def _logits(q: Tensor, k: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Scaled and biased attention logits, float32 (float64 for float64), [B, Hq, M, N]."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).to(dtype)
    logits = (q.shape[-1] ** -0.5 if scale is None else scale) * (q.to(dtype) @ k.transpose(-1, -2))
    bias = _additive(mask, logits)
    return logits if bias is None else logits + bias


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A boolean mask as the bias that fused attention takes."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    bias = torch.zeros_like(mask, dtype=like.dtype).masked_fill_(~mask, -math.inf)
    return bias[(None,) * (4 - bias.dim())]


def _biased_column_scores(
    record: _Record,
    query_mask: Tensor | None,
    *,
    softmax_scope: str,
    diagonal: bool,
    reduction: str,
) -> Tensor:
    """Column scores under an arbitrary mask or bias, in plain PyTorch over the candidate columns."""
    q, k, bias = record.q, record.k, record.bias
    n_rows, n_columns = q.shape[2], k.shape[2]
    row = record.query_start + torch.arange(n_rows, device=q.device)[:, None]
    column = torch.arange(n_columns, device=q.device)[None, :]
    logits = _logits(q, k, bias, record.softmax_scale)
    counts = logits != -math.inf
    if record.causal:
        counts = counts & (column <= row)
    if query_mask is not None:
        counts = counts & query_mask[:, None, :, None]
    lse = record.softmax_lse
    if softmax_scope == "block":
        counts = counts & (row >= 0) & (row < n_columns)
        lse = torch.logsumexp(logits.masked_fill(~counts, -math.inf), dim=-1)
    if not diagonal:
        counts = counts & (column != row)
    weights = torch.exp(logits - lse[..., None].to(logits.dtype)).masked_fill(~counts, 0.0)
    if reduction == "max":
        scores = weights.amax(dim=2)
    else:
        scores = weights.sum(dim=2)
    if reduction == "mean":
        scores = scores / counts.sum(dim=2).clamp(min=1)
    return scores.sum(dim=1, dtype=torch.float32)
