"""The whole step on every backend: the composition of its parts, committed in place."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from problems import (
    DTYPES,
    FLOAT8,
    GROUPS,
    assert_accurate,
    boolean_mask,
    descale,
    normal,
    random_window,
    row_lse,
    strided,
)
from torch import Tensor

from attn_sampler import (
    StepResult,
    column_scores,
    decode_step,
    reference,
    select_tokens,
    token_confidence,
)
from attn_sampler.backends import REGISTRY
from attn_sampler.options import Attention, Layer, Masks, Sampling, Selection, Span
from attn_sampler.options import Step as StepOptions

VOCAB, MASK = 37, 5
SCALES = ("q_descale", "k_descale")


@dataclasses.dataclass
class Step:
    """The arguments of one step."""

    tokens: Tensor
    logits: Tensor
    layers: list[tuple[Tensor | None, ...]]
    options: dict[str, Any]

    def copy(self) -> Step:
        """With token memory of its own, in the same layout."""
        storage = self.tokens.untyped_storage()
        flat = torch.empty(0, dtype=torch.int64, device=self.tokens.device).set_(storage)
        tokens = flat.clone().as_strided(
            self.tokens.shape, self.tokens.stride(), self.tokens.storage_offset()
        )
        return dataclasses.replace(self, tokens=tokens)

    def double(self) -> Step:
        layers = [tuple(x if x is None else x.double() for x in layer) for layer in self.layers]
        return dataclasses.replace(self.copy(), logits=self.logits.double(), layers=layers)

    def run(self, function: Any = decode_step, **more: Any) -> StepResult:
        return function(self.tokens, self.logits, self.layers, **{**self.options, **more})


def random_step(seed: int, device: torch.device, dtypes: Sequence[torch.dtype] = DTYPES) -> Step:
    rng = random.Random(seed)
    batch, n_tokens, count = rng.randint(1, 3), rng.choice((9, 20, 41)), rng.randint(1, 8)
    n_layers, headdim, dtype = rng.choice((1, 2, 5)), rng.choice((32, 40, 96)), rng.choice(dtypes)
    start = rng.randrange(n_tokens - count + 1)
    full = rng.random() < 0.5  # no cache: a row for each token; else the rows of the block
    offset = rng.choice((0, 0, -start, 3))  # where the keys begin, relative to the tokens
    n_rows, n_keys = (n_tokens, n_tokens) if full else (count, start + count + max(offset, 0))
    columns = slice(start + offset, start + offset + count)
    if full:
        columns = slice(start, start + count)
    options: dict[str, Any] = {
        "block": slice(start, start + count),
        "columns": columns,
        "query_start": 0 if full else columns.start,
        "mask_token_id": MASK,
        "rule": rng.choice(("parallel", "parallel", "sequential")),
        "tau": rng.choice((0.05, 0.1, 0.5)),
        "fallback": rng.choice(("confidence", "score")),
        "metric": rng.choice(("probability", "margin", "entropy")),
        "query_rows": rng.choice(("all", "masked")),
        "causal": rng.random() < 0.3,
        "diagonal": rng.random() < 0.7,
        "reduction": rng.choice(("sum", "mean", "max")),
        "softmax_scope": rng.choice(("sequence", "sequence", "block")),
        "window_size": random_window(seed),
    }
    if rng.random() < 0.3:
        options |= {"temperature": 0.8, "seed": rng.choice((4, torch.arange(batch)))}
    for name, length in (("key_mask", n_keys), ("query_mask", n_rows)):
        if (mask := boolean_mask(rng, rng.choice(("none", "left", "random")), batch, length)) is not None:
            options[name] = mask
    with_lse = options["softmax_scope"] == "sequence" and rng.random() < 0.6
    if with_lse:
        options["lse_base"] = rng.choice("e2")
    layers = []
    scale_names = SCALES[: rng.randrange(3)] if dtype == FLOAT8 else ()
    for _ in range(n_layers):
        kv_heads, group = rng.randint(1, 2), rng.choice(GROUPS)
        layout = rng.choice(("contiguous", "transposed", "wide rows"))
        q = normal(rng.randrange(1 << 30), batch, kv_heads * group, n_rows, headdim, dtype=dtype)
        k = normal(rng.randrange(1 << 30), batch, kv_heads, n_keys, headdim, dtype=dtype)
        lse = None
        scales: dict[str, Tensor] = {}
        if dtype == FLOAT8:
            scales = {name: descale(rng, batch, kv_heads) for name in scale_names}
        if with_lse:
            seen = {name: options[name] for name in ("causal", "window_size", "query_start")}
            lse = row_lse(q, k, **seen, **scales)
            lse = lse / torch.log(torch.tensor(2.0)) if options["lse_base"] == "2" else lse
            lse = lse.to(device)
        layer = (strided(q, layout).to(device), strided(k, layout).to(device), lse)
        if dtype == FLOAT8:
            layer += tuple(scales[name].to(device) if name in scales else None for name in SCALES)
        layers.append(layer)
    storage = torch.randint(VOCAB, (batch, 2 * n_tokens), generator=torch.Generator().manual_seed(seed))
    storage[torch.rand(storage.shape, generator=torch.Generator().manual_seed(seed)) < 0.5] = MASK
    logits = 2.0 * normal(seed, batch, count + 2, VOCAB, dtype=torch.bfloat16 if dtype == FLOAT8 else dtype)
    logits[..., MASK] = 50.0  # what it would predict if it were not excluded
    options = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in options.items()}
    return Step(storage.to(device)[:, ::2], logits.to(device)[:, 1:-1], layers, options)


@pytest.mark.parametrize(
    ("seed", "dtypes"),
    [*((seed, DTYPES) for seed in range(60)), *((seed, (FLOAT8,)) for seed in range(60, 80))],
    ids=lambda x: str(x) if isinstance(x, int) else "float8" if FLOAT8 in x else "",
)
def test_random_steps(backend, device, seed, dtypes):
    step = random_step(seed, device, dtypes)
    options = step.options
    truth = step.double().run(reference.decode_step)
    same_precision = step.copy().run(reference.decode_step)
    before = step.tokens.clone()
    memory = step.tokens.untyped_storage().tolist()
    result = step.run(backend=backend)
    assert result.tokens is step.tokens
    assert_accurate(result.scores, same_precision.scores, truth.scores)
    assert torch.equal(result.token_ids, same_precision.token_ids)
    assert not (result.token_ids == MASK).any()
    assert_accurate(result.confidence, same_precision.confidence, truth.confidence)
    # Exactly the selection that the step's own scores and confidence call for ...
    block = options["block"]
    masked = before[:, block] == MASK
    selected = reference.select_tokens(
        result.scores,
        result.confidence,
        masked,
        rule=options["rule"],
        tau=options["tau"],
        fallback=options["fallback"],
    )
    assert torch.equal(result.selected, selected)
    assert torch.equal(selected.any(dim=1), masked.any(dim=1))
    # ... and exactly that committed, in this memory and no other.
    expected = before.clone()
    expected[:, block] = torch.where(selected, result.token_ids, before[:, block])
    assert torch.equal(step.tokens, expected)
    step.tokens.copy_(before)
    assert step.tokens.untyped_storage().tolist() == memory


def small_step(device: torch.device, **options: Any) -> Step:
    """B 2, T = N = M = 12, 3 layers; a block of 4 masked positions."""
    tokens = torch.randint(6, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0)).to(device)
    tokens[:, 6:] = MASK
    layers = []
    for index in range(3):
        q, k = normal(index, 2, 4, 12, 40), normal(index + 10, 2, 2, 12, 40)
        layers.append((q.to(device), k.to(device), row_lse(q, k).to(device)))
    logits = normal(20, 2, 4, VOCAB).mul(2).to(device)
    return Step(tokens, logits, layers, {"block": slice(6, 10), "mask_token_id": MASK, **options})


def test_it_is_its_parts(backend, device):
    step = small_step(device, tau=0.3)
    tokens = step.tokens.clone()
    result = step.run(backend=backend)
    scores = None
    for q, k, lse in step.layers:
        scores = column_scores(q, k, columns=slice(6, 10), softmax_lse=lse, out=scores, backend=backend)
    token_ids, confidence = token_confidence(step.logits, exclude_token_id=MASK, backend=backend)
    torch.testing.assert_close(result.scores, scores)
    assert torch.equal(result.token_ids, token_ids)
    assert torch.equal(result.confidence, confidence)
    masked = tokens[:, 6:10] == MASK
    selected = select_tokens(result.scores, confidence, masked, tau=0.3, backend=backend)
    assert torch.equal(result.selected, selected)


def test_a_score_buffer_is_read_as_it_is(backend, device):
    step = small_step(device, tau=0.3)
    from_layers = step.copy().run(backend=backend)
    scores = from_layers.scores.clone()
    buffer = torch.full((2, 8), 9.0, device=device)
    buffer[:, ::2] = scores
    result = dataclasses.replace(step, layers=buffer[:, ::2]).run(backend=backend)
    assert result.scores.data_ptr() == buffer.data_ptr()
    assert torch.equal(buffer[:, ::2], scores)
    assert (buffer[:, 1::2] == 9.0).all()
    for name in ("tokens", "token_ids", "confidence", "selected"):
        assert torch.equal(getattr(result, name), getattr(from_layers, name))


def test_layers_without_lse_and_pairs(backend, device):
    step = small_step(device)
    with_lse = step.copy().run(backend=backend)
    for layers in ([(q, k, None) for q, k, _ in step.layers], [[q, k] for q, k, _ in step.layers]):
        result = dataclasses.replace(step.copy(), layers=layers).run(backend=backend)
        torch.testing.assert_close(result.scores, with_lse.scores)


def test_rows_masked_is_a_query_mask(backend, device):
    step = small_step(device)
    step.tokens[0, 7] = 9
    masked_rows = step.tokens == MASK
    expected = step.copy().run(query_mask=masked_rows, backend=backend)
    result = step.copy().run(query_rows="masked", backend=backend)
    assert torch.equal(result.scores, expected.scores)
    query_mask = torch.rand(2, 12, generator=torch.Generator().manual_seed(1)).to(device) < 0.5
    expected = step.copy().run(query_mask=masked_rows & query_mask, backend=backend)
    result = step.copy().run(query_rows="masked", query_mask=query_mask, backend=backend)
    assert torch.equal(result.scores, expected.scores)


def test_keys_that_are_not_aligned_with_the_tokens(backend, device):
    """A cache that dropped the first 4 tokens: the same attention at shifted columns."""
    step = small_step(device, query_rows="masked")
    layers = [(q[:, :, 4:], k[:, :, 4:], None) for q, k, _ in step.layers]
    key_mask = (torch.arange(12, device=device) >= 4).expand(2, 12)
    whole = [(q, k, None) for q, k, _ in step.layers]
    expected = dataclasses.replace(step.copy(), layers=whole).run(key_mask=key_mask, backend=backend)
    result = dataclasses.replace(step.copy(), layers=layers).run(columns=slice(2, 6), backend=backend)
    torch.testing.assert_close(result.scores, expected.scores)
    assert torch.equal(result.tokens, expected.tokens)


def test_steps_fill_the_block(backend, device):
    for rule, tau in (("sequential", 0.9), ("parallel", 1.0), ("parallel", 0.2)):
        step = small_step(device, rule=rule, tau=tau)
        step.tokens[1, 7] = 9
        given = step.tokens.clone()
        counts = []
        while (step.tokens[:, 6:10] == MASK).any():
            counts.append(step.run(backend=backend).selected.sum(dim=1).tolist())
        assert torch.tensor(counts).sum(dim=0).tolist() == [4, 3]
        if rule == "sequential":
            assert counts == [[1, 1], [1, 1], [1, 1], [1, 0]]
        outside = torch.ones(12, dtype=torch.bool)
        outside[6:10] = False
        assert torch.equal(step.tokens[:, outside], given[:, outside])
        assert step.tokens[1, 7] == 9
        # A full block stays as it is.
        after = step.tokens.clone()
        assert not step.run(backend=backend).selected.any()
        assert torch.equal(step.tokens, after)


def test_inputs_stay_as_they_are(backend, device):
    step = small_step(device, key_mask=torch.ones(2, 12, dtype=torch.bool, device=device))
    inputs = [*itertools.chain(*step.layers), step.logits, step.options["key_mask"]]
    before = [x.clone() for x in inputs]
    step.run(query_rows="masked", backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def test_undefined_scores_commit_nothing(backend, device):
    step = small_step(device)
    step.layers[1][1][0, 1, 7, 0] = torch.nan  # key 7 of sequence 0
    result = step.run(backend=backend)
    assert result.scores.isnan().nonzero().tolist() == [[0, 1]]
    assert not result.selected[0, 1]
    assert result.selected.any(dim=1).all()


def test_undefined_confidence_comes_last(backend, device):
    step = small_step(device)
    step.logits[0, :3] = torch.nan
    result = step.run(backend=backend)
    assert result.confidence.isnan().tolist() == [[True, True, True, False], [False] * 4]
    assert result.selected[0].tolist() == [False, False, False, True]


def test_every_element_of_the_outputs_is_written(backend, device):
    step = small_step(device)
    expected = step.copy().run(backend=backend)
    scores, confidence = (torch.full((2, 4), torch.nan, device=device) for _ in range(2))
    token_ids = torch.full((2, 4), -7, device=device)
    selected = torch.ones(2, 4, dtype=torch.bool, device=device)
    actual = StepResult(step.tokens, token_ids, confidence, scores, selected)
    attention = Attention(
        Span(6, 10), Span(0, 0), 0, 40**-0.5, "e", False, "sequence", True, "sum", False, False
    )
    sampling, selection = Sampling("probability", 0.0, 0), Selection("parallel", "confidence", 0.9)
    options = StepOptions(Span(6, 10), MASK, "all", attention, sampling, selection)
    layers = [Layer(*layer) for layer in step.layers]
    REGISTRY[backend].function("decode_step")(actual, step.logits, layers, Masks(), options)
    assert all(map(torch.equal, actual[:5], expected[:5]))


def test_no_sequences(backend, device):
    q, k = torch.zeros(0, 4, 12, 40, device=device), torch.zeros(0, 2, 12, 40, device=device)
    tokens = torch.zeros(0, 12, dtype=torch.int64, device=device)
    logits = torch.zeros(0, 4, VOCAB, device=device)
    result = decode_step(
        tokens, logits, [(q, k, None)], block=slice(6, 10), mask_token_id=MASK, backend=backend
    )
    assert result.selected.shape == (0, 4)


def test_twenty_reruns_give_the_same_bits(backend, device):
    step = small_step(device, temperature=0.7, seed=3, metric="entropy")
    first = step.copy().run(backend=backend)
    for _ in range(20):
        again = step.copy().run(backend=backend)
        assert all(map(torch.equal, again[:5], first[:5]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU tells a host synchronisation")
def test_no_host_synchronisation():
    for backend, rule in itertools.product(("auto", "reference"), ("parallel", "sequential")):
        step = small_step(torch.device("cuda"), rule=rule, temperature=0.7, seed=3)
        expected = step.copy().run(backend=backend)
        step = step.copy()
        torch.cuda.set_sync_debug_mode("error")
        try:
            result = step.run(backend=backend)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(result.tokens, expected.tokens)


def test_the_bits_do_not_depend_on_the_number_of_threads(backend, device):
    if backend == "reference":
        pytest.skip("the reference's matrix products are PyTorch's, which make no such promise")
    step = small_step(device, metric="entropy")
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(step.copy().run(backend=backend))
    finally:
        torch.set_num_threads(threads)
    for result in results:
        assert all(map(torch.equal, result[:5], results[0][:5]))
