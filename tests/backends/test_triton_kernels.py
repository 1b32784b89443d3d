"""The Triton kernels against the reference in float64.

They run on the GPU where there is one, else in a place of their own, under ``TRITON_INTERPRET=1`` on CPU
tensors. There bfloat16 operands are widened to float32 on load, since the
interpreter has no bfloat16 arithmetic; what a GPU does with them shows on a GPU alone.
"""

from __future__ import annotations

import math
import random

import pytest
import torch
import triton
import triton.language as tl
from attn_sampler.kernels import attention, confidence, launch
from torch import Tensor

from attn_sampler import kernels, reference

pytestmark = [
    pytest.mark.slow,
    pytest.mark.places("triton", "triton@interpreter"),
    pytest.mark.usefixtures("backend"),
]

DEVICE = "cpu" if launch.INTERPRET else "cuda"
NAN, INF = math.nan, math.inf
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
needs_gpu = pytest.mark.skipif(launch.INTERPRET, reason="no GPU here: CUDA graphs need one")


@pytest.fixture(autouse=True)
def poisoned_workspaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every workspace starts as NaN (or a large count): what a kernel reads, it must have written."""
    allocate = launch.workspace

    def poisoned(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return allocate(like, *shape, dtype=dtype).fill_(NAN if dtype.is_floating_point else 0x7FFFFFF0)

    monkeypatch.setattr(launch, "workspace", poisoned)


@pytest.fixture
def many_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device large enough for every kind of split."""
    monkeypatch.setattr(launch, "processors", lambda device: 64)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout, surrounded by NaN."""
    if layout == "contiguous":
        return x.contiguous().to(DEVICE)
    if layout == "transposed":  # [B, H, M, D] out of [B, M, H, D]
        return x.transpose(1, 2).contiguous().to(DEVICE).transpose(1, 2)
    step = 2 if layout == "strided" else 1
    shape = [size + 3 for size in x.shape[:-1]] + [step * x.shape[-1] + 5]
    whole = torch.full(shape, NAN, dtype=x.dtype, device=DEVICE)
    inside = whole[tuple(slice(1, 1 + size) for size in x.shape[:-1])][..., 1 : 1 + step * x.shape[-1] : step]
    return inside.copy_(x)


LAYOUTS = ("contiguous", "transposed", "padded", "strided")


def assert_as_accurate(actual: Tensor, same_precision: Tensor, truth: Tensor, atol: float = 2e-6) -> None:
    """The error is at most twice that of plain PyTorch of that precision, plus atol at the result's scale."""
    actual, same_precision = actual.double().cpu(), same_precision.double().cpu()
    truth = truth.double().cpu()
    assert actual.shape == truth.shape
    torch.testing.assert_close(actual.isnan(), truth.isnan())
    scale = 1.0 + truth.nan_to_num(0.0, 0.0, 0.0).abs().amax().item() if truth.numel() else 1.0
    error = (actual - truth).nan_to_num(0.0).abs().amax().item() if truth.numel() else 0.0
    allowed = (same_precision - truth).nan_to_num(0.0).abs().amax().item() if truth.numel() else 0.0
    assert error <= 2.0 * allowed + atol * scale, f"error {error:.3e}, plain PyTorch {allowed:.3e}"


class Case:
    """A random attention problem."""

    def __init__(self, seed: int, **fixed: object) -> None:
        self.random = random.Random(seed)
        pick = self.random.choice
        values = {
            "batch": pick((1, 2, 3)),
            "kv_heads": pick((1, 2)),
            "group": pick((1, 1, 4, 7)),
            "n_rows": pick((1, 3, 7, 16, 33, 63)),
            "n_keys": pick((5, 16, 63, 113, 130)),
            "headdim": pick((3, 16, 40, 64, 80, 96, 128, 192, 256, 512)),
            "dtype": pick(DTYPES),
            "layout": pick(LAYOUTS),
            "scope": pick(("sequence", "sequence", "block")),
            "given_lse": pick((True, True, False)),
            "lse_base": pick(("e", "2")),
            "causal": pick((True, False)),
            "diagonal": pick((True, True, False)),
            "key_mask": pick((True, False)),
            "query_mask": pick((True, False)),
            "reduction": pick(("sum", "sum", "mean", "max")),
            "per_head": pick((True, False)),
            "accumulate": pick((True, False)),
            "scale": pick((None, None, 0.3, -0.2, 0.0)),
            "query_start": pick((None, None, 0, -4, 9)),
        }
        values.update(fixed)
        self.__dict__.update(values)
        g = generator(seed)
        heads = self.kv_heads * self.group
        self.q = laid_out(
            torch.randn(self.batch, heads, self.n_rows, self.headdim, generator=g).to(self.dtype), self.layout
        )
        k = torch.randn(self.batch, self.kv_heads, self.n_keys, self.headdim, generator=g)
        self.k = laid_out(k.to(self.dtype), self.random.choice(LAYOUTS))
        self.lo = self.random.randrange(self.n_keys)
        self.hi = self.random.randint(self.lo + 1, self.n_keys)
        if values.get("columns"):
            self.lo, self.hi = values["columns"]
        self.start = self.n_keys - self.n_rows if self.query_start is None else self.query_start
        self.scale = self.headdim**-0.5 if self.scale is None else self.scale
        self.keys = (
            (torch.rand(self.batch, self.n_keys, generator=g) < 0.7).to(DEVICE) if self.key_mask else None
        )
        self.rows = (
            (torch.rand(self.batch, 2 * self.n_rows, generator=g) < 0.6).to(DEVICE)[:, ::2]
            if self.query_mask
            else None
        )
        self.lse = None
        if self.given_lse and self.scope == "sequence":
            self.lse = self._softmax_lse()

    def _softmax_lse(self) -> Tensor:
        """As a forward attention gives it: float32, its own layout, rounded."""
        k = self.k.double().repeat_interleave(self.group, dim=1)
        logits = self.scale * (self.q.double() @ k.transpose(-1, -2))
        sees = torch.ones(self.n_rows, self.n_keys, dtype=torch.bool, device=DEVICE)
        if self.causal:
            sees = sees.tril(self.start)
        if self.keys is not None:
            sees = sees & self.keys[:, None, None, :]
        lse = logits.masked_fill(~sees, -INF).logsumexp(-1)
        if self.lse_base == "2":
            lse = lse / math.log(2.0)
        return lse.float().transpose(1, 2).contiguous().transpose(1, 2)

    @property
    def options(self) -> dict[str, object]:
        """Keywords of the reference."""
        return {
            "columns": slice(self.lo, self.hi),
            "softmax_lse": self.lse,
            "lse_base": self.lse_base,
            "softmax_scale": self.scale,
            "causal": self.causal,
            "key_mask": self.keys,
            "query_mask": self.rows,
            "query_start": self.start,
            "softmax_scope": self.scope,
            "diagonal": self.diagonal,
            "per_head": self.per_head,
        }

    def __repr__(self) -> str:
        return ", ".join(
            f"{k}={v}" for k, v in vars(self).items() if not isinstance(v, (Tensor, random.Random))
        )


def outputs(shape: tuple[int, ...], accumulate: bool) -> Tensor:
    """A strided output, NaN where it is to be overwritten and 0.5 where it is to be added to."""
    return torch.full((*shape[:-1], 2 * shape[-1]), 0.5 if accumulate else NAN, device=DEVICE)[..., ::2]


def column_scores(case: Case) -> Tensor:
    """What the kernels make of the case."""
    count = case.hi - case.lo
    shape = (case.batch, case.q.shape[1], count) if case.per_head else (case.batch, count)
    out = outputs(shape, case.accumulate)
    kernels.column_scores(
        out,
        case.q,
        case.k,
        case.lse,
        None,
        None,
        case.keys,
        case.rows,
        case.lo,
        case.hi,
        case.start,
        case.scale,
        case.lse_base,
        case.causal,
        case.scope,
        case.diagonal,
        case.reduction,
        case.per_head,
        case.accumulate,
    )
    return out


def check_column_scores(case: Case) -> Tensor:
    actual = column_scores(case)
    added = 0.5 if case.accumulate else 0.0
    plain = reference.column_scores(case.q, case.k, reduction=case.reduction, **case.options)
    truth = reference.column_scores(
        case.q.double(), case.k.double(), reduction=case.reduction, **case.options
    )
    assert_as_accurate(actual, plain + added, truth + added)
    return actual


def attention_map(case: Case, first: int, last: int) -> Tensor:
    count = case.hi - case.lo
    shape = (case.batch, last - first, count)
    if case.per_head:
        shape = (case.batch, case.q.shape[1], last - first, count)
    out = outputs(shape, case.accumulate)
    kernels.attention_map(
        out,
        case.q,
        case.k,
        case.lse,
        None,
        None,
        case.keys,
        case.rows,
        first,
        last,
        case.lo,
        case.hi,
        case.start,
        case.scale,
        case.lse_base,
        case.causal,
        case.scope,
        case.diagonal,
        case.per_head,
        case.accumulate,
    )
    return out


def check_attention_map(case: Case) -> Tensor:
    first = case.random.randrange(case.n_rows)
    last = case.random.randint(first + 1, case.n_rows)
    actual = attention_map(case, first, last)
    added = 0.5 if case.accumulate else 0.0
    plain = reference.attention_map(case.q, case.k, rows=slice(first, last), **case.options)
    truth = reference.attention_map(case.q.double(), case.k.double(), rows=slice(first, last), **case.options)
    assert_as_accurate(actual, plain + added, truth + added)
    return actual


@pytest.mark.parametrize("seed", range(48))
def test_column_scores(seed: int) -> None:
    check_column_scores(Case(seed))


@pytest.mark.parametrize("seed", range(100, 124))
def test_attention_map(seed: int) -> None:
    check_attention_map(Case(seed))


SPLIT_CASES = {
    "rows": {"kv_heads": 1, "group": 1, "n_rows": 700, "n_keys": 720, "columns": (600, 613)},
    "rows of packed heads": {"kv_heads": 1, "group": 7, "n_rows": 65, "n_keys": 70, "columns": (3, 40)},
    "heads": {"kv_heads": 6, "group": 1, "n_rows": 20, "n_keys": 70, "columns": (3, 40)},
    "keys": {
        "kv_heads": 2,
        "group": 1,
        "n_rows": 4,
        "n_keys": 600,
        "columns": (590, 600),
        "given_lse": False,
    },
    "many columns": {"kv_heads": 1, "group": 2, "n_rows": 40, "n_keys": 200, "columns": (0, 200)},
    "block beyond one tile": {
        "kv_heads": 1,
        "group": 1,
        "n_rows": 160,
        "n_keys": 200,
        "columns": (20, 170),
        "scope": "block",
    },
}


@pytest.mark.usefixtures("many_processors")
@pytest.mark.parametrize("reduction", ["sum", "mean", "max"])
@pytest.mark.parametrize("name", SPLIT_CASES)
def test_splits_combine(name: str, reduction: str) -> None:
    fixed = {
        "batch": 1,
        "headdim": 16,
        "scope": "sequence",
        "given_lse": True,
        "per_head": False,
        "scale": None,
        "query_start": None,
        "reduction": reduction,
        **SPLIT_CASES[name],
    }
    for seed in (1, 2):
        check_column_scores(Case(seed, **fixed))


@pytest.mark.usefixtures("many_processors")
def test_map_heads_combine() -> None:
    for seed in (1, 2):
        check_attention_map(Case(seed, kv_heads=2, group=4, n_rows=16, n_keys=40, headdim=32, per_head=False))


@pytest.mark.usefixtures("many_processors")
@pytest.mark.parametrize("reduction", ["sum", "max"])
def test_same_bits_every_run(reduction: str) -> None:
    case = Case(3, batch=2, kv_heads=2, group=2, n_rows=130, n_keys=140, headdim=16, reduction=reduction)
    first = column_scores(case)
    for _ in range(3 if launch.INTERPRET else 20):
        assert torch.equal(column_scores(case).nan_to_num(), first.nan_to_num())


def test_cost_is_bounded_by_the_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the log-sum-exp given, keys outside the columns are not read, and one launch does it."""
    case = Case(5, scope="sequence", given_lse=True, key_mask=False, columns=(30, 41), n_keys=63, headdim=64)
    expected = column_scores(case)
    case.k[:, :, :30], case.k[:, :, 41:] = NAN, NAN
    names = count_launches(monkeypatch)
    assert torch.equal(column_scores(case), expected)
    assert names == ["column_scores_kernel"]


def count_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched from now on."""
    names: list[str] = []
    start = launch.launch

    def counted(kernel, *args, **kwargs):  # type: ignore[no-untyped-def]
        names.append(kernel.__name__)
        start(kernel, *args, **kwargs)

    monkeypatch.setattr(launch, "launch", counted)
    return names


@pytest.mark.parametrize("given_lse", [True, False])
@pytest.mark.parametrize("reduction", ["sum", "mean", "max"])
def test_masked_entries_are_never_seen(reduction: str, given_lse: bool) -> None:
    """NaN in masked keys and rows, whatever their log-sum-exp, contributes exactly nothing."""
    case = Case(
        11,
        batch=2,
        n_rows=16,
        n_keys=63,
        headdim=40,
        scope="sequence",
        given_lse=given_lse,
        key_mask=True,
        query_mask=True,
        reduction=reduction,
        accumulate=False,
        scale=None,
    )
    case.rows[1] = False  # a sequence without a row
    clean = column_scores(case)
    assert not clean.isnan().any()
    assert not clean[1].any()
    case.k.masked_fill_(~case.keys[:, None, :, None], NAN)
    case.q.masked_fill_(~case.rows[:, None, :, None], NAN)
    if case.lse is not None:
        case.lse.masked_fill_(~case.rows[:, None, :], NAN)
    assert torch.equal(column_scores(case), clean)


@pytest.mark.parametrize("given_lse", [True, False])
@pytest.mark.parametrize("reduction", ["sum", "max"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_visible_nan_and_infinity(value: float, reduction: str, given_lse: bool) -> None:
    case = Case(
        12,
        batch=2,
        kv_heads=1,
        group=2,
        n_rows=16,
        n_keys=63,
        headdim=40,
        dtype=torch.float32,
        scope="sequence",
        given_lse=given_lse,
        causal=True,
        diagonal=True,
        key_mask=False,
        query_mask=False,
        reduction=reduction,
        accumulate=False,
        query_start=None,
        columns=(40, 60),
        scale=None,
    )
    case.k[0, 0, 50, 3] = value  # one of the columns
    case.k[1, 0, 10, 3] = value  # a key outside them
    actual = column_scores(case)
    expected = reference.column_scores(case.q, case.k, reduction=reduction, **case.options)
    assert not expected.isfinite().all()
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-5, atol=1e-6)


def test_rows_without_a_log_sum_exp_contribute_nothing() -> None:
    case = Case(13, scope="sequence", given_lse=True, key_mask=False, query_mask=False, accumulate=False)
    case.lse.fill_(-INF)
    assert not column_scores(case).any()
    assert not attention_map(case, 0, case.n_rows).any()


def test_no_rows_and_no_sequences() -> None:
    for batch, rows in ((2, 0), (0, 5)):
        q = torch.zeros(batch, 2, rows, 16, device=DEVICE)
        k = torch.zeros(batch, 2, 20, 16, device=DEVICE)
        out = torch.full((batch, 4), NAN, device=DEVICE)
        kernels.column_scores(
            out, q, k, *[None] * 5, 3, 7, 0, 1.0, "e", False, "sequence", True, "sum", False, False
        )
        assert out.numel() == batch * 4
        assert not out.any()


def test_offsets_beyond_32_bits() -> None:
    """Rows and keys over 2**31 elements apart."""
    far = (1 << 30) + 8
    memory = torch.empty(2 * far + 64, dtype=torch.float16, device=DEVICE)
    near = torch.randn(1, 1, 3, 32, generator=generator(0)).half().to(DEVICE)
    x = memory.as_strided((1, 1, 3, 32), (far, far, far, 1))
    x.copy_(near)
    outs = []
    for tensor in (near, x):
        out = torch.full((1, 3), NAN, device=DEVICE)
        kernels.column_scores(
            out,
            tensor,
            tensor,
            *[None] * 5,
            0,
            3,
            0,
            0.2,
            "e",
            False,
            "sequence",
            True,
            "sum",
            False,
            False,
        )
        outs.append(out)
    assert torch.equal(*outs)


def token_confidence(logits: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    """What the kernels make of the logits."""
    token_ids = torch.full(logits.shape[:2], -7, dtype=torch.int64, device=DEVICE)
    value = torch.full(logits.shape[:2], -7.0, device=DEVICE)
    seed = options.get("seed", 0)
    exclude = options.get("exclude_token_id")
    kernels.token_confidence(
        token_ids,
        value,
        logits,
        seed if isinstance(seed, Tensor) else None,
        options.get("metric", "probability"),
        options.get("temperature", 0.0),
        0 if isinstance(seed, Tensor) else seed,
        -1 if exclude is None else exclude,
        options.get("vocab_start", 0),
    )
    return token_ids, value


def random_logits(seed: int) -> tuple[Tensor, dict[str, object]]:
    pick = random.Random(seed).choice
    g = generator(seed)
    shape = (pick((1, 2, 3)), pick((1, 4, 7)), pick((1, 2, 5, 63, 500, 1030, 4099, 9001)))
    dtype = pick(DTYPES)
    logits = torch.randn(shape, generator=g) * pick((1.0, 4.0, 12.0))
    if pick((True, False)):  # coarse values: many ties
        logits = logits.round()
    special = pick((None, NAN, INF, -INF))
    if special is not None:
        logits.masked_fill_(torch.rand(shape, generator=g) < pick((0.001, 0.2, 1.0)), special)
    layout = pick(("contiguous", "padded", "strided"))
    options: dict[str, object] = {
        "metric": pick(("probability", "margin", "entropy")),
        "temperature": pick((0.0, 0.0, 1.0, 0.7, 1e-3)),
        "seed": pick((0, 1, -3, 2**40 + 5)),
    }
    if shape[2] > 1 and pick((True, False)):
        options["exclude_token_id"] = int(pick((0, shape[2] - 1, shape[2] // 2)))
    if pick((True, False)):
        seeds = torch.randint(-(2**62), 2**62, (2 * shape[0],), generator=g)
        options["seed"] = seeds.to(DEVICE)[::2]
    return laid_out(logits.to(dtype), layout), options


@pytest.mark.usefixtures("many_processors")
@pytest.mark.parametrize("seed", range(60))
def test_token_confidence(seed: int) -> None:
    logits, options = random_logits(seed)
    token_ids, value = token_confidence(logits, **options)
    expected_ids, plain = reference.token_confidence(logits, **options)
    assert torch.equal(token_ids, expected_ids)
    exact = torch.softmax(masked_logits(logits, options).double(), -1)
    assert_as_accurate(value, plain, metric_of(exact, token_ids, options))


def masked_logits(logits: Tensor, options: dict[str, object]) -> Tensor:
    exclude = options.get("exclude_token_id")
    x = logits.double()
    if exclude is not None:
        x[..., exclude] = -INF
    return x


def metric_of(p: Tensor, token_ids: Tensor, options: dict[str, object]) -> Tensor:
    """The metric of given probabilities, in their precision."""
    if options["metric"] == "entropy":
        return torch.special.xlogy(p, p).sum(-1)
    chosen = p.gather(-1, token_ids[..., None])[..., 0]
    if options["metric"] == "margin":
        others = p.scatter(-1, token_ids[..., None], 0.0).amax(-1)
        return chosen - others
    return chosen


@pytest.mark.usefixtures("many_processors")
def test_one_token_stands_out() -> None:
    """The winner in every lane, at the edge of every tile, and tied with a later one."""
    vocab = 9001
    places = [0, 1, 3, 1023, 1024, 4095, 4096, 8191, 8192, 9000]
    logits = torch.zeros(1, len(places), vocab, device=DEVICE)
    for row, place in enumerate(places):
        logits[0, row, place] = 3.0
        logits[0, row, -1] = 3.0
    token_ids, value = token_confidence(logits, metric="margin")
    assert token_ids.tolist() == [places]
    assert value[0, :-1].abs().max() == 0.0  # tied
    assert value[0, -1] > 0.0


@triton.jit
def _noise_kernel(out, seeds, position, GROUPS: tl.constexpr):
    group = tl.arange(0, 4)[:, None] * (GROUPS // 4) + tl.arange(0, GROUPS // 4)[None, :]
    noise = confidence._gumbel_noise(tl.load(seeds), position, group)
    token = tl.arange(0, 4)[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
    tl.store(out + token, noise)


def test_noise_is_equal_to_the_last_bit() -> None:
    for seed in (0, 1, -1, 2**63 - 1, 123456789123):
        out = torch.full((4 * 1024,), NAN, device=DEVICE)
        row_seed = torch.tensor([seed], device=DEVICE)
        launch.launch(
            _noise_kernel,
            1,
            (out, row_seed, 5),
            {"GROUPS": 1024},
            launch.Config(1, 1, 4, 1),
            device=out.device,
            fuse_multiply_add=False,
        )
        expected = reference.gumbel_noise((1, 6, 4 * 1024), seed, torch.device(DEVICE))[0, 5]
        assert torch.equal(out.view(torch.int32), expected.contiguous().view(torch.int32))


@pytest.mark.usefixtures("many_processors")
@pytest.mark.parametrize("start", [0, 1, 1202, 1203, 2**31, 2**34 - 4096])
def test_a_vocabulary_shard(start: int) -> None:
    """Its noise is that of its place in the whole vocabulary, in splits of whole tiles too."""
    logits = (3.0 * torch.randn(1, 2, 4096, generator=generator(4))).to(DEVICE)
    options = {"metric": "margin", "temperature": 0.8, "seed": 9, "exclude_token_id": 1500}
    token_ids, value = token_confidence(logits, vocab_start=start, **options)
    expected_ids, expected = reference.token_confidence(logits, vocab_start=start, **options)
    assert torch.equal(token_ids, expected_ids)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


def random_selection(seed: int) -> tuple[Tensor, Tensor, Tensor, dict[str, object]]:
    """Scores and confidence full of ties, NaN and infinities."""
    pick = random.Random(seed).choice
    g = generator(seed)
    shape = (pick((1, 3, 5)), pick((1, 2, 7, 32, 100, 1500)))
    choices = torch.tensor([0.0, -0.0, 0.25, 0.9, 0.95, 1.0, NAN, INF, -INF][: pick((4, 6, 7, 9))])
    scores, conf = (choices[torch.randint(len(choices), shape, generator=g)] for _ in range(2))
    if pick((True, False)):
        scores = torch.rand(shape, generator=g)
    masked = torch.rand(shape, generator=g) < pick((0.0, 0.1, 0.5, 1.0))
    options = {
        "policy": pick(("parallel", "parallel", "sequential")),
        "tau": pick((0.0, 0.25, 0.9, 1.0)),
        "fallback": pick(("confidence", "score")),
    }
    return scores.to(DEVICE), conf.to(DEVICE), masked.to(DEVICE), options


@pytest.mark.parametrize("seed", range(60))
def test_select_tokens(seed: int) -> None:
    scores, conf, masked, options = random_selection(seed)
    if seed % 2:  # columns of wider tensors
        scores, conf, masked = (torch.stack([x, x], -1)[..., 0] for x in (scores, conf, masked))
    selected = torch.ones(masked.shape, dtype=torch.bool, device=DEVICE)
    kernels.select_tokens(
        selected, scores, conf, masked, options["policy"], options["tau"], options["fallback"]
    )
    assert torch.equal(selected, reference.select_tokens(scores, conf, masked, **options))


class Step:
    """A random decoding step: layers of differing layouts, and heads where ``same`` is false."""

    def __init__(self, seed: int, *, same: bool, layers: int | None = None) -> None:
        self.random = random.Random(seed)
        pick = self.random.choice
        g = generator(seed)
        self.batch, self.count = pick((1, 2, 3)), pick((1, 4, 8, 37))
        n_rows, self.headdim = pick((self.count, 50)), pick((16, 48))
        self.n_keys, n_tokens = 70, 90
        dtype = pick(DTYPES)
        self.q, self.k = [], []
        for _ in range(layers or pick((1, 2, 5))):
            kv_heads, group = (2, 2) if same else pick(((1, 1), (1, 4), (2, 2), (4, 2)))
            layout = "transposed" if same else pick(LAYOUTS)
            q = torch.randn(self.batch, kv_heads * group, n_rows, self.headdim, generator=g)
            k = torch.randn(self.batch, kv_heads, self.n_keys, self.headdim, generator=g)
            self.q.append(laid_out(q.to(dtype), layout))
            self.k.append(laid_out(k.to(dtype), layout))
        self.mask_token_id, self.vocab = 5, pick((7, 300))
        self.block_start = pick((0, 20, 53))
        self.column_start = self.random.randint(0, self.n_keys - self.count)
        # The rows stand at tokens from here on: all of them inside.
        self.query_start = self.column_start - self.block_start + pick((0, 20, 40))
        tokens = torch.randint(0, self.vocab, (self.batch, n_tokens), generator=g)
        tokens[torch.rand(tokens.shape, generator=g) < 0.5] = self.mask_token_id
        tokens[0, self.block_start : self.block_start + self.count] = pick((self.mask_token_id, 2))
        self.tokens = tokens.to(DEVICE)
        sharpness = pick((1.0, 20.0))
        logits = sharpness * torch.randn(self.batch, self.count, self.vocab, generator=g)
        self.logits = laid_out(logits.to(dtype), pick(("contiguous", "strided")))
        self.keys = (
            (torch.rand(self.batch, self.n_keys, generator=g) < 0.8).to(DEVICE)
            if pick((True, False))
            else None
        )
        self.rows = (
            (torch.rand(self.batch, n_rows, generator=g) < 0.8).to(DEVICE) if pick((True, False)) else None
        )
        self.masked_rows_only = pick((True, False))
        self.scope = pick(("sequence", "sequence", "block"))
        self.lse: list[Tensor] = []
        if self.scope == "sequence" and pick((True, False)):
            self.lse = [torch.randn(x.shape[:3], generator=g).to(DEVICE) + 3.0 for x in self.q]
        self.lse_base = pick(("e", "2"))
        self.causal, self.diagonal = pick((True, False)), pick((True, False))
        self.reduction = pick(("sum", "mean", "max"))
        self.metric = pick(("probability", "margin", "entropy"))
        self.temperature, self.seed = pick((0.0, 0.9)), pick((3, -4))
        self.policy, self.fallback = (
            pick(("parallel", "parallel", "sequential")),
            pick(("confidence", "score")),
        )
        self.tau = pick((0.0, 0.5, 0.9))

    def run(self, scores: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """tokens, token_ids, confidence, scores, selected, by the kernels."""
        shape = (self.batch, self.count)
        tokens = torch.stack([self.tokens, self.tokens], -1)[..., 0]
        with_layers = scores is None
        if scores is None:
            scores = torch.full(shape, NAN, device=DEVICE)
        token_ids = torch.full(shape, -7, dtype=torch.int64, device=DEVICE)
        value = torch.full(shape, NAN, device=DEVICE)
        selected = torch.ones(shape, dtype=torch.bool, device=DEVICE)
        kernels.decode_step(
            tokens,
            scores,
            token_ids,
            value,
            selected,
            self.logits,
            self.q if with_layers else [],
            self.k if with_layers else [],
            self.lse if with_layers else [],
            [],
            [],
            self.keys,
            self.rows,
            None,
            self.block_start,
            self.block_start + self.count,
            self.mask_token_id,
            self.masked_rows_only,
            self.column_start,
            self.column_start + self.count,
            self.query_start,
            None,
            self.lse_base,
            self.causal,
            self.scope,
            self.diagonal,
            self.reduction,
            self.metric,
            self.temperature,
            self.seed,
            self.policy,
            self.tau,
            self.fallback,
        )
        return tokens, token_ids, value, scores, selected

    def expected(self, dtype: torch.dtype, scores: Tensor | None = None) -> reference.StepResult:
        lse = self.lse or [None] * len(self.q)
        layers = [(q.to(dtype), k.to(dtype), e) for q, k, e in zip(self.q, self.k, lse, strict=True)]
        return reference.decode_step(
            self.tokens.clone(),
            self.logits,
            layers if scores is None else scores,
            block=slice(self.block_start, self.block_start + self.count),
            mask_token_id=self.mask_token_id,
            policy=self.policy,
            tau=self.tau,
            fallback=self.fallback,
            metric=self.metric,
            temperature=self.temperature,
            seed=self.seed,
            rows="masked" if self.masked_rows_only else "all",
            columns=slice(self.column_start, self.column_start + self.count),
            query_mask=self.rows,
            query_start=self.query_start,
            lse_base=self.lse_base,
            causal=self.causal,
            key_mask=self.keys,
            softmax_scope=self.scope,
            diagonal=self.diagonal,
            reduction=self.reduction,
        )

    def check(self, result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]) -> None:
        tokens, token_ids, value, scores, selected = result
        plain, truth = self.expected(self.q[0].dtype), self.expected(torch.float64)
        assert_as_accurate(scores, plain.scores, truth.scores, atol=2e-6 * len(self.q))
        self.check_commit(tokens, token_ids, value, scores, selected)

    def check_commit(
        self, tokens: Tensor, token_ids: Tensor, value: Tensor, scores: Tensor, selected: Tensor
    ) -> None:
        """Given its own scores and confidence, the step is the reference's to the last bit."""
        block = slice(self.block_start, self.block_start + self.count)
        expected_ids, expected_value = reference.token_confidence(
            self.logits,
            metric=self.metric,
            temperature=self.temperature,
            seed=self.seed,
            exclude_token_id=self.mask_token_id,
        )
        assert torch.equal(token_ids, expected_ids)
        torch.testing.assert_close(value, expected_value, rtol=2e-5, atol=2e-6, equal_nan=True)
        masked = self.tokens[:, block] == self.mask_token_id
        assert torch.equal(
            selected,
            reference.select_tokens(
                scores, value, masked, policy=self.policy, tau=self.tau, fallback=self.fallback
            ),
        )
        committed = self.tokens.clone()
        committed[:, block] = torch.where(selected, token_ids, committed[:, block])
        assert torch.equal(tokens, committed)


@pytest.mark.usefixtures("many_processors")
@pytest.mark.parametrize("seed", range(32))
def test_decode_step(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(seed, same=seed % 2 == 0)
    names = count_launches(monkeypatch)
    step.check(step.run())
    assert names[0] == "_token_partials_kernel"
    assert names[-1] == "column_scores_kernel"
    assert len(names) == len(set(names)) <= 3


@pytest.mark.parametrize("seed", range(32, 38))
def test_decode_step_finished_in_a_launch_of_its_own(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "last_program_commits", lambda device: False)
    step = Step(seed, same=True)
    names = count_launches(monkeypatch)
    step.check(step.run())
    assert names[-2:] == ["column_scores_kernel", "commit_kernel"]


@pytest.mark.parametrize("seed", range(40, 48))
def test_decode_step_of_given_scores(seed: int) -> None:
    step = Step(seed, same=True)
    scores = torch.rand(step.batch, step.count, generator=generator(seed)).to(DEVICE)
    given = scores.clone()
    step.check_commit(*step.run(scores))
    assert torch.equal(scores, given)


@pytest.mark.usefixtures("many_processors")
def test_many_layers_take_no_more_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(50, same=True, layers=24 if launch.INTERPRET else attention.MAX_LAYERS)
    names = count_launches(monkeypatch)
    step.check(step.run())
    assert len(names) <= 3


def test_decode_step_same_bits_every_run() -> None:
    step = Step(51, same=False)
    first = step.run()
    for _ in range(2 if launch.INTERPRET else 20):
        for a, b in zip(step.run(), first, strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())


@needs_gpu
def test_captured_step_replays_with_changed_inputs() -> None:
    """A graph of the step, replayed after its inputs changed, does what an eager step does."""
    step = Step(52, same=True)
    step.lse = [torch.randn(x.shape[:3], device=DEVICE) + 3.0 for x in step.q]
    step.scope = "sequence"
    step.run()  # compiled before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step.run()
    for seed in range(3):
        g = torch.Generator(DEVICE).manual_seed(seed)
        for x in (*step.q, *step.k, step.logits):
            x.copy_(torch.randn(x.shape, generator=g, device=DEVICE))
        graph.replay()
        graph.replay()  # a replay leaves nothing behind that the next one trips over
        for a, b in zip(captured, step.run(), strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_problems_are_named() -> None:
    q = torch.zeros(1, 1, 2, 16, device=DEVICE)
    assert kernels.problem("column_scores", ()) is None
    assert kernels.problem("column_scores", (q, q)) is None
    wide = torch.zeros(1, 1, 2, 520, device=DEVICE)
    assert kernels.problem("column_scores", (wide, wide)) == (
        "it serves head dimensions up to 512, and this one is 520"
    )
    assert "float64" in kernels.problem("attention_map", (q.double(), q.double()))
    logits = torch.zeros(1, 2, 9, device=DEVICE)
    assert kernels.problem("decode_step", (logits, *[q] * 256)) is None
    assert kernels.problem("decode_step", (logits, *[q] * 258)) == (
        "it serves up to 128 layers in a step, and these are 129"
    )
    on_meta = torch.zeros(1, 2, 9, device="meta")
    assert kernels.problem("token_confidence", (on_meta,)) == ("it takes cuda tensors, and these are on meta")


def test_chunks_of_the_head_dimension_cover_it_with_little_padding() -> None:
    for headdim in range(1, attention.MAX_HEADDIM + 1):
        for size in (2, 4):
            block = launch.block_d(headdim, size)
            padded = math.ceil(headdim / block) * block
            assert headdim <= padded < headdim + 64
    assert [launch.block_d(d, 2) for d in (64, 96, 128, 192, 256, 512)] == [64, 32, 128, 64, 128, 128]
