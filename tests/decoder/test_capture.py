"""AttentionCapture against attention written out in float64."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
from capture_cases import (
    CALLS,
    COLUMNS,
    B,
    D,
    H,
    M,
    N,
    by_hand,
    captured,
    forward,
    lowest,
    nothing_is_left,
    qkv,
    random_bool,
)
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from toy_model import ToyModel

from attn_sampler import AttentionCapture, decode_step, report_attention
from attn_sampler.attention_calls import attention_with_lse
from attn_sampler.capture import is_capturing


def assert_close(scores: Tensor, truth: Tensor, same_precision: Tensor, lse_error: float = 0.0) -> None:
    """The error of the same-precision arithmetic, twice, plus a rounding of each row's contribution.

    And what an error of PyTorch's own log-sum-exp makes of the scores, which is a share of them.
    """
    assert scores.dtype == torch.float32
    error = (scores.double() - truth).abs().max()
    allowed = 2 * (same_precision.double() - truth).abs().max() + 2e-6 * H * N + lse_error * truth.max()
    assert error <= allowed, float(error)


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_scores(name: str, dtype: torch.dtype) -> None:
    call = dict(CALLS[name])
    q, k, v = qkv(rows=call.pop("rows", N), kv_heads=call.pop("kv_heads", H), dtype=dtype)
    mask = call.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        lowest_here = torch.finfo(dtype).min
        mask = call["attn_mask"] = torch.where(mask == lowest, lowest_here, mask.to(dtype))
    output, capture = captured(q, k, v, call)
    plain = F.scaled_dot_product_attention(q, k, v, **call)
    torch.testing.assert_close(output, plain, rtol=0, atol=0, equal_nan=True)
    options = {"mask": mask, "causal": call.get("is_causal", False), "scale": call.get("scale")}
    same = torch.float64 if dtype == torch.float64 else torch.float32
    # In half precision PyTorch's exponentials are good to some 1e-4 where the processor has no AVX-512.
    coarse = 2e-4 if dtype.itemsize == 2 and "AVX512" not in torch.backends.cpu.get_cpu_capability() else 0.0
    assert_close(capture.scores, by_hand(q, k, **options), by_hand(q, k, dtype=same, **options), coarse)


@pytest.mark.parametrize("name", ["plain", "causal", "key mask", "full mask, a row sees nothing", "bias"])
@pytest.mark.parametrize(
    ("given", "truth"),
    [
        ({"softmax_scope": "block"}, {"block": True}),
        ({"diagonal": False}, {"diagonal": False}),
        ({"reduction": "mean"}, {"reduction": "mean"}),
        ({"reduction": "max"}, {"reduction": "max"}),
        ({"query_mask": random_bool(B, N, seed=9)}, {"query_mask": random_bool(B, N, seed=9)}),
        ({"columns": None}, {"columns": slice(None)}),
        ({"columns": slice(-4, None)}, {"columns": slice(9, 13)}),
        ({"columns": slice(5, 6), "softmax_scope": "block"}, {"columns": slice(5, 6), "block": True}),
        (
            {"softmax_scope": "block", "diagonal": False, "reduction": "mean", "query_start": 2},
            {"block": True, "diagonal": False, "reduction": "mean", "start": 2},
        ),
        ({"query_start": 2, "diagonal": False}, {"start": 2, "diagonal": False}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_options(name: str, given: dict, truth: dict) -> None:
    call = CALLS[name]
    q, k, v = qkv(1)
    _, capture = captured(q, k, v, call, **given)
    options = {"mask": call.get("attn_mask"), "causal": call.get("is_causal", False), **truth}
    assert_close(capture.scores, by_hand(q, k, **options), by_hand(q, k, dtype=torch.float32, **options))


def test_query_start_with_fewer_rows() -> None:
    q, k, v = qkv(rows=4)  # the rows of the block alone, in the middle of the keys
    options = {"query_start": 3, "diagonal": False, "softmax_scope": "block"}
    _, capture = captured(q, k, v, {}, columns=slice(3, 7), **options)
    truth = {"columns": slice(3, 7), "start": 3, "diagonal": False, "block": True}
    assert_close(capture.scores, by_hand(q, k, **truth), by_hand(q, k, dtype=torch.float32, **truth))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("padded", [False, True])
def test_model_with_attention_by_hand(seed: int, padded: bool) -> None:
    model, truth_model = ToyModel(seed), ToyModel(seed, dtype=torch.float64)
    truth_model.by_hand = True
    tokens = torch.randint(22, (3, 11), generator=torch.Generator().manual_seed(seed))
    mask = (
        torch.arange(11) >= torch.tensor([0, 4, 2])[:, None]
        if padded
        else torch.ones(3, 11, dtype=torch.bool)
    )
    keywords = {"attention_mask": mask} if padded else {}
    expected = model(tokens, **keywords)
    with AttentionCapture(slice(5, 9), query_mask=mask) as capture:
        logits = model(tokens, **keywords)
    assert torch.equal(logits, expected)
    truth_model(tokens, **keywords)
    truth = sum((w * mask[:, None, :, None]).sum(dim=(1, 2)) for w in truth_model.weights)[:, 5:9]
    torch.testing.assert_close(capture.scores.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        ("all", [0, 1, 2, 3, 4]),
        (slice(None), [0, 1, 2, 3, 4]),
        (slice(1, 4, 2), [1, 3]),
        (slice(-2, None), [3, 4]),
        (slice(1, -1), [1, 2, 3]),
        (slice(-3, -1), [2, 3]),
        ([0], [0]),
        ([-1], [4]),
        ((2, -1, 0), [0, 2, 4]),
        ([-1, 4], [4]),
        (range(2), [0, 1]),
    ],
    ids=str,
)
def test_layers(layers: object, chosen: list[int], keep: bool) -> None:
    with AttentionCapture(COLUMNS, layers, keep=keep) as capture:  # type: ignore[arg-type]
        truths = forward(5)
    assert capture.num_calls == 5
    torch.testing.assert_close(capture.scores.double(), sum(truths[i] for i in chosen), rtol=1e-5, atol=1e-5)
    assert torch.equal(capture.scores, capture.scores)  # reading changes nothing
    if keep:
        assert len(capture.layers) == len(chosen)
        assert torch.equal(capture.layers[0].k, qkv(chosen[0])[1][:, :, COLUMNS])


def test_negative_layers_hold_no_more_than_they_need() -> None:
    with AttentionCapture(COLUMNS, [0, -2]) as capture:
        forward(6)
    assert [index for index, _ in capture._records] == [0, 4, 5]


@pytest.mark.parametrize("layers", [[5], [-6], [0, 7], slice(5, None), slice(2, 2)], ids=str)
def test_layers_that_do_not_fit(layers: object) -> None:
    with AttentionCapture(COLUMNS, layers) as capture:  # type: ignore[arg-type]
        forward(5)
    with pytest.raises(RuntimeError, match=r"layers: .* does not fit the 5 attention calls"):
        _ = capture.scores


@pytest.mark.parametrize(
    ("attention", "options"),
    [
        ({}, {}),
        ({}, {"softmax_scope": "block"}),
        ({}, {"query_mask": random_bool(B, N), "reduction": "mean", "diagonal": False}),
        ({"is_causal": True, "scale": 0.4}, {}),
        ({"attn_mask": CALLS["key mask"]["attn_mask"]}, {"reduction": "max"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [N, M])
def test_kept_layers_give_decode_step_the_same_scores(attention: dict, options: dict, rows: int) -> None:
    if "query_mask" in options:
        options = {**options, "query_mask": options["query_mask"][:, :rows]}
    with AttentionCapture(COLUMNS, keep=True, **options) as capture:
        forward(3, attention=attention, rows=rows)
    tokens, logits = torch.full((B, N), 9), torch.randn(B, 6, 10, generator=torch.Generator().manual_seed(1))
    result = decode_step(
        tokens, logits, capture.layers, block=COLUMNS, mask_token_id=9, **capture.step_options
    )
    torch.testing.assert_close(result.scores, capture.scores, rtol=1e-5, atol=1e-5)
    assert result.selected.any(dim=1).all()
    layers, keywords = capture.step_input()
    assert isinstance(layers, list)
    again = decode_step(torch.full((B, N), 9), logits, layers, block=COLUMNS, mask_token_id=9, **keywords)
    assert torch.equal(again.scores, result.scores)
    with AttentionCapture(COLUMNS, **options) as reduced:
        forward(3, attention=attention, rows=rows)
    torch.testing.assert_close(reduced.scores, capture.scores, rtol=1e-6, atol=1e-6)
    assert torch.equal(reduced.step_input()[0], reduced.scores)
    with pytest.raises(RuntimeError, match="keep=True"):
        _ = reduced.layers


def test_layers_that_cannot_be_kept_are_summed() -> None:
    q, k, v = qkv()
    with AttentionCapture(COLUMNS, keep=True) as capture:
        F.scaled_dot_product_attention(q, k, v)
        F.scaled_dot_product_attention(q, k, v, attn_mask=random_bool(N, N))
    with pytest.raises(NotImplementedError, match="attn_mask"):
        _ = capture.layers
    assert_scores = capture.step_input()
    assert assert_scores[1] == {}
    assert torch.equal(assert_scores[0], capture.scores)
    truth = by_hand(q, k) + by_hand(q, k, mask=random_bool(N, N))
    torch.testing.assert_close(capture.scores.double(), truth, rtol=1e-5, atol=1e-5)
    with AttentionCapture(COLUMNS, keep=True) as capture:
        F.scaled_dot_product_attention(q, k, v)
        F.scaled_dot_product_attention(q, k, v, scale=0.3)
    with pytest.raises(NotImplementedError, match="differ in mask, scale"):
        _ = capture.step_options
    truth = by_hand(q, k) + by_hand(q, k, scale=0.3)
    torch.testing.assert_close(capture.step_input()[0].double(), truth, rtol=1e-5, atol=1e-5)


def test_layers_with_key_masks_of_their_own() -> None:
    """Reduced in one call where the masks are equal, and only there."""
    q, k, v = qkv()
    mask = random_bool(B, 1, 1, N)
    other = mask.clone()
    other[0, 0, 0, 4].logical_not_()
    for masks, equal in (([mask, mask.clone()], True), ([mask, other], False), ([mask, mask, None], False)):
        with AttentionCapture(COLUMNS, keep=True) as capture:
            for attn_mask in masks:
                F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        layers, keywords = capture.step_input()
        assert isinstance(layers, list) == equal
        truth = sum(by_hand(q, k, mask=attn_mask) for attn_mask in masks)
        torch.testing.assert_close(capture.scores.double(), truth, rtol=1e-5, atol=1e-5)
        if equal:
            assert torch.equal(keywords["key_mask"], mask[:, 0, 0, COLUMNS])
        else:
            with pytest.raises(NotImplementedError, match="differ in mask, scale"):
                _ = capture.step_options


def test_kept_keys_are_copies_of_the_columns() -> None:
    q, k, v = qkv()
    _, capture = captured(q, k, v, {}, keep=True)
    kept = capture.layers[0].k
    assert kept.untyped_storage().nbytes() == B * H * 6 * D * 4
    k.zero_()
    assert torch.equal(kept, qkv()[1][:, :, COLUMNS])


def test_nan_query_row_outside_the_query_mask_contributes_nothing() -> None:
    q, k, v = qkv()
    q[:, :, 4] = torch.nan
    query_mask = torch.ones(B, N, dtype=torch.bool)
    query_mask[:, 4] = False
    for attention in ({}, {"attn_mask": random_bool(B, 1, N, N)}):
        _, capture = captured(q, k, v, attention, query_mask=query_mask)
        truth = by_hand(q, k, query_mask=query_mask, mask=attention.get("attn_mask"))
        torch.testing.assert_close(capture.scores.double(), truth, rtol=1e-5, atol=1e-5)


class Operators(TorchDispatchMode):
    """The operators that ran, with the shapes of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[torch.Size]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        tensors = [x for x in args if isinstance(x, Tensor)]
        self.seen.append((func.name().split("::")[1], [x.shape for x in tensors]))
        return func(*args, **(kwargs or {}))

    def matmuls_over_keys(self) -> int:
        matmul = ("mm", "matmul", "linear", "einsum")
        return sum(
            any(part in name for part in matmul) and any(N in shape for shape in shapes)
            for name, shapes in self.seen
        )


@pytest.mark.parametrize("grad", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("keep", [False, True])
def test_attention_is_computed_once(keep: bool, grad: type) -> None:
    q, k, v = qkv(rows=M)
    for attention in ({}, {"attn_mask": random_bool(B, 1, 1, N)}, {"attn_mask": random_bool(M, N)}):
        # The dispatch mode is entered first, so that it sees what the capture itself runs.
        with grad(), Operators() as operators:
            output, capture = captured(q, k, v, attention, keep=keep)
            assert capture.scores.shape == (B, 6)
        fused = [name for name, _ in operators.seen if "flash_attention" in name]
        assert fused == ["_scaled_dot_product_flash_attention_for_cpu"]
        assert operators.matmuls_over_keys() == 0
        assert torch.equal(output, F.scaled_dot_product_attention(q, k, v, **attention))


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
def test_unfused_attention_is_computed_once_too(grad: type) -> None:
    q, k, v = qkv(rows=M)
    attention = {"attn_mask": random_bool(1, M, N)}  # 3-d: PyTorch takes its math path
    with grad(), Operators() as operators:
        output, _ = captured(q, k, v, attention)
    assert operators.matmuls_over_keys() == 2  # logits and output
    assert torch.equal(output, F.scaled_dot_product_attention(q, k, v, **attention))


def test_gradients_flow_through_a_captured_forward_pass() -> None:
    grads = []
    for context in (contextlib.nullcontext(), AttentionCapture(COLUMNS)):
        q, k, v = (x.requires_grad_() for x in qkv())
        with context:
            F.scaled_dot_product_attention(q, k, v).square().sum().backward()
        grads.append((q.grad, k.grad, v.grad))
    assert not context.scores.requires_grad  # type: ignore[union-attr]
    for expected, got in zip(*grads, strict=True):
        assert torch.equal(expected, got)


def test_autocast() -> None:
    q, k, v = qkv()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, capture = captured(q, k, v.bfloat16(), {})
        scores = capture.scores
        biased = captured(q, k, v, {"attn_mask": random_bool(N, N)})[1].scores
        assert torch.equal(output, F.scaled_dot_product_attention(q, k, v.bfloat16()))
    assert output.dtype == torch.bfloat16
    low_q, low_k = q.bfloat16(), k.bfloat16()
    torch.testing.assert_close(scores.double(), by_hand(low_q, low_k), rtol=1e-4, atol=1e-4)
    truth = by_hand(low_q, low_k, mask=random_bool(N, N))
    torch.testing.assert_close(biased.double(), truth, rtol=1e-4, atol=1e-4)


def test_nothing_stays_after_an_exception() -> None:
    def model() -> None:
        forward(1)
        raise ZeroDivisionError

    capture = AttentionCapture()
    with pytest.raises(ZeroDivisionError), capture:
        model()
    assert nothing_is_left()
    forward(1)
    assert capture.num_calls == 1
    with pytest.raises(RuntimeError, match="dropout"), AttentionCapture():
        F.scaled_dot_product_attention(*qkv(), dropout_p=2.0)
    assert nothing_is_left()


def test_entering_again_forgets() -> None:
    capture = AttentionCapture(COLUMNS)
    with capture:
        forward(2)
    first = capture.scores
    capture.columns = slice(0, 2)
    with capture:
        truth = forward(1, seed=7)
    assert capture.num_calls == 1
    assert capture.scores.shape == (B, 2)
    assert first.shape == truth[0].shape
    q, k, _ = qkv(7)
    torch.testing.assert_close(
        capture.scores.double(), by_hand(q, k, columns=slice(0, 2)), rtol=1e-5, atol=1e-5
    )


def test_nested_captures_see_the_same_calls() -> None:
    with AttentionCapture(COLUMNS) as outer:
        before = forward(1)
        with AttentionCapture(COLUMNS, layers=[-1]) as inner:
            inside = forward(2, seed=3)
        after = forward(1, seed=8)
    assert (outer.num_calls, inner.num_calls) == (4, 2)
    torch.testing.assert_close(inner.scores.double(), inside[-1], rtol=1e-5, atol=1e-5)
    truth = sum(before + inside + after)
    torch.testing.assert_close(outer.scores.double(), truth, rtol=1e-5, atol=1e-5)


def test_threads_capture_apart() -> None:
    barrier = threading.Barrier(3, timeout=60)
    results: dict[int, tuple[AttentionCapture | None, Tensor]] = {}

    def work(thread: int) -> None:
        capture = AttentionCapture(COLUMNS) if thread < 2 else contextlib.nullcontext()
        with capture as opened:
            barrier.wait()  # all are open, or running bare, before any calls
            truth = sum(forward(thread + 1, seed=10 * thread))
            barrier.wait()
        results[thread] = (opened, truth)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(results) == [0, 1, 2]
    for i in range(2):
        capture, truth = results[i]
        assert capture.num_calls == i + 1
        torch.testing.assert_close(capture.scores.double(), truth, rtol=1e-5, atol=1e-5)
    assert nothing_is_left()


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", ["plain", "causal", "cache", "key mask, grouped", "bias", "scale"])
def test_reported_attention_counts_as_seen_attention(name: str, keep: bool) -> None:
    """An attention of one's own, inside which nothing is seen, among calls that are."""
    call = dict(CALLS[name])
    q, k, v = qkv(2, rows=call.pop("rows", N), kv_heads=call.pop("kv_heads", H))
    softmax_lse = attention_with_lse(q, k, v, **call)[1]
    reported = {key: value for key, value in call.items() if key != "enable_gqa"}
    with AttentionCapture(COLUMNS, [0, 1], keep=keep) as capture:
        assert is_capturing()
        report_attention(q, k, softmax_lse, **reported)
        F.scaled_dot_product_attention(q, k, v, **call)
        report_attention(q, k, softmax_lse, **reported)
    assert capture.num_calls == 3
    with AttentionCapture(COLUMNS, keep=keep) as seen:
        for _ in range(2):
            F.scaled_dot_product_attention(q, k, v, **call)
    assert torch.equal(capture.scores, seen.scores)
    assert not is_capturing()
    report_attention(q, k, softmax_lse)  # nothing is open
    assert capture.num_calls == 3


def test_no_attention_call() -> None:
    with AttentionCapture() as capture:
        torch.nn.MultiheadAttention(16, 2)(*[torch.randn(3, 1, 16)] * 3)
    for read in (lambda: capture.scores, capture.step_input, lambda: capture.step_options):
        with pytest.raises(RuntimeError, match=r"saw no call of .*product_attention: .* report_attention"):
            read()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": "last"}, ValueError, "layers: expected one of all, got 'last'"),
        ({"layers": 3}, TypeError, "layers: expected 'all', a slice or a sequence"),
        ({"layers": []}, ValueError, "layers: expected at least one index"),
        ({"layers": slice(3, None, -1)}, ValueError, "layers: expected a slice of positive step"),
        ({"layers": [1.0]}, TypeError, "layers: expected an integer"),
        ({"keep": 1}, TypeError, "keep: "),
        ({"softmax_scope": "all"}, ValueError, "softmax_scope: "),
        ({"diagonal": "no"}, TypeError, "diagonal: "),
        ({"reduction": "min"}, ValueError, "reduction: "),
        ({"backend": "gpu"}, ValueError, "backend: "),
        ({"query_start": 0.5}, TypeError, "query_start: "),
    ],
    ids=str,
)
def test_bad_options(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AttentionCapture(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": slice(5, 14)}, "columns: .* outside the 13 key"),
        ({"columns": slice(4, 4)}, "columns: expected at least one"),
        ({"columns": slice(0, 9, 2)}, "columns: expected a slice of step 1"),
        ({"query_mask": torch.ones(B, N)}, "query_mask: expected dtype bool"),
        ({"query_mask": torch.ones(B, N + 1, dtype=torch.bool)}, r"query_mask: expected shape \[B, M\]"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_the_call(options: dict, message: str) -> None:
    """The model runs; the scores raise."""
    output, capture = captured(*qkv(), {}, **options)
    assert torch.equal(output, F.scaled_dot_product_attention(*qkv()))
    with pytest.raises(ValueError, match=f"attention call 0 of the forward pass cannot be scored: {message}"):
        _ = capture.scores
