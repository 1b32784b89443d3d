"""Column scores of any model that calls ``torch.nn.functional.scaled_dot_product_attention``.

The model is neither edited nor patched: a ``TorchFunctionMode`` sees its attention calls while the context is
open, and a ``TorchDispatchMode`` around each of them reads the row log-sum-exp that the fused kernel computes
and normally throws away. PyTorch still chooses and runs the kernel, so the model's output keeps its bits, and
scoring the candidate columns costs a small fraction of the attention itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from attn_sampler import checks, reference
from attn_sampler.attention_calls import attention_with_lse, autocast, compiled_attention, open_captures
from attn_sampler.attention_calls import is_capturing as is_capturing
from attn_sampler.attention_calls import report_attention as report_attention
from attn_sampler.backends import BACKEND_CHOICES
from attn_sampler.errors import DecodingError
from attn_sampler.functional import attention_map, column_scores
from attn_sampler.options import REDUCTIONS

_ATTENTION = F.scaled_dot_product_attention


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
        Slice of key positions (of ``key`` as the model passes it), C of them. Default: all.
    layers
        Which attention calls of the forward pass count, by their order: ``"all"``, a slice, or a
        sequence of indices. Negative ones count from the end.
    keep
        False: each layer is reduced at once, and the extra memory is one [B, C] buffer (and, with negative
        ``layers``, the queries of those). True: ``layers`` keeps (q, k of the columns, softmax_lse), for one
        reduction by ``decode_step(tokens, logits, capture.layers, ..., **capture.step_options)``.
    query_mask
        Boolean [B, M]: the query rows that count. Default: all (pass the attention mask of a padded
        batch, so that padding rows do not vote).
    query_start
        Key position of query row 0. Default: N - M, or 0 for a call with ``is_causal``, as PyTorch aligns it.
    softmax_scope, diagonal, reduction, backend
        As in ``column_scores``.

    Raises
    ------
    TypeError, ValueError
        Naming the argument.

    Notes
    -----
    Entering the context forgets the last forward pass, so one object serves a whole decoding run;
    ``columns``, ``query_mask`` and ``query_start`` may be assigned in between. Contexts nest, and are
    thread-local, as all ``TorchFunctionMode``s are. A model under ``torch.compile`` is served without a graph
    break and without recompilation from step to step, without gradients; but ``Tensor.unflatten``, which
    torch cannot trace under a ``TorchFunctionMode``, breaks its graph.

    With ``keep`` or negative ``layers``, what is set aside refers to the model's own queries and mask, and to
    its keys where all columns are taken. None of these may be overwritten before the scores are read: a
    mask must not be refilled in place between layers. Under ``torch.compile`` they are copied.

    ``nn.MultiheadAttention``, ``flex_attention``, other libraries' kernels and attention written out by hand
    are not seen, unless they call ``report_attention``. A boolean ``attn_mask`` that is the same for all
    heads and rows ([B, 1, 1, N], or expanded from it) and ``is_causal`` are handed to the kernels; any other
    mask or bias is served by plain PyTorch over the candidate columns, and cannot be kept. A bias of -inf, or
    of the lowest finite value of its dtype, masks; a row that is masked everywhere contributes 0. Dropout is
    not applied to the scores.
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
        checks.flag("keep", keep)
        checks.choice("softmax_scope", softmax_scope, ("sequence", "block"))
        checks.flag("diagonal", diagonal)
        checks.choice("reduction", reduction, REDUCTIONS)
        checks.choice("backend", backend, BACKEND_CHOICES)
        if query_start is not None:
            checks.integer("query_start", query_start)
        self.columns = columns
        self.keep = keep
        self.query_mask = query_mask
        self._selection = check_layer_choice(layers)
        self._lookback = _lookback(self._selection)
        self.query_start = query_start
        self._options: dict[str, Any] = {"softmax_scope": softmax_scope, "diagonal": diagonal}
        self._options["reduction"] = reduction
        self._backend = backend
        self.reset()

    def reset(self) -> None:
        """Forget the last forward pass; entering the context does so too."""
        self.num_calls = 0
        self._records: list[tuple[int, _Record]] = []
        self._sum: Tensor | None = None

    def __enter__(self) -> AttentionCapture:
        self.reset()
        open_captures().append(self)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        open_captures().remove(self)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is not _ATTENTION:  # every torch function of the model comes by here
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return compiled_attention(*args, **kwargs)
        if not self._wants(self.num_calls):
            self.num_calls += 1
            return func(*args, **kwargs)
        output, softmax_lse = attention_with_lse(*args, **kwargs)
        self._record(softmax_lse, *args, **kwargs)
        return output

    @property
    def scores(self) -> Tensor:
        """float32 [B, C]: attention received by each column, added up over heads and chosen layers."""
        total = None if self._sum is None else self._sum.clone()
        for record in self._chosen_records():
            total = self._reduce(record, total)
        assert total is not None
        return total

    @property
    def layers(self) -> list[CapturedLayer]:
        """The chosen layers' tensors (with ``keep=True``)."""
        if not self.keep:
            raise RuntimeError("AttentionCapture keeps no layers: create it with keep=True")
        records = self._chosen_records()
        if any(record.bias is not None for record in records):
            raise NotImplementedError(
                "a layer's attn_mask is neither a key mask [B, 1, 1, N] nor is_causal and cannot be "
                "handed to decode_step: use keep=False, or pass scores=capture.scores"
            )
        block_scope = self._options["softmax_scope"] == "block"
        return [CapturedLayer(r.q, r.k, None if block_scope else r.softmax_lse) for r in records]

    @property
    def step_options(self) -> dict[str, Any]:
        """The keywords with which ``decode_step`` reads ``layers``."""
        records = self._chosen_records()
        first = records[0]
        if not _reducible_in_one_call(records):
            raise NotImplementedError(
                "the layers differ in mask, scale, shape or positions and cannot be reduced in one "
                "call: use keep=False, or pass scores=capture.scores"
            )
        return {
            "columns": slice(0, first.k.shape[2]),
            "query_start": first.query_start,
            "softmax_scale": first.softmax_scale,
            "causal": first.causal,
            "key_mask": first.key_mask,
            "query_mask": self.query_mask,
            **self._options,
        }

    @property
    def attention_map(self) -> Tensor:
        """float32 [B, C, C]: what each candidate position attends to each (with ``keep=True``).

        Rows are the queries at the candidate columns' own positions. It is the mean over heads and chosen
        layers, so that a weight is a share of its row's attention whatever the model's size.
        """
        if not self.keep:
            raise RuntimeError("AttentionCapture keeps no layers to map: create it with keep=True")
        records = self._chosen_records()
        total: Tensor | None = None
        for record in records:
            total = self._map(record, total)
        assert total is not None
        return total.div_(sum(record.q.shape[1] for record in records))

    def step_input(self, as_map: bool = False) -> tuple[Tensor | list[CapturedLayer], dict[str, Any]]:
        """The third argument of a policy's ``step``, and the keywords that go with it.

        The kept layers where they can be reduced in one call; else ``scores``, which needs no keywords. For a
        policy with ``needs_map``, ``as_map``: ``attention_map``, which needs none either.
        """
        if as_map:
            return self.attention_map, {}
        if self.keep:
            records = self._chosen_records()
            if all(r.bias is None for r in records) and _reducible_in_one_call(records):
                return self.layers, self.step_options
        return self.scores, {}

    def add_call(self, *arguments: Any, **keywords: Any) -> None:
        """Take an attention call that no mode saw: its log-sum-exp, and what attention was called with."""
        if self._wants(self.num_calls):
            self._record(*arguments, **keywords)
        else:
            self.num_calls += 1

    def _wants(self, index: int) -> bool:
        """Whether the attention call of this index counts, or may."""
        return self._lookback > 0 or index in chosen_layers(self._selection, index + 1)

    def _chosen_records(self) -> list[_Record]:
        """The records that count and are not reduced yet."""
        if self.num_calls == 0:
            raise DecodingError(
                "AttentionCapture saw no call of torch.nn.functional.scaled_dot_product_attention: the "
                "model may use nn.MultiheadAttention, flash-attn, a fused custom operator or attention "
                "written out by hand (attn_implementation='eager' in transformers), or no forward pass ran "
                "inside the context; an attention that knows its log-sum-exp can call report_attention"
            )
        chosen = chosen_layers(self._selection, self.num_calls)
        if not chosen or min(chosen) < 0 or max(chosen) >= self.num_calls:
            raise DecodingError(
                f"layers: {self._selection} does not fit the {self.num_calls} attention calls of the model"
            )
        return [record for index, record in self._records if index in chosen]

    def _record(
        self,
        softmax_lse: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        *,
        copy: bool = False,
    ) -> None:
        """Reduce one attention call, or put it aside: its tensors, or copies of them."""
        index = self.num_calls
        if query.dim() != 4:
            raise ValueError(
                f"AttentionCapture: expected attention inputs [B, H, M, D], got {list(query.shape)}"
            )
        q, k = autocast(query.detach()), autocast(key.detach())
        (batch, _, n_rows, _), n_keys = q.shape, k.shape[2]
        lo, hi = checks.span("columns", self.columns, n_keys, "key positions (N)")
        checks.optional("query_mask", self.query_mask, "[B, M]", (batch, n_rows), (torch.bool,), q)
        start = 0 if is_causal else n_keys - n_rows
        if self.query_start is not None:
            start = self.query_start
        if is_causal and start != 0:  # the kernels' causal mask moves with the rows' positions
            attn_mask = torch.ones(n_rows, n_keys, dtype=torch.bool, device=q.device).tril()
            is_causal = False
        key_mask = bias = None
        if attn_mask is not None:
            mask = attn_mask.detach()
            mask = mask[(None,) * (4 - mask.dim())]
            same_for_all = all(mask.shape[axis] == 1 or mask.stride(axis) == 0 for axis in (1, 2))
            mask = mask.expand(batch, -1, n_rows, n_keys)[..., lo:hi]
            if mask.dtype == torch.bool and same_for_all:
                key_mask = mask[:, 0, 0]
            else:
                bias = mask
        k = k[:, :, lo:hi]
        record = _Record(q, k, softmax_lse.detach(), start - lo, key_mask, bias, is_causal, scale)
        self.num_calls += 1
        if not (self.keep or self._lookback):
            self._sum = self._reduce(record, self._sum)
            return
        if copy:
            key_mask, bias = (None if x is None else _copy(x) for x in (key_mask, bias))
            record = record._replace(q=_copy(q), k=_copy(k), key_mask=key_mask, bias=bias)
        elif hi - lo < n_keys:
            record = record._replace(k=_copy(k))  # a view would keep all keys alive
        self._records.append((index, record))
        if self._lookback:
            fixed = () if isinstance(self._selection, (str, slice)) else self._selection
            oldest = self.num_calls - self._lookback
            self._records = [(i, r) for i, r in self._records if i >= oldest or i in fixed]

    def _reduce(self, record: _Record, total: Tensor | None) -> Tensor:
        reading = (column_scores, reference.column_scores)
        return self._read(reading, record, total, reduction=self._options["reduction"])

    def _map(self, record: _Record, total: Tensor | None) -> Tensor:
        first, (n_rows, n_columns) = -record.query_start, (record.q.shape[2], record.k.shape[2])
        if not 0 <= first <= n_rows - n_columns:
            raise ValueError(
                f"columns: a map needs a query row at each of the {n_columns} columns, but the {n_rows} rows "
                f"stand at columns {-first} to {n_rows - first - 1}"
            )
        rows = slice(first, first + n_columns)
        return self._read((attention_map, reference.attention_map), record, total, rows=rows)

    def _read(
        self,
        reading: tuple[Callable[..., Tensor], ...],
        record: _Record,
        total: Tensor | None,
        **options: Any,
    ) -> Tensor:
        """Add a call's scores or map to the total; under an arbitrary mask or bias, as the reference does."""
        scope = self._options["softmax_scope"]
        options |= {
            "softmax_lse": None if scope == "block" else record.softmax_lse,
            "softmax_scale": record.softmax_scale,
            "query_mask": self.query_mask,
            "query_start": record.query_start,
            "softmax_scope": scope,
            "diagonal": self._options["diagonal"],
        }
        backed, plain = reading
        with torch.autocast(record.q.device.type, enabled=False):  # scores are float32 to the end
            if record.bias is None:
                options |= {"causal": record.causal, "key_mask": record.key_mask, "backend": self._backend}
                return backed(record.q, record.k, out=total, **options)
            values = plain(record.q, record.k, bias=record.bias, **options).to(torch.float32)
            return values if total is None else total.add_(values)


class _Record(NamedTuple):
    """One attention call, with the key axis reduced to the candidate columns."""

    q: Tensor  # [B, Hq, M, D]
    k: Tensor  # [B, Hkv, C, D]
    softmax_lse: Tensor  # [B, Hq, M]
    query_start: int  # column (may be negative or beyond C) at which row 0 stands
    key_mask: Tensor | None  # [B, C] bool
    bias: Tensor | None  # [B, Hq | 1, M, C], boolean or added to the logits
    causal: bool
    softmax_scale: float | None

    @property
    def geometry(self) -> tuple:
        """What layers that are reduced in one call have in common."""
        batch, _, n_rows, headdim = self.q.shape
        shape = (batch, n_rows, headdim, self.k.shape[2], self.q.dtype)
        return (*shape, self.key_mask is None, self.query_start, self.causal, self.softmax_scale)


def _reducible_in_one_call(records: Sequence[_Record]) -> bool:
    """Whether the layers have geometry and key mask in common."""
    if len({record.geometry for record in records}) > 1:
        return False
    # Eager models mostly pass all layers one mask. Only others are compared, which waits for the GPU.
    masks = {(m.data_ptr(), m.stride()): m for r in records if (m := r.key_mask) is not None}
    first, *others = masks.values() or (None,)
    return first is None or not others or bool((torch.stack(others) == first).all())


def _copy(x: Tensor) -> Tensor:
    """A copy of the elements; what repeats in memory, as an expanded axis does, repeats in the copy."""
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride())
    return x[once].clone().expand(x.shape)


def check_layer_choice(layers: Any) -> str | slice | tuple[int, ...]:
    if isinstance(layers, str):
        checks.choice("layers", layers, ("all",))
        return layers
    if isinstance(layers, slice):
        if (layers.step or 1) < 1:
            raise ValueError(f"layers: expected a slice of positive step, got {layers}")
        return layers
    if not isinstance(layers, Sequence):
        raise TypeError(f"layers: expected 'all', a slice or a sequence of indices, got {layers!r}")
    if not layers:
        raise ValueError("layers: expected at least one index, got none")
    return tuple(checks.integer("layers", index) for index in layers)


def _lookback(selection: str | slice | Sequence[int]) -> int:
    """How many of the last calls a negative index may turn out to mean; 0 where there is none."""
    if isinstance(selection, str):
        return 0
    if isinstance(selection, slice):
        start, stop = selection.start or 0, selection.stop or 0
        return sys.maxsize if stop < 0 else max(-start, 0)
    return max(-min(selection), 0)


def chosen_layers(selection: str | slice | Sequence[int], count: int) -> set[int]:
    """The chosen indices among ``count`` calls; those of a sequence may lie outside."""
    if isinstance(selection, slice):
        return set(range(*selection.indices(count)))
    if isinstance(selection, str):
        return set(range(count))
    return {i + count if i < 0 else i for i in selection}
