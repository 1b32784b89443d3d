"""What an evaluation decodes: problems with known answers, and the models that decode them."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attn_sampler import documents
from attn_sampler.bundled import MODELS, load_task
from attn_sampler.bundled import load_model as load_bundled_model
from attn_sampler.bundled.model import load_weights
from attn_sampler.bundled.tasks import Addition, Task, make_sudoku_puzzles

#: Names of the bundled problem sets; a suffix says which number of an addition is blank.
BUNDLED = ("sudoku", "addition", "addition-first", "addition-second")
#: Disjoint problems: rules and thresholds are chosen on "dev" and reported on "heldout".
SPLITS = ("heldout", "dev")
_DEV_SEED = 21


@dataclasses.dataclass
class EvaluatedModel:
    """A model, and what decoding with it needs to know."""

    model: Callable[..., Any]  # as ``generate`` takes it
    mask_token_id: int
    tokenizer: Any = None  # with ``encode(text, add_special_tokens=False)``, for problems given as text
    #: Further keywords of ``generate``, such as ``logit_shift``; a ``block_length`` here comes before others.
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def vocab_size(self) -> int | None:
        """How many tokens there are; None where the model's config does not say."""
        model = getattr(self.model, "model", self.model)  # of an adapter
        size = getattr(getattr(model, "config", None), "vocab_size", None)
        return size if isinstance(size, int) else None


def load_model(
    spec: str, device: str = "cpu", *, family: str | None = None, trust_remote_code: bool = False
) -> EvaluatedModel:
    """The model that ``spec`` names.

    Parameters
    ----------
    spec
        A bundled task or a name of ``bundled.MODELS``; a ``.safetensors`` file of ``bundled.model.save_weights``, or a folder that holds
        exactly one; ``hub:ID`` or ``hub:FOLDER`` for a checkpoint of a family in ``adapters.models``; or
        ``module:function``, called without arguments for an ``EvaluatedModel``.
    device
        Of the model; one that ``module:function`` made is moved if it is a module.
    family, trust_remote_code
        Of a checkpoint: a name of ``adapters.models.FAMILIES`` (default: by its model_type), and whether
        code that comes with it may run.

    Raises
    ------
    ValueError
        It names none of these.
    adapters.run.LoadError
        The checkpoint cannot be had or decoded here.
    """
    if spec in BUNDLED or spec in MODELS:
        model = load_bundled_model(spec if spec in MODELS else spec.partition("-")[0]).to(device)
        return EvaluatedModel(model, model.mask_token_id)
    path = Path(spec)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if path.is_dir() and len(files) != 1:
        raise ValueError(f"model: expected one .safetensors file in {spec}, got {len(files)}")
    if files[0].is_file():
        model = load_weights(files[0]).to(device)
        return EvaluatedModel(model, model.mask_token_id)
    prefix, colon, rest = spec.partition(":")
    if not colon or not rest:
        raise ValueError(
            f"model: expected a bundled model ({', '.join(MODELS)}), a .safetensors file, a folder with "
            f"one, hub:ID or module:function, got {spec!r}"
        )
    if prefix == "hub":
        from attn_sampler.adapters.run import load

        adapter, tokenizer, options = load(
            rest, family=family, device=device, trust_remote_code=trust_remote_code
        )
        return EvaluatedModel(adapter, options.pop("mask_token_id"), tokenizer, options)
    try:
        function = getattr(importlib.import_module(prefix), rest)
        inspect.signature(function).bind()  # that it can be called; what it raises itself is its author's
    except (ImportError, AttributeError, SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"model: {spec!r} cannot be loaded: {error}") from error
    loaded = function()
    if not isinstance(loaded, EvaluatedModel):
        raise ValueError(f"model: {spec} must return an EvaluatedModel, got {type(loaded).__name__}")
    if isinstance(loaded.model, torch.nn.Module):
        loaded.model.to(device)
    return loaded


@dataclasses.dataclass
class ProblemSet:
    """Problems of one task."""

    name: str
    prompts: list[Tensor]  # int64 [L] each, the mask token at the blanks
    answers: list[Tensor]  # int64 each: the true tokens of the blanks
    block_length: int
    task: Task | None = None  # whose rules judge an answer; without it the true answer does
    #: More to know of a filled prompt, int64 [L], by name: whether it parses, for example.
    measures: dict[str, Callable[[Tensor], bool]] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    def check_model(self, model: EvaluatedModel) -> None:
        """Raise ValueError where the model does not know a token, or its mask token is at no blank."""
        size = math.inf if model.vocab_size is None else model.vocab_size
        for number, (prompt, answer) in enumerate(zip(self.prompts, self.answers, strict=True), start=1):
            largest = int(torch.cat([prompt, answer]).max())
            if largest >= size:
                raise ValueError(
                    f"{self.name}, problem {number}: expected token ids below {size}, the model's "
                    f"vocabulary, got {largest}"
                )
            if (blanks := int((prompt == model.mask_token_id).sum())) != len(answer):
                raise ValueError(
                    f"{self.name}, problem {number}: expected the model's mask token, "
                    f"{model.mask_token_id}, at the {len(answer)} blanks, got it at {blanks} positions"
                )

    @property
    def fingerprint(self) -> str:
        """Changes with the problems."""
        rows = [(p.tolist(), a.tolist()) for p, a in zip(self.prompts, self.answers, strict=True)]
        return hashlib.sha256(json.dumps([self.block_length, rows]).encode()).hexdigest()[:16]

    def truth(self, index: int, mask_token_id: int) -> Tensor:
        """The prompt with its blanks filled by the true answer."""
        tokens = self.prompts[index].clone()
        tokens[tokens == mask_token_id] = self.answers[index]
        return tokens

    def judge(self, index: int, tokens: Tensor, mask_token_id: int) -> bool:
        """Whether ``tokens``, the prompt filled in, is a right answer."""
        if self.task is not None:
            return bool(self.task.check(tokens[None].numpy(), self.prompts[index][None].numpy())[0])
        return torch.equal(tokens, self.truth(index, mask_token_id))


def bundled_problems(name: str, count: int, split: str = "heldout") -> ProblemSet:
    """Problems of a bundled task, none of them seen in training, and none in two splits.

    Raises
    ------
    ValueError
        An unknown name or split, or more problems than are packaged.
    """
    if name not in BUNDLED or split not in SPLITS:
        raise ValueError(
            f"task and split: expected one of {BUNDLED} and of {SPLITS}, got {name!r}, {split!r}"
        )
    task = load_task(name.partition("-")[0])
    dev = split == "dev"
    if isinstance(task, Addition):
        blank = name.partition("-")[2] or "sum"
        prompt, solution = task.problems(count, seed=_DEV_SEED if dev else 0, blank=blank)
    elif dev:
        prompt, solution = make_sudoku_puzzles(count, _DEV_SEED)
    else:
        prompt, solution = task.problems(count)
    prompts = list(torch.from_numpy(prompt))
    answers = [torch.from_numpy(s)[p == task.mask_token_id] for p, s in zip(prompts, solution, strict=True)]
    return ProblemSet(name, prompts, answers, task.length, task)


def read_problems(
    path: Path, model: EvaluatedModel, block_length: int, count: int | None = None
) -> ProblemSet:
    """The first ``count`` problems of a JSON Lines file (``evaluate`` says of what form).

    Raises
    ------
    ValueError
        Naming the line: it is not of that form, or is text and the model has no tokenizer.
    """
    prompts: list[Tensor] = []
    answers: list[Tensor] = []
    try:
        lines = documents.read_text(path).split("\n")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for number, line in enumerate(lines, start=1):
        if count is not None and len(prompts) == count:
            break
        if not line.strip():
            continue
        try:
            record = documents.parse_json(line)
            prompt, answer = (_token_ids(record[key], model) for key in ("prompt", "answer"))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: expected prompt and answer: {error!r}") from None
        blanks = int((prompt == model.mask_token_id).sum())
        if blanks == 0:
            blanks = len(answer)
            prompt = torch.cat([prompt, prompt.new_full((blanks,), model.mask_token_id)])
        if blanks != len(answer) or blanks == 0 or (answer == model.mask_token_id).any():
            raise ValueError(
                f"{path}, line {number}: {blanks} blanks, but {len(answer)} true tokens for them"
            )
        prompts.append(prompt)
        answers.append(answer)
    if not prompts:
        raise ValueError(f"{path}: holds no problem")
    name = path.stem.encode("utf-8", "replace").decode()  # whatever bytes the file system holds
    return ProblemSet(name, prompts, answers, block_length)


def _token_ids(value: Any, model: EvaluatedModel) -> Tensor:
    if isinstance(value, str):
        if model.tokenizer is None:
            raise ValueError("text, but the model comes without a tokenizer")
        value = model.tokenizer.encode(value, add_special_tokens=False)
    if not isinstance(value, list) or not all(type(x) is int and 0 <= x < 1 << 31 for x in value):
        raise ValueError("expected text or a list of token ids, which are not negative")
    return torch.tensor(value, dtype=torch.int64)
