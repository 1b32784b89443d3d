"""A tile of attention: logits, weights, and the operands that the attention kernels read.

The query heads that share a key head are packed into the rows of a tile: row r is query row r // PACK of head
r % PACK of the pack. Logarithms are to base 2 throughout.

Kernels take tensors with their strides, and compile-time options, as records. Triton specialises every
integer of a record by whether 16 divides it and whether it is 1, as strides want. What differs from call to
call must not be compiled for: sizes and places are therefore arguments by themselves, named under
``do_not_specialize``, and in records they are 16-fold (``..16``), so that 16 always divides them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_sampler.checks import Span
from attn_sampler.options import LOG2E, Attention, Layer, Masks

from . import launch

_INF = tl.constexpr(float("inf"))
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


class Matrix(NamedTuple):
    """A tensor [B, N]."""

    data: Tensor
    stride_b16: int
    stride_n: int

    @classmethod
    def of(cls, x: Tensor) -> Matrix:
        return cls(x, 16 * x.stride(0), x.stride(1))

    @classmethod
    def optional(cls, x: Tensor | None) -> Matrix | None:
        return None if x is None else cls.of(x)


class Vector(NamedTuple):
    """A tensor [B]."""

    data: Tensor
    stride_b: int


class Keys(NamedTuple):
    """Which keys of a sequence there are, and by which pages they are found.

    Kernels count key positions as if all sequences ended at the last of N (``place``), so that they mean the
    same for all: where a sequence has fewer keys, positions are ahead of them.
    """

    mask: Matrix | None
    table: Matrix | None
    lengths: Vector | None
    n_keys16: int  # 0 where it makes no difference
    pages16: tuple[int, ...] | None  # of all layers, or of each

    @classmethod
    def of(cls, masks: Masks, tensors: Sequence[Tensor]) -> Keys:
        return cls(
            Matrix.optional(masks.key_mask),
            Matrix.optional(masks.block_table),
            None if masks.seqlens_k is None else Vector(masks.seqlens_k, masks.seqlens_k.stride(0)),
            0 if masks.seqlens_k is None else 16 * masks.n_keys(tensors[0]),
            _shared([16 * x.shape[0] for x in tensors]) if masks.paged else None,
        )


class Vectors(NamedTuple):
    """Queries or keys [B, H, R, D] of all layers; a stride is one for all of them where they agree."""

    data: tuple[Tensor, ...]
    stride_b: tuple[int, ...]
    stride_h: tuple[int, ...]
    stride_r: tuple[int, ...]
    stride_d: tuple[int, ...]


class Scales(NamedTuple):
    """Descales [B, Hkv] of all layers."""

    data: tuple[Tensor, ...]
    stride_b: tuple[int, ...]
    stride_h: tuple[int, ...]


class Lse(NamedTuple):
    """Row log-sum-exp [B, H, M] of all layers."""

    data: tuple[Tensor, ...]
    stride_b: tuple[int, ...]  # 16-fold where it was given, as stride_h
    stride_h: tuple[int, ...]
    stride_m: tuple[int, ...]
    scale: float  # to base 2


class Layers(NamedTuple):
    """What the logits of all layers are made of."""

    q: Vectors
    k: Vectors
    q_descale: Scales | None
    k_descale: Scales | None
    heads: tuple[int, ...]
    groups: tuple[int, ...]  # query heads that share a key head
    scale_log2: float


class Tile(NamedTuple):
    """Sizes of a tile; a compile-time option."""

    headdim: int
    block_m: int
    block_n: int
    block_d: int  # of the chunks that the head dimension is cut in
    upcast: bool  # multiply in float32
    plain_scale: bool  # the largest product is the largest logit
    page_size: int  # of keys that lie in pages


class Block(NamedTuple):
    """A tile's rows or columns inside a kernel: their vectors, and the first chunk of each."""

    pointers: Any
    ok: Any
    stride_d: Any
    chunk: Any


@triton.jit
def of_layer(values, layer):
    """The entry of a tuple that has one for each layer, or one for all of them."""
    value = values[0]
    for index in tl.static_range(1, len(values)):
        value = tl.where(layer == index, values[index], value)
    return value


@triton.jit
def lse_stride(strides, layer, SPLITS: tl.constexpr):
    """stride_b or stride_h of an ``Lse``, given or computed in so many splits."""
    stride = of_layer(strides, layer)
    if SPLITS == 0:
        stride = stride >> 4
    return stride


@triton.jit
def is_set(mask, b, at, ok):
    """Where ok, and set in row b of a mask; all are set in no mask."""
    if mask is not None:
        offset = b * (mask.stride_b16 >> 4) + at.to(tl.int64) * mask.stride_n
        ok = ok & (tl.load(mask.data + offset, mask=ok, other=0) != 0)
    return ok


@triton.jit
def keys_ahead(keys, b):
    """By how much key positions are ahead of the keys of sequence b."""
    ahead = 0
    if keys.lengths is not None:
        length = tl.load(keys.lengths.data + b * keys.lengths.stride_b)
        n_keys = keys.n_keys16 >> 4
        ahead = n_keys - tl.minimum(tl.maximum(length, 0), n_keys)
    return ahead


@triton.jit
def first_key_rows(layers, keys, layer, b):
    """Where the offsets of ``find_keys`` start."""
    base = of_layer(layers.k.data, layer)
    if keys.table is None:
        base += b * of_layer(layers.k.stride_b, layer)
    return base


@triton.jit
def find_keys(layers, keys, layer, b, position, ok, ahead, TILE: tl.constexpr):
    """Of some positions: which have a key, which have one that is not masked, and how far off it is."""
    n = position
    if keys.lengths is not None:
        n = position - ahead
        ok = ok & (n >= 0)
    offset = n.to(tl.int64) * of_layer(layers.k.stride_r, layer)
    if keys.table is not None:
        index = n // TILE.page_size
        entry = b * (keys.table.stride_b16 >> 4) + index.to(tl.int64) * keys.table.stride_n
        page = tl.load(keys.table.data + entry, mask=ok, other=-1)
        ok = ok & (page >= 0) & (page < (of_layer(keys.pages16, layer) >> 4))
        offset = (n - index * TILE.page_size).to(tl.int64) * of_layer(layers.k.stride_r, layer)
        offset += page.to(tl.int64) * of_layer(layers.k.stride_b, layer)
    return ok, is_set(keys.mask, b, n, ok), offset


@triton.jit
def _widened(x):
    """float8 as float16, which can hold every e4m3; as bits (uint8) where the device has no such type."""
    if x.dtype == tl.uint8:
        # Exponent and fraction moved into place, a NaN's exponent filled up; the product rebases it.
        bits = x.to(tl.uint16)
        magnitude = (bits & 0x7F) << 7
        magnitude = magnitude | ((magnitude + 0x80) & 0x4000)
        x = (magnitude | ((bits & 0x80) << 8)).to(tl.float16, bitcast=True) * 256.0
    elif x.dtype == tl.float8e4nv:
        x = x.to(tl.float16)
    return x


@triton.jit
def _load_chunk(pointers, ok, stride_d, CHUNK: tl.constexpr, TILE: tl.constexpr):
    """Chunk CHUNK of the head dimension of some vectors: [BLOCK, block_d], zero where there is nothing."""
    offs_d = CHUNK * TILE.block_d + tl.arange(0, TILE.block_d)
    mask = ok[:, None]
    if TILE.headdim % TILE.block_d != 0:
        mask = mask & (offs_d < TILE.headdim)[None, :]
    x = tl.load(pointers[:, None] + offs_d.to(tl.int64)[None, :] * stride_d, mask=mask, other=0.0)
    x = _widened(x)
    if TILE.upcast:
        x = x.to(tl.float32)
    return x


@triton.jit
def load_block(pointers, ok, stride_d, TILE: tl.constexpr):
    """A tile's rows or columns, with their first chunk read."""
    return Block(pointers, ok, stride_d, _load_chunk(pointers, ok, stride_d, 0, TILE))


@triton.jit
def products_tile(q, k, TILE: tl.constexpr):
    """Products [block_m, block_n] of two blocks."""
    acc = tl.dot(q.chunk, tl.trans(k.chunk), input_precision="ieee")
    for chunk in tl.static_range(1, (TILE.headdim + TILE.block_d - 1) // TILE.block_d):
        q_chunk = _load_chunk(q.pointers, q.ok, q.stride_d, chunk, TILE)
        k_chunk = _load_chunk(k.pointers, k.ok, k.stride_d, chunk, TILE)
        acc = tl.dot(q_chunk, tl.trans(k_chunk), acc, input_precision="ieee")
    return acc


@triton.jit
def logits_tile(products, factor, TILE: tl.constexpr):
    """Logits in units [block_m, block_n]."""
    if not TILE.plain_scale:
        products = products * factor
    return products


@triton.jit
def logit_scale(layers, layer, b, kv_head):
    """From products of a key head to logits to base 2."""
    scale = _descaled(layers.scale_log2, layers.q_descale, layer, b, kv_head)
    return _descaled(scale, layers.k_descale, layer, b, kv_head)


@triton.jit
def _descaled(scale, descale, layer, b, kv_head):
    if descale is not None:
        at = b * of_layer(descale.stride_b, layer) + kv_head * of_layer(descale.stride_h, layer)
        scale = scale * tl.load(of_layer(descale.data, layer) + at)
    return scale


@triton.jit
def logit_units(scale, TILE: tl.constexpr):
    """How logits are kept: the factor of a product, 1 or -1, and the unit of what is kept, to base 2.

    No rounding, and no logit beyond float32, comes between a weight and the log-sum-exp then. Only a scale
    too small for that is multiplied in.
    """
    factor = 1.0
    unit = scale
    if not TILE.plain_scale:
        is_small = tl.abs(scale) <= 2.0**-100
        factor = tl.where(is_small, scale, tl.where(scale < 0.0, -1.0, 1.0))
        unit = tl.where(is_small, 1.0, tl.abs(scale))
    return factor, unit


@triton.jit
def visible(row_ok, position, key_ok, key, left, right, LIMITED: tl.constexpr):
    """Which rows see which keys [block_m, block_n]; all, but where LIMITED to windows."""
    sees = row_ok[:, None] & key_ok[None, :]
    if LIMITED:
        sees = (
            sees
            & (key[None, :] >= (position - left)[:, None])
            & (key[None, :] <= (position + right)[:, None])
        )
    return sees


@triton.jit
def safe_max(m):
    """A maximum that can be subtracted: 0 in place of -inf; far above what is finite in place of inf."""
    return tl.where(m == -_INF, 0.0, tl.minimum(m, _LARGEST))


@triton.jit
def load_lse(pointers, ok, scale, unit, SPLITS: tl.constexpr):
    """Row log-sum-exp [block_m]: a logit in units, and what is to be added to base 2.

    It is given and to be scaled, or, with SPLITS, computed in so many parts: their largest logits lie side by
    side, then what is to be added to each.
    """
    if SPLITS == 0:
        rest = tl.load(pointers, mask=ok, other=-_INF) * scale
        top = tl.zeros_like(rest)
    elif SPLITS == 1:
        top = safe_max(tl.load(pointers, mask=ok, other=0.0))
        rest = tl.load(pointers + 1, mask=ok, other=-_INF)
    else:
        parts = pointers[:, None] + tl.arange(0, SPLITS)[None, :]
        tops = tl.load(parts, mask=ok[:, None], other=-_INF)
        rests = tl.load(parts + SPLITS, mask=ok[:, None], other=-_INF)
        top = safe_max(tl.max(tops, 1))
        sums = tl.exp2((safe_max(tops) - top[:, None]) * unit + rests)
        rest = tl.log2(tl.sum(tl.where(rests == -_INF, 0.0, sums), 1))
    return top, rest


@triton.jit
def weights_tile(logits, top, rest, unit, sees, LSE_OF_TILE: tl.constexpr):
    """Attention weights [block_m, block_n], exactly 0 where a row sees nothing, of logits in units.

    The log-sum-exp is that of load_lse. With LSE_OF_TILE the tile holds all the keys of the softmax, and it
    is not read.
    """
    if LSE_OF_TILE:
        seen = tl.where(sees, logits, -_INF)
        top = safe_max(tl.max(seen, 1))
        rest = tl.log2(tl.sum(tl.exp2((seen - top[:, None]) * unit), 1))
    weights = tl.exp2((logits - top[:, None]) * unit - rest[:, None])
    return tl.where(sees & (rest != -_INF)[:, None], weights, 0.0)


@triton.jit
def is_last(counter, total):
    """Whether all the other programs that count here have finished; their results can be read then.

    The increment releases this program's results and acquires the others'. It is one thread's: the first
    barrier puts the writes of all threads before it, the second puts their reads after it. The last one sets
    the counter back to 0 for the next launch: no other program of this one comes to it again.
    """
    tl.debug_barrier()
    before = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    last = before == total - 1
    tl.store(counter, 0, mask=last)
    return last


class Problem(NamedTuple):
    """The layers of a call as the kernels take them, and what their launchers ask about them."""

    layers: Layers
    keys: Keys
    page_size: int  # 0: they lie in no pages
    batch: int
    heads: int  # of the layer that has most
    group: int  # number of query heads that share a key head in every layer
    n_rows: int
    n_keys: int
    headdim: int
    element_size: int
    plain_scale: bool  # known to be positive and not next to 0
    device: torch.device


class Window(NamedTuple):
    """The keys that a row sees, from ``left`` before its position to ``right`` after it.

    A side without limit has one that no key is beyond, and no limit is further than that: sums of positions
    stay as small as the positions.
    """

    left: int
    right: int
    limited: bool  # at a side at least

    @classmethod
    def of(cls, problem: Problem, options: Attention) -> Window:
        assert options.query_start is not None
        (left, right), start = options.window_size, near(options.query_start)
        right, moved = 0 if options.causal else right, start - options.query_start
        to_first, to_last = max(start + problem.n_rows, 0), max(problem.n_keys - start, 0)
        return cls(
            to_first if left < 0 else min(max(left + moved, -1), to_first),
            to_last if right < 0 else min(max(right - moved, -1), to_last),
            max(left, right) >= 0,
        )


class Cut(NamedTuple):
    """A launch's tile."""

    parameters: launch.Config
    tile: Tile
    of_tile: bool  # the keys of the softmax fit into it


def place(options: Attention, masks: Masks, problem: Problem) -> Attention:
    """The options with positions as the kernels count them."""
    if masks.seqlens_k is None:
        return options
    n_keys, columns = problem.n_keys, options.columns
    columns = Span(columns.start + n_keys, columns.stop + n_keys)
    return options._replace(columns=columns, query_start=options.query_start + n_keys)


def gather(layers: Sequence[Layer], masks: Masks, softmax_scale: float) -> Problem:
    q, k, _, q_descale, k_descale = zip(*layers, strict=True)
    n_keys = masks.n_keys(k[0])
    if n_keys > launch.MAX_POSITIONS:
        raise ValueError(f"block_table: the kernels take up to 2^29 keys, and these are {n_keys}")
    batch, _, n_rows, headdim = q[0].shape
    heads = [x.shape[1] for x in q]
    groups = [x.shape[1] // y.shape[1] for x, y in zip(q, k, strict=True)]
    operands = Layers(
        _vectors(q),
        _vectors(k),
        None if q_descale[0] is None else Scales(q_descale, *shared_strides(q_descale)),
        None if k_descale[0] is None else Scales(k_descale, *shared_strides(k_descale)),
        _shared(heads),
        _shared(groups),
        softmax_scale * LOG2E,
    )
    return Problem(
        operands,
        Keys.of(masks, k),
        k[0].shape[2] if masks.paged else 0,
        batch,
        max(heads),
        math.gcd(*groups),
        n_rows,
        n_keys,
        headdim,
        q[0].element_size(),
        softmax_scale > 2.0**-99 and q_descale[0] is None and k_descale[0] is None,
        q[0].device,
    )


def _vectors(tensors: Sequence[Tensor]) -> Vectors:
    """float8 goes as bits to a device that does not convert it by itself."""
    if tensors[0].dtype == torch.float8_e4m3fn and not launch.converts_float8(tensors[0].device):
        tensors = [x.view(torch.uint8) for x in tensors]
    return Vectors(tuple(tensors), *shared_strides(tensors))


def _shared(values: Sequence[int]) -> tuple[int, ...]:
    """One value for all layers where they agree, else one for each."""
    return (values[0],) if len(set(values)) == 1 else tuple(values)


def shared_strides(tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """For each axis, one stride for all tensors where they agree, else one for each."""
    return [_shared(strides) for strides in zip(*(x.stride() for x in tensors), strict=True)]


def near(query_start: int) -> int:
    """query_start such that the kernels can compute in 32 bits: beyond, no row is at a key either."""
    return min(max(query_start, -launch.MAX_POSITIONS), launch.MAX_POSITIONS)


def fitting(size: int, limit: int) -> int:
    """Tile size for so many rows or columns: a power of two, from 16 (tl.dot's least) to the limit."""
    return min(limit, max(16, launch.next_power_of_2(size)))


def tile_of(problem: Problem, block_m: int, block_n: int) -> Tile:
    block_d = launch.block_d(problem.headdim, problem.element_size)
    scale, page_size = problem.plain_scale, problem.page_size
    return Tile(problem.headdim, block_m, block_n, block_d, launch.INTERPRET, scale, page_size)


def cut_columns(kernel: str, problem: Problem, options: Attention, n_rows: int) -> Cut:
    """The tile of a kernel for so many packed rows and the columns of the options."""
    n_columns = options.columns.stop - options.columns.start
    shape_class = launch.attention_class(n_columns, problem.headdim, problem.element_size)
    parameters = launch.config(kernel, shape_class, problem.device)
    block_m, block_n = parameters.block_m, fitting(n_columns, parameters.block_n)
    largest_softmax = 64 if problem.element_size == 4 else 128
    of_tile = options.softmax_scope == "block" and n_columns <= largest_softmax
    if of_tile:
        block_m, block_n = min(32, block_m), fitting(n_columns, largest_softmax)
    return Cut(parameters, tile_of(problem, fitting(n_rows, block_m), block_n), of_tile)
