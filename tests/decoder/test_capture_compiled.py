"""AttentionCapture in compiled models, and of the operators that they call."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import pytest
import torch
from capture_cases import (
    B,
    D,
    H,
    M,
    N,
    by_hand,
    nothing_is_left,
    qkv,
    random_bool,
)
from torch import Tensor
from torch.nn import functional as F

from attn_sampler import AttentionCapture, attention_calls, report_attention
from attn_sampler.attention_calls import attention_with_lse


def test_reported_attention_in_a_compiled_model() -> None:
    """The graph breaks, and is not compiled anew from step to step."""
    from torch._dynamo.testing import CompileCounterWithBackend

    report = torch.compiler.disable(report_attention)

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = q @ k.transpose(-1, -2) * D**-0.5
        report(q * 1.0, k, torch.logsumexp(logits, dim=-1))
        return logits.softmax(dim=-1) @ v

    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=graphs)
    counts = []
    with torch.no_grad():
        for seed in range(4):
            with AttentionCapture(slice(seed, seed + 3), keep=seed == 3) as capture:
                compiled(*qkv(seed))
            q, k, _ = qkv(seed)
            truth = by_hand(q, k, columns=slice(seed, seed + 3))
            torch.testing.assert_close(capture.scores.double(), truth, rtol=1e-5, atol=1e-5)
            counts.append(graphs.frame_count)
    assert counts == counts[:1] * 4
    assert counts[0] <= 2


class Stack(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(32, 96) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            q, k, v = layer(x).view(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4)
            x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(x.shape)
        return x


def test_compiled_model() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.manual_seed(0)
    torch._dynamo.reset()
    model, x = Stack(), torch.randn(2, 9, 32)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    with torch.no_grad():
        for columns, layers in ((slice(2, 5), "all"), (slice(0, 9), [-1]), (slice(4, 6), slice(0, 2))):
            for keep in (False, True):
                with AttentionCapture(columns, layers, keep=keep) as capture:
                    output = compiled(x)
                with AttentionCapture(columns, layers, keep=keep) as eager:
                    assert torch.equal(output, model(x))
                assert capture.num_calls == 3
                assert torch.equal(capture.scores, eager.scores)
        assert graphs.frame_count == 1  # neither the columns nor the steps recompile
        with AttentionCapture(slice(2, 5)) as outer, AttentionCapture(slice(0, 1), [0]) as inner:
            compiled(x)
        with AttentionCapture(slice(2, 5)) as eager_outer, AttentionCapture(slice(0, 1), [0]) as eager_inner:
            model(x)
        assert torch.equal(outer.scores, eager_outer.scores)
        assert torch.equal(inner.scores, eager_inner.scores)
        mask = torch.arange(9)[None, None, None, :] > torch.tensor([0, 3])[:, None, None, None]
        for attn_mask in (mask, mask & random_bool(9, 9)):
            with AttentionCapture(slice(2, 5)) as capture:
                output = compiled(x, attn_mask)
            with AttentionCapture(slice(2, 5)) as eager:
                assert torch.equal(output, model(x, attn_mask))
            assert torch.equal(capture.scores, eager.scores)
        with AttentionCapture(slice(2, 5), keep=True) as capture:
            compiled(x, mask)
        with AttentionCapture(slice(2, 5), keep=True) as eager:
            model(x, mask)
        (layers, options), (expected, _) = capture.step_input(), eager.step_input()
        assert torch.equal(options["key_mask"], mask[:, 0, 0, 2:5])
        for layer, other in zip(layers, expected, strict=True):
            assert all(map(torch.equal, layer, other))
        assert torch.equal(compiled(x), model(x))  # no capture: the graph without it
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with AttentionCapture(slice(2, 5)) as capture:
                output = compiled(x)
            with AttentionCapture(slice(2, 5)) as eager:
                assert torch.equal(output, model(x))
            assert torch.equal(capture.scores, eager.scores)
    assert nothing_is_left()


def test_compiled_model_with_gradients() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, x = Stack(), torch.randn(2, 9, 32)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    gradients = []
    for context in (contextlib.nullcontext(), AttentionCapture(slice(2, 5))):
        model.zero_grad()
        with context:
            compiled(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(map(torch.equal, *gradients))
    with torch.no_grad(), AttentionCapture(slice(2, 5)) as eager:
        model(x)
    assert context.num_calls == 3
    torch.testing.assert_close(context.scores, eager.scores)


@torch.no_grad()
def test_compiled_attention_with_a_cache() -> None:
    """Fewer rows than keys, grouped and repeated heads: one graph over steps and columns."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")

    def model(q: Tensor, past: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = torch.cat([past, k], dim=2)
        v = torch.cat([past, v], dim=2)
        grouped = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        return F.scaled_dot_product_attention(grouped, k, v)

    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for seed, columns in enumerate((slice(6, 10), slice(9, 13), slice(6, 13))):
        q, k, v = qkv(seed, rows=M, kv_heads=2)
        past, k, v = k[:, :, :6], k[:, :, 6:], v[:, :, 6:]
        with AttentionCapture(columns, keep=seed == 1) as capture:
            output = compiled(q, past, k, v)
        with AttentionCapture(columns, [0]) as first:
            assert torch.equal(output, model(q, past, k, v))
        keys = torch.cat([past, k], dim=2)
        torch.testing.assert_close(
            first.scores.double(), by_hand(q, keys, columns=columns), rtol=1e-5, atol=1e-5
        )
        grouped = F.scaled_dot_product_attention(q, keys, torch.cat([past, v], dim=2), enable_gqa=True)
        truth = by_hand(q, keys, columns=columns) + by_hand(grouped, keys, columns=columns)
        torch.testing.assert_close(capture.scores.double(), truth, rtol=1e-5, atol=1e-5)
    assert graphs.frame_count == 1


class Deep(torch.nn.Module):
    """Queries, keys, biases and outputs of one size, and masks made from masks: inductor uses their memory
    again."""

    def __init__(self, masks: Sequence[str]) -> None:
        super().__init__()
        self.masks = masks
        for name in ("q", "k", "v", "out", "up", "see", "bias"):
            width = 1 if name == "see" else 64
            linear = (torch.nn.Linear(64, width, bias=False) for _ in masks)
            self.register_module(name, torch.nn.ModuleList(linear))

    def forward(self, x: Tensor) -> Tensor:
        sees = x.sum(dim=-1) > 0
        for i, kind in enumerate(self.masks):
            q, k, v = (
                linear[i](x).view(*x.shape[:2], 4, 16).transpose(1, 2) for linear in (self.q, self.k, self.v)
            )
            mask = None
            if kind == "key mask":
                sees = sees ^ (self.see[i](x)[..., 0] > 0)
                mask = sees[:, None, None, :]
            elif kind == "bias":
                mask = self.bias[i](x)[:, None]
            attention = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + self.up[i](torch.relu(self.out[i](attention.transpose(1, 2).reshape(x.shape))))
        return x


@torch.no_grad()
def test_what_is_kept_outlives_the_memory_of_a_compiled_graph() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Deep(["", "key mask", "key mask", "bias", "bias", "key mask", ""])
    compiled, x = torch.compile(model, fullgraph=True), torch.randn(2, 64, 64)
    for columns in (slice(8, 16), None):
        for layers in (*([i] for i in range(7)), [-1], [-6, -3], slice(-4, None), "all"):
            keep = layers not in ([-1], [-6, -3])
            with AttentionCapture(columns, layers, keep=keep) as capture:  # type: ignore[arg-type]
                output = compiled(x)
            with AttentionCapture(columns, layers, keep=keep) as eager:  # type: ignore[arg-type]
                torch.testing.assert_close(output, model(x), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(capture.scores, eager.scores, rtol=1e-4, atol=1e-4)


def test_operator_of_compiled_graphs() -> None:
    arguments = (*qkv(), None, 0.0, True, 0.3, False)
    torch.library.opcheck(torch.ops.attn_sampler.captured_attention.default, arguments)


FUSED = [
    ("_scaled_dot_product_flash_attention_for_cpu", None),
    ("_scaled_dot_product_flash_attention", None),
    ("_scaled_dot_product_efficient_attention", 4),
    ("_scaled_dot_product_cudnn_attention", 4),
    ("_scaled_dot_product_fused_attention_overrideable", None),
]


@pytest.mark.parametrize(("name", "on_demand"), FUSED)
def test_fused_operators_are_read_as_their_schema_says(name: str, on_demand: int | None) -> None:
    operator = getattr(torch.ops.aten, name).default
    schema = operator._schema
    assert schema.returns[1].name in ("logsumexp", "log_sumexp")
    flags = [a.name for a in schema.arguments]
    assert ("compute_log_sumexp" in flags) == (on_demand is not None)
    if on_demand is not None:
        argument = schema.arguments[on_demand]
        assert (argument.name, str(argument.type)) == ("compute_log_sumexp", "bool")
        assert not argument.has_default_value()  # so it arrives by position
    assert attention_calls._LogSumExpTap._FUSED[operator] == on_demand


@pytest.mark.parametrize("rows", [1, 7, 32, 33])
@pytest.mark.parametrize("name", [n for n, _ in FUSED[1:4]])
def test_cuda_operators(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake CUDA tensors: their padded or four-dimensional log-sum-exp becomes [B, Hq, M]."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    operator = getattr(torch.ops.aten, name)
    # As PyTorch calls them where no gradient is needed.
    arguments = {"_scaled_dot_product_flash_attention": ()}.get(name, (None, False))
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: operator(q, k, v, *arguments)[0])
    with FakeTensorMode():
        q, k, v = (torch.empty(B, H, n, D, device="cuda:0", dtype=torch.float16) for n in (rows, N, N))
        output, lse = attention_with_lse(q, k, v)
    assert output.shape == q.shape
    assert (lse.shape, lse.dtype, lse.device.type) == ((B, H, rows), torch.float32, "cuda")


def test_attention_without_a_log_sum_exp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: q + 0)
    with pytest.raises(NotImplementedError, match="no log-sum-exp on cpu"):
        attention_with_lse(*qkv())
