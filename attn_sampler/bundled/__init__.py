"""Two small trained models and their tasks, for demonstrations, tests and benchmarks without a download.

``load_model`` gives a LLaDA-like masked-diffusion language model of 0.37 million parameters, and
``load_task`` the problems that it was trained on, with their rules. Both import what they need when called;
importing this package costs nothing. ``MODEL_CARD.md`` beside this file says how the models were made and how
good they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .model import TinyMaskedLM
    from .tasks import Task

__all__ = ["TASKS", "load_model", "load_task"]

TASKS: tuple[str, ...] = ("sudoku", "addition")


def _require_known(task: str) -> None:
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: accepted are {', '.join(map(repr, TASKS))}")


def load_task(task: str) -> Task:
    """Return the task of that name.

    Raises
    ------
    ValueError
        If ``task`` is not one of ``TASKS``.
    """
    _require_known(task)
    from .tasks import Addition, Sudoku

    return Sudoku() if task == "sudoku" else Addition()


def load_model(task: str) -> TinyMaskedLM:
    """Return the bundled model of that task: evaluation mode, CPU, float32 from packaged float16.

    Raises
    ------
    ValueError
        If ``task`` is not one of ``TASKS``.
    """
    _require_known(task)
    from .model import load_weights

    return load_weights(Path(__file__).with_name(f"{task}.safetensors"))
