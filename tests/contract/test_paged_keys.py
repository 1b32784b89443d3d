"""Keys in the pages of a cache (``block_table``) and sequences with ends of their own (``seqlens_k``)."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from problems import ATTENTION_DTYPES, AttentionProblem, assert_accurate, normal, random_attention, row_lse
from torch import Tensor

import attn_sampler
from attn_sampler import attention_map, column_scores, decode_step, ops, options, reference
from attn_sampler.operator_arguments import flat

PAGE_SIZES = (1, 3, 16, 17, 64, 256)
CACHES = ("HND", "NHD", "half of HND pages", "first of two NHD", "wide rows")
NO_PAGE = (-1, -(1 << 31), (1 << 31) - 1)
MASK = 5


def empty_cache(layout: str, pages: int, kv_heads: int, page_size: int, headdim: int, like: Tensor) -> Tensor:
    """[pages, Hkv, page_size, D] of NaN, in the memory that an engine would have."""
    shape = {
        "HND": (pages, kv_heads, page_size, headdim),
        "NHD": (pages, page_size, kv_heads, headdim),
        "half of HND pages": (pages, 2, kv_heads, page_size, headdim),
        "first of two NHD": (2, pages, page_size, kv_heads, headdim),
        "wide rows": (pages, kv_heads, page_size, headdim + 5),
    }[layout]
    memory = torch.full(shape, torch.nan, device=like.device).to(like.dtype)
    if layout == "half of HND pages":
        return memory[:, 1]
    if layout == "wide rows":
        return memory[..., 2:-3]
    return memory if layout == "HND" else (memory if layout == "NHD" else memory[0]).transpose(1, 2)


def in_pages(rng: random.Random, k: Tensor, page_size: int, layout: str) -> tuple[Tensor, Tensor]:
    """The keys [B, Hkv, N, D] in pages in any order, with others between, and their table."""
    batch, kv_heads, n_keys, headdim = k.shape
    count = n_keys // page_size
    pages = rng.sample(range(batch * count + 3), batch * count)
    table = torch.full((batch, 2 * count), 1 << 20, dtype=torch.int32, device=k.device)[:, ::2]
    table.copy_(torch.tensor(pages, dtype=torch.int32).reshape(batch, count))
    cache = empty_cache(layout, batch * count + 3, kv_heads, page_size, headdim, k)
    for b in range(batch):
        for i in range(count):
            cache[int(table[b, i])] = k[b, :, i * page_size : (i + 1) * page_size]
    return cache, table


def shifted(x: Tensor, by: list[int], value: Any) -> Tensor:
    """x [B, ..., N, ...] with each sequence moved so many keys to the front of N, its axis -2 (of a mask the
    last), and this value where there are no others."""
    moved = torch.full(x.shape, value, device=x.device).to(x.dtype)
    for b, n in enumerate(by):
        if x.dim() == 2:
            moved[b, : x.shape[1] - n] = x[b, n:]
        else:
            moved[b, :, : x.shape[2] - n] = x[b, :, n:]
    return moved


@dataclasses.dataclass
class Case:
    """Keys in pages, or ends of sequences, and the same with all keys in one tensor, the absent ones masked,
    and all sequences ending at the last of N."""

    given: AttentionProblem
    plain: AttentionProblem

    def to(self, device: torch.device) -> Case:
        return Case(self.given.to(device), self.plain.to(device))


def make_case(
    seed: int,
    plain: AttentionProblem,
    page_size: int | None,
    ends: bool,
    layout: str = "HND",
    holes: bool = False,
) -> Case:
    rng = random.Random(f"pages {seed}")
    q, k, how = plain.q, plain.k, dict(plain.options)
    batch, _, n_keys, _ = k.shape
    present = torch.ones(batch, n_keys, dtype=torch.bool) if how.get("key_mask") is None else how["key_mask"]
    given = dict(how)
    ahead = [0] * batch
    if ends:
        lengths = [rng.choice((0, 1, n_keys, rng.randint(0, n_keys))) for _ in range(batch)]
        ahead = [n_keys - n for n in lengths]
        beyond = [
            n + rng.choice((0, 7)) if n == n_keys else n - rng.choice((0, 7)) * (n == 0) for n in lengths
        ]
        given["seqlens_k"] = torch.tensor(beyond, dtype=torch.int32)
        present = present & (torch.arange(n_keys) >= torch.tensor(ahead)[:, None])
        if (columns := how.get("columns")) is not None:
            given["columns"] = slice(columns.start - n_keys, columns.stop - n_keys or rng.choice((0, None)))
        if how.get("query_start") is not None:
            given["query_start"] = how["query_start"] - n_keys
    if how.get("key_mask") is not None:
        given["key_mask"] = shifted(how["key_mask"], ahead, True)
    keys = shifted(k, ahead, torch.nan)
    if page_size is not None:
        keys, table = in_pages(rng, keys, page_size, layout)
        given["block_table"] = table
        if holes:
            hole = torch.rand(table.shape, generator=torch.Generator().manual_seed(seed)) < 0.3
            for b, i in hole.nonzero().tolist():
                table[b, i] = rng.choice((*NO_PAGE, keys.shape[0]))
                at = slice(ahead[b] + i * page_size, ahead[b] + (i + 1) * page_size)
                present = present.clone()
                present[b, at] = False
    how["key_mask"] = present
    return Case(AttentionProblem(q, keys, given), AttentionProblem(q, k, how))


def random_case(seed: int) -> Case:
    rng = random.Random(f"case {seed}")
    page_size = rng.choice((*PAGE_SIZES, None))
    at_most = rng.choice((20, 70, 70, 300))
    n_keys = rng.randint(1, at_most) if page_size is None else page_size * max(1, at_most // page_size)
    problem = random_attention(
        seed, sizes=(1, 7, 19), key_sizes=(n_keys,), headdims=(32, 33, 40, 64), dtypes=ATTENTION_DTYPES
    )
    ends = page_size is None or rng.random() < 0.6
    return make_case(seed, problem, page_size, ends, rng.choice(CACHES), rng.random() < 0.4)


def judge(name: str, backend: str, case: Case, **more: Any) -> Tensor:
    """The result, against that of the plain problem in float64."""
    specification = getattr(reference, name)
    truth = case.plain.double().run(specification, **more)
    same_precision = case.plain.run(specification, **more)
    actual = case.given.run(getattr(attn_sampler, name), backend=backend, **more)
    assert_accurate(actual, same_precision, truth)
    assert (actual[truth == 0.0] == 0.0).all()
    return actual


@pytest.mark.parametrize("seed", range(72))
def test_random_problems(backend, device, seed):
    case, more = random_case(seed).to(device), {"per_head": seed % 5 == 0}
    if seed % 3 == 0:
        n_rows = case.given.q.shape[2]
        rows = slice(n_rows // 3, n_rows)
        more |= {"reduction": ("none", "none", "sum", "diagonal")[seed // 3 % 4], "rows": rows}
        judge("attention_map", backend, case, **more)
        return
    judge("column_scores", backend, case, reduction=("sum", "mean", "max")[seed // 3 % 3], **more)


@pytest.mark.parametrize("layout", CACHES)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_pages_and_layouts(backend, device, layout, page_size):
    n_keys = -(-40 // page_size) * page_size
    q, k = normal(0, 2, 4, 6, 32), normal(1, 2, 2, n_keys, 32)
    case = make_case(page_size, AttentionProblem(q, k, {}), page_size, page_size == 16, layout).to(device)
    judge("column_scores", backend, case, causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("ends", [False, True])
def test_same_bits_in_any_pages(backend, device, dtype, with_lse, ends):
    """As where the keys lie together, in pages of any size and any order, and in each sequence alone."""
    n_keys = 192
    q, k = normal(0, 3, 4, 9, 32, dtype=dtype), normal(1, 3, 2, n_keys, 32, dtype=dtype)
    given = {"window_size": (100, -1), "columns": slice(-70, None)}
    if with_lse:
        given["softmax_lse"] = row_lse(q, k)
    if ends:
        given |= {"seqlens_k": torch.tensor([150, 192, 31], dtype=torch.int32)}
    problem = AttentionProblem(q, k, given).to(device)
    for function in (column_scores, attention_map):
        expected = problem.run(function, backend=backend)
        for page_size in (1, 3, 16, 64, 192):
            cache, table = in_pages(random.Random(page_size), problem.k, page_size, "NHD")
            paged = AttentionProblem(problem.q, cache, problem.options | {"block_table": table})
            assert torch.equal(paged.run(function, backend=backend), expected)
        alone = {
            name: x[1:2] if isinstance(x, Tensor) else x
            for name, x in (problem.options | {"block_table": table}).items()
        }
        own = function(problem.q[1:2], cache, **alone, backend=backend)
        if backend in ("cpu", "reference"):  # elsewhere the cut may depend on the batch
            assert torch.equal(own[0], expected[1])
        else:
            torch.testing.assert_close(own[0], expected[1])


def test_same_bits_in_small_pages(backend, device):
    """The same of few keys, where kernels are interpreted too."""
    q, k = normal(0, 2, 2, 5, 16), normal(1, 2, 1, 24, 16)
    ends = torch.tensor([24, 9], dtype=torch.int32)
    problem = AttentionProblem(q, k, {"seqlens_k": ends, "columns": slice(-7, None)}).to(device)
    cache, table = in_pages(random.Random(0), problem.k, 3, "HND")
    for function in (column_scores, attention_map):
        expected = problem.run(function, backend=backend)
        assert torch.equal(
            function(problem.q, cache, **problem.options, block_table=table, backend=backend), expected
        )


def test_masked_and_unused_pages_are_not_read(backend, device):
    """Entries that name no page, and pages beyond a sequence's end, which hold NaN; nothing is left."""
    q = normal(0, 2, 2, 3, 32).to(device)
    cache = torch.full((4, 1, 16, 32), torch.nan, device=device)
    table = torch.tensor([[-1, 4], [1 << 30, -5]], dtype=torch.int32, device=device)
    for more in ({}, {"reduction": "mean"}, {"softmax_lse": torch.zeros(2, 2, 3, device=device)}):
        scores = column_scores(q, cache, block_table=table, **more, backend=backend)
        assert (scores == 0.0).all()
    ends = torch.tensor([0, -3], dtype=torch.int32, device=device)
    table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32, device=device)
    assert (column_scores(q, cache, block_table=table, seqlens_k=ends, backend=backend) == 0.0).all()
    none = cache[:0]
    assert (column_scores(q, none, block_table=table, backend=backend) == 0.0).all()
    assert (attention_map(q, none, block_table=table, backend=backend) == 0.0).all()


def test_no_sequence_and_no_rows(backend, device):
    cache, how = normal(0, 5, 2, 4, 16).to(device), {"columns": slice(-5, None), "backend": backend}
    for batch, n_rows in ((0, 3), (2, 0)):
        table = torch.zeros(batch, 3, dtype=torch.int32, device=device)
        ends = torch.full((batch,), 7, dtype=torch.int32, device=device)
        q = torch.zeros(batch, 4, n_rows, 16, device=device)
        for per_head, shape in ((False, (batch, 5)), (True, (batch, 4, 5))):
            scores = column_scores(q, cache, block_table=table, seqlens_k=ends, per_head=per_head, **how)
            assert scores.shape == shape
            assert (scores == 0.0).all()


def test_positions_count_from_each_end(backend, device):
    """Written out: uniform weights of rows at a sequence's last three keys, which see what is not after."""
    q, k = torch.zeros(3, 1, 3, 16, device=device), torch.zeros(3, 1, 6, 16, device=device)
    ends = torch.tensor([6, 4, 2], dtype=torch.int32, device=device)
    scores = column_scores(q, k, seqlens_k=ends, columns=slice(-4, None), causal=True, backend=backend)
    full = 1 / 4 + 1 / 5 + 1 / 6
    four = 1 / 2 + 1 / 3 + 1 / 4
    # Of the shortest the first row stands before key 0 and sees nothing.
    expected = [
        [full, full, 1 / 5 + 1 / 6, 1 / 6],
        [four, four, 1 / 3 + 1 / 4, 1 / 4],
        [0.0, 0.0, 1 + 1 / 2, 1 / 2],
    ]
    for row, other in zip(scores.tolist(), expected, strict=True):
        assert row == pytest.approx(other)
    moved = column_scores(
        q, k, seqlens_k=ends, columns=slice(-4, 0), query_start=-4, window_size=(0, 0), backend=backend
    )
    assert moved.tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 1, 0]]
    own = attention_map(
        q, k, seqlens_k=ends, columns=slice(-2, None), reduction="diagonal", diagonal=True, backend=backend
    )
    for row, length in zip(own.tolist(), (6, 4, 2), strict=True):
        assert row == pytest.approx([0.0, 1 / length, 1 / length])


def paged_step(seed: int, ends: bool, device: torch.device, with_lse: bool) -> tuple[list, dict, list, dict]:
    """Layers with one table, their options, and the same in plain tensors."""
    rng = random.Random(seed)
    batch, n_keys, n_rows, page_size = 2, 24, 8, rng.choice((3, 8, 12))
    layers, plain, table, ahead = [], [], None, [0] * batch
    given: dict[str, Any] = {"columns": slice(-8, None) if ends else slice(n_keys - 8, n_keys)}
    whole: dict[str, Any] = {"columns": slice(n_keys - 8, n_keys), "causal": False}
    if ends:
        lengths = [n_keys - rng.randrange(10), 5]
        ahead = [n_keys - n for n in lengths]
        given["seqlens_k"] = torch.tensor(lengths, dtype=torch.int32, device=device)
        whole["key_mask"] = (torch.arange(n_keys) >= torch.tensor(ahead)[:, None]).to(device)
    for i, heads in enumerate((4, 2)):
        q, k = normal(seed + i, batch, heads, n_rows, 16), normal(seed + 10 + i, batch, 2, n_keys, 16)
        lse = row_lse(q, k, key_mask=whole.get("key_mask", torch.ones(1)).cpu() if ends else None)
        cache, pages = in_pages(random.Random(seed), shifted(k, ahead, torch.nan), page_size, "NHD")
        table = pages if table is None else table
        assert torch.equal(table, pages)
        lse = lse.to(device) if with_lse else None
        layers.append((q.to(device), cache.to(device), lse))
        plain.append((q.to(device), k.to(device), lse))
    assert table is not None
    given["block_table"] = table.to(device)
    return layers, given, plain, whole


@pytest.mark.parametrize(
    ("ends", "with_lse", "query_rows"),
    [(False, True, "all"), (True, False, "all"), (False, False, "masked"), (True, True, "masked")],
)
def test_step(backend, device, ends, with_lse, query_rows):
    """Two layers, of different heads, with one table: as with the keys in plain tensors."""
    layers, given, plain, whole = paged_step(7, ends, device, with_lse)
    tokens = torch.full((2, 30), MASK)
    tokens[:, ::3] = 7
    how = {"block": slice(20, 28), "mask_token_id": MASK, "query_rows": query_rows, "tau": 0.05}
    logits = 2.0 * normal(3, 2, 8, 11)
    theirs = tokens.clone()
    expected = reference.decode_step(
        theirs,
        logits.double(),
        [tuple(None if x is None else x.cpu().double() for x in layer) for layer in plain],
        **{n: x.cpu() if isinstance(x, Tensor) else x for n, x in whole.items()},
        **how,
    )
    own = tokens.to(device)
    result = decode_step(own, logits.to(device), layers, **given, **how, backend=backend)
    torch.testing.assert_close(result.scores.cpu().double(), expected.scores, rtol=1e-5, atol=1e-5)
    assert torch.equal(own.cpu(), theirs)
    assert torch.equal(result.selected.cpu(), expected.selected)


def test_out_adds_up(backend, device):
    case = make_case(1, AttentionProblem(normal(0, 2, 2, 5, 32), normal(1, 2, 2, 48, 32)), 16, True).to(
        device
    )
    once = case.given.run(column_scores, backend=backend)
    out = once.clone()
    assert case.given.run(column_scores, out=out, backend=backend) is out
    torch.testing.assert_close(out, 2.0 * once)


def arguments(**change: Any) -> dict[str, Any]:
    given = {
        "q": torch.ones(2, 4, 3, 8),
        "k": torch.ones(7, 2, 16, 8),
        "block_table": torch.zeros(2, 3, dtype=torch.int32),
        "seqlens_k": torch.tensor([48, 20], dtype=torch.int32),
        "columns": slice(-8, None),
    }
    return {name: x for name, x in (given | change).items() if x is not ...}


def int32(*shape: int, **more: Any) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32, **more)


REFUSED = [
    ({"block_table": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, "block_table", ["int32", "int64"]),
    ({"block_table": int32(3, 3)}, ValueError, "block_table", ["[2, 3]", "[3, 3]"]),
    ({"block_table": int32(6)}, ValueError, "block_table", ["2-dimensional"]),
    ({"block_table": int32(2, 3, 1)}, ValueError, "block_table", ["2-dimensional"]),
    ({"block_table": [[0, 1, 2]] * 2}, TypeError, "block_table", ["list"]),
    ({"block_table": int32(2, 3, device="meta")}, ValueError, "block_table", ["cpu", "meta"]),
    ({"block_table": int32(2, 3).to_sparse()}, ValueError, "block_table", ["dense", "sparse_coo"]),
    ({"block_table": int32(2, 0)}, ValueError, "columns", ["outside", "0"]),
    ({"block_table": ...}, ValueError, "k", ["[2, 2, 16, 8]", "[7, 2, 16, 8]"]),
    ({"k": torch.ones(7, 2, 0, 8)}, ValueError, "k", ["at least one key", "[7, 2, 0, 8]"]),
    ({"k": torch.ones(7, 3, 16, 8)}, ValueError, "k", ["4 heads", "3"]),
    ({"k": torch.ones(7, 2, 16, 9)}, ValueError, "k", ["[pages, Hkv, page_size, D]", "[7, 2, 16, 9]"]),
    ({"k": torch.ones(7, 16, 8)}, ValueError, "k", ["[pages, Hkv, page_size, D]"]),
    ({"seqlens_k": torch.zeros(2, dtype=torch.int64)}, ValueError, "seqlens_k", ["int32", "int64"]),
    ({"seqlens_k": int32(3)}, ValueError, "seqlens_k", ["[2]", "[3]"]),
    ({"seqlens_k": int32(2, 1)}, ValueError, "seqlens_k", ["1-dimensional"]),
    ({"seqlens_k": (4, 5)}, TypeError, "seqlens_k", ["tuple"]),
    ({"seqlens_k": int32(2, device="meta")}, ValueError, "seqlens_k", ["cpu", "meta"]),
    ({"columns": slice(0, 8)}, ValueError, "columns", ["from the end", "slice(0, 8, None)"]),
    ({"columns": slice(0, None)}, ValueError, "columns", ["from the end"]),
    ({"columns": slice(4, 4)}, ValueError, "columns", ["from the end"]),
    ({"columns": slice(-8, 8)}, ValueError, "columns", ["from the end"]),
    ({"columns": slice(None, 8)}, ValueError, "columns", ["from the end"]),
    ({"columns": slice(-8, -8)}, ValueError, "columns", ["empty"]),
    ({"columns": slice(-4, -8)}, ValueError, "columns", ["empty"]),
    ({"columns": slice(-49, None)}, ValueError, "columns", ["outside", "48"]),
    ({"columns": slice(-8, None, 2)}, ValueError, "columns", ["step 1"]),
    ({"key_mask": torch.ones(2, 16, dtype=torch.bool)}, ValueError, "key_mask", ["[2, 48]", "[2, 16]"]),
]


def refuses(
    function: Any, given: dict[str, Any], error: type[Exception], start: str, words: list[str]
) -> None:
    with pytest.raises(error) as caught:
        function(**given)
    message = str(caught.value)
    assert message.startswith(f"{start}:"), message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("function", [column_scores, attention_map])
@pytest.mark.parametrize(("change", "error", "start", "words"), REFUSED)
def test_refused(function, change, error, start, words):
    shape = (2, 8) if function is column_scores else (2, 3, 8)
    for out in (None, torch.full(shape, 5.0)):
        refuses(function, arguments(**change) | {"out": out}, error, start, words)
        assert out is None or (out == 5.0).all()


STEP_REFUSED = [
    *(x for x in REFUSED if not {"k", "block_table"} & x[0].keys()),
    ({"columns": None}, TypeError, "columns", ["seqlens_k", "slice(-32, None)"]),
    ({"columns": slice(-9, None)}, ValueError, "columns", ["as many key positions", "8", "9"]),
    ({"query_rows": "masked", "query_start": -48}, ValueError, "query_rows", ["-16"]),
    ({"block_table": int32(3, 3)}, ValueError, "block_table", ["[2, 3]", "[3, 3]"]),
    ({"block_table": ...}, ValueError, "layers[0] k", ["[2, 2, 16, 8]"]),
]


@pytest.mark.parametrize(("change", "error", "start", "words"), STEP_REFUSED)
def test_step_refused(change, error, start, words):
    given = arguments(**change)
    layers = [(given.pop("q"), given.pop("k"), None)] * 2
    tokens = torch.full((2, 40), MASK)
    how = {"block": slice(24, 32), "mask_token_id": MASK, "logits": torch.ones(2, 8, 9)}
    refuses(decode_step, {"tokens": tokens, "layers": layers} | how | given, error, start, words)
    assert (tokens == MASK).all()


def test_layers_share_pages(backend, device):
    """Their caches may have different numbers of pages, but no other size of a page."""
    given = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in arguments().items()}
    q, k = given.pop("q"), given.pop("k")
    tokens, logits = torch.full((2, 40), MASK, device=device), torch.ones(2, 8, 9, device=device)
    how = {"block": slice(24, 32), "mask_token_id": MASK, "backend": backend}
    result = decode_step(tokens, logits, [(q, k), (q, k[:1])], **given, **how)
    expected = column_scores(q, k, **given, backend=backend)
    torch.testing.assert_close(result.scores, 2.0 * expected)
    with pytest.raises(ValueError, match=r"^layers\[1\] k: "):
        decode_step(tokens, logits, [(q, k), (q, k[:, :, :8])], **given, **how)


def test_results_in_the_memory_of_tables(backend, device):
    given = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in arguments().items()}
    for name in ("block_table", "seqlens_k"):
        memory = torch.zeros(64, device=device)
        read = memory.view(torch.int32)[: given[name].numel()].view(given[name].shape)
        out = memory[:16].view(2, 8)
        with pytest.raises(ValueError, match=f"^out: .* of {name}"):
            column_scores(**given | {name: read}, out=out, backend=backend)
        assert (memory == 0.0).all()
    layers, tokens = [(given.pop("q"), given.pop("k"))], torch.full((2, 40), MASK, device=device)
    how = {"block": slice(24, 32), "mask_token_id": MASK, "backend": backend}
    for name in ("block_table", "seqlens_k"):
        count = given[name].numel()
        read = tokens.view(torch.int32).flatten()[:count].view(given[name].shape)
        with pytest.raises(ValueError, match=f"^tokens: .* of {name}"):
            decode_step(tokens, torch.ones(2, 8, 9, device=device), layers, **given | {name: read}, **how)
    assert (tokens == MASK).all()


def calls(device: torch.device, backend: str) -> dict[str, Any]:
    """Functions of (q, k, table, seqlens, tokens, logits)."""

    def scores(x):
        kept = {"block_table": x["table"], "seqlens_k": x["ends"], "columns": slice(-8, None)}
        return column_scores(x["q"] * 1.5, x["k"], causal=True, **kept, backend=backend) * 2

    def dense(x):
        return attention_map(
            x["q"], x["k"][: len(x["q"])], seqlens_k=x["ends"], columns=slice(-8, -2), backend=backend
        )

    def step(x):
        kept = {"block_table": x["table"], "seqlens_k": x["ends"], "columns": slice(-8, None)}
        how = {"block": slice(20, 28), "mask_token_id": MASK, "query_rows": "masked"}
        layers = [(x["q"], x["k"])] * 2
        return decode_step(x["tokens"], x["logits"], layers, **kept, **how, backend=backend).scores

    return {"scores": scores, "dense": dense, "step": step}


def inputs(device: torch.device, pages: int = 3) -> dict[str, Tensor]:
    values = {
        "q": normal(0, 5, 4, 6, 32),
        "k": normal(1, 17, 2, 11, 32),
        "table": torch.arange(5 * pages, dtype=torch.int32).reshape(5, pages),
        "ends": torch.tensor([9, 0, 30, 11 * pages, 12], dtype=torch.int32),
        "tokens": torch.full((5, 29), MASK),
        "logits": normal(2, 5, 8, 13),
    }
    return {name: x.to(device) for name, x in values.items()}


@pytest.mark.parametrize("name", ["scores", "dense", "step"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_to_one_graph(backend, device, name, dynamic):
    """Without a break, so that nothing is read on the host; with dynamic shapes for tables of any width."""
    torch._dynamo.reset()
    function = calls(device, backend)[name]
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for index, pages in enumerate((3, 3) if dynamic is None else (3, 2)):
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            actual = compiled(inputs(device, pages))
        assert torch.equal(actual, function(inputs(device, pages)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU tells a host synchronisation")
@pytest.mark.parametrize("name", ["scores", "dense", "step"])
def test_no_host_synchronisation(name):
    device = torch.device("cuda")
    for backend in ("auto", "reference"):
        function, x = calls(device, backend)[name], inputs(device)
        expected = function(inputs(device))
        torch.cuda.set_sync_debug_mode("error")
        try:
            actual = function(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("op", ["column_scores", "attention_map", "decode_step"])
def test_opcheck(backend, device, op):
    x = inputs(device)
    masks = flat(options.Masks(block_table=x["table"], seqlens_k=x["ends"]))
    how = options.Attention(
        *(options.Span(-8, 0), options.Span(0, 6), -6, 0.2, "e", True, "sequence", False),
        *("none" if op == "attention_map" else "sum", False, False),
    )
    layer = flat(options.Layer(x["q"], x["k"]))
    given: tuple
    if op == "decode_step":
        ids, scores = torch.zeros(5, 8, dtype=torch.int64, device=device), torch.zeros(5, 8, device=device)
        outputs = (x["tokens"], ids, scores, scores.clone(), scores > 0.0)
        step = options.Step(
            *(options.Span(20, 28), MASK, "masked", how, options.Sampling("probability", 0.0, 0)),
            options.Selection("parallel", "confidence", 0.1, torch.inf, 0.0, 64, "product"),
        )
        layers = ([x["q"]] * 2, [x["k"]] * 2, [], [], [])
        given = (*outputs, *(None,) * 4, x["logits"], *layers, *masks, *flat(step), backend)
    else:
        shape = (5, 8) if op == "column_scores" else (5, 6, 8)
        given = (torch.zeros(shape, device=device), *layer, *masks, *flat(how), backend)
    results = torch.library.opcheck(getattr(torch.ops.attn_sampler, op).default, given)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", ["scores", "dense", "step"])
def test_the_direct_way_takes_pages(monkeypatch, name):
    """On the CPU nothing is checked in Python first."""
    x = inputs(torch.device("cpu"))
    if ops.direct("cpu", x["q"]) is None:
        pytest.skip("nothing takes calls before they are checked here")
    expected = calls(torch.device("cpu"), "cpu")[name](inputs(torch.device("cpu")))
    monkeypatch.setattr(options.Masks, "check_keys", None)
    assert torch.equal(calls(torch.device("cpu"), "cpu")[name](x), expected)
