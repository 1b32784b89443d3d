"""The records that a call is made of: what it reads, and how.

A public function fills them in as it was called, with None where there is a default; ``checked`` refuses what
is wrong, naming the argument, and resolves what was left out. Backends are given checked ones.

The options are field for field, in this order, the parameter structs of csrc/include/attn_sampler.h: the
extension reads them by place. The torch operators take their fields one by one (``schema``, ``flat``,
``unflat``).
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attn_sampler import checks
from attn_sampler.checks import Span

MAX_ELEMENTS = 1 << 40  # of a tensor: its products with what is kept for each are far from the end of int64
MAX_ROWS = 1 << 32  # of the queries of all heads and sequences: a view of few elements can have any number
MAX_KEYS = (1 << 30) - 1  # the kernels count keys, and the positions of a block, in 32 bits
MAX_HEADDIM = 512  # of the GPU kernels: a tile of keys has to fit the shared memory
MAX_VOCAB = 1 << 34  # the sampling stream counts groups of 4 tokens in 32 bits
MAX_TOP_P_VOCAB = 1 << 32  # the sum of so many weights of 30 bits is less than 2^63
MAX_POOL_WIDTH = 1023  # a kernel holds the scores around those that it pools
MAX_POSITION = 1 << 62  # far enough from the end of int64 for sums of positions
MAX_SCALE = 2.35e38  # finite in float32, its product with log2(e) too
MIN_TEMPERATURE = 2.0**-120  # logits are multiplied by its inverse, in float32
LOG2E = math.log2(math.e)

QUERY_ROWS = ("all", "masked")
REDUCTIONS = ("sum", "mean", "max")
MAP_REDUCTIONS = ("none", "sum", "diagonal")
PER = ("kv_head", "head", "all")
POOLS = ("max", "mean")
RULES = ("parallel", "sequential", "threshold")
REVISION_ORDERS = ("product", "doubt", "score")
_SCALES = f"a finite number of magnitude up to {MAX_SCALE:.3g}"
_INT64_MIN, _INT64_END, _UINT64_END = -(1 << 63), 1 << 63, 1 << 64
_INT32_MAX = (1 << 31) - 1


class Layer(NamedTuple):
    """One layer's attention inputs; the C API's attn_sampler_layer."""

    q: Tensor  # [B, Hq, M, D]
    k: Tensor  # [B, Hkv, N, D]; with a block table [pages, Hkv, page_size, D]
    softmax_lse: Tensor | None = None  # [B, Hq, M]
    q_descale: Tensor | None = None  # [B, Hkv]
    k_descale: Tensor | None = None  # [B, Hkv]

    def check(
        self,
        softmax_scope: str,
        prefix: str = "",
        *,
        dtypes: Sequence[torch.dtype] = checks.ATTENTION_DTYPES,
        like: Tensor | None = None,
        paged: bool = False,
    ) -> None:
        """The tensors are valid and fit together."""
        q, k, softmax_lse, q_descale, k_descale = self
        k_axes = axes_of_keys(paged)
        checks.tensor(f"{prefix}q", q, "[B, Hq, M, D]", dtypes, like=like)
        checks.tensor(f"{prefix}k", k, k_axes, (q.dtype,), like=q)
        batch, heads, _, headdim = q.shape
        kv_heads, n_keys = k.shape[1:3]
        if headdim < 1:
            raise ValueError(f"{prefix}q: expected a head dimension D >= 1, got shape {list(q.shape)}")
        if kv_heads < 1 or heads < 1 or heads % kv_heads != 0:
            raise ValueError(
                f"{prefix}k: expected a number of heads that divides the {heads} heads of q, got {kv_heads}"
            )
        checks.shape(f"{prefix}k", k, k_axes, (k.shape[0] if paged else batch, kv_heads, n_keys, headdim))
        if paged and n_keys < 1:
            raise ValueError(
                f"{prefix}k: expected pages of at least one key with a block_table, got shape {list(k.shape)}"
            )
        checks.size(f"{prefix}q", q.shape, MAX_ELEMENTS)
        checks.size(f"{prefix}q", q.shape[:3], MAX_ROWS, "query rows [B, Hq, M]")
        checks.size(f"{prefix}k", k.shape, MAX_ELEMENTS)
        if softmax_lse is not None:
            if softmax_scope == "block":
                raise ValueError(
                    f"{prefix}softmax_lse: not accepted with softmax_scope='block', whose softmax is over "
                    "the block's keys alone"
                )
            floats = (torch.float32, torch.float64) if q.dtype == torch.float64 else (torch.float32,)
            checks.optional(f"{prefix}softmax_lse", softmax_lse, "[B, Hq, M]", q.shape[:3], floats, q)
        for name, descale in (("q_descale", q_descale), ("k_descale", k_descale)):
            if descale is not None and q.dtype != checks.FLOAT8:
                raise ValueError(
                    f"{prefix}{name}: accepted with q and k of float8_e4m3fn only, these are {q.dtype}"
                )
            checks.optional(f"{prefix}{name}", descale, "[B, Hkv]", (batch, kv_heads), (torch.float32,), q)


def axes_of_keys(paged: bool) -> str:
    """How the axes of k are spelled."""
    return "[pages, Hkv, page_size, D]" if paged else "[B, Hkv, N, D]"


class Masks(NamedTuple):
    """Which keys and query rows take part, and where the keys lie; the C API's attn_sampler_masks."""

    key_mask: Tensor | None = None  # [B, N] bool
    query_mask: Tensor | None = None  # [B, M] bool
    column_mask: Tensor | None = None  # [B, C] bool, of attention_map
    block_table: Tensor | None = None  # [B, P] int32, pages of k
    seqlens_k: Tensor | None = None  # [B] int32, keys of each sequence

    @property
    def paged(self) -> bool:
        return self.block_table is not None

    def n_keys(self, k: Tensor) -> int:
        """N: the keys that a sequence can have in checked tensors."""
        return k.shape[2] if self.block_table is None else self.block_table.shape[1] * k.shape[2]

    def columns(self, span: Any, k: Tensor) -> Span:
        """The bounds of these key positions: of all sequences, or counted from the end of each."""
        from_end = self.seqlens_k is not None
        return checks.span("columns", span, self.n_keys(k), "key positions (N)", from_end=from_end)

    def first_row(self, n_rows: int, k: Tensor) -> int:
        """The key position of query row 0, if it is not given, counted as the columns are."""
        return (self.n_keys(k) if self.seqlens_k is None else 0) - n_rows

    def check_keys(self, q: Tensor) -> None:
        """What says where keys are."""
        table, batch = self.block_table, q.shape[0]
        if table is not None:
            checks.tensor("block_table", table, "[B, P]", (torch.int32,), like=q)
            checks.shape("block_table", table, "[B, P]", (batch, table.shape[1]))
            checks.size("block_table", table.shape, MAX_ELEMENTS)
        checks.optional("seqlens_k", self.seqlens_k, "[B]", (batch,), (torch.int32,), q)

    def check(self, q: Tensor, k: Tensor, n_columns: int = 0) -> None:
        """The masks; ``check_keys`` has passed."""
        shape = (q.shape[0], self.n_keys(k))
        checks.optional("key_mask", self.key_mask, "[B, N]", shape, (torch.bool,), q)
        checks.optional("query_mask", self.query_mask, "[B, M]", (q.shape[0], q.shape[2]), (torch.bool,), q)
        checks.optional("column_mask", self.column_mask, "[B, C]", (q.shape[0], n_columns), (torch.bool,), q)


class Attention(NamedTuple):
    """How attention is read; the C API's attn_sampler_attention_params."""

    columns: slice | Span | None
    rows: slice | Span | None  # of attention_map
    query_start: int | None
    softmax_scale: float | None
    lse_base: str
    causal: bool
    softmax_scope: str
    diagonal: bool
    reduction: str  # over rows; of attention_map, over columns
    per_head: bool
    accumulate: bool  # add to the output
    window_size: tuple[int, int] = (-1, -1)  # keys before and after a row's own; -1: all

    def check(self, reductions: Sequence[str] = REDUCTIONS) -> None:
        """The options that stand by themselves."""
        checks.choice("lse_base", self.lse_base, ("e", "2"))
        checks.choice("softmax_scope", self.softmax_scope, ("sequence", "block"))
        checks.choice("reduction", self.reduction, reductions)
        for name in ("causal", "diagonal", "per_head"):
            checks.flag(name, getattr(self, name))
        if self.softmax_scale is not None:
            scale = self.softmax_scale
            checks.number("softmax_scale", scale, _SCALES, lambda x: -MAX_SCALE <= x <= MAX_SCALE)
        if self.query_start is not None:
            checks.integer("query_start", self.query_start, -MAX_POSITION, MAX_POSITION)
        checks.pair("window_size", self.window_size, "(left, right)", -1, MAX_POSITION)

    def checked(self, layer: Layer, masks: Masks, reads_rows: bool) -> "Attention":
        """Resolved for q and k, which are checked here too, and so is where keys are."""
        self.check(MAP_REDUCTIONS if reads_rows else REDUCTIONS)
        layer.check(self.softmax_scope, paged=masks.paged)
        masks.check_keys(layer.q)
        return self.placed(layer, masks, *self.spans(layer, masks, reads_rows))

    def spans(self, layer: Layer, masks: Masks, reads_rows: bool) -> tuple[Span, Span]:
        """Columns and rows; all rows where they are not read."""
        n_rows, columns = layer.q.shape[2], masks.columns(self.columns, layer.k)
        if not reads_rows:
            return columns, Span(0, n_rows)
        return columns, checks.span("rows", self.rows, n_rows, "query rows (M)")

    def placed(self, layer: Layer, masks: Masks, columns: Span, rows: Span) -> "Attention":
        """With these columns and rows, and the defaults of checked q and k."""
        _, _, n_rows, headdim = layer.q.shape
        start = masks.first_row(n_rows, layer.k) if self.query_start is None else self.query_start
        scale = headdim**-0.5 if self.softmax_scale is None else float(self.softmax_scale)
        return Attention(columns, rows, start, scale, *self[4:])


def checked_pool(pool: object) -> tuple[str, int]:
    """How scores are pooled, and over how many; None pools nothing, as a width of 1."""
    if pool is None:
        return "max", 1
    if not isinstance(pool, tuple) or len(pool) != 2:
        raise TypeError(f"pool: expected a tuple (how, width) or None, got {type(pool).__name__}")
    checks.choice("pool", pool[0], POOLS)
    width = checks.integer("pool", pool[1], 1, MAX_POOL_WIDTH + 1)
    if width % 2 == 0:
        raise ValueError(f"pool: expected an odd width, so that a column is in the middle, got {width}")
    return pool


class Top(NamedTuple):
    """Which columns are chosen; the C API's attn_sampler_top_columns_params."""

    attention: Attention
    count: int  # type: ignore[assignment]  # of a tuple's methods, which nobody calls
    per: str
    sinks: int
    recent: int
    pool: tuple[str, int] | None  # how, and an odd width; a width of 1 pools nothing

    def checked(self, layer: Layer, masks: Masks) -> "Top":
        """Resolved for q and k, which are checked here too, and so is where keys are."""
        checks.choice("per", self.per, PER)
        count = checks.integer("count", self.count, 1, _INT64_END)
        sinks = checks.integer("sinks", self.sinks, 0, _INT64_END)
        recent = checks.integer("recent", self.recent, 0, _INT64_END)
        pool = checked_pool(self.pool)
        attention = self.attention.checked(layer, masks, False)
        columns = attention.columns.stop - attention.columns.start  # type: ignore[union-attr]
        if count > columns:
            raise ValueError(f"count: expected at most the {columns} columns, got {count}")
        if sinks + recent > count:
            raise ValueError(
                f"sinks, recent: expected at most count = {count} columns together, got {sinks} and {recent}"
            )
        return Top(attention, count, self.per, sinks, recent, pool)


class Sampling(NamedTuple):
    """How tokens are predicted; the C API's attn_sampler_sampling_params."""

    metric: str
    temperature: float | Tensor  # a number, or [B] float32: one for each row, as of what follows
    seed: int | Tensor | None  # [B] int64
    exclude_token_id: int | None = None
    vocab_start: int = 0
    top_k: int | Tensor = 0  # [B] int32
    top_p: float | Tensor = 1.0
    min_p: float | Tensor = 0.0
    token_bitmask: Tensor | None = None  # [B, W] or [B, C, W] int32

    def checked(self, logits: Tensor) -> "Sampling":
        """With a signed seed of 64 bits or one a row; the logits [B, C, V] are checked here too."""
        checks.tensor("logits", logits, "[B, C, V]", checks.FLOAT_DTYPES)
        check_logits_size(logits)
        vocab, exclude = logits.shape[2], self.exclude_token_id
        if vocab < 1:
            raise ValueError("logits: expected at least one token in the vocabulary, got V = 0")
        if exclude is not None:
            checks.integer("exclude_token_id", exclude, 0, vocab)
            if vocab == 1:
                raise ValueError("exclude_token_id: the vocabulary's only token cannot be excluded")
        checks.integer("vocab_start", self.vocab_start, 0, MAX_VOCAB - vocab + 1)
        return self.of_stream(logits)

    def of_stream(self, logits: Tensor) -> "Sampling":
        """With all but the vocabulary's part checked."""
        checks.choice("metric", self.metric, ("probability", "margin", "entropy"))
        temperature, seed, batch = self.temperature, self.seed, logits.shape[:1]
        if not checks.of_rows("temperature", temperature, batch, torch.float32, logits):
            temperature = check_temperature(temperature)
        if seed is None:
            if isinstance(temperature, Tensor) or temperature > 0.0:
                raise ValueError("seed: needed where temperature > 0 (an integer, or an int64 tensor [B])")
            seed = 0
        elif isinstance(seed, Tensor):
            checks.tensor("seed", seed, "[B]", (torch.int64,), like=logits)
            checks.shape("seed", seed, "[B]", logits.shape[:1])
        else:
            seed = signed_seed(checks.integer("seed", seed, _INT64_MIN, _UINT64_END))
        top_k, top_p, min_p = self.top_k, self.top_p, self.min_p
        if not checks.of_rows("top_k", top_k, batch, torch.int32, logits):
            top_k = check_top_k(top_k)
        if not checks.of_rows("top_p", top_p, batch, torch.float32, logits):
            top_p = check_top_p(top_p)
        if not checks.of_rows("min_p", min_p, batch, torch.float32, logits):
            min_p = check_min_p(min_p)
        if logits.shape[2] > MAX_TOP_P_VOCAB and (isinstance(top_p, Tensor) or top_p < 1.0):
            raise ValueError(f"top_p: served for at most {MAX_TOP_P_VOCAB} tokens, got V = {logits.shape[2]}")
        check_bitmask(self.token_bitmask, logits)
        exclude = (self.exclude_token_id, self.vocab_start)
        return Sampling(self.metric, temperature, seed, *exclude, top_k, top_p, min_p, self.token_bitmask)


class Selection(NamedTuple):
    """Which positions are committed, and which revised; the C API's attn_sampler_selection_params."""

    rule: str | Tensor  # a word, or [B] int32 of reference.RULE_CODES
    fallback: str
    tau: float | Tensor  # a number, or [B] float32
    replace_tau: float = math.inf
    remask_tau: float = 0.0
    max_revisions: int | None = None
    revision_order: str = "product"

    def checked(self, budget: Tensor | None, like: Tensor, shape: Sequence[int]) -> "Selection":
        """With numbers for what was left out; the budget, int32 of this shape, is checked too."""
        tau = self.tau
        if not checks.of_rows("rule", self.rule, shape[:1], torch.int32, like):
            checks.choice("rule", self.rule, RULES)
        checks.choice("fallback", self.fallback, ("confidence", "score"))
        if not checks.of_rows("tau", tau, shape[:1], torch.float32, like):
            tau = checks.unit_interval("tau", tau)
        replace = checks.number("replace_tau", self.replace_tau, "a number >= 0", lambda x: x >= 0.0)
        remask = checks.unit_interval("remask_tau", self.remask_tau)
        most = MAX_KEYS if self.max_revisions is None else self.max_revisions
        checks.integer("max_revisions", most, 0, _INT64_END)
        checks.choice("revision_order", self.revision_order, REVISION_ORDERS)
        if budget is not None:
            checks.tensor("budget", budget, "[B, C]", (torch.int32,), like=like)
            checks.shape("budget", budget, "[B, C]", shape)
            checks.writable("budget", budget)
        return Selection(self.rule, self.fallback, tau, replace, remask, most, self.revision_order)


class Step(NamedTuple):
    """A decoding step; the C API's attn_sampler_decode_step_params."""

    block: slice | Span
    mask_token_id: int
    query_rows: str
    attention: Attention
    sampling: Sampling
    selection: Selection

    def checked(self, tokens: Tensor, logits: Tensor, budget: Tensor | None) -> "Step":
        """All but what the layers decide (``placed``); tokens and logits are checked here too."""
        self.attention.check()
        checks.choice("query_rows", self.query_rows, QUERY_ROWS)
        checks.tensor("tokens", tokens, "[B, T]", (torch.int64,))
        checks.writable("tokens", tokens)
        block = checks.span("block", self.block, tokens.shape[1], "token positions (T)")
        checks.tensor("logits", logits, "[B, C, V]", checks.FLOAT_DTYPES, like=tokens)
        vocab = logits.shape[2]
        checks.shape("logits", logits, "[B, C, V]", (tokens.shape[0], block.stop - block.start, vocab))
        checks.size("tokens", tokens.shape, MAX_ELEMENTS)
        check_logits_size(logits)
        checks.integer("mask_token_id", self.mask_token_id, 0, vocab)
        if vocab == 1:
            raise ValueError("logits: expected a vocabulary with more than the mask token, got V = 1")
        selection = self.selection.checked(budget, tokens, logits.shape[:2])
        # Without layers nothing is made of the attention's options, valid as they have to be.
        attention = Attention(block, Span(0, 0), 0, 1.0, *self.attention[4:])
        sampling = self.sampling.of_stream(logits)
        return Step(block, self.mask_token_id, self.query_rows, attention, sampling, selection)

    def placed(self, attention: Attention, layer: Layer, masks: Masks, tokens: Tensor) -> "Step":
        """This checked step with ``attention`` resolved for where the block stands in the layers."""
        assert isinstance(self.block, Span)
        columns = columns_of_block(attention, layer, masks, self.block)
        attention = attention.placed(layer, masks, columns, Span(0, 0))
        if self.query_rows == "masked":
            token_of_row_0(attention, layer, self.block, tokens)
        return self._replace(attention=attention)


def columns_of_block(attention: Attention, layer: Layer, masks: Masks, block: Span) -> Span:
    """The block's key positions."""
    chosen = block if attention.columns is None else attention.columns
    if attention.columns is None and masks.seqlens_k is not None:
        raise TypeError(
            "columns: needed with seqlens_k, which counts key positions from the end of each sequence "
            "(as in slice(-32, None)) while block counts tokens, got None"
        )
    columns = masks.columns(chosen, layer.k)
    here, there = block.stop - block.start, columns.stop - columns.start
    if here != there:
        raise ValueError(
            f"columns: expected as many key positions as the block has tokens, {here}, got {there}"
        )
    return columns


def token_of_row_0(attention: Attention, layer: Layer, block: Span, tokens: Tensor) -> int:
    """The token position of query row 0 under resolved options; all rows have to stand at tokens."""
    assert isinstance(attention.columns, Span)
    assert attention.query_start is not None
    row, n_rows = attention.query_start - attention.columns.start + block.start, layer.q.shape[2]
    if row < 0 or row + n_rows > tokens.shape[1]:
        raise ValueError(
            f"query_rows: with 'masked', every query row must stand at one of the {tokens.shape[1]} tokens; "
            f"rows are at {row} to {row + n_rows - 1} (query_start, columns)"
        )
    return row


def check_layers(
    layers: Sequence[Sequence[Tensor | None]], tokens: Tensor, softmax_scope: str, paged: bool = False
) -> list[Layer]:
    """The layers of a step: of one batch, M, N, D and dtype; what is optional is in all or in none."""
    k_axes = axes_of_keys(paged)
    if not isinstance(layers, (list, tuple)) or not layers:
        raise TypeError(
            "layers: expected a non-empty sequence of (q, k, softmax_lse), "
            f"got {'an empty one' if isinstance(layers, (list, tuple)) else type(layers).__name__}"
        )
    first: Sequence[Any] = ()
    for index, layer in enumerate(layers):
        if not isinstance(layer, (list, tuple)) or len(layer) not in (2, 3, 5):
            raise TypeError(
                f"layers[{index}]: expected (q, k), (q, k, softmax_lse) or "
                "(q, k, softmax_lse, q_descale, k_descale)"
            )
        if len(layer) == len(first) and all(map(_alike, layer, first)):
            continue  # most layers are like the first: a quick way
        first = first or layer
        prefix = f"layers[{index}] "
        dtypes = checks.ATTENTION_DTYPES if index == 0 else (first[0].dtype,)
        record = Layer(*layer)
        record.check(softmax_scope, prefix, dtypes=dtypes, like=tokens, paged=paged)
        (q, k), batch = record[:2], tokens.shape[0]
        checks.shape(f"{prefix}q", q, "[B, Hq, M, D]", (batch, q.shape[1], *first[0].shape[2:]))
        checks.shape(
            f"{prefix}k", k, k_axes, (k.shape[0] if paged else batch, k.shape[1], *first[1].shape[2:])
        )
    records = [Layer(*layer) for layer in layers]
    for name, values in zip(Layer._fields, zip(*records, strict=True), strict=True):
        given = sum(x is not None for x in values)
        if given not in (0, len(layers)):
            raise ValueError(
                f"layers: expected {name} for all layers or for none, got {given} of {len(layers)}"
            )
    return records


def _alike(x: object, y: Tensor | None) -> bool:
    """Whether x is dense and has the shape, dtype and device of y, or both are None."""
    if x is None or y is None:
        return x is y
    if not isinstance(x, Tensor) or not checks.is_dense(x):
        return False
    return x.shape == y.shape and x.dtype == y.dtype and x.device == y.device


def check_logits_size(logits: Tensor) -> None:
    """Of [B, C, V]: so many that the sampling stream can count them."""
    checks.size("logits", logits.shape, MAX_ELEMENTS)
    for what, length, limit in (
        ("positions C", logits.shape[1], MAX_KEYS),
        ("tokens V", logits.shape[2], MAX_VOCAB),
    ):
        if length > limit:
            raise ValueError(f"logits: expected at most {limit} {what}, got {length}")


def check_bitmask(bitmask: object, logits: Tensor) -> None:
    """None, or words of 32 bits for all tokens, a row of them for each position or for all of a sequence."""
    if bitmask is None:
        return
    axes = "[B, C, W]" if isinstance(bitmask, Tensor) and bitmask.dim() == 3 else "[B, W]"
    words = checks.tensor("token_bitmask", bitmask, axes, (torch.int32,), like=logits).shape[-1]
    least = -(-logits.shape[2] // 32)
    if words < least:
        raise ValueError(
            f"token_bitmask: expected at least {least} words of 32 bits for {logits.shape[2]} tokens, "
            f"got {words}"
        )
    given: Tensor = bitmask  # type: ignore[assignment]
    checks.shape("token_bitmask", given, axes, (*logits.shape[: given.dim() - 1], words))
    checks.size("token_bitmask", given.shape, MAX_ELEMENTS)


def check_temperature(value: object) -> float:
    """Zero, or a number whose inverse, by which logits are multiplied in float32, is far from overflow."""
    temperature = checks.non_negative("temperature", value)
    if 0.0 < temperature < MIN_TEMPERATURE:
        raise ValueError(f"temperature: expected 0 or at least {MIN_TEMPERATURE:.3g}, got {temperature}")
    return temperature


def check_top_k(value: Any) -> int:
    """As many tokens as any vocabulary has, at the most; 0 is all."""
    return min(checks.integer("top_k", value, 0, _INT64_END), _INT32_MAX)


def check_top_p(value: Any) -> float:
    """A share of the mass."""
    return checks.number("top_p", value, "a number in (0, 1]", lambda x: 0.0 < x <= 1.0)


def check_min_p(value: Any) -> float:
    """A share of the largest probability."""
    return checks.unit_interval("min_p", value)


def signed_seed(seed: int) -> int:
    """The seed as the operators take it: the stream is keyed by 64 bits, and these are a signed integer's."""
    return (seed - _INT64_MIN) % _UINT64_END + _INT64_MIN


def renamed(name: str, value: Any, old: str, given: Any) -> Any:
    """What was given by the old name of an argument, which warns, or the value of the new one."""
    if given is None:
        return value
    warnings.warn(f"{old}: it is called {name} now; the next release takes that alone", DeprecationWarning, 3)
    return given


def bounds(span: Any) -> Any:
    """A slice as a record holds it: while torch.compile traces, which would make constants of its bounds, the
    bounds alone."""
    compiling = torch.compiler.is_compiling() and isinstance(span, slice) and span.step in (None, 1)
    return Span(span.start, span.stop) if compiling else span
