"""A larger check of the rules: a masked-diffusion model of Python source, trained here and then evaluated.

    python -m bench.train_code_model --out FOLDER    # on a GPU; in seconds on a CPU, at toy size:
    python -m bench.train_code_model --size toy --seconds 5 --problems 4 --max-files 60 --out FOLDER

The data are the files of this interpreter's standard library and of installed packages under MIT, BSD, Apache
or PSF licences; one file in 32, by the hash of its text, is held out. The model of ``--size base`` has 31
million parameters. Problems are whole small functions of held-out files with a run of tokens blanked; every
rule fills them in. Measured are exact match, whether the function parses, passes, and order log-likelihood.

Designed for 9 minutes on one H100 or H200, where it has not run yet: 5 to train, 2 to decode, the rest to
read and report. Decoding stops at ``--eval-seconds``, and rules that were not reached are missing from the
table; a rerun with the same ``--out`` goes on from the saved weights.
"""

from __future__ import annotations

import argparse
import ast
import collections
import dataclasses
import hashlib
import importlib.metadata
import json
import random
import re
import sys
import sysconfig
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from attn_sampler import checks, command_line, documents
from attn_sampler.backends import BACKEND_CHOICES
from attn_sampler.bundled.model import TinyMaskedLM, TinyMaskedLMConfig, load_weights, save_weights
from attn_sampler.bundled.train import Recipe, make_optimizers, masked_loss
from attn_sampler.evaluate import BASELINE, RULES, Results, evaluate, expand
from attn_sampler.problem_sets import EvaluatedModel, ProblemSet
from attn_sampler.report import markdown, plot_frontier, summarise

HELD_OUT_ONE_IN = 32
_LICENCES = re.compile(r"\b(MIT|BSD|Apache|PSF|Python Software Foundation)\b", re.IGNORECASE)
_COPYLEFT = re.compile(r"\b(A?GPL|LGPL|MPL|EPL|GNU)", re.IGNORECASE)
_PIECES = re.compile(r"[^\W\d]\w*|\n[ ]*|[ ]+|\d|.", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and how it is trained."""

    vocab_size: int  # the mask token is the last one
    hidden_size: int
    num_layers: int
    num_heads: int
    ffn_size: int
    length: int  # tokens of a training sequence, and at most of a problem
    batch_size: int


SIZES = {
    "toy": Size(384, 64, 2, 4, 128, 64, 16),
    "base": Size(8192, 512, 7, 8, 1408, 256, 256),
}


class Tokenizer:
    """Words, indentation, and the rest by character; what is rare by UTF-8 byte. Loses nothing."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self.pieces = list(pieces)
        self._ids = {piece: 256 + index for index, piece in enumerate(self.pieces)}

    @classmethod
    def fit(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """The most frequent pieces, as many as the vocabulary has room for beside 256 bytes and the mask."""
        counts = collections.Counter(piece for text in texts for piece in _PIECES.findall(text))
        return cls([piece for piece, _ in counts.most_common(vocab_size - 257)])

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids; there are no special tokens."""
        ids: list[int] = []
        for piece in _PIECES.findall(text):
            token = self._ids.get(piece)
            ids += piece.encode() if token is None else [token]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text, invalid UTF-8 replaced."""
        return b"".join(
            bytes([token]) if token < 256 else self.pieces[token - 256].encode() for token in ids
        ).decode(errors="replace")


def permissive_files() -> Iterator[Path]:
    """Source files of the standard library and of installed packages whose metadata name such a licence."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.iterdir()):
        if path.name not in ("site-packages", "dist-packages"):
            yield from sorted(path.rglob("*.py")) if path.is_dir() else [path] * (path.suffix == ".py")
    for package in sorted(importlib.metadata.distributions(), key=lambda d: d.metadata["Name"] or ""):
        classifiers = [c for c in package.metadata.get_all("Classifier") or () if c.startswith("License")]
        named = [package.metadata.get("License-Expression") or "", *classifiers]
        named += [] if any(named) else [(package.metadata.get("License") or "")[:100]]
        text = " ".join(named)
        if _LICENCES.search(text) and not _COPYLEFT.search(text):
            yield from sorted(
                Path(str(file.locate())) for file in package.files or () if file.suffix == ".py"
            )


def read_texts(paths: Iterable[Path], max_files: int = 4000) -> tuple[list[str], list[str]]:
    """Texts to train on and held-out ones, each once, whatever the number of copies."""
    texts: dict[str, str] = {}
    for path in paths:
        if len(texts) >= max_files:
            break
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # a broken link or another encoding: one file less
        if 200 <= len(text) <= 400_000:
            texts[hashlib.sha256(text.encode()).hexdigest()] = text
    sides: tuple[list[str], list[str]] = ([], [])
    for digest, text in sorted(texts.items()):
        sides[int(digest[:8], 16) % HELD_OUT_ONE_IN == 0].append(text)
    return sides


def parses(text: str) -> bool:
    """Whether ``text`` is Python."""
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def infilling_problems(texts: Sequence[str], tokenizer: Tokenizer, size: Size, count: int) -> ProblemSet:
    """Whole functions that fit the model, with a run of 8 to 24 tokens behind their first line blanked."""
    rng, mask = random.Random(0), size.vocab_size - 1
    functions: dict[str, list[int]] = {}
    for text in texts:
        lines = text.split("\n")
        for node in ast.walk(ast.parse(text)) if parses(text) else ():
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno is not None:
                source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])) + "\n"
                ids = tokenizer.encode(source)
                if 40 <= len(ids) <= size.length and parses(source):
                    functions[source] = ids
    prompts, answers = [], []
    for source in rng.sample(sorted(functions), min(count, len(functions))):
        ids = torch.tensor(functions[source])
        head = len(tokenizer.encode(source.split("\n")[0]))
        length = rng.randint(8, 24)
        first = rng.randint(min(head, len(ids) - length - 1), len(ids) - length - 1)
        answers.append(ids[first : first + length].clone())
        ids[first : first + length] = mask
        prompts.append(ids)
    measures = {"parses": lambda _, tokens: parses(tokenizer.decode(tokens.tolist()))}
    return ProblemSet("code", prompts, answers, size.length, measures=measures)


def train(data: Tensor, size: Size, seconds: float, device: str, seed: int = 0) -> TinyMaskedLM:
    """Train from scratch on random windows of ``data`` for so long; the rate decays by the clock."""
    torch.manual_seed(seed)
    config = TinyMaskedLMConfig(
        size.vocab_size, size.vocab_size - 1, size.hidden_size, size.num_layers, size.num_heads, size.ffn_size
    )
    model = TinyMaskedLM(config).to(device).train()
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    recipe = Recipe(steps=1000, batch_size=size.batch_size, warmup_steps=20)
    optimizers = make_optimizers(model, recipe)
    groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    forward = torch.compile(model) if device != "cpu" else model
    answer = torch.ones(size.batch_size, size.length, dtype=torch.bool)
    step, began = 0, time.monotonic()
    while (share := (time.monotonic() - began) / seconds) < 1.0:
        factor = recipe.learning_rate_factor(int(share * recipe.steps))  # of a thousand parts of the time
        for group, peak in groups:
            group["lr"] = peak * factor
        starts = rng.integers(len(data) - size.length, size=(size.batch_size, 1))
        tokens = data[torch.from_numpy(starts + np.arange(size.length))].long()
        with torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=device != "cpu"):
            loss = masked_loss(forward, tokens, answer, config.mask_token_id, generator, device)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        for optimizer in optimizers:
            optimizer.step()
        if step % 100 == 0:
            print(f"step {step}  {share:.0%} of the time  loss {loss.item():.3f} nats a token", flush=True)
        step += 1
    print(f"{step} steps, {step * tokens.numel() / 1e6:.1f} million tokens", flush=True)
    return model.eval()


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's text."""
    return command_line.guarded(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    parser = command_line.Parser(prog="python -m bench.train_code_model")
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--seconds", type=command_line.seconds, default=300.0, help="of training (default: 300)"
    )
    parser.add_argument(
        "--eval-seconds", type=command_line.seconds, default=120.0, help="of decoding (default: 120)"
    )
    parser.add_argument("--problems", type=command_line.positive, default=300)
    parser.add_argument(
        "--max-files", type=command_line.positive, default=4000, help="read no more (default: 4000)"
    )
    parser.add_argument(
        "--backend", choices=BACKEND_CHOICES, default="auto", help="of the sampling step (default: auto)"
    )
    parser.add_argument("--rule", nargs="+", default=list(RULES), help="(default: every policy)")
    parser.add_argument("--tau", nargs="+", type=command_line.unit_interval, default=[0.7, 0.9, 0.95])
    parser.add_argument("--out", type=Path, required=True, help="folder of weights and results")
    options = parser.parse_args(arguments)
    try:
        return _train_and_evaluate(parser, options)
    except ValueError as error:
        parser.error(str(error))


def _train_and_evaluate(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Raises ValueError where an option is wrong, or a file in ``--out``."""
    checks.device("argument --device", options.device)
    if options.device != "cpu":
        torch.set_float32_matmul_precision("high")
    size = SIZES[options.size]
    rules = expand(options.rule, options.tau)
    options.out.mkdir(parents=True, exist_ok=True)
    training, held_out = read_texts(permissive_files(), options.max_files)
    if not held_out:
        parser.error("--max-files: none of the files read is held out; read more")

    weights, pieces = options.out / "code.safetensors", options.out / "pieces.json"
    if weights.exists() and pieces.exists():
        known = documents.parse_json(documents.read_text(pieces))
        documents.check_shape(known, [documents.TEXT], str(pieces))
        tokenizer = Tokenizer(known)
    else:
        tokenizer = Tokenizer.fit(training, size.vocab_size)
        data = torch.tensor(tokenizer.encode("\n".join(training)), dtype=torch.int32)
        print(f"{len(training)} files, {len(data) / 1e6:.1f} million tokens", flush=True)
        model = train(data, size, options.seconds, options.device)
        pieces.write_text(json.dumps(tokenizer.pieces), encoding="utf-8")
        save_weights(model, weights, {"task": "code"})
    model = load_weights(weights).to(options.device)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters", flush=True)

    problems = infilling_problems(held_out, tokenizer, size, options.problems)
    results = Results(options.out / "results.json")
    evaluated = EvaluatedModel(model, model.mask_token_id, tokenizer, {"backend": options.backend})
    work = [(problems, evaluated, f"code-{options.size}")]
    left = evaluate(work, rules, results, orders=True, time_limit=options.eval_seconds)
    rows = summarise(results.cells, BASELINE)
    (options.out / "results.md").write_text(markdown(rows, BASELINE), encoding="utf-8")
    plot_frontier(rows, options.out / "results.png")
    print(f"{len(rows)} rules complete, {left} decodings left; see {options.out}/results.md", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
