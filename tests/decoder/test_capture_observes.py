"""The observer never breaks the observed: what cannot be scored runs as without it, and reading raises."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from capture_cases import COLUMNS, by_hand, nothing_is_left, qkv
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from attn_sampler import AttentionCapture, column_scores, report_attention

attend = F.scaled_dot_product_attention


class Marked(Tensor):
    """A subclass that PyTorch's attention serves."""


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def jagged() -> Tensor:
    parts = [random(5, 2, 16), random(3, 2, 16)]
    return torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)


# name -> the call, and why it cannot be scored
UNSCORED: dict[str, tuple[Callable[[], Tensor], str]] = {
    "jagged": (lambda: attend(*[jagged()] * 3), "query is a NestedTensor"),
    "nested": (
        lambda: attend(*[torch.nested.nested_tensor([random(2, 5, 16), random(2, 3, 16)])] * 3),
        "query is nested",
    ),
    "vmap": (lambda: torch.vmap(attend)(*[random(3, 1, 2, 6, 16)] * 3), "query stands for other tensors"),
    "grad": (
        lambda: torch.func.grad(lambda q: attend(q, q, q).sum())(random(1, 2, 6, 16)),
        "query stands for other tensors",
    ),
    "3-D": (lambda: attend(*[random(2, 6, 16)] * 3), r"query is expected to be \[B, H, M, D\]"),
    "5-D": (lambda: attend(*[random(2, 1, 2, 6, 16)] * 3), r"and is \[2, 1, 2, 6, 16\]"),
    "subclass": (lambda: attend(*[random(1, 2, 6, 16).as_subclass(Marked)] * 3), "query is a Marked"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", UNSCORED)
def test_what_cannot_be_scored_runs(name: str) -> None:
    call, reason = UNSCORED[name]
    plain = call()
    with AttentionCapture() as capture:
        attend(*[random(1, 2, 6, 16)] * 3)
        output = call()
    assert type(output) is type(plain)
    same = zip(output.unbind(), plain.unbind(), strict=True) if plain.is_nested else [(output, plain)]
    assert all(torch.equal(a, b) for a, b in same)
    assert capture.num_calls == 2
    with pytest.raises(
        Exception, match=rf"attention call 1 of the forward pass cannot be scored: .*{reason}"
    ):
        _ = capture.scores
    with AttentionCapture(layers=[0]) as chosen:  # the call is left out
        attend(*[random(1, 2, 6, 16)] * 3)
        call()
    q = random(1, 2, 6, 16)
    torch.testing.assert_close(chosen.scores, column_scores(q, q))
    assert nothing_is_left()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", ["jagged", "vmap", "3-D", "5-D", "subclass"])
def test_what_cannot_be_scored_compiles(name: str) -> None:
    call, reason = UNSCORED[name]
    inputs = {
        "jagged": jagged(),
        "vmap": random(3, 1, 2, 6, 16),
        "subclass": random(1, 2, 6, 16).as_subclass(Marked),
    }
    x = inputs.get(name, random(2, 6, 16) if name == "3-D" else random(2, 1, 2, 6, 16))

    def model(x: Tensor) -> Tensor:
        return torch.vmap(attend)(x, x, x) if name == "vmap" else attend(x, x, x)

    outputs = []
    for context in (contextlib.nullcontext(), AttentionCapture()):
        torch._dynamo.reset()
        with torch.no_grad(), context:
            outputs.append(torch.compile(model, backend="eager")(x))
    plain, output = outputs
    same = zip(output.unbind(), plain.unbind(), strict=True) if plain.is_nested else [(output, plain)]
    assert all(torch.equal(a, b) for a, b in same)
    assert call is not None
    with pytest.raises(
        Exception, match=rf"attention call 0 of the forward pass cannot be scored: .*{reason}"
    ):
        _ = context.scores


def test_an_attention_without_a_log_sum_exp_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    capture = AttentionCapture()
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, *_, **__: q + 0)
    q, k, v = qkv()
    with capture:
        assert torch.equal(capture.__torch_function__(attend, (), (q, k, v)), q)
    with pytest.raises(NotImplementedError, match=r"call 0 .* gives no log-sum-exp on cpu"):
        _ = capture.scores


def test_broadcast_and_empty_batches() -> None:
    for q, k in ((random(1, 2, 4, 16), random(3, 2, 6, 16)), (random(3, 2, 4, 16), random(1, 2, 6, 16))):
        with AttentionCapture() as capture:
            attend(q, k, k)
        expected = column_scores(q.expand(3, -1, -1, -1), k.expand(3, -1, -1, -1))
        torch.testing.assert_close(capture.scores, expected)
    empty = random(0, 2, 8, 16)
    with AttentionCapture(keep=True) as capture:
        assert attend(empty, empty, empty).shape == empty.shape
    assert capture.scores.shape == (0, 8)
    with AttentionCapture() as capture:
        assert attend(empty[:, :1], empty, empty).shape[1] == 1  # where another batch has the 2 of the keys
    assert capture.scores.shape == (0, 8)
    with AttentionCapture() as capture:
        assert not attend(random(1, 2, 8, 16), *[random(1, 2, 0, 16)] * 2).any()
    with pytest.raises(ValueError, match=r"call 0 .* columns: expected at least one of the 0 key positions"):
        _ = capture.scores


def test_layers_of_different_numbers_of_keys() -> None:
    q, k, image = random(1, 2, 4, 16), random(1, 2, 12, 16), random(1, 2, 14, 16)
    for keep in (False, True):
        with AttentionCapture(slice(8, 12), keep=keep) as capture:
            attend(q, k, k)
            attend(q, image, image)
            attend(q, k, k)
        with pytest.raises(ValueError, match=r"layers: .* call 0 has 12 and call 1 has 14"):
            _ = capture.scores
    with AttentionCapture(slice(-4, None)) as capture:  # counted from the end
        attend(q, k, k)
        attend(q, image, image)
    last = column_scores(q, k, columns=slice(8, 12)) + column_scores(q, image, columns=slice(10, 14))
    torch.testing.assert_close(capture.scores, last)
    for layers in ([0, 2], slice(None, None, 2), [0, -1]):
        with AttentionCapture(slice(8, 12), layers) as capture:
            attend(q, k, k)
            attend(q, image, image)
            attend(q, k, k)
        torch.testing.assert_close(capture.scores, 2 * column_scores(q, k, columns=slice(8, 12)))


@pytest.mark.parametrize("spelling", ["-inf", "lowest", "bfloat16's lowest", "bool"])
def test_a_mask_is_a_mask_in_every_spelling(spelling: str) -> None:
    """It goes to the kernels, is kept, and gives the same scores as in booleans."""
    q, k, v = qkv()
    sees = torch.rand(2, 1, 1, 13, generator=torch.Generator().manual_seed(3)) > 0.3
    causal = torch.ones(13, 13, dtype=torch.bool).tril()
    hidden = {"-inf": -torch.inf, "lowest": torch.finfo(torch.float32).min}.get(
        spelling, torch.finfo(torch.bfloat16).min
    )
    window = causal & ~causal.tril(-4)
    for visible in (sees, causal, sees & causal, window, window | window.mT, causal.tril(3), causal.triu(-3)):
        if visible.shape[-2] == 13 and visible.shape[0] == 2:
            visible = visible | (torch.arange(13) == 0)  # no row sees nothing
        mask = visible if spelling == "bool" else torch.zeros(visible.shape).masked_fill(~visible, hidden)
        with AttentionCapture(COLUMNS, keep=True) as capture:
            attend(q, k, v, attn_mask=mask)
        assert len(capture.layers) == 1  # raises where the mask is not the kernels'
        truth = by_hand(q, k, mask=visible)
        torch.testing.assert_close(capture.scores.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "bias", [causal_upper_left(4, 13), causal_lower_right(4, 13), causal_lower_right(13, 13)]
)
def test_causal_bias_goes_to_the_kernels(bias: Tensor) -> None:
    """Its rows stand where PyTorch aligns them, in a compiled model too."""
    q, k, v = qkv(rows=bias.seq_len_q)
    seen = bias._materialize()
    start = 0 if bias.variant.name == "UPPER_LEFT" else None
    truth = by_hand(q, k, mask=seen, start=start, diagonal=False)
    torch._dynamo.reset()
    for call in (attend, torch.compile(lambda *x, **mask: attend(*x, **mask), backend="eager")):
        with AttentionCapture(COLUMNS, keep=True, diagonal=False) as capture:
            output = call(q, k, v, attn_mask=bias)
        assert capture.step_options["causal"]
        assert torch.equal(output, attend(q, k, v, attn_mask=seen)) or start == 0
        torch.testing.assert_close(capture.scores.double(), truth, rtol=1e-5, atol=1e-5)


def test_a_mask_that_is_refilled_is_read_again() -> None:
    q, k, v = qkv()
    mask, truth = torch.zeros(1, 1, 1, 13), 0
    with AttentionCapture(COLUMNS) as capture:
        for hidden in (2, 5, 8):
            mask.zero_()[..., hidden] = -torch.inf
            attend(q, k, v, attn_mask=mask)
            truth = truth + by_hand(q, k, mask=mask.clone())
    torch.testing.assert_close(capture.scores.double(), truth, rtol=1e-5, atol=1e-5)


def test_reports() -> None:
    """Refused where they do not fit together; a bias that hides the weights' scale is said so when read."""
    q, k, _ = qkv()
    lse = torch.logsumexp(q @ k.mT / 4, dim=-1)
    with AttentionCapture() as capture:
        with pytest.raises(ValueError, match=r"softmax_lse: expected shape \[B, Hq, M\]"):
            report_attention(q, k, lse[..., :-1])
        with pytest.raises(TypeError, match="key: expected a tensor"):
            report_attention(q, None, lse)  # type: ignore[arg-type]
        assert capture.num_calls == 0
        report_attention(q, k, lse - 1e9, attn_mask=torch.full((13, 13), -1e9))
    with pytest.raises(NotImplementedError, match=r"call 0 .* its bias moves a row"):
        _ = capture.scores
    sink = torch.logaddexp(lse, torch.tensor(1.5))  # takes a share of each row
    with AttentionCapture(COLUMNS) as capture:
        report_attention(q, k, sink)
    weights = torch.exp((q @ k.mT / 4).double() - sink.double()[..., None])
    torch.testing.assert_close(capture.scores.double(), weights.sum((1, 2))[:, COLUMNS], rtol=1e-5, atol=1e-5)
