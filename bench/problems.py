"""A row with its tensors in place: ours on each backend, the rivals, and the truth."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attn_sampler import (
    column_scores,
    decode_step,
    is_backend_supported,
    reference,
    token_confidence,
    top_columns,
)
from attn_sampler.attention_calls import attention_with_lse

from . import rivals
from .rows import Row

_TEMPERATURE, _SEED = 0.8, 1234
# Relative to the largest true value. Rivals round products to the inputs' 8 or 11 bits; we do not.
OUR_TOLERANCE, RIVAL_TOLERANCE = 1e-4, 3e-2

# Every shape is a new graph to torch.compile, which would fall back to eager after eight of them.
torch._dynamo.config.cache_size_limit = 256


class Candidate(NamedTuple):
    """One way to do the work."""

    run: Callable[[], Any]
    ours: bool = False
    scratch_bytes: float = 0.0  # what it materialises, estimated: no run that would not fit
    compiled: bool = False  # its first run compiles


class Problem(NamedTuple):
    """A row with its tensors in place."""

    candidates: dict[str, Candidate]
    error: Callable[[Any, bool], float]  # of a result (ours or not), relative to the truth
    reset: Callable[[], Any] = lambda: None  # before each sample, outside the clock


class Setting(NamedTuple):
    """Where and in what precision a case runs."""

    device: str
    dtype: torch.dtype
    backends: tuple[str, ...]

    @property
    def element(self) -> int:
        return self.dtype.itemsize

    def ours(
        self, op: str, tensors: tuple[Tensor, ...], call: Callable[[str], Any], scratch_bytes: float = 0.0
    ) -> dict[str, Candidate]:
        """The call on every backend asked for that serves it here."""
        return {
            backend: Candidate(
                lambda backend=backend: call(backend),
                ours=True,
                scratch_bytes=scratch_bytes if backend == "reference" else 0.0,
            )
            for backend in self.backends
            if is_backend_supported(op, backend, *tensors).supported
        }


def _matrix_bytes(row: Row, element: int) -> float:
    """The attention matrix in the inputs' precision twice and in float32 twice."""
    return 1.0 * row.batch * row.heads * row.n_rows * row.n_keys * (2 * element + 8)


# Problems. An error function raises WrongResultError where no figure can express what is wrong.


class WrongResultError(Exception):
    """A result that must not be timed."""


def require(condition: bool, otherwise: str) -> None:
    """Raise WrongResultError unless the condition holds."""
    if not condition:
        raise WrongResultError(otherwise)


def relative_error(result: Tensor, exact: Tensor) -> float:
    """The largest difference over the largest true value; infinite where a value is not finite."""
    require(result.shape == exact.shape, f"shape {tuple(result.shape)}, expected {tuple(exact.shape)}")
    difference = (result.double() - exact.double()).abs().max()
    error = float(difference / exact.double().abs().max())
    return error if error == error else float("inf")


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function under torch.compile with dynamic shapes, so that rows share what they can."""
    return torch.compile(function, dynamic=True)


@functools.cache
def flash_colreduce() -> Callable[..., Tensor] | None:
    """The peer's function, None where it is not installed."""
    if importlib.util.find_spec("flash_colreduce") is None:
        return None
    return importlib.import_module("flash_colreduce").flash_colreduce


def columns_problem(row: Row, setting: Setting) -> Problem:
    """Scores of the candidate columns of one layer, the log-sum-exp given."""
    q, k = row.attention(setting.dtype, setting.device)
    lse = row.softmax_lse(q, k)
    exact = rivals.block_scores(q.double(), k.double(), lse.double(), row.block)
    matrix = _matrix_bytes(row, setting.element)

    def call(backend: str) -> Tensor:
        return column_scores(q, k, columns=row.block, softmax_lse=lse, backend=backend)

    candidates = setting.ours("column_scores", (q, k), call, matrix)
    candidates |= {
        "block matmul": Candidate(lambda: rivals.block_scores(q, k, lse, row.block)),
        "torch.compile": Candidate(
            lambda: compiled(rivals.block_scores)(q, k, lse, row.block), compiled=True
        ),
        "naive, no LSE": Candidate(lambda: rivals.naive_scores(q, k, row.block), scratch_bytes=matrix),
        "tiled, no LSE": Candidate(lambda: rivals.tiled_scores(q, k, row.block)),
    }
    return Problem(candidates, lambda result, ours: relative_error(result, exact))


def sweep_problem(row: Row, setting: Setting) -> Problem:
    """The same without torch.compile, which would compile at every step of the sweep."""
    problem = columns_problem(row, setting)
    return problem._replace(candidates={n: c for n, c in problem.candidates.items() if not c.compiled})


def all_columns_problem(row: Row, setting: Setting, per_head: bool = False) -> Problem:
    """Scores of all columns, the log-sum-exp not given."""
    q, k = row.attention(setting.dtype, setting.device)
    matrix = _matrix_bytes(row, setting.element)
    arguments = (q, k, row.block, row.causal, per_head)

    def call(backend: str) -> Tensor:
        return column_scores(q, k, causal=row.causal, per_head=per_head, backend=backend)

    candidates = setting.ours("column_scores", (q, k), call, matrix)
    candidates |= {
        "naive": Candidate(lambda: rivals.naive_scores(*arguments), scratch_bytes=matrix),
        "tiled": Candidate(lambda: rivals.tiled_scores(*arguments)),
        "torch.compile": Candidate(
            lambda: compiled(rivals.naive_scores)(*arguments), scratch_bytes=matrix, compiled=True
        ),
    }
    if per_head and setting.device == "cuda" and (colreduce := flash_colreduce()) is not None:
        candidates["flash-colreduce"] = Candidate(
            lambda: colreduce(q, k, reduction="sum", is_causal=row.causal)
        )
    # One sequence in float64 (of separate heads, the first) is the truth; all others by what they add up to.
    heads = slice(0, 1) if per_head else slice(None)
    exact = rivals.tiled_scores(q[:1, heads].double(), k[:1, heads].double(), row.block, row.causal, per_head)

    def error(result: Tensor, ours: bool) -> float:
        totals = result.double().sum(dim=-1)
        expected = torch.full_like(totals, row.n_rows if per_head else row.heads * row.n_rows)
        first = result[:1, heads] if per_head else result[:1]
        return max(relative_error(totals, expected), relative_error(first, exact))

    return Problem(candidates, error)


def per_head_problem(row: Row, setting: Setting) -> Problem:
    """All columns, the heads kept apart: what flash-colreduce does."""
    return all_columns_problem(row, setting, per_head=True)


def top_columns_problem(row: Row, setting: Setting) -> Problem:
    """A 16th of the keys for each key head, the log-sum-exp given."""
    q, k = row.attention(setting.dtype, setting.device)
    lse, count = row.softmax_lse(q, k), max(1, row.n_keys // 16)
    matrix = _matrix_bytes(row, setting.element)

    def call(backend: str) -> tuple[Tensor, Tensor]:
        return top_columns(q, k, count=count, softmax_lse=lse, backend=backend)

    def then_topk() -> tuple[Tensor, Tensor]:
        scores = column_scores(q, k, softmax_lse=lse, per_head=True)
        found = scores.unflatten(1, (row.kv_heads, -1)).sum(dim=2).topk(count)
        return found.indices, found.values

    candidates = setting.ours("top_columns", (q, k), call, matrix)
    candidates |= {
        "column_scores, topk": Candidate(then_topk),
        "PyTorch": Candidate(lambda: rivals.top_columns(q, k, lse, count), scratch_bytes=matrix),
        "torch.compile": Candidate(
            lambda: compiled(rivals.top_columns)(q, k, lse, count), scratch_bytes=matrix, compiled=True
        ),
    }
    exact = []
    for h in range(row.kv_heads):  # a key head at a time, as the log-sum-exp
        group = slice(h * row.heads // row.kv_heads, (h + 1) * row.heads // row.kv_heads)
        keys, of_group = k[:, h : h + 1].double(), lse[:, group].double()
        exact.append(rivals.block_scores(q[:, group].double(), keys, of_group, row.block))
    scores = torch.stack(exact, dim=1)
    largest = scores.topk(count).values

    def error(result: tuple[Tensor, Tensor], ours: bool) -> float:
        positions, found = result
        return max(relative_error(found, largest), relative_error(scores.gather(-1, positions), largest))

    return Problem(candidates, error)


def snapkv_problem(row: Row, setting: Setting) -> Problem:
    """The window of the last queries and half of the other keys, by scores pooled over five."""
    q, k = row.attention(setting.dtype, setting.device)
    window, width = row.n_rows, 5
    n_others = (row.n_keys - window) // 2
    count, matrix = window + n_others, _matrix_bytes(row, setting.element)

    def call(backend: str) -> Tensor:
        how: dict[str, Any] = {"recent": window, "pool": ("mean", width), "backend": backend}
        return top_columns(q, k, count=count, causal=True, **how).positions

    candidates = setting.ours("top_columns", (q, k), call, matrix)
    candidates |= {
        "PyTorch": Candidate(lambda: rivals.snapkv(q, k, count, width), scratch_bytes=matrix),
        "torch.compile": Candidate(
            lambda: compiled(rivals.snapkv)(q, k, count, width), scratch_bytes=matrix, compiled=True
        ),
    }
    whole = slice(0, row.n_keys)
    exact = rivals.tiled_scores(q.double(), k.double(), whole, causal=True, per_head=True).double()
    exact = exact[..., :-window].unflatten(1, (row.kv_heads, -1)).sum(dim=2)
    exact = torch.nn.functional.avg_pool1d(exact, width, stride=1, padding=width // 2)
    largest = exact.topk(n_others).values

    def error(positions: Tensor, ours: bool) -> float:
        kept = positions[..., :window].sort(dim=-1).values
        last = torch.arange(row.n_keys - window, row.n_keys, device=kept.device)
        require(bool((kept == last).all()), "the window is not kept")
        others = positions[..., window:]
        require(bool((others.sort(dim=-1).values.diff(dim=-1) > 0).all()), "a key is chosen twice")
        require(bool((others < row.n_keys - window).all()), "a key of the window is chosen twice")
        return relative_error(exact.gather(-1, others), largest)

    return Problem(candidates, error)


def paged_problem(row: Row, setting: Setting) -> Problem:
    """Scores of the candidate columns, or of all, with the keys in shuffled pages of a cache and together."""
    q, k = row.attention(setting.dtype, setting.device)
    is_all = row.columns == row.n_keys
    lse = None if is_all else row.softmax_lse(q, k)
    how: dict[str, Any] = {"columns": row.block, "softmax_lse": lse}
    if is_all:
        exact = rivals.tiled_scores(q.double(), k.double(), row.block)
    else:
        exact = rivals.block_scores(q.double(), k.double(), row.softmax_lse(q, k).double(), row.block)
    tokens = k.transpose(1, 2).contiguous()  # [B, N, Hkv, D], as engines cache them
    together = tokens.transpose(1, 2)

    def in_pages(page_size: int) -> tuple[Tensor, Tensor]:
        """The cache [pages, Hkv, page_size, D] and the table; of fewer keys, smaller pages."""
        page_size = math.gcd(page_size, row.n_keys)
        table = torch.randperm(
            row.batch * row.n_keys // page_size, generator=torch.Generator().manual_seed(0)
        )
        table = table.to(setting.device)
        cache = torch.empty(len(table), *(page_size, *tokens.shape[2:]), device=k.device, dtype=k.dtype)
        cache[table] = tokens.reshape(cache.shape)
        return cache.transpose(1, 2), table.reshape(row.batch, -1).int()

    matrix, candidates = _matrix_bytes(row, setting.element), {}
    for page_size in (16, 32, 1):
        cache, table = in_pages(page_size)
        call = functools.partial(column_scores, q, cache, block_table=table, **how)
        ours = setting.ours("column_scores", (q, k), lambda backend, call=call: call(backend=backend), matrix)
        for backend, candidate in ours.items():
            name = backend if page_size == 16 else f"{backend}, pages of {page_size}"
            candidates[name] = candidate._replace(ours=page_size == 16)
    plain = setting.ours(
        "column_scores", (q, k), lambda backend: column_scores(q, together, backend=backend, **how), matrix
    )
    for backend, candidate in plain.items():
        candidates[f"{backend}, together"] = candidate._replace(ours=False)
    return Problem(candidates, lambda result, ours: relative_error(result, exact))


def block_scope_problem(row: Row, setting: Setting) -> Problem:
    """The paper's block approximation: queries, keys and softmax of the block alone."""
    q, k = row.attention(setting.dtype, setting.device)
    exact = rivals.block_scope_scores(q.double(), k.double(), row.block)

    def call(backend: str) -> Tensor:
        return column_scores(q, k, columns=row.block, softmax_scope="block", backend=backend)

    candidates = setting.ours("column_scores", (q, k), call, _matrix_bytes(row, setting.element))
    candidates |= {
        "PyTorch": Candidate(lambda: rivals.block_scope_scores(q, k, row.block)),
    }
    return Problem(candidates, lambda result, ours: relative_error(result, exact))


def attention_problem(row: Row, setting: Setting) -> Problem:
    """A layer's attention together with the candidates' scores."""
    q, k = row.attention(setting.dtype, setting.device)
    v = torch.randn_like(k)
    exact = rivals.block_scores(q.double(), k.double(), row.softmax_lse(q, k).double(), row.block)
    gqa = {"enable_gqa": row.heads != row.kv_heads}
    expected = scaled_dot_product_attention(q[:1].float(), k[:1].float(), v[:1].float(), **gqa)
    matrix = _matrix_bytes(row, setting.element)

    def call(backend: str) -> tuple[Tensor, Tensor]:
        output, softmax_lse = attention_with_lse(q, k, v, **gqa)
        return output, column_scores(q, k, columns=row.block, softmax_lse=softmax_lse, backend=backend)

    candidates = setting.ours("column_scores", (q, k), call, matrix)
    candidates |= {
        "attention alone": Candidate(lambda: (scaled_dot_product_attention(q, k, v, **gqa), None)),
        "output_attentions": Candidate(
            lambda: rivals.output_attentions(q, k, v, row.block), scratch_bytes=matrix
        ),
    }

    def error(result: tuple[Tensor, Tensor | None], ours: bool) -> float:
        output, scores = result
        # The output is PyTorch's in all of them, in the inputs' precision.
        off = relative_error(output[:1], expected)
        require(off < RIVAL_TOLERANCE, f"the attention's output is off by {off:.2g}")
        return 0.0 if scores is None else relative_error(scores, exact)

    return Problem(candidates, error)


class _Probabilities:
    """The truth about logits: the float64 probability of any token."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.largest = logits.amax(dim=-1)
        self.log_total = torch.stack([torch.logsumexp(x.double(), dim=-1) for x in logits])

    def error(self, token_ids: Tensor, confidence: Tensor, greedy: bool) -> float:
        """Of the confidence; the tokens themselves are right or wrong."""
        chosen = self.logits.gather(-1, token_ids[..., None]).squeeze(-1)
        if greedy:
            require(torch.equal(chosen, self.largest), "not the most probable token")
        return relative_error(confidence, torch.exp(chosen.double() - self.log_total))


def confidence_problem(row: Row, setting: Setting) -> Problem:
    """The most probable token of every candidate, and its probability."""
    logits = row.logits(setting.dtype, setting.device)
    truth = _Probabilities(logits)
    candidates = setting.ours(
        "token_confidence",
        (logits,),
        lambda backend: token_confidence(logits, backend=backend),
        16.0 * logits.numel(),
    )
    candidates |= {
        "softmax + max": Candidate(lambda: rivals.softmax_max(logits), scratch_bytes=8.0 * logits.numel()),
        "torch.compile": Candidate(lambda: compiled(rivals.softmax_max)(logits), compiled=True),
        "LLaDA, float64": Candidate(
            lambda: rivals.llada_confidence(logits), scratch_bytes=16.0 * logits.numel()
        ),
    }
    return Problem(candidates, lambda result, ours: truth.error(*result, greedy=True))


def sampled_problem(row: Row, setting: Setting) -> Problem:
    """A token sampled for every candidate, and its probability; ours from the specified random stream."""
    logits = row.logits(setting.dtype, setting.device)
    truth = _Probabilities(logits)
    few = logits[:, :2][[0, -1]]  # the noise depends on the position in the block and the token alone
    expected, _ = reference.token_confidence(few, temperature=_TEMPERATURE, seed=_SEED)
    candidates = setting.ours(
        "token_confidence",
        (logits,),
        lambda backend: token_confidence(logits, temperature=_TEMPERATURE, seed=_SEED, backend=backend),
        200.0 * logits.numel(),
    )
    candidates |= {
        "Gumbel, float32": Candidate(
            lambda: rivals.softmax_sample(logits, _TEMPERATURE), scratch_bytes=24.0 * logits.numel()
        ),
        "torch.compile": Candidate(
            lambda: compiled(rivals.softmax_sample)(logits, _TEMPERATURE),
            scratch_bytes=8.0 * logits.numel(),
            compiled=True,
        ),
        "LLaDA, float64": Candidate(
            lambda: rivals.llada_confidence(logits, _TEMPERATURE), scratch_bytes=40.0 * logits.numel()
        ),
    }

    def error(result: tuple[Tensor, Tensor], ours: bool) -> float:
        if ours:
            first = result[0][:, :2][[0, -1]]
            require(torch.equal(first, expected), "not the specified random stream")
        return truth.error(*result, greedy=False)

    return Problem(candidates, error)


def truncated_problem(row: Row, setting: Setting) -> Problem:
    """Tokens drawn from some of the vocabulary, in several ways, and from all of it."""
    logits = row.logits(setting.dtype, setting.device)
    truth = _Probabilities(logits)
    ways: dict[str, dict[str, Any]] = {
        "": {"top_k": 50, "top_p": 0.9},
        ", top_k 50": {"top_k": 50},
        ", top_k 1000": {"top_k": 1000},
        ", top_p 0.9": {"top_p": 0.9},
        ", min_p 0.05": {"min_p": 0.05},
        ", each row by its own": {
            "top_k": torch.full((row.batch,), 50, dtype=torch.int32, device=setting.device),
            "top_p": torch.full((row.batch,), 0.9, device=setting.device),
        },
        ", all tokens": {},
    }
    few = logits[:, :2][[0, -1]]
    expected, _ = reference.token_confidence(few, temperature=_TEMPERATURE, seed=_SEED, **ways[""])
    candidates = {}
    for name, way in ways.items():
        call = functools.partial(token_confidence, logits, temperature=_TEMPERATURE, seed=_SEED, **way)
        ours = setting.ours(
            "token_confidence",
            (logits,),
            lambda backend, call=call: call(backend=backend),
            200.0 * logits.numel(),
        )
        for backend, candidate in ours.items():
            candidates[backend + name] = candidate._replace(ours=name == "")
    candidates["sorted, float32"] = Candidate(
        lambda: rivals.truncated_sample(logits, _TEMPERATURE, 50, 0.9), scratch_bytes=40.0 * logits.numel()
    )

    def error(result: tuple[Tensor, Tensor], ours: bool) -> float:
        if ours:
            first = result[0][:, :2][[0, -1]]
            require(torch.equal(first, expected), "not the specified random stream")
        return truth.error(*result, greedy=False)

    return Problem(candidates, error)


class _Step(NamedTuple):
    """The tensors of a decoding step, and how its layers are read."""

    layers: list[tuple[Tensor, Tensor, Tensor]]  # each with its own queries and its candidates' keys
    exact: Tensor  # their scores
    logits: Tensor
    truth: _Probabilities
    tokens: Tensor
    options: dict[str, Any]

    @classmethod
    def of(cls, row: Row, setting: Setting) -> _Step:
        q, k = row.attention(setting.dtype, setting.device)
        lse = row.softmax_lse(q, k)
        exact = row.layers * rivals.block_scores(q.double(), k.double(), lse.double(), row.block)
        layers = [(q.clone(), k[:, :, row.block].clone(), lse.clone()) for _ in range(row.layers)]
        mask = row.vocab - 1
        logits = row.logits(setting.dtype, setting.device)
        logits[..., mask] = -torch.inf  # ours never predicts the mask token; the rivals must not either
        tokens = torch.zeros(row.batch, row.n_keys, dtype=torch.int64, device=setting.device)
        tokens[:, row.block] = mask
        options = {
            "block": row.block,
            "mask_token_id": mask,
            "columns": slice(0, row.columns),
            "query_start": row.columns - row.n_rows,
        }
        return cls(layers, exact, logits, _Probabilities(logits), tokens, options)


def step_problem(row: Row, setting: Setting) -> Problem:
    """A whole decoding step over all layers."""
    layers, exact, logits, truth, tokens, options = _Step.of(row, setting)
    mask, start = options["mask_token_id"], tokens.clone()
    candidates = setting.ours(
        "decode_step",
        (logits, layers[0][0], layers[0][1]),
        lambda backend: decode_step(tokens, logits, layers, backend=backend, **options),
        16.0 * logits.numel(),
    )
    arguments = (tokens, row.block, logits, layers, mask)
    parts = {"scores_of": compiled(rivals.block_scores), "confidence_of": compiled(rivals.softmax_max)}
    candidates |= {
        "PyTorch": Candidate(lambda: rivals.attention_step(*arguments), scratch_bytes=8.0 * logits.numel()),
        "torch.compile": Candidate(lambda: rivals.attention_step(*arguments, **parts), compiled=True),
        "LLaDA, no attention": Candidate(
            lambda: rivals.llada_step(tokens, row.block, logits, mask), scratch_bytes=16.0 * logits.numel()
        ),
    }

    def error(result: Any, ours: bool) -> float:
        if ours:
            selected = reference.select_tokens(
                result.scores, result.confidence, torch.ones_like(result.selected)
            )
            require(torch.equal(result.selected, selected), "not the tokens that the rule selects")
            expected = torch.where(selected, result.token_ids, start[:, row.block])
            filled = result.tokens[:, row.block]
            require(torch.equal(filled, expected), "not the tokens that were selected")
            result = (result.token_ids, result.confidence, result.scores)
        token_ids, confidence, *scores = result
        errors = [truth.error(token_ids, confidence, greedy=True)]
        return max(errors + [relative_error(s, exact) for s in scores])

    return Problem(candidates, error, lambda: tokens.copy_(start))


def revision_problem(row: Row, setting: Setting) -> Problem:
    """A step that may replace and re-mask the half of the block that stands, beside one that only commits."""
    layers, _, logits, truth, tokens, options = _Step.of(row, setting)
    options["rule"], mask = "threshold", options["mask_token_id"]
    tokens[:, row.block][:, 1::2] = 0
    start = tokens.clone()
    budget = torch.full((row.batch, row.columns), 3, dtype=torch.int32, device=setting.device)
    revision = {"replace_tau": 0.9, "remask_tau": 0.5, "max_revisions": 4}

    def plain(backend: str) -> Any:
        return decode_step(tokens, logits, layers, backend=backend, **options)[1:4]

    def revising(backend: str) -> Any:
        return decode_step(tokens, logits, layers, budget=budget, backend=backend, **options, **revision)

    tensors, scratch = (logits, layers[0][0], layers[0][1]), 16.0 * logits.numel()
    candidates = setting.ours("decode_step", tensors, revising, scratch)
    for backend, candidate in setting.ours("decode_step", tensors, plain, scratch).items():
        candidates[f"{backend}, only committing"] = candidate._replace(ours=False)

    def error(result: Any, ours: bool) -> float:
        if ours:
            stood = start[:, row.block]
            chosen = logits.gather(-1, stood[..., None]).squeeze(-1).double()
            exact = torch.exp(chosen - truth.log_total)
            require(relative_error(result.current, exact) < OUR_TOLERANCE, "not the current probabilities")
            seen = (result.scores, result.confidence, stood == mask, result.current)
            fresh = torch.full_like(budget, 3)
            expected = reference.revise_tokens(*seen, result.token_ids != stood, fresh, **revision)
            require(torch.equal(result.revised, expected), "not the revisions of the rule")
            require(row.columns == 1 or bool(expected.any()), "nothing is revised")
            result = result[1:4]
        token_ids, confidence, _ = result
        return truth.error(token_ids, confidence, greedy=True)

    def reset() -> None:
        tokens.copy_(start)
        budget.fill_(3)

    return Problem(candidates, error, reset)
