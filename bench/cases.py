"""What is compared: cases over rows, and what each costs at least."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .problems import (
    Problem,
    Setting,
    all_columns_problem,
    attention_problem,
    block_scope_problem,
    columns_problem,
    confidence_problem,
    paged_problem,
    per_head_problem,
    revision_problem,
    sampled_problem,
    snapkv_problem,
    step_problem,
    sweep_problem,
    top_columns_problem,
    truncated_problem,
)
from .rows import (
    ALL_COLUMNS,
    BY_BATCH,
    BY_COLUMNS,
    BY_KEYS,
    BY_ROWS,
    DECODE,
    LONG,
    OBSERVED,
    PAGED,
    PEER,
    SNAPKV,
    VOCABULARY,
    Row,
)


class Case(NamedTuple):
    """A comparison over rows."""

    title: str
    rows: dict[str, Row]
    cost: Callable[[Row, int], tuple[float, float]]  # bytes and operations of a row, by the element's size
    make: Callable[[Row, Setting], Problem]
    tensor_bytes: Callable[[Row, int], float]  # what the problem itself holds


# Costs: what any method has to read and write, and to multiply and add.


def columns_cost(row: Row, element: int) -> tuple[float, float]:
    """Queries, log-sum-exp, the candidates' keys; one product of each."""
    n_queries = row.batch * row.heads * row.n_rows
    n_keys = row.batch * row.kv_heads * row.columns
    n_bytes = (
        n_queries * (row.headdim * element + 4) + n_keys * row.headdim * element + 4 * row.batch * row.columns
    )
    return n_bytes, 2.0 * n_queries * row.columns * row.headdim


def all_columns_cost(row: Row, element: int) -> tuple[float, float]:
    """Queries, all keys; every visible product once."""
    n_queries = row.batch * row.heads * row.n_rows
    n_bytes = (n_queries + row.batch * row.kv_heads * row.n_keys) * row.headdim * element
    n_bytes += 4 * row.batch * row.heads * row.columns
    visible = row.n_keys - (row.n_rows - 1) / 2 if row.causal else row.n_keys
    return n_bytes, 2.0 * n_queries * visible * row.headdim


def top_columns_cost(row: Row, element: int) -> tuple[float, float]:
    """As with all columns, but for what is written; and the log-sum-exp."""
    n_bytes, operations = all_columns_cost(row, element)
    chosen = row.batch * row.kv_heads * max(1, row.n_keys // 16)
    written = 12 * chosen - 4 * row.batch * row.heads * row.columns
    return n_bytes + written + 4 * row.batch * row.heads * row.n_rows, operations


def snapkv_cost(row: Row, element: int) -> tuple[float, float]:
    """As with all columns, but for what is written."""
    n_bytes, operations = all_columns_cost(row, element)
    chosen = row.batch * row.kv_heads * (row.n_keys + row.n_rows) / 2
    return n_bytes + 8 * chosen - 4 * row.batch * row.heads * row.columns, operations


def block_scope_cost(row: Row, element: int) -> tuple[float, float]:
    """As with the log-sum-exp given, the rows being the block's."""
    n_bytes, operations = columns_cost(row._replace(n_rows=row.columns), element)
    return n_bytes - 4 * row.batch * row.heads * row.columns, operations


def attention_cost(row: Row, element: int) -> tuple[float, float]:
    """Queries, keys, values, output; two products, and the candidates' once more."""
    n_queries = row.batch * row.heads * row.n_rows
    n_bytes = 2.0 * (n_queries + row.batch * row.kv_heads * row.n_keys) * row.headdim * element
    return n_bytes, 4.0 * n_queries * row.n_keys * row.headdim + columns_cost(row, element)[1]


def confidence_cost(row: Row, element: int) -> tuple[float, float]:
    """Every logit once."""
    return row.batch * row.columns * (row.vocab * element + 12.0), 0.0


def step_cost(row: Row, element: int) -> tuple[float, float]:
    """The scores of all layers, and the confidence."""
    n_bytes, operations = columns_cost(row, element)
    return row.layers * n_bytes + confidence_cost(row, element)[0], row.layers * operations


def _attention_bytes(row: Row, element: int) -> float:
    return (row.heads * row.n_rows + row.kv_heads * row.n_keys) * row.batch * row.headdim * element * 1.0


def _logits_bytes(row: Row, element: int) -> float:
    return 1.0 * row.batch * row.columns * row.vocab * element


def _step_bytes(row: Row, element: int) -> float:
    return _attention_bytes(row, element) + step_cost(row, element)[0]


#: In order of what is missed most where time runs out.
CASES = {
    "columns": Case(
        "Column scores of the candidates, log-sum-exp given",
        DECODE,
        columns_cost,
        columns_problem,
        _attention_bytes,
    ),
    "step": Case("A whole decoding step, all layers", DECODE, step_cost, step_problem, _step_bytes),
    "revision": Case(
        "A step that revises, beside one that does not", DECODE, step_cost, revision_problem, _step_bytes
    ),
    "confidence": Case(
        "Token confidence, greedy", VOCABULARY, confidence_cost, confidence_problem, _logits_bytes
    ),
    "peer": Case(
        "flash-colreduce's rows: all keys, per head, no log-sum-exp",
        PEER,
        all_columns_cost,
        per_head_problem,
        _attention_bytes,
    ),
    "all_columns": Case(
        "Column scores of all keys, no log-sum-exp",
        ALL_COLUMNS,
        all_columns_cost,
        all_columns_problem,
        _attention_bytes,
    ),
    "top_columns": Case(
        "The keys of a long context that matter, a 16th of them, log-sum-exp given",
        LONG,
        top_columns_cost,
        top_columns_problem,
        _attention_bytes,
    ),
    "snapkv": Case(
        "SnapKV's choice: the window of the last queries, and half of the other keys",
        SNAPKV,
        snapkv_cost,
        snapkv_problem,
        _attention_bytes,
    ),
    "observed": Case(
        "H2O's scores: all keys by all later queries, per head",
        OBSERVED,
        all_columns_cost,
        per_head_problem,
        _attention_bytes,
    ),
    "paged": Case(
        "Keys in pages of 16, beside keys that lie together, log-sum-exp given",
        PAGED,
        columns_cost,
        paged_problem,
        lambda row, element: 3 * _attention_bytes(row, element),
    ),
    "paged_all": Case(
        "The same of all keys, no log-sum-exp",
        ALL_COLUMNS,
        all_columns_cost,
        paged_problem,
        lambda row, element: 3 * _attention_bytes(row, element),
    ),
    "by_keys": Case(
        "Column scores by context length", BY_KEYS, columns_cost, sweep_problem, _attention_bytes
    ),
    "by_rows": Case("Column scores by rows", BY_ROWS, columns_cost, sweep_problem, _attention_bytes),
    "by_columns": Case(
        "Column scores by candidates", BY_COLUMNS, columns_cost, sweep_problem, _attention_bytes
    ),
    "by_batch": Case("Column scores by batch", BY_BATCH, columns_cost, sweep_problem, _attention_bytes),
    "block_scope": Case(
        "Column scores in block scope", DECODE, block_scope_cost, block_scope_problem, _attention_bytes
    ),
    "truncated": Case(
        "Token confidence, drawn from top_k 50 and top_p 0.9",
        VOCABULARY,
        confidence_cost,
        truncated_problem,
        _logits_bytes,
    ),
    "sampled": Case("Token confidence, sampled", VOCABULARY, confidence_cost, sampled_problem, _logits_bytes),
    "attention": Case(
        "A layer's attention together with its scores",
        DECODE,
        attention_cost,
        attention_problem,
        lambda row, element: 2 * _attention_bytes(row, element),
    ),
}
