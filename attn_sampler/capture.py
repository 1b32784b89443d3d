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
from attn_sampler.attention import attention_map, column_scores
from attn_sampler.attention_calls import Arguments, Call, compiled_attention, observe, open_captures
from attn_sampler.attention_calls import is_capturing as is_capturing
from attn_sampler.attention_calls import report_attention as report_attention
from attn_sampler.attention_masks import Visible, read_mask
from attn_sampler.backends import BACKEND_CHOICES
from attn_sampler.errors import DecodingError
from attn_sampler.options import REDUCTIONS

_ATTENTION = F.scaled_dot_product_attention
_EVERYWHERE = (-1, -1)


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
        Key position of query row 0. Default: N - M, or 0 for a call with ``is_causal`` or
        ``causal_upper_left``, as PyTorch aligns them.
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
    break and without recompilation from step to step; but ``Tensor.unflatten``, which torch cannot trace
    under a ``TorchFunctionMode``, and attention of tensor subclasses break its graph.

    With ``keep`` or negative ``layers``, what is set aside refers to the model's own queries and mask, and to
    its keys where all columns are taken. None of these may be overwritten before the scores are read: a
    mask must not be refilled in place between layers. Under ``torch.compile`` they are copied.

    The capture never changes what the model does: a call that it cannot score (nested or 3-dimensional
    tensors, subclasses, inside ``torch.vmap``) runs as without it, and reading the scores raises, with the
    call's index and the reason; ``layers`` may leave it out. Under ``torch.compile`` a call that carries a
    gradient is computed once more. Layers of different numbers of keys have no columns in common, and raise
    likewise, unless the columns are counted from the end.

    ``nn.MultiheadAttention``, ``flex_attention``, other libraries' kernels and attention written out by hand
    are not seen, unless they call ``report_attention``. Masks are handed to the kernels where they hide keys
    from all rows ([B, 1, 1, N], or expanded from it), all but a band about each row (``is_causal``, PyTorch's
    ``CausalBias``, a table that is causal or a sliding window), or both: as booleans, or as zeros beside -inf
    or the lowest finite value. Any other mask or bias is served by plain PyTorch over the candidate columns,
    and cannot be kept. To know them apart, float masks and tables are read on the host, once for all layers
    that share one (in inference mode and in compiled models, once a layer). A row that is hidden everywhere
    contributes 0; one that has only biases of the lowest value, or others far from 0, what PyTorch makes of
    it: equal shares. Dropout is not applied to the scores.
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
        self._keys: dict[int, int] = {}  # how many each scored call has; 0 where it does not matter
        self._failures: dict[int, Exception] = {}
        self._masks: dict[tuple, tuple[Tensor, Visible]] = {}

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
            return compiled_attention(Arguments(*args, **kwargs))
        if not self._wants(self.num_calls):
            self.num_calls += 1
            return func(*args, **kwargs)
        output, seen = observe(Arguments(*args, **kwargs))
        self.add_call(seen)
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
            **first.limits,
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
        return self._mapped()

    def row_mass(self, column_mask: Tensor | None = None, *, reduction: str = "sum") -> Tensor:
        """float32 [B, C]: what each candidate position gives of its attention (with ``keep=True``).

        To the candidate columns that count, boolean [B, C] (default: all of them); or, with
        ``reduction="diagonal"``, to itself. It is the mean over heads and chosen layers, as ``attention_map``
        is, of which these are the row sums and the diagonal; no map is made.
        """
        checks.choice("reduction", reduction, ("sum", "diagonal"))
        return self._mapped(column_mask=column_mask, reduction=reduction)

    def _mapped(self, **options: Any) -> Tensor:
        if not self.keep:
            raise RuntimeError("AttentionCapture keeps no layers to map: create it with keep=True")
        records = self._chosen_records()
        total: Tensor | None = None
        for record in records:
            total = self._map(record, total, **options)
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

    def add_call(self, seen: Call | Exception) -> None:
        """Take an attention call, or the reason why it cannot be scored."""
        index = self.num_calls
        self.num_calls += 1
        if not self._wants(index):
            return
        try:
            if isinstance(seen, Exception):
                raise seen
            self._record(index, seen)
        except Exception as error:  # the model is not to suffer from it: it is raised where scores are read
            self._failures[index] = error

    def _wants(self, index: int) -> bool:
        """Whether the attention call of this index counts, or may."""
        return self._lookback > 0 or index in chosen_layers(self._selection, index + 1)

    def _chosen_records(self) -> list[_Record]:
        """The records that count and are not reduced yet."""
        if self.num_calls == 0:
            raise DecodingError(
                "AttentionCapture saw no call of torch.nn.functional.scaled_dot_product_attention: the "
                "model may use nn.MultiheadAttention, flash-attn, a fused custom operator or attention "
                "written out by hand (attn_implementation='eager' in transformers, whose 'sdpa' is seen), or "
                "no forward pass ran inside the context; an attention that knows its log-sum-exp can call "
                "report_attention"
            )
        chosen = chosen_layers(self._selection, self.num_calls)
        if not chosen or min(chosen) < 0 or max(chosen) >= self.num_calls:
            raise DecodingError(
                f"layers: {self._selection} does not fit the {self.num_calls} attention calls of the model"
            )
        for index in sorted(chosen & self._failures.keys()):
            error = self._failures[index]
            known = type(error) in (TypeError, ValueError, NotImplementedError)
            raise (type(error) if known else RuntimeError)(
                f"attention call {index} of the forward pass cannot be scored: {error}"
            ) from error
        keys = {self._keys[index]: index for index in sorted(chosen, reverse=True)}
        if len(keys) > 1:
            (n, i), (other, j), *_ = sorted(keys.items(), key=lambda item: item[1])
            raise ValueError(
                "layers: expected attention calls of one number of keys, as columns are positions among "
                f"them; call {i} has {n} and call {j} has {other}"
            )
        return [record for index, record in self._records if index in chosen]

    def _record(self, index: int, call: Call) -> None:
        """Reduce an attention call, or put it aside: its tensors, or copies of them."""
        q, k, scale = call.query, call.key, call.scale
        (batch, _, n_rows, _), n_keys = q.shape, k.shape[2]
        self._keys[index] = 0 if _from_the_end(self.columns) else n_keys
        if self._keys[index] != next(iter(self._keys.values())) and not self._lookback and not self.keep:
            return  # reading raises
        lo, hi = checks.span("columns", self.columns, n_keys, "key positions (N)")
        checks.optional("query_mask", self.query_mask, "[B, M]", (batch, n_rows), (torch.bool,), q)
        start = 0 if call.is_causal else n_keys - n_rows
        if self.query_start is not None:
            start = self.query_start
        visible = self._visible(call)
        key_mask, bias, window = visible.key_mask, visible.bias, visible.window_size(start)
        if window is None:  # the kernels' bands move with the rows' positions, which these are not about
            bias = visible.table(n_rows, n_keys, q.device).expand(batch, -1, -1, -1)
            key_mask, window = None, _EVERYWHERE
        if visible.shifted:
            if call.is_reported:
                raise NotImplementedError(
                    "its bias moves a row by more than a float32 softmax_lse can tell (to or beyond 1024)"
                )
            record = _Record(q, k, None, start, None, bias, window, scale, slice(lo, hi))
        else:
            key_mask = None if key_mask is None else key_mask[:, lo:hi]
            bias = None if bias is None else bias[..., lo:hi]
            k = k[:, :, lo:hi]
            record = _Record(q, k, call.softmax_lse, start - lo, key_mask, bias, window, scale, None)
        if not (self.keep or self._lookback):
            self._sum = self._reduce(record, self._sum)
            return
        if call.copy:
            key_mask, bias = (None if x is None else _copy(x) for x in (key_mask, bias))
            record = record._replace(q=_copy(q), k=_copy(k), key_mask=key_mask, bias=bias)
        elif k.shape[2] < n_keys:
            record = record._replace(k=_copy(k))  # a view would keep all keys alive
        self._records.append((index, record))
        if self._lookback:
            fixed = () if isinstance(self._selection, (str, slice)) else self._selection
            oldest = self.num_calls - self._lookback
            self._records = [(i, r) for i, r in self._records if i >= oldest or i in fixed]

    def _visible(self, call: Call) -> Visible:
        """What the call's rows see, read once for all calls that share a mask."""
        mask, (batch, _, n_rows, _), n_keys = call.attn_mask, call.query.shape, call.key.shape[2]
        arguments = (call.is_causal, batch, n_rows, n_keys, not call.is_reported)
        # A mask whose writes leave no trace, in its version, may be another one by now.
        if type(mask) is not Tensor or call.copy or mask.is_inference():
            return read_mask(mask, *arguments)
        place = (mask.data_ptr(), mask.dtype, mask.shape, mask.stride(), mask._version)
        key = (place, arguments)
        if key not in self._masks:  # with the mask, lest another is given its memory
            self._masks[key] = mask, read_mask(mask, *arguments)
        return self._masks[key][1]

    def _reduce(self, record: _Record, total: Tensor | None) -> Tensor:
        reading = (column_scores, reference.column_scores)
        return self._read(reading, record, total, reduction=self._options["reduction"])

    def _map(self, record: _Record, total: Tensor | None, **options: Any) -> Tensor:
        lo, hi, _ = (record.columns or slice(None)).indices(record.k.shape[2])
        first, n_rows, n_columns = lo - record.query_start, record.q.shape[2], hi - lo
        if not 0 <= first <= n_rows - n_columns:
            raise ValueError(
                f"columns: a map needs a query row at each of the {n_columns} columns, but the {n_rows} rows "
                f"stand at columns {-first} to {n_rows - first - 1}"
            )
        rows = slice(first, first + n_columns)
        reading = (attention_map, reference.attention_map)
        return self._read(reading, record, total, rows=rows, **options)

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
                options |= {"key_mask": record.key_mask, **record.limits, "backend": self._backend}
                return backed(record.q, record.k, out=total, **options)
            if record.columns is None:
                values = plain(record.q, record.k, bias=record.bias, **options).to(torch.float32)
                return values if total is None else total.add_(values)
            for head in range(record.q.shape[1]):  # with all keys, a head at a time
                group, of_bias = record.q.shape[1] // record.k.shape[1], head % record.bias.shape[1]
                one = record.q[:, head : head + 1], record.k[:, head // group : head // group + 1]
                bias = record.bias[:, of_bias : of_bias + 1]
                values = plain(*one, columns=record.columns, bias=bias, **options).to(torch.float32)
                total = values if total is None else total.add_(values)
            assert total is not None
            return total


class _Record(NamedTuple):
    """An attention call, with the candidate columns of the keys, or with all where no log-sum-exp will do."""

    q: Tensor  # [B, Hq, M, D]
    k: Tensor  # [B, Hkv, C, D], or [B, Hkv, N, D]
    softmax_lse: Tensor | None  # [B, Hq, M]; None with all keys
    query_start: int  # column (may be negative or beyond C), or key with all keys, at which row 0 stands
    key_mask: Tensor | None  # [B, C] bool
    bias: Tensor | None  # [B, Hq | 1, M, C | N], boolean or added to the logits
    window_size: tuple[int, int]
    softmax_scale: float | None
    columns: slice | None  # the candidates among all keys; None where there are no others

    @property
    def limits(self) -> dict[str, Any]:
        left, right = self.window_size
        return {"causal": right == 0, "window_size": (left, right or -1)}

    @property
    def geometry(self) -> tuple:
        """What layers that are reduced in one call have in common."""
        batch, _, n_rows, headdim = self.q.shape
        shape = (batch, n_rows, headdim, self.k.shape[2], self.q.dtype)
        return (*shape, self.key_mask is None, self.query_start, self.window_size, self.softmax_scale)


def _reducible_in_one_call(records: Sequence[_Record]) -> bool:
    """Whether the layers have geometry and key mask in common."""
    if len({record.geometry for record in records}) > 1:
        return False
    # Eager models mostly pass all layers one mask. Only others are compared, which waits for the GPU.
    masks = {(m.data_ptr(), m.stride()): m for r in records if (m := r.key_mask) is not None}
    first, *others = masks.values() or (None,)
    return first is None or not others or bool((torch.stack(others) == first).all())


def _from_the_end(columns: Any) -> bool:
    """Whether they are counted from the last key, as of caches that drop the first ones."""
    if not isinstance(columns, slice) or not isinstance(columns.start, int):
        return False
    return columns.start < 0 and (columns.stop is None or columns.stop < 0)


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
