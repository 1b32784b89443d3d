"""A capture scores what the model computed: thousands of random calls, PyTorch itself being the judge.

With the identity as its values, ``F.scaled_dot_product_attention`` returns the weights that it used. A seed
is one forward pass; ``python tests/decoder/test_capture_property.py SEED`` runs it alone. A plain run of the
tests takes the first few; ``-m long`` takes the thousands.
"""

from __future__ import annotations

import contextlib
import random
import re
import sys
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import CausalBias, CausalVariant, causal_lower_right, causal_upper_left

from attn_sampler import AttentionCapture, report_attention

INF = torch.inf
QUICK, ALL = 480, 20_000


@pytest.mark.parametrize(
    "seeds",
    [range(i, i + 120) for i in range(0, QUICK, 120)]
    + [pytest.param(range(i, i + 976), marks=pytest.mark.long) for i in range(QUICK, ALL, 976)],
    ids=lambda seeds: f"{seeds.start}-{seeds.stop - 1}",
)
def test_forward_passes(seeds: range) -> None:
    for seed in seeds:
        try:
            check(seed)
        except Exception as error:
            raise AssertionError(f"python tests/decoder/test_capture_property.py {seed}") from error


class Draw(NamedTuple):
    """One attention call."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Any
    causal: bool
    scale: float | None
    gqa: bool
    dropout: float

    def run(self) -> Tensor:
        options = {"dropout_p": self.dropout, "is_causal": self.causal, "scale": self.scale}
        return F.scaled_dot_product_attention(
            self.q, self.k, self.v, self.mask, **options, enable_gqa=self.gqa
        )


def check(seed: int) -> None:
    rng, generator = random.Random(f"pass {seed}"), torch.Generator().manual_seed(seed)
    way = rng.choices(("eager", "compiled", "reported"), (14, 1, 3))[0]
    low = rng.choice((torch.bfloat16, torch.float16))
    autocast = torch.autocast("cpu", dtype=low, enabled=way != "reported" and rng.random() < 0.2)
    grad = rng.choice((torch.no_grad, torch.enable_grad, torch.inference_mode))
    with grad(), autocast:
        draws = [draw(rng, generator)]
        for _ in range(rng.choice((0, 0, 1, 2))):  # layers of one mask, at times refilled between them
            draws.append(another(draws[0], rng, generator))
        if grad is torch.enable_grad and rng.random() < 0.5:
            draws = [d._replace(q=d.q.requires_grad_()) for d in draws]
        if way == "reported":
            draws = [d._replace(v=d.k) for d in draws]
        options = capture_options(rng, generator, draws[0])
        layers = rng.choice(("all", "all", slice(-1, None), [0], [-1]))
        chosen = {"all": draws, "[0]": draws[:1]}.get(str(layers), draws[-1:])
        capture = AttentionCapture(layers=layers, **options)
        refill = (
            way == "eager"
            and rng.random() < 0.2
            and not (options["keep"] or layers in ([-1], slice(-1, None)))
        )
        try:
            again = run(way, draws, contextlib.nullcontext(), refill)
        except RuntimeError as error:  # not every kernel of PyTorch takes a mask beside is_causal
            with pytest.raises(type(error), match=re.escape(str(error)[:40])):
                run(way, draws, capture, refill)
            return
        outputs = run(way, draws, capture, refill)
    for output, plain in zip(outputs, again, strict=True):
        torch.testing.assert_close(output, plain, rtol=0, atol=0, equal_nan=True)
    if any(output.isnan().any() for output in outputs):
        return  # PyTorch's kernels make NaN of a scale of 0 beside a mask
    reported = way == "reported"
    operands = [seen_by_torch(d, low if autocast._enabled else None) for d in chosen]
    if reported and any(is_shifted(d) for d in operands):
        with pytest.raises(NotImplementedError, match=r"attention call \d of .* its bias moves a row"):
            _ = capture.scores
        return
    expected, slack = 0.0, 0.0
    for d in operands:
        weights, counts, margin = weights_of(d, options, reported)
        expected, slack = (
            expected + reduced(weights, counts, options),
            slack + margin * d.q.shape[2] * d.q.shape[1],
        )
    # Its kernels for half precision take a quick exponential, whose sums are in the log-sum-exp.
    rtol = 1e-5 if operands[0].q.dtype in (torch.float32, torch.float64) else 2e-4
    scores = capture.scores
    assert scores.dtype == torch.float32
    assert scores.shape == expected.shape
    torch.testing.assert_close(scores.double(), expected, rtol=rtol, atol=slack + 1e-6, equal_nan=True)
    if options["keep"]:
        check_map(capture, operands, options, reported, rtol)


def run(way: str, draws: list[Draw], context: Any, refill: bool) -> list[Tensor]:
    """The outputs of a forward pass."""
    masks = [d.mask for d in draws]
    saved = [m.clone() if refill and type(m) is Tensor else m for m in masks]

    def forward() -> list[Tensor]:
        outputs = []
        for d, mask in zip(draws, saved, strict=True):
            if refill and type(mask) is Tensor:
                d.mask.copy_(mask)
            torch.manual_seed(1)
            outputs.append(d.run() if way != "reported" else reported_run(d))
        return outputs

    if way == "compiled":
        torch._dynamo.reset()
        forward = torch.compile(lambda: [d.run() for d in draws], backend="eager")
    torch.manual_seed(1)
    with context:
        return forward()


def reported_run(d: Draw) -> Tensor:
    _, logits = logits_of(d, torch.float64, True)
    q, k, v = d.q.detach(), d.k.detach(), d.v
    lse = torch.logsumexp(logits, dim=-1).float()
    batch, heads = torch.broadcast_shapes(q.shape[:1], k.shape[:1])[0], logits.shape[1]
    q, k = q.expand(batch, heads, -1, -1), k.expand(batch, -1, -1, -1)
    report_attention(q, k, lse.expand(batch, heads, -1), attn_mask=d.mask, is_causal=d.causal, scale=d.scale)
    return v


def draw(rng: random.Random, generator: torch.Generator) -> Draw:
    dtype = rng.choice((torch.float32,) * 3 + (torch.bfloat16, torch.float16, torch.float64))
    batch, kv, group = rng.choice((1, 2, 3)), rng.choice((1, 2, 3)), rng.choice((1, 1, 2, 3))
    m, n, d = (
        rng.choice((1, 2, 5, 8, 17, 33)),
        rng.choice((1, 2, 7, 8, 16, 33, 40)),
        rng.choice((1, 4, 8, 16, 24)),
    )
    n = rng.choice((n, m, m + 3))
    gqa = rng.random() < 0.5
    heads = kv * group if gqa else rng.choice((1, kv)) if rng.random() < 0.2 else kv
    kv = kv if gqa or rng.random() < 0.8 else rng.choice((1, heads))
    b_q, b_k, b_v = (batch if rng.random() < 0.9 else 1 for _ in range(3))
    if rng.random() < 0.04:
        b_q = b_k = b_v = 0
    kv = kv if heads in (1, kv) or kv == 1 or gqa else heads
    spread = rng.choice((1.0, 1.0, 3.0))
    q, k = (torch.randn(s, generator=generator) * spread for s in ((b_q, heads, m, d), (b_k, kv, n, d)))
    v = torch.randn((b_v, kv, n, rng.choice((d, d, 3))), generator=generator)
    q, k, v = (layout(rng, x.to(dtype)) for x in (q, k, v))
    out_batch, out_heads = max(b_q, b_k) if b_q and b_k else 0, max(heads, kv)
    mask, causal = draw_mask(rng, generator, (out_batch, out_heads, m, n), dtype)
    scale = rng.choice((None, None, 0.7, 0.0, -0.2, 1.5))
    return Draw(q, k, v, mask, causal, scale, gqa, rng.choice((0.0,) * 9 + (0.3,)))


def another(first: Draw, rng: random.Random, generator: torch.Generator) -> Draw:
    q, k = (torch.randn(x.shape, generator=generator).to(x.dtype) for x in (first.q, first.k))
    mask = first.mask
    if isinstance(mask, Tensor) and type(mask) is Tensor and rng.random() < 0.4:
        shuffled = mask.flatten()[torch.randperm(mask.numel(), generator=generator)]
        mask = shuffled.view(mask.shape)
    return first._replace(q=q, k=k, mask=mask)


def layout(rng: random.Random, x: Tensor) -> Tensor:
    return x if rng.random() < 0.7 else x.transpose(1, 2).contiguous().transpose(1, 2)


def draw_mask(
    rng: random.Random, generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[Any, bool]:
    m, n = shape[2:]
    causal = rng.random() < 0.25
    kind = rng.choices(("none", "bias object", "bool", "zeros", "bias"), (3, 1, 4, 4, 4))[0]
    if kind == "none":
        return None, causal
    if kind == "bias object":
        lower = rng.random() < 0.6 and m <= n  # PyTorch warns of NaN otherwise
        return (causal_lower_right if lower else causal_upper_left)(m, n), False
    rank = rng.choice((2, 4, 4, 4, 4, 3))
    axes = [s if rng.random() < 0.6 else 1 for s in shape]
    if rng.random() < 0.4:  # what most models pass: a padding mask
        axes = [shape[0], 1, 1, n]
    if axes[3] == 1 and rng.random() < 0.7:
        axes[3] = n
    axes = axes[4 - rank :]
    sees = torch.rand(axes, generator=generator) < rng.choice((0.5, 0.9))
    pattern = rng.random()
    if len(axes) == 4 and axes[2:] == [m, n] and pattern < 0.5:  # causal limits, windows, documents, padding
        row, key = torch.arange(m)[:, None] + rng.choice((0, n - m, 1, -1)), torch.arange(n)
        sees = (key <= row) if pattern < 0.3 else ((key - row).abs() <= rng.choice((0, 1, 4)))
        sees = sees.expand(axes)
        if rng.random() < 0.5:
            sees = sees & (key >= rng.randrange(n))
    elif pattern > 0.8 and axes[-1] == n:
        sees = (torch.arange(n) >= rng.randrange(n)).expand(axes)
    sees = sees.clone()
    if rng.random() < 0.2 and len(axes) > 1:
        sees[..., rng.randrange(axes[-2]), :] = False
    if rng.random() < 0.1:
        sees = sees.expand(shape) if rank == 4 and 0 not in shape else sees
    if kind == "bool":
        return sees, causal
    largest = torch.finfo(dtype).max
    amounts = [x for x in (1e4, 1e5, 1e9, 3e38, largest, largest, INF, INF) if x <= largest or x == INF]
    mask = torch.zeros(sees.shape, dtype=torch.float64)
    if kind == "bias":
        size = rng.choice((1.0, 30.0, 900.0, 1e5))
        mask = torch.randn(sees.shape, generator=generator).double() * size
        if rng.random() < 0.2:
            mask = mask + rng.choice((-1e9, 1e9, -3e4, 3e4))
        mask = mask.clamp(-largest, largest)
    if kind == "zeros" or rng.random() < 0.5:
        mask = mask.masked_fill(~sees, -rng.choice(amounts))
    return mask.to(dtype), causal


def capture_options(rng: random.Random, generator: torch.Generator, d: Draw) -> dict[str, Any]:
    m, n = d.q.shape[2], d.k.shape[2]
    lo = rng.randrange(n)
    columns = rng.choice((None, slice(lo, rng.randint(lo + 1, n)), slice(-rng.randint(1, n), None)))
    batch = output_shape(d)[0]
    query_mask = torch.rand((batch, m), generator=generator) < 0.6
    return {
        "columns": columns,
        "keep": rng.random() < 0.3,
        "query_mask": rng.choice((None, None, query_mask)),
        "query_start": rng.choice((None, None, 0, n - m, rng.randint(-3, n))),
        "softmax_scope": rng.choice(("sequence", "sequence", "block")),
        "diagonal": rng.random() < 0.7,
        "reduction": rng.choice(("sum", "sum", "mean", "max")),
    }


def output_shape(d: Draw) -> tuple[int, int]:
    """The batch and the heads of a call's output."""
    tensors = (d.q, d.k, d.v)
    empty = any(x.shape[0] == 0 for x in tensors)
    return 0 if empty else max(x.shape[0] for x in tensors), max(x.shape[1] for x in tensors)


def seen_by_torch(d: Draw, low: torch.dtype | None) -> Draw:
    """The operands after autocast, of the output's batch and heads."""

    def cast(x: Any) -> Any:
        lowered = low is not None and type(x) is Tensor and x.dtype not in (torch.bool, torch.float64)
        return x.to(low) if lowered else x

    batch, heads = output_shape(d)
    q, k, mask = cast(d.q.detach()), cast(d.k.detach()), cast(d.mask)
    return d._replace(q=q.expand(batch, heads, -1, -1), k=k.expand(batch, -1, -1, -1), mask=mask)


def lowest_of(dtype: torch.dtype) -> float:
    return torch.finfo(torch.float16 if dtype == torch.float16 else torch.bfloat16).min


def table_of(d: Draw, lowest_hides: bool) -> tuple[Tensor, Tensor]:
    """Which keys a row may see, and what is added, both [B | 1, H | 1, M, N]."""
    m, n = d.q.shape[2], d.k.shape[2]
    sees, bias = torch.ones(1, 1, m, n, dtype=torch.bool), torch.zeros(1, 1, m, n, dtype=torch.float64)
    if d.causal:
        sees = sees.tril()
    mask = d.mask
    if isinstance(mask, CausalBias):
        mask = mask._materialize()
    if mask is None:
        return sees, bias
    mask = mask[(None,) * (4 - mask.dim())]
    if mask.dtype == torch.bool:
        return sees & mask, bias
    bias = mask.double().expand(-1, -1, m, n)
    sees = sees & (bias > -INF)
    high = sees & (bias > lowest_of(mask.dtype))
    return (high if lowest_hides else torch.where(high.any(dim=-1, keepdim=True), high, sees)), bias


def logits_of(d: Draw, dtype: torch.dtype, lowest_hides: bool = False) -> tuple[Tensor, Tensor]:
    """Which keys a row may see, and the logits [B, H, M, N]."""
    sees, bias = table_of(d, lowest_hides)
    q, k = d.q.detach().to(dtype), d.k.detach().to(dtype)
    k = k.repeat_interleave(max(q.shape[1] // k.shape[1], 1), dim=1)
    scale = d.q.shape[3] ** -0.5 if d.scale is None else d.scale
    logits = scale * (q @ k.mT) + bias.masked_fill(~sees, 0.0).to(dtype)
    return sees.expand(logits.shape), logits.masked_fill(~sees, -INF)


def is_shifted(d: Draw) -> bool:
    if d.q.shape[0] == 0:
        return False
    sees, bias = table_of(d, True)
    top = bias.masked_fill(~sees, -INF).amax(dim=-1)
    return bool(((top.abs() > 1024) & (top > -INF)).any())


def weights_of(d: Draw, options: dict[str, Any], reported: bool) -> tuple[Tensor, Tensor, float]:
    """The weights [B, H, M, C] of the columns, which of them count, and what rounding may change."""
    m, n = d.q.shape[2], d.k.shape[2]
    lo, hi, _ = (options["columns"] or slice(None)).indices(n)
    sees, logits = logits_of(d, torch.float64, reported)
    rows = first_row(d, options) + torch.arange(m)
    # A row with an infinite bias has no weights: PyTorch's NaN stands at each key of it, hidden ones too.
    sees = sees | (logits == INF).any(dim=-1, keepdim=True)
    if options["softmax_scope"] == "block":
        inside = torch.zeros(n, dtype=torch.bool)
        inside[lo:hi] = True
        sees = sees & inside & ((rows >= lo) & (rows < hi))[:, None]
    if reported and options["softmax_scope"] == "sequence":
        weights = torch.softmax(logits, dim=-1).nan_to_num(0.0)
    else:
        weights = weights_that_torch_used(d, sees, options["softmax_scope"] == "block")
    if options["query_mask"] is not None:
        sees = sees & options["query_mask"][:, None, :, None]
    if not options["diagonal"]:
        sees = sees & (torch.arange(n) != rows[:, None])
    weights = weights.masked_fill(~sees, 0.0)
    finite = logits[logits.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    exact = torch.float64 if d.q.dtype == torch.float64 else torch.float32
    step = torch.finfo(exact).eps * largest  # by which logits of other rounding differ
    return weights[..., lo:hi], sees[..., lo:hi], 1e-6 + (4 * step if step < 0.1 else 0.0)


def weights_that_torch_used(d: Draw, sees: Tensor, block: bool) -> Tensor:
    """Of the same operands in the precision of its kernels, with the identity as the values."""
    dtype = torch.float64 if d.q.dtype == torch.float64 else torch.float32
    n = d.k.shape[2]
    q, k = d.q.to(dtype), d.k.to(dtype)
    eye = torch.eye(n, dtype=dtype).expand(q.shape[0], k.shape[1], n, n)
    _, bias = table_of(d, False)
    mask = bias.to(dtype)
    hidden = ~sees if block else ~table_of(d, False)[0]
    if not block:
        hidden = hidden & ~(bias > -INF) | ~causal_limit(d)
    mask = mask.expand(sees.shape).masked_fill(hidden.expand(sees.shape), -INF)
    grouped = k.shape[1] not in (1, q.shape[1])
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q, k, eye, mask, scale=d.scale, enable_gqa=grouped).double()


def causal_limit(d: Draw) -> Tensor:
    """What is hidden by other than a finite bias, [B | 1, H | 1, M, N]."""
    mask = d.mask
    if type(mask) is Tensor and mask.dtype != torch.bool:
        mask = None
    return table_of(d._replace(mask=mask), False)[0]


def first_row(d: Draw, options: dict[str, Any]) -> int:
    if (start := options["query_start"]) is not None:
        return start
    upper_left = isinstance(d.mask, CausalBias) and d.mask.variant == CausalVariant.UPPER_LEFT
    return 0 if d.causal or upper_left else d.k.shape[2] - d.q.shape[2]


def reduced(weights: Tensor, counts: Tensor, options: dict[str, Any]) -> Tensor:
    if options["reduction"] == "max":
        return F.pad(weights, (0, 0, 0, 1)).amax(dim=2).sum(dim=1)
    total = weights.sum(dim=2)
    return (total / counts.sum(dim=2).clamp(min=1) if options["reduction"] == "mean" else total).sum(dim=1)


def check_map(
    capture: AttentionCapture, draws: list[Draw], options: dict[str, Any], reported: bool, rtol: float
) -> None:
    total: Any = 0.0
    for d in draws:
        lo, hi, _ = (options["columns"] or slice(None)).indices(d.k.shape[2])
        first = lo - first_row(d, options)
        if not 0 <= first <= d.q.shape[2] - (hi - lo):
            with pytest.raises(ValueError, match="a map needs a query row at each"):
                _ = capture.attention_map
            return
        weights, _, margin = weights_of(d, options, reported)
        total = total + weights[:, :, first : first + hi - lo].sum(dim=1)
    expected = total / sum(d.q.shape[1] for d in draws)
    torch.testing.assert_close(capture.attention_map.double(), expected, rtol=rtol, atol=margin + 1e-6)


if __name__ == "__main__":
    check(int(sys.argv[1]))
