"""Whole decoding steps of a model of random weights: tokens per second, and where the time goes.

Every way to decode commits one token a step and sequence: how many more a rule may commit depends on a
trained model, so tokens per second here compare the cost of a step, not the rules.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attn_sampler import AttentionCapture, column_scores, decode_step, select_tokens, token_confidence

from . import rivals
from .capture import MASK, Model

_ROUNDS = 12
PARTS = ("forward", "capture", "scores", "confidence", "selection")


class Shape(NamedTuple):
    """A model, and what it decodes."""

    name: str
    layers: int
    width: int
    heads: int
    vocab: int
    batch: int
    prompt: int
    generated: int
    block: int


#: LLaDA-8B has multi-layer perceptrons of 12,288; bench.capture's Model makes them 8/3 of the width, 10,922.
SHAPES = {
    "cuda": Shape("a model of LLaDA-8B's size, random weights", 32, 4096, 32, 126464, 1, 1024, 256, 32),
    "cpu": Shape("a small model, random weights", 6, 512, 8, 32768, 1, 256, 128, 32),
    "brief": Shape("a tiny model, random weights", 2, 64, 2, 512, 2, 16, 16, 8),
}


class Stopwatch:
    """Milliseconds of each part, the device waited for where it is asked to be."""

    def __init__(self, device: str, waits: bool) -> None:
        self.parts: dict[str, float] = {}
        self._wait = torch.cuda.synchronize if device == "cuda" and waits else lambda: None

    def __call__(self, part: str, run: Callable[[], Any]) -> Any:
        self._wait()
        start = time.perf_counter()
        result = run()
        self._wait()
        self.parts[part] = 1e3 * (time.perf_counter() - start)
        return result


class Decoder:
    """The ways to decode one block: each a function of the tokens, which it fills by one, and a stopwatch."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        with torch.device(device):
            model = Model(shape.vocab, shape.width, shape.heads, shape.layers)
        self.model = model.to(dtype).eval().requires_grad_(False)
        self.block = slice(shape.prompt, shape.prompt + shape.block)
        length = shape.prompt + shape.generated
        generator = torch.Generator(device).manual_seed(0)
        size = (shape.batch, length)
        self.start = torch.randint(1, shape.vocab, size, device=device, generator=generator)
        self.start[:, shape.prompt :] = MASK
        self.ways = {
            "confidence, LLaDA's own sampling": self.llada,
            "confidence, token_confidence": self.confidence,
            "attention, ours, part by part": self.ours_in_parts,
            "attention, ours (decode_step)": self.ours,
            "attention, eager extraction": self.eager,
        }

    def llada(self, tokens: Tensor, watch: Stopwatch) -> None:
        logits = watch("forward", lambda: self.model(tokens))
        watch("confidence", lambda: rivals.llada_step(tokens, self.block, logits[:, self.block], MASK))

    def confidence(self, tokens: Tensor, watch: Stopwatch) -> None:
        logits = watch("forward", lambda: self.model(tokens))
        token_ids, confidence = watch("confidence", lambda: self._confidence(logits))
        watch("selection", lambda: self._commit(tokens, token_ids, confidence, confidence))

    def ours_in_parts(self, tokens: Tensor, watch: Stopwatch) -> None:
        capture = AttentionCapture(columns=self.block, keep=True)
        logits = watch("capture", lambda: self._captured(capture, tokens))
        scores = watch("scores", lambda: self._scores(capture))
        token_ids, confidence = watch("confidence", lambda: self._confidence(logits))
        watch("selection", lambda: self._commit(tokens, token_ids, confidence, scores))

    def ours(self, tokens: Tensor, watch: Stopwatch) -> None:
        capture = AttentionCapture(columns=self.block, keep=True)
        logits = watch("capture", lambda: self._captured(capture, tokens))

        def step() -> None:
            layers, options = capture.layers, capture.step_options
            decode_step(
                tokens,
                logits[:, self.block],
                layers,
                block=self.block,
                mask_token_id=MASK,
                rule="sequential",
                **options,
            )

        watch("scores", step)

    def eager(self, tokens: Tensor, watch: Stopwatch) -> None:
        self.model.eager = True
        logits = watch("capture", lambda: self.model(tokens))
        self.model.eager = False
        weights, self.model.weights = self.model.weights, []
        scores = watch(
            "scores", lambda: sum(w[..., self.block].sum(dim=(1, 2), dtype=torch.float32) for w in weights)
        )
        token_ids, confidence = watch("confidence", lambda: rivals.softmax_max(logits[:, self.block]))
        watch("selection", lambda: self._commit(tokens, token_ids, confidence, scores))

    def _captured(self, capture: AttentionCapture, tokens: Tensor) -> Tensor:
        with capture:
            return self.model(tokens)

    def _scores(self, capture: AttentionCapture) -> Tensor:
        layers, options = capture.layers, capture.step_options
        scores = None
        for q, k, softmax_lse in layers:
            scores = column_scores(q, k, softmax_lse=softmax_lse, out=scores, **options)
        return scores

    def _confidence(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return token_confidence(logits[:, self.block], exclude_token_id=MASK)

    def _commit(self, tokens: Tensor, token_ids: Tensor, confidence: Tensor, order: Tensor) -> None:
        masked = tokens[:, self.block] == MASK
        selected = select_tokens(order, confidence, masked, rule="sequential")
        tokens[:, self.block] = torch.where(selected, token_ids, tokens[:, self.block])


@torch.no_grad()
def run(device: str, dtype: torch.dtype, *, brief: bool = False) -> dict[str, Any]:
    """Decode in every way, step by step in turns.

    Returns
    -------
    dict
        ``model``, ``device``, ``threads``, ``note``, and ``variants``: for each way ``name``,
        ``tokens_per_s``, ``step_ms`` (of uninterrupted steps) and ``parts_ms`` (None where the way has no
        such part), medians. In the ways that capture, the forward pass is that of the plain way in the
        same round, and ``capture`` what the capturing pass took beyond it.
    """
    shape = SHAPES["brief" if brief else device]
    decoder = Decoder(shape, device, dtype)
    steps: dict[str, list[float]] = {name: [] for name in decoder.ways}
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in decoder.ways}
    whole = {name: decoder.start.clone() for name in decoder.ways}
    split = {name: decoder.start.clone() for name in decoder.ways}
    for way in decoder.ways.values():
        way(decoder.start.clone(), Stopwatch(device, waits=True))
    rounds = min(shape.block, _ROUNDS)
    for _ in range(rounds):
        plain = 0.0
        for name, way in decoder.ways.items():
            step, timed = Stopwatch(device, waits=True), Stopwatch(device, waits=True)
            step("all", functools.partial(way, whole[name], Stopwatch(device, waits=False)))
            way(split[name], timed)
            plain = timed.parts.setdefault("forward", plain)
            if "capture" in timed.parts:
                timed.parts["capture"] -= plain
            steps[name].append(step.parts["all"])
            parts[name].append(timed.parts)
    for name in decoder.ways:
        for filled in (whole[name], split[name]):
            committed = (filled[:, decoder.block] != MASK).sum(dim=1)
            if (committed != rounds).any():
                raise RuntimeError(f"{name} committed {committed.tolist()} tokens in {rounds} steps")
    variants = []
    for name in decoder.ways:
        taken = parts[name]
        medians = {
            part: statistics.median(p[part] for p in taken) if part in taken[0] else None for part in PARTS
        }
        step_ms = statistics.median(steps[name])
        variants.append(
            {
                "name": name,
                "tokens_per_s": 1e3 * shape.batch / step_ms,
                "step_ms": step_ms,
                "parts_ms": medians,
            }
        )
    return {
        "model": f"{shape.name}: {shape.layers} layers, width {shape.width}, V {shape.vocab}, "
        f"batch {shape.batch}, {shape.prompt} + {shape.generated} tokens, block {shape.block}",
        "device": device,
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "dtype": str(dtype).removeprefix("torch."),
        "note": "One token a step and sequence. *step* is uninterrupted, the median of 12 steps; "
        "the parts were timed in other steps, so they need not add up to it. *decode_step* does scores, "
        "confidence and selection in one call, and LLaDA's sampling the last two.",
        "variants": variants,
    }
