"""Small trained models and their tasks, for demonstrations, tests and benchmarks without a download.

``load_model`` gives a LLaDA-like masked-diffusion language model of 0.37 million parameters, and
``load_task`` the problems that it was trained on, with their rules. There are two models for each task: that of
its name, which was trained to fill blanks, and one called ``NAME-edits``, which was trained to judge the tokens
that it sees too, as rules that take tokens back need it. Both functions import what they need when called;
importing this package costs nothing. ``MODEL_CARD.md`` beside this file says how the models were made and how
good they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .model import TinyMaskedLM
    from .tasks import Task

__all__ = ["MODELS", "TASKS", "load_model", "load_task"]

TASKS: tuple[str, ...] = ("sudoku", "addition")
MODELS: tuple[str, ...] = (*TASKS, *(f"{task}-edits" for task in TASKS))


def _require_known(kind: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise ValueError(f"unknown {kind} {name!r}: accepted are {', '.join(map(repr, known))}")


def load_task(task: str) -> Task:
    """Return the task of that name.

    Raises
    ------
    ValueError
        If ``task`` is not one of ``TASKS``.
    """
    _require_known("task", task, TASKS)
    from .tasks import Addition, Sudoku

    return Sudoku() if task == "sudoku" else Addition()


def load_model(name: str) -> TinyMaskedLM:
    """Return the bundled model of that name: evaluation mode, CPU, float32 from packaged float16.

    Raises
    ------
    ValueError
        If ``name`` is not one of ``MODELS``.
    """
    _require_known("model", name, MODELS)
    from .model import load_weights

    return load_weights(Path(__file__).with_name(f"{name}.safetensors"))
