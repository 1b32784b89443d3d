"""Column scores of every backend, against the reference in float64 and by their properties."""

from __future__ import annotations

import itertools

import pytest
import torch
from problems import (
    ATTENTION_DTYPES,
    DTYPES,
    FLOAT8,
    GROUPS,
    HEAD_DIMS,
    SIZES,
    AttentionProblem,
    judge,
    normal,
    random_attention,
    row_lse,
)

from attn_sampler import column_scores, reference
from attn_sampler.backends import REGISTRY
from attn_sampler.options import Attention, Layer, Masks, Span


def small_problem(device: torch.device, *, seed: int = 0, dtype: torch.dtype = torch.float32, **options):
    """B 2, Hq 4, Hkv 2, M 9, N 21, D 40."""
    q, k = normal(seed, 2, 4, 9, 40, dtype=dtype), normal(seed + 1, 2, 2, 21, 40, dtype=dtype)
    return AttentionProblem(q, k, options).to(device)


@pytest.mark.parametrize("seed", range(80))
def test_random_problems(backend, device, seed):
    problem = random_attention(seed).to(device)
    judge(
        "column_scores",
        backend,
        problem,
        reduction=("sum", "mean", "max", "sum")[seed % 4],
        per_head=seed % 5 == 0,
    )


@pytest.mark.parametrize("seed", range(40))
def test_random_float8_problems(backend, device, seed):
    problem = random_attention(seed, dtypes=(FLOAT8,)).to(device)
    judge(
        "column_scores",
        backend,
        problem,
        reduction=("sum", "mean", "max", "sum")[seed % 4],
        per_head=seed % 5 == 0,
    )


@pytest.mark.parametrize("with_lse", [True, False])
def test_every_float8(backend, device, with_lse):
    """All finite values, by ones and zeros; then the two NaN."""
    codes = torch.arange(256, dtype=torch.uint8)
    finite = codes[(codes & 0x7F) != 0x7F].view(FLOAT8).to(device)  # 254 keys, each with one value
    k = torch.zeros(1, 1, 254, 16, dtype=FLOAT8, device=device)
    k[0, 0, :, 5] = finite
    q = torch.ones(1, 1, 1, 16, dtype=FLOAT8, device=device)
    scale = torch.full((1, 1), 1 / 64, device=device)
    logits = finite.double() / 64
    options = {"k_descale": scale, "softmax_scale": 1.0}
    if with_lse:
        options["softmax_lse"] = logits.logsumexp(0).float().expand(1, 1, 1)
    scores = column_scores(q, k, **options, backend=backend)[0]
    torch.testing.assert_close(scores.double(), logits.softmax(0), rtol=3e-6, atol=0.0)
    for nan in (0x7F, 0xFF):
        k[0, 0, 7, 5] = torch.tensor(nan, dtype=torch.uint8, device=device).view(FLOAT8)
        unknown = column_scores(q, k, **options, backend=backend)[0].isnan()
        assert unknown[7]
        assert unknown.sum() == (1 if with_lse else 254)


def test_descales_multiply_queries_and_keys(backend, device):
    """The scores of the real values; a scale of NaN in sight, and behind a mask."""
    problem = small_problem(device, dtype=FLOAT8, causal=True)
    q_descale = torch.tensor([[0.3, 1.1], [1.7, 0.25]], device=device)
    k_descale = torch.tensor([[1.9, 0.5], [1.2, 2.3]], device=device).T
    real = AttentionProblem(
        problem.q.float() * q_descale.repeat_interleave(2, dim=1)[..., None, None],
        problem.k.float() * k_descale[..., None, None],
        problem.options,
    )
    expected = real.run(column_scores, backend=backend)
    scores = problem.run(column_scores, q_descale=q_descale, k_descale=k_descale, backend=backend)
    torch.testing.assert_close(scores, expected)
    k_descale[1, 0] = torch.nan
    unknown = problem.run(column_scores, q_descale=q_descale, k_descale=k_descale, backend=backend)
    assert torch.equal(unknown.isnan().any(dim=1), torch.tensor([False, True], device=device))
    shown = torch.tensor([[True], [False]], device=device).expand(2, 9)
    hidden = problem.run(
        column_scores, q_descale=q_descale, k_descale=k_descale, query_mask=shown, backend=backend
    )
    torch.testing.assert_close(hidden[0], expected[0])
    assert (hidden[1] == 0.0).all()


@pytest.mark.parametrize("headdim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", ATTENTION_DTYPES)
@pytest.mark.parametrize("with_lse", [True, False])
def test_head_dimensions(backend, device, headdim, dtype, with_lse):
    q, k = normal(0, 1, 2, 17, headdim, dtype=dtype), normal(1, 1, 1, 35, headdim, dtype=dtype)
    options = {"columns": slice(11, 30)} | ({"softmax_lse": row_lse(q, k)} if with_lse else {})
    judge("column_scores", backend, AttentionProblem(q, k, options).to(device))


@pytest.mark.parametrize(("n_rows", "n_keys"), list(itertools.product(SIZES, SIZES)))
def test_sizes_and_groups(backend, device, n_rows, n_keys):
    group = GROUPS[(n_rows + n_keys) % 3]
    q, k = normal(0, 2, group, n_rows, 32), normal(1, 2, 1, n_keys, 32)
    for reduction in ("sum", "mean", "max"):
        judge("column_scores", backend, AttentionProblem(q, k).to(device), reduction=reduction, causal=True)


@pytest.mark.parametrize("dtype", ATTENTION_DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_many_keys(backend, device, dtype, causal):
    """More of them than any kernel holds at a time."""
    q, k = normal(0, 1, 2, 70, 32, dtype=dtype), normal(1, 1, 1, 1500, 32, dtype=dtype)
    judge(
        "column_scores",
        backend,
        AttentionProblem(q, k, {"columns": slice(1300, 1500), "causal": causal}).to(device),
    )


@pytest.mark.parametrize("headdim", [40, 64, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_many_rows_and_columns(backend, device, headdim, dtype, causal):
    """Several of the widest tiles that any kernel has, some of them cut, and all columns."""
    q, k = normal(0, 1, 2, 140, headdim, dtype=dtype), normal(1, 1, 1, 200, headdim, dtype=dtype)
    problem = AttentionProblem(q, k, {"causal": causal}).to(device)
    judge("column_scores", backend, problem)
    key_mask = torch.arange(200, device=device)[None] >= 5
    more = {"reduction": "max" if causal else "mean", "per_head": headdim < 96, "diagonal": False}
    judge("column_scores", backend, problem, key_mask=key_mask, **more)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "n_rows", "n_keys", "count", "headdim"),
    [
        (1, 32, 32, 384, 384, 32, 128),
        (2, 32, 32, 32, 1280, 32, 128),
        (4, 16, 4, 32, 2080, 32, 128),
        (1, 28, 4, 128, 768, 128, 128),
        (1, 28, 4, 8, 2080, 8, 128),
        (8, 32, 8, 4, 1024, 4, 128),
        (1, 8, 4, 256, 640, 256, 512),
        (1, 4, 1, 32, 32768, 32, 128),
    ],
)
@pytest.mark.parametrize("with_lse", [True, False])
def test_decode_shapes(backend, device, batch, heads, kv_heads, n_rows, n_keys, count, headdim, with_lse):
    q = normal(0, batch, heads, n_rows, headdim, dtype=torch.bfloat16)
    k = normal(1, batch, kv_heads, n_keys, headdim, dtype=torch.bfloat16)
    options = {"columns": slice(n_keys - count, n_keys)}
    if with_lse:
        options["softmax_lse"] = row_lse(q, k)
    judge("column_scores", backend, AttentionProblem(q, k, options).to(device))


@pytest.mark.parametrize("dtype", ATTENTION_DTYPES)
def test_all_columns_sum_to_the_number_of_rows(backend, device, dtype):
    problem = small_problem(device, dtype=dtype)
    per_head = problem.run(column_scores, per_head=True, backend=backend)
    torch.testing.assert_close(per_head.sum(dim=2), torch.full((2, 4), 9.0, device=device))
    scores = problem.run(column_scores, backend=backend)
    torch.testing.assert_close(scores.sum(dim=1), torch.full((2,), 36.0, device=device))
    torch.testing.assert_close(per_head.sum(dim=1), scores)
    mean = problem.run(column_scores, reduction="mean", backend=backend)
    torch.testing.assert_close(mean, scores / 9)


def test_permuting_keys_permutes_scores(backend, device):
    problem = small_problem(device)
    order = torch.randperm(21, generator=torch.Generator().manual_seed(5)).to(device)
    moved = AttentionProblem(problem.q, problem.k[:, :, order])
    torch.testing.assert_close(
        moved.run(column_scores, backend=backend), problem.run(column_scores, backend=backend)[:, order]
    )


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 1e4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_changes_nothing(backend, device, poison, dtype):
    problem = small_problem(device, dtype=dtype)
    bare = problem.run(column_scores, query_start=12, backend=backend)
    keys, rows = (slice(3, 24), slice(2, 11))  # 3 keys and 2 rows more on the left, 4 and 1 on the right
    k = torch.full((2, 2, 28, 40), poison, dtype=dtype, device=device)
    q = torch.full((2, 4, 12, 40), poison, dtype=dtype, device=device)
    k[:, :, keys], q[:, :, rows] = problem.k, problem.q
    key_mask = torch.zeros(2, 28, dtype=torch.bool, device=device)
    query_mask = torch.zeros(2, 12, dtype=torch.bool, device=device)
    key_mask[:, keys], query_mask[:, rows] = True, True
    padded = column_scores(q, k, key_mask=key_mask, query_mask=query_mask, query_start=13, backend=backend)
    assert (padded[:, :3] == 0.0).all()
    assert (padded[:, 24:] == 0.0).all()
    torch.testing.assert_close(padded[:, keys], bare)


def test_grouped_heads_equal_repeated_keys(backend, device):
    problem = small_problem(device)
    repeated = AttentionProblem(problem.q, problem.k.repeat_interleave(2, dim=1))
    for per_head in (False, True):
        torch.testing.assert_close(
            problem.run(column_scores, per_head=per_head, backend=backend),
            repeated.run(column_scores, per_head=per_head, backend=backend),
        )


@pytest.mark.parametrize("base", ["e", "2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_given_lse_equals_computed_lse(backend, device, base, dtype):
    problem = small_problem(device, dtype=dtype, columns=slice(5, 16), causal=True)
    lse = row_lse(problem.q.cpu(), problem.k.cpu(), causal=True).to(device)
    lse = lse / torch.log(torch.tensor(2.0)) if base == "2" else lse
    torch.testing.assert_close(
        problem.run(column_scores, softmax_lse=lse, lse_base=base, backend=backend),
        problem.run(column_scores, backend=backend),
    )


def test_lse_of_the_fused_attention(backend, device):
    """The strides that the fused CPU attention gives its lse, and its 0.0 for a row that sees nothing."""
    q, k = normal(0, 2, 4, 9, 64), normal(1, 2, 4, 21, 64)
    bias = torch.zeros(2, 1, 9, 21)
    bias[1] = -torch.inf
    _, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, k, attn_mask=bias)
    assert lse[1].abs().max() == 0.0
    assert lse.stride() == (36, 1, 4)
    key_mask = torch.tensor([[True], [False]]).expand(2, 21)
    problem = AttentionProblem(q, k, {"softmax_lse": lse, "key_mask": key_mask}).to(device)
    scores = judge("column_scores", backend, problem)
    assert (scores[1] == 0.0).all()
    torch.testing.assert_close(scores[0].sum(), torch.tensor(36.0, device=device))


def test_rows_with_an_lse_of_minus_infinity_contribute_nothing(backend, device):
    problem = small_problem(device)
    lse = row_lse(problem.q.cpu(), problem.k.cpu()).to(device)
    lse[:, :, 4:] = -torch.inf
    shorter = AttentionProblem(problem.q[:, :, :4], problem.k)
    torch.testing.assert_close(
        problem.run(column_scores, softmax_lse=lse, backend=backend),
        shorter.run(column_scores, softmax_lse=lse[:, :, :4], backend=backend),
    )


@pytest.mark.parametrize("causal", [False, True])
def test_block_scope_equals_attention_on_the_block_alone(backend, device, causal):
    problem = small_problem(device)
    # Rows stand at 12 to 20; those at 14 to 18 are of the block.
    block = problem.run(
        column_scores, columns=slice(14, 19), softmax_scope="block", causal=causal, backend=backend
    )
    alone = column_scores(problem.q[:, :, 2:7], problem.k[:, :, 14:19], causal=causal, backend=backend)
    torch.testing.assert_close(block, alone)
    elsewhere = problem.run(column_scores, columns=slice(2, 9), softmax_scope="block", backend=backend)
    assert (elsewhere == 0.0).all()  # no row stands there


def test_causal_rows_see_keys_up_to_their_own(backend, device):
    q, k = torch.zeros(1, 1, 3, 32, device=device), torch.zeros(1, 1, 5, 32, device=device)

    def scores(**options):
        return column_scores(q, k, causal=True, backend=backend, **options)[0].tolist()

    third, quarter, fifth = 1 / 3, 1 / 4, 1 / 5
    assert scores() == pytest.approx([*[third + quarter + fifth] * 3, quarter + fifth, fifth])
    assert scores(query_start=0) == pytest.approx([1 + 1 / 2 + third, 1 / 2 + third, third, 0, 0])
    assert scores(query_start=-2) == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert scores(query_start=-3) == [0.0] * 5
    assert scores(query_start=7) == pytest.approx([3 / 5] * 5)
    assert scores(diagonal=False) == pytest.approx(
        [*[third + quarter + fifth] * 2, quarter + fifth, fifth, 0]
    )
    assert scores(reduction="mean") == pytest.approx(
        [*[(third + quarter + fifth) / 3] * 3, (quarter + fifth) / 2, fifth]
    )
    assert scores(reduction="max") == pytest.approx([*[third] * 3, quarter, fifth])
    # A dropped diagonal entry is not one of the rows that the mean counts.
    assert scores(reduction="mean", diagonal=False) == pytest.approx(
        [*[(third + quarter + fifth) / 3] * 2, (quarter + fifth) / 2, fifth, 0]
    )


@pytest.mark.parametrize("reduction", ["sum", "mean", "max"])
def test_nothing_visible_is_zero(backend, device, reduction):
    problem = small_problem(device)
    key_mask = torch.zeros(2, 21, dtype=torch.bool, device=device)
    query_mask = torch.zeros(2, 9, dtype=torch.bool, device=device)
    for mask in ({"key_mask": key_mask}, {"query_mask": query_mask}):
        assert (problem.run(column_scores, reduction=reduction, backend=backend, **mask) == 0.0).all()


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean", "max"])
def test_visible_nan_shows(backend, device, with_lse, reduction):
    problem = small_problem(device)
    lse = row_lse(problem.q.cpu(), problem.k.cpu()).to(device) if with_lse else None
    problem.k[1, 0, 6, 3] = torch.nan
    scores = problem.run(column_scores, softmax_lse=lse, reduction=reduction, backend=backend)
    assert not scores[0].isnan().any()
    nan = scores[1].isnan()
    assert nan[6]
    assert nan.sum() == (1 if with_lse else 21)  # without a given lse, the softmax of the row is undefined


@pytest.mark.parametrize("per_head", [False, True])
def test_out_is_added_into(backend, device, per_head):
    first, second = small_problem(device), small_problem(device, seed=7)
    shape = (2, 4, 21) if per_head else (2, 21)
    storage = torch.full((*shape[:-1], 50), 3.0, device=device)
    out = storage[..., 4:46:2]
    expected = 3.0 + sum(p.run(column_scores, per_head=per_head, backend=backend) for p in (first, second))
    for problem in (first, second):
        result = problem.run(column_scores, per_head=per_head, out=out, backend=backend)
        assert result is out
    torch.testing.assert_close(out, expected)
    untouched = torch.ones(50, dtype=torch.bool)
    untouched[4:46:2] = False
    assert (storage[..., untouched] == 3.0).all()


def test_every_element_of_the_output_is_written(backend, device):
    """Into memory that holds NaN, not added to."""
    for columns, options in (
        ((0, 21), {}),
        ((3, 8), {"key_mask": torch.zeros(2, 21, dtype=torch.bool, device=device)}),
        ((3, 8), {"query_start": -100, "causal": True}),
        ((0, 5), {"softmax_scope": "block"}),
    ):
        problem = small_problem(device, **options)
        for per_head, reduction in itertools.product((False, True), ("sum", "mean", "max")):
            shape = (2, 4, columns[1] - columns[0]) if per_head else (2, columns[1] - columns[0])
            out = torch.full(shape, torch.nan, device=device)
            how = Attention(
                Span(*columns),
                Span(0, 9),
                options.get("query_start", 12),
                40**-0.5,
                "e",
                options.get("causal", False),
                options.get("softmax_scope", "sequence"),
                True,
                reduction,
                per_head,
                False,
            )
            masks = Masks(options.get("key_mask"))
            REGISTRY[backend].function("column_scores")(out, Layer(problem.q, problem.k), masks, how)
            expected = problem.run(
                column_scores,
                columns=slice(*columns),
                reduction=reduction,
                per_head=per_head,
                backend=backend,
            )
            assert torch.equal(out, expected)


def test_no_rows_and_no_sequences(backend, device):
    problem = small_problem(device)
    no_rows = AttentionProblem(problem.q[:, :, :0], problem.k)
    no_batch = AttentionProblem(problem.q[:0], problem.k[:0])
    for reduction in ("sum", "mean", "max"):
        assert (no_rows.run(column_scores, reduction=reduction, backend=backend) == 0.0).all()
        assert no_batch.run(column_scores, reduction=reduction, backend=backend).shape == (0, 21)
    out = torch.full((2, 21), 2.0, device=device)
    no_rows.run(column_scores, out=out, backend=backend)
    assert (out == 2.0).all()


def test_expanded_views_are_read(backend, device):
    q, k = normal(0, 1, 1, 9, 40).to(device), normal(1, 1, 1, 21, 40).to(device)
    judge("column_scores", backend, AttentionProblem(q.expand(3, 2, 9, 40), k.expand(3, 2, 21, 40)))


def test_large_logits_do_not_overflow(backend, device):
    """Logits of some thousands, where exp() overflows without the row maximum."""
    problem = small_problem(device, softmax_scale=60.0)
    scores = problem.run(column_scores, backend=backend)
    truth = problem.double().run(reference.column_scores)
    torch.testing.assert_close(scores.double(), truth, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(scores.sum(dim=1), torch.full((2,), 36.0, device=device), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("scale", [-0.3, -2.0, 0.0, 1e-37])
@pytest.mark.parametrize("infinite", [False, True])
def test_any_scale(backend, device, scale, infinite):
    """Where the scale is not positive, or as good as 0, the largest product need not be the largest logit."""
    problem = small_problem(device, softmax_scale=scale)
    if infinite:
        problem.k[0, 0, 5, 3] = torch.inf
    judge("column_scores", backend, problem)


def test_no_gradient(backend, device):
    problem = small_problem(device)
    out = torch.zeros(2, 21, device=device)
    problem.q.requires_grad_()
    for scores in (problem.run(column_scores, backend=backend), problem.run(column_scores, out=out)):
        assert not scores.requires_grad
        assert scores.grad_fn is None


@pytest.mark.parametrize("dtype", ATTENTION_DTYPES)
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize(
    ("heads", "n_rows", "n_keys"), [(4, 20, 70), pytest.param(28, 63, 513, marks=pytest.mark.slow)]
)
def test_twenty_reruns_give_the_same_bits(backend, device, dtype, with_lse, heads, n_rows, n_keys):
    q, k = normal(0, 2, heads, n_rows, 96, dtype=dtype), normal(1, 2, 2, n_keys, 96, dtype=dtype)
    lse = row_lse(q, k).to(device) if with_lse else None
    q, k = q.to(device), k.to(device)
    first = column_scores(q, k, softmax_lse=lse, backend=backend)
    for _ in range(20):
        assert torch.equal(column_scores(q, k, softmax_lse=lse, backend=backend), first)


def test_the_bits_do_not_depend_on_the_number_of_threads(backend, device):
    if backend == "reference":
        pytest.skip("the reference's matrix products are PyTorch's, which make no such promise")
    problems = [random_attention(seed).to(device) for seed in (1, 4, 9, 16, 25)]
    threads = torch.get_num_threads()
    try:
        for problem in problems:
            results = []
            for count in (1, 2, 3, 8):
                torch.set_num_threads(count)
                results.append(problem.run(column_scores, backend=backend))
            assert all(torch.equal(r.nan_to_num(-1.0), results[0].nan_to_num(-1.0)) for r in results)
    finally:
        torch.set_num_threads(threads)
