"""Compiling, before a server takes requests, what its decoding steps will need."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from attn_sampler import checks, ops
from attn_sampler.attention import column_scores
from attn_sampler.backends import BACKEND_CHOICES, Backend, choose_backend
from attn_sampler.functional import decode_step
from attn_sampler.options import MAX_KEYS

_META = torch.device("meta")
#: The options of decode_step that column_scores has too.
_OF_ATTENTION = (
    *("lse_base", "softmax_scale", "causal", "window_size", "query_start", "softmax_scope", "diagonal"),
    *("reduction", "key_mask", "query_mask", "block_table", "seqlens_k"),
)


def warm_up(
    *,
    layers: int,
    heads: int,
    kv_heads: int,
    headdim: int,
    block: int,
    vocab: int,
    max_keys: int,
    dtype: torch.dtype = torch.bfloat16,
    logits_dtype: torch.dtype | None = None,
    softmax_lse: bool = True,
    cached: bool = True,
    page_size: int = 0,
    layer_by_layer: bool = False,
    device: torch.device | str | int | None = None,
    backend: str = "auto",
    **options: Any,
) -> int:
    """Compile what the decoding steps of a model need, so that no request waits for a compiler.

    The backend ``triton`` compiles a kernel when it is first called with operands of a kind, which takes
    0.5 to 3 seconds each. This compiles them for all batches and for contexts up to ``max_keys``, from the
    calls themselves, on tensors without memory: nothing runs on the device. Other backends compile nothing
    at run time.

    Parameters
    ----------
    layers, heads, kv_heads, headdim
        The model's attention layers that count, and their query heads, key heads and head dimension.
    block
        C, the positions of a block.
    vocab
        V, the length of a row of logits.
    max_keys
        The largest N, keys in the context of a sequence; at least block.
    dtype, logits_dtype
        Of queries and keys, and of logits (default: the same; needed in float8, which comes with descales).
    softmax_lse
        Whether the model's log-sum-exp is given.
    cached
        Whether the query rows are those of the block alone (M = C), or of the whole context (M = N).
    page_size
        The keys of a page, where they lie in pages (with ``block_table`` and ``seqlens_k``); 0: in none.
    layer_by_layer
        Whether the scores are made by a call of ``column_scores`` for each layer, with ``out``, and then
        given to ``decode_step``, as adapters to engines do.
    device
        Where the steps run; default: torch's current GPU, or the CPU.
    backend
        As in ``column_scores``.
    **options
        Those of ``decode_step``, as they will be given, without ``block`` and ``columns``; mask_token_id
        too. A tensor stands for any of its dtype, rank and strides, a mask for those of all lengths.

    Returns
    -------
    int
        How many kernels were compiled, or read from Triton's cache on disk; 0 where all had been before, and
        of backends that need none.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError
        As ``decode_step``; the message names the argument.

    Notes
    -----
    The steps need no others if their tensors begin at a multiple of 16 bytes and have the strides of new ones
    (queries and keys also those of transposed ``[B, N, H, D]``), and V is a multiple of 16 or the logits are
    not a slice.
    """
    counts = {"layers": layers, "heads": heads, "kv_heads": kv_heads, "headdim": headdim, "block": block}
    for name, value in {**counts, "vocab": vocab, "max_keys": max_keys}.items():
        checks.integer(name, value, 1)
    checks.integer("page_size", page_size, 0)
    if max_keys < block or max_keys > MAX_KEYS:
        raise ValueError(f"max_keys: expected from block, {block}, to {MAX_KEYS}, got {max_keys}")
    if heads % kv_heads != 0:
        raise ValueError(f"kv_heads: expected a number that divides the {heads} heads, got {kv_heads}")
    for name, given in (("softmax_lse", softmax_lse), ("cached", cached), ("layer_by_layer", layer_by_layer)):
        checks.flag(name, given)
    checks.choice("backend", backend, BACKEND_CHOICES)
    for name, kind in (("dtype", dtype), ("logits_dtype", logits_dtype)):
        if not isinstance(kind, torch.dtype) and not (name == "logits_dtype" and kind is None):
            raise TypeError(f"{name}: expected a torch.dtype, got {type(kind).__name__}")
    if dtype == checks.FLOAT8 and logits_dtype is None:
        raise TypeError("logits_dtype: needed where dtype is torch.float8_e4m3fn, got None")
    kind = logits_dtype or dtype

    def step(n_keys: int) -> None:
        n_rows = block if cached else n_keys
        pages = -(-n_keys // page_size) if page_size else 0
        layer = _layer(heads, kv_heads, headdim, n_rows, n_keys, pages, page_size, dtype, softmax_lse)
        _step([layer] * layers, n_keys, pages, block, vocab, kind, layer_by_layer, options)

    def steps() -> None:
        for n_keys in _contexts(block, max_keys):
            step(n_keys)

    step(block)  # of no backend yet: it says what is wrong with the options
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
    chosen = _backend(backend, where, (block, vocab, kind), (heads, kv_heads, headdim, dtype))
    with ops.warming(chosen):
        return chosen.compiled_by(where, steps)


def _backend(
    name: str,
    device: torch.device,
    logits: tuple[int, int, torch.dtype],
    attention: tuple[int, int, int, torch.dtype],
) -> Backend:
    """The one that will run, or BackendUnavailableError."""
    block, vocab, logits_dtype = logits
    heads, kv_heads, headdim, dtype = attention
    q = torch.empty(0, heads, 1, headdim, dtype=dtype, device=device)
    of_logits = torch.empty(0, block, vocab, dtype=logits_dtype, device=device)
    return choose_backend("decode_step", name, of_logits, q, q[:, :kv_heads])


def _contexts(least: int, most: int) -> Iterator[int]:
    """Of each doubling eight: kernels are cut by powers of two."""
    sizes = ((8 + part) << doubling >> 3 for doubling in range(most.bit_length()) for part in range(8))
    yield from sorted({least, most, *(size for size in sizes if least < size < most)})


def _layer(
    heads: int,
    kv_heads: int,
    headdim: int,
    n_rows: int,
    n_keys: int,
    pages: int,
    page_size: int,
    dtype: torch.dtype,
    with_lse: bool,
) -> tuple[Any, ...]:
    """Queries, keys and what belongs to them, of one sequence."""
    q = torch.empty(1, heads, n_rows, headdim, dtype=dtype, device=_META)
    k_shape = (pages, kv_heads, page_size, headdim) if pages else (1, kv_heads, n_keys, headdim)
    k = torch.empty(k_shape, dtype=dtype, device=_META)
    lse = torch.empty(1, heads, n_rows, device=_META) if with_lse else None
    if dtype != checks.FLOAT8:
        return q, k, lse
    return q, k, lse, *(torch.empty(1, kv_heads, device=_META) for _ in range(2))


def _step(
    layers: list[tuple[Any, ...]],
    n_keys: int,
    pages: int,
    block: int,
    vocab: int,
    dtype: torch.dtype,
    layer_by_layer: bool,
    options: dict[str, Any],
) -> None:
    """The calls of one decoding step."""
    given = {name: _alike(value) for name, value in options.items()}
    for name, length in (("key_mask", n_keys), ("query_mask", layers[0][0].shape[2])):
        if isinstance(given.get(name), Tensor):
            given[name] = torch.empty(1, length, dtype=given[name].dtype, device=_META)
    if pages:
        given["block_table"] = torch.empty(1, pages, dtype=torch.int32, device=_META)
        given["seqlens_k"] = torch.empty(1, dtype=torch.int32, device=_META)
    from_end = given.get("seqlens_k") is not None
    columns = slice(-block, None) if from_end else slice(n_keys - block, n_keys)
    tokens = torch.empty(1, n_keys, dtype=torch.int64, device=_META)
    logits = torch.empty(1, block, vocab, dtype=dtype, device=_META)
    place = slice(n_keys - block, n_keys)
    if not layer_by_layer:
        decode_step(tokens, logits, layers, block=place, columns=columns, **given)
        return
    scores = torch.empty(1, block, device=_META)
    of_attention = {name: given[name] for name in _OF_ATTENTION if name in given}
    q, k, lse, *descales = layers[0]
    named = {**of_attention, **dict(zip(("q_descale", "k_descale"), descales, strict=False))}
    column_scores(q, k, columns=columns, softmax_lse=lse, out=scores, **named)
    decode_step(tokens, logits, scores=scores, block=place, **given)


def _alike(value: Any) -> Any:
    """A tensor's stand-in, for a batch of one."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided((1, *value.shape[1:]), value.stride(), dtype=value.dtype, device=_META)
