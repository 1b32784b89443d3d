"""What an evaluation decodes: problems with known answers, and the models that decode them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import inspect
import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attn_sampler import checks, documents, published
from attn_sampler.bundled import MODELS, load_task
from attn_sampler.bundled import load_model as load_bundled_model
from attn_sampler.bundled.model import load_weights
from attn_sampler.bundled.tasks import Addition, Task, make_sudoku_puzzles
from attn_sampler.published import antibodies, reactions

#: Names of the bundled problem sets; a suffix says which number of an addition is blank.
BUNDLED = ("sudoku", "addition", "addition-first", "addition-second")
#: Disjoint problems: rules and thresholds are chosen on "dev" and reported on "heldout".
SPLITS = ("heldout", "dev")
_DEV_SEED = 21


class PublishedTask(NamedTuple):
    """Problems for a published model."""

    model: str  # that decodes them by default
    blanks: tuple[str, ...]  # what can be blank as a whole


#: By what they are made of.
PUBLISHED_TASKS = {
    "reactions": PublishedTask("rxnmapper", ("product", "reagent")),
    "heavy": PublishedTask("sapiens-heavy", ("cdr", "framework")),
    "light": PublishedTask("sapiens-light", ("cdr", "framework")),
}


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
        A bundled task or a name of ``bundled.MODELS``; one of ``published.MODELS``, fetched where it is not
        here; a ``.safetensors`` file of
        ``bundled.model.save_weights``, or a folder that holds exactly one; ``hub:ID`` or ``hub:FOLDER`` for a
        checkpoint of a family in ``adapters.models``; or ``module:function``, called without arguments for an
        ``EvaluatedModel``.
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
    if spec in published.MODELS:
        spec = f"hub:{published.folder(spec)}"
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
    #: Whether the problem of an index is right, filled in, int64 [L]; None: where it is the true answer.
    rule: Callable[[int, Tensor], bool] | None = None
    #: More to know of it, by name: whether it parses, for example, or which share of it is right.
    measures: dict[str, Callable[[int, Tensor], float]] = dataclasses.field(default_factory=dict)

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
        if self.rule is not None:
            return self.rule(index, tokens)
        return torch.equal(tokens, self.truth(index, mask_token_id))


def default_model(name: str) -> str:
    """The model, as ``load_model`` takes it, that decodes the problems of that name unless told otherwise.

    Raises
    ------
    ValueError
        There are no such problems.
    """
    if name in BUNDLED:
        return name.partition("-")[0]
    kind, _ = parse_published(name)
    return PUBLISHED_TASKS[kind].model


def make_problems(name: str, count: int, model: EvaluatedModel, split: str = "heldout") -> ProblemSet:
    """Problems, bundled or for published models, that the model can be asked.

    Raises
    ------
    ValueError, published.FetchError
        As ``bundled_problems`` and ``published_problems``; or the model does not know one of their tokens.
    """
    if name in BUNDLED:
        problems = bundled_problems(name, count, split)
    else:
        problems = published_problems(name, count, model, split)
    problems.check_model(model)
    return problems


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
    return ProblemSet(name, prompts, answers, task.length, rules_of(task, prompts))


def rules_of(task: Task, prompts: Sequence[Tensor]) -> Callable[[int, Tensor], bool]:
    """Whether a bundled task's prompt, by its index, filled in to int64 [L], obeys the task's rules."""
    return lambda index, tokens: bool(task.check(tokens[None].numpy(), prompts[index][None].numpy())[0])


def published_problems(name: str, count: int, model: EvaluatedModel, split: str = "heldout") -> ProblemSet:
    """Problems for the published models, made by a seeded generator, none in two splits.

    Parameters
    ----------
    name
        What is blank of what (``PUBLISHED_TASKS``): ``reactions`` (the whole product), ``reactions-reagent``,
        ``heavy-cdr``, ``light-framework``, or a percentage of all positions, scattered: ``reactions-70``. The
        reactions and chains are the same whatever is blank of them, and more is blank of the same at a larger
        percentage.
    model
        Whose tokenizer spells them.

    Returns
    -------
    ProblemSet
        With the measure ``tokens``, the share of the blanks that hold the true token, and for reactions
        ``valid``. A reaction is right where it is the same chemistry (``published.reactions``).

    Raises
    ------
    ValueError
        An unknown name or split, or a model without a tokenizer or with another vocabulary.
    published.FetchError
        Germline genes are needed, and cannot be fetched.
    """
    kind, blank = parse_published(name)
    checks.choice("split", split, SPLITS)
    if model.tokenizer is None:
        raise ValueError(f"{name}: needs a model with a tokenizer")
    texts: dict[str, list[bool]] = {}  # each with its positions that may be blank
    rng, draws = random.Random(kind), 0
    num_tokens = functools.cache(lambda part: len(model.tokenizer.encode(part, add_special_tokens=False)))
    while len(texts) < count:
        text, among = _drawn(kind, blank, rng, num_tokens)
        if (draws := draws + 1) > 20 * count + 1000:
            raise ValueError(f"{name}: expected at most some {len(texts)} different problems, got {count}")
        if int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % len(SPLITS) == SPLITS.index(split):
            texts.setdefault(text, among)
    prompts, answers = [], []
    for text, among in texts.items():
        ids = torch.tensor(model.tokenizer.encode(text))
        if len(ids) != len(among) + 2 or (ids == model.tokenizer.unk_token_id).any():
            raise ValueError(f"{name}: the model's tokenizer does not spell {text}")
        places = [i for i, may_be in enumerate(among, start=1) if may_be]
        random.Random(text).shuffle(places)
        if blank.isdigit():
            places = places[: max(1, round(len(places) * int(blank) / 100))]
        chosen = torch.tensor(sorted(places))
        answers.append(ids[chosen].clone())
        ids[chosen] = model.mask_token_id
        prompts.append(ids)
    problems = ProblemSet(name, prompts, answers, max(map(len, prompts)))

    def share_right(index: int, tokens: Tensor) -> float:
        blanks = prompts[index] == model.mask_token_id
        return float((tokens[blanks] == answers[index]).double().mean())

    problems.measures = {"tokens": share_right}
    if kind == "reactions":
        truths = list(texts)

        def spelled(tokens: Tensor) -> str:
            return model.tokenizer.decode(tokens, skip_special_tokens=True)

        problems.rule = lambda index, tokens: reactions.same(spelled(tokens), truths[index])
        problems.measures["valid"] = lambda _, tokens: reactions.is_valid(spelled(tokens))
    return problems


def parse_published(name: str) -> tuple[str, str]:
    """What the problems are made of, and what is blank of it.

    Raises
    ------
    ValueError
        There are no such problems.
    """
    kind, dash, blank = name.partition("-")
    if kind in PUBLISHED_TASKS:
        blanks = PUBLISHED_TASKS[kind].blanks
        blank = blank if dash else blanks[0]
        if blank in blanks or (blank.isdigit() and str(int(blank)) == blank and 1 <= int(blank) <= 100):
            return kind, blank
    accepted = [f"{kind}-{blank}" for kind, task in PUBLISHED_TASKS.items() for blank in task.blanks]
    raise ValueError(
        f"expected one of {', '.join([*BUNDLED, *accepted])}, or a percentage of the positions in the last "
        f"place (reactions-70), got {name!r}"
    )


def _drawn(
    kind: str, blank: str, rng: random.Random, num_tokens: Callable[[str], int]
) -> tuple[str, list[bool]]:
    """A text, and which of its tokens may be blank."""
    if kind == "reactions":
        reactants, reagents, product = reactions.draw(rng)
        parts = [(part, blank == "reagent" and part in reagents) for part in sorted(reactants + reagents)]
        sides = [*itertools.chain(*[((".", False), part) for part in parts])][1:]
        pieces = [*sides, (">>", False), (product, blank == "product")]
    else:
        chain, in_cdr = antibodies.draw(kind, rng, published.folder("germlines"))
        pieces = [
            (letter, {"cdr": cdr, "framework": not cdr}.get(blank, False))
            for letter, cdr in zip(chain, in_cdr, strict=True)
        ]
    among = [chosen or blank.isdigit() for text, chosen in pieces for _ in range(num_tokens(text))]
    return "".join(text for text, _ in pieces), among


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
            prompt, answer = record["prompt"], _token_ids(record["answer"], model)
            prompt = _token_ids(_masked_text(prompt, len(answer), model), model, whole=True)
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


def _masked_text(prompt: Any, blanks: int, model: EvaluatedModel) -> Any:
    """For a model that fills in texts, a text with its blanks, which its special tokens go around."""
    if not isinstance(prompt, str) or not getattr(model.model, "infills", False):
        return prompt
    mask = model.tokenizer.mask_token
    return prompt if mask in prompt else prompt + mask * blanks


def _token_ids(value: Any, model: EvaluatedModel, whole: bool = False) -> Tensor:
    if isinstance(value, str):
        if model.tokenizer is None:
            raise ValueError("text, but the model comes without a tokenizer")
        special = whole and getattr(model.model, "infills", False)
        value = model.tokenizer.encode(value, add_special_tokens=special)
    if not isinstance(value, list) or not all(type(x) is int and 0 <= x < 1 << 31 for x in value):
        raise ValueError("expected text or a list of token ids, which are not negative")
    return torch.tensor(value, dtype=torch.int64)
