"""What a decoding step costs in the engines, by their own rule and by ours through the same adapter.

    python -m bench.engines [--batch 1 8] [--block 32] [--vocab 126464] [--threads 1] [--seconds 2]

On the CPU, from the logits of a block to its tokens; the model's pass is not in it. The engines' own code is
that of the installed package (``pip install --no-deps`` will do), with stand-ins for what it imports and no
``torch.compile``; an engine that is not installed is named. Each engine has its own rule, a plain threshold
or what stands nearest to it; ours as the same rule, whose choices have to be the same before anything is
timed; and ours by attention, whose scores are there, but in dInfer and diffusers, where the step reads one
small layer. Reading them is part of the model's pass and has a table of its own: what one attention layer's
scores cost beside the layer's attention, with the log-sum-exp that some engines give, inside the block, and
over paged keys.

Times are medians of wall-clock milliseconds, taken in turns with cold caches. Written to
``results/engines.json`` and ``results/engines.md``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from attn_sampler import command_line
from attn_sampler.adapters import _engine
from attn_sampler.sampler import AttnSampler

from .harness import on_cpu
from .report import RESULTS, ROOT
from .timing import CpuDevice, last_level_cache_bytes, take_turns

sys.path.append(str(ROOT / "tests" / "support"))  # the stand-ins of the adapters' tests
TAU = 0.9


class Step(NamedTuple):
    """A block's step in an engine: starts anew, and answers what stands there then."""

    start: Callable[[], Any]
    run: Callable[[], Any]
    result: Callable[[], Tensor]


class Scene(NamedTuple):
    """The problem that each engine is given."""

    batch: int
    block: int
    vocab: int
    logits: Tensor  # [B, C, V] float32
    scores: Tensor  # [B, C] float32

    @property
    def mask(self) -> int:
        return self.vocab - 1


def make_scene(batch: int, block: int, vocab: int) -> Scene:
    """Of every other position the prediction is sure."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, block, vocab, generator=generator)
    sure = torch.randint(vocab - 1, (batch, block, 1), generator=generator)
    strength = torch.where(torch.rand(batch, block, 1, generator=generator) < 0.5, 20.0, 4.0)
    logits.scatter_add_(-1, sure, strength)
    logits[..., vocab - 1] = -30.0  # engines differ in whether the mask token may be predicted
    return Scene(batch, block, vocab, logits, torch.rand(batch, block, generator=generator))


class _Seen(nn.Module):
    """A model whose one attention is that of the block to itself, for adapters that watch a model."""

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


def _watched(scene: Scene) -> tuple[_Seen, Callable[[], Any]]:
    x = torch.randn(scene.batch, 8, scene.block, 32)
    model = _Seen()
    return model, lambda: model(x)


def sglang(patch: Any, scene: Scene) -> dict[str, Step]:
    from engine_toy import load_alone, stub

    stub(patch, {"sglang.srt.layers.attention.flashinfer_backend": {}})
    given = {"is_npu": lambda: False}
    path = "sglang/srt/dllm/algorithm"
    load_alone(patch, "sglang.srt.dllm.algorithm.base", "sglang", f"{path}/base.py", given)
    own = load_alone(
        patch, "sglang.srt.dllm.algorithm.low_confidence", "sglang", f"{path}/low_confidence.py", given
    )
    adapter = importlib.import_module("attn_sampler.adapters.sglang")

    def config(**options: Any) -> Any:
        return SimpleNamespace(
            block_size=scene.block,
            mask_id=scene.mask,
            first_done_first_out_mode=False,
            algorithm_config=options,
        )

    def step(algorithm: Any) -> Step:
        batch = SimpleNamespace(batch_size=scene.batch, input_ids=None, dllm_prompt_mask=None)

        def start() -> None:
            batch.input_ids = torch.full((scene.batch * scene.block,), scene.mask)

        flat = scene.logits.flatten(0, 1)
        run = lambda: algorithm.step(batch, flat, [None] * scene.batch)  # noqa: E731
        return Step(start, run, lambda: batch.input_ids)

    ours = adapter.algorithm()
    attentive = ours(config(tau=TAU))
    attentive._scores = SimpleNamespace(read=lambda _: scene.scores)
    return {
        "its own": step(own.LowConfidence(config(threshold=TAU))),
        "ours, threshold": step(ours(config(policy="threshold", tau=TAU))),
        "ours, attention": step(attentive),
    }


def lmdeploy(patch: Any, scene: Scene) -> dict[str, Step]:
    from engine_toy import load_alone, stub

    states = {"DLLM_MASKED": 0, "DLLM_UNMASKED": 1, "DLLM_CACHED": 2}
    strategy = SimpleNamespace(LOW_CONFIDENCE_DYNAMIC="dynamic", LOW_CONFIDENCE_STATIC=0, SEQUENTIAL=1)
    stub(
        patch, {"lmdeploy.pytorch.consts": states, "lmdeploy.pytorch.config": {"UnmaskingStrategy": strategy}}
    )
    name = "lmdeploy.pytorch.strategies.dllm.unmasking"
    path = f"{name.replace('.', '/')}.py"
    own = load_alone(patch, name, "lmdeploy", path, {"record_function": lambda _: lambda f: f})
    adapter = importlib.import_module("attn_sampler.adapters.lmdeploy")
    config = SimpleNamespace(
        block_length=scene.block,
        unmasking_strategy="dynamic",
        confidence_threshold=TAU,
        denoising_steps=None,
    )
    processor = own.UnmaskingProcessor(config)
    flat, drawn = scene.logits.flatten(0, 1), scene.logits.argmax(dim=-1).flatten()

    def step(call: Callable[..., Any]) -> Step:
        kept: dict[str, Tensor] = {}

        def start() -> None:
            kept["ids"] = torch.full((scene.batch * scene.block,), scene.mask)
            kept["states"] = torch.zeros(scene.batch * scene.block, dtype=torch.int64)

        def run() -> None:
            kept["states"], kept["ids"] = call(flat, kept["ids"], drawn.clone(), kept["states"])

        return Step(start, run, lambda: torch.where(kept["states"] > 0, kept["ids"], scene.mask))

    def ours(policy: str) -> Step:
        unmasking = adapter.Unmasking(_engine.stateless_policy(policy, TAU), 0, "all", {})
        unmasking._scores = SimpleNamespace(read=lambda _: scene.scores)
        return step(lambda *arguments: unmasking(processor, *arguments))

    return {"its own": step(processor), "ours, threshold": ours("threshold"), "ours, attention": ours("attn")}


def dinfer(patch: Any, scene: Scene) -> dict[str, Step]:
    from engine_toy import load_alone

    patch.setattr(torch, "compile", lambda *_, **__: lambda function: function)
    path = "dinfer/decoding/parallel_strategy.py"
    own = load_alone(patch, "dinfer.decoding.parallel_strategy", "dinfer", path, {})
    utils = load_alone(patch, "dinfer.decoding.utils", "dinfer", "dinfer/decoding/utils.py", {})
    for name in ("add_gumbel_noise", "get_num_transfer_tokens"):
        if hasattr(utils, name):
            patch.setattr(own, name, getattr(utils, name), raising=False)
    adapter = importlib.import_module("attn_sampler.adapters.dinfer")
    prompt = torch.zeros(scene.batch, 4, dtype=torch.int64)
    ids = {"mask_id": scene.mask, "eos_id": 1}

    def step(decoder: Any, before: Callable[[], Any] | None = None) -> Step:
        kept: dict[str, Any] = {}

        def start() -> None:
            kept["x"] = utils.TokenArray(prompt, scene.block, *ids.values(), "cpu")
            if before is not None:
                before()

        def run() -> None:
            decoder.decode(scene.logits, 4, 4 + scene.block, kept["x"])

        return Step(start, run, lambda: kept["x"].data[:, 4:])

    model = _Seen()
    x = torch.randn(scene.batch, 8, 4 + scene.block, 32)
    attentive = adapter.AttnParallelDecoder(model, tau=TAU, **ids)
    return {
        "its own": step(own.ThresholdParallelDecoder(0.0, TAU, **ids)),
        "ours, threshold": step(adapter.AttnParallelDecoder(_Seen(), policy="threshold", tau=TAU, **ids)),
        "ours, attention": step(attentive, lambda: model(x)),
    }


def diffusers(patch: Any, scene: Scene) -> dict[str, Step]:
    from diffusers import BlockRefinementScheduler

    from attn_sampler.adapters.diffusers import AttnSamplerScheduler

    shape = {"block_length": scene.block, "num_inference_steps": scene.block}

    def step(scheduler: Any, before: Callable[[], Any] | None = None) -> Step:
        kept: dict[str, Any] = {}
        scheduler.set_timesteps(scene.block, device="cpu")

        def start() -> None:
            kept["sample"] = torch.full((scene.batch, scene.block), scene.mask)
            if before is not None:
                before()

        def run() -> None:
            output = scheduler.step(
                scene.logits, 0, kept["sample"], mask_token_id=scene.mask, threshold=TAU, return_dict=True
            )
            kept["sample"] = output.prev_sample

        return Step(start, run, lambda: kept["sample"])

    attentive = AttnSamplerScheduler(rule="parallel", **shape)
    model, forward = _watched(scene)
    attentive.attach(model)
    return {
        "its own": step(BlockRefinementScheduler(**shape)),
        "ours, threshold": step(AttnSamplerScheduler(rule="threshold", **shape)),
        "ours, attention": step(attentive, forward),
    }


def diffusion_gemma(patch: Any, scene: Scene) -> dict[str, Step]:
    from transformers.models.diffusion_gemma import generation_diffusion_gemma as own

    from attn_sampler.adapters.diffusion_gemma import CanvasSampler

    drawn = scene.logits.argmax(dim=-1)
    canvas = torch.zeros_like(drawn)

    def step(sampler: Any) -> Step:
        kept: dict[str, Tensor] = {}

        def run() -> None:
            kept["canvas"] = sampler.accept_canvas(canvas, drawn, scene.logits, 0)

        return Step(kept.clear, run, lambda: kept["canvas"])

    sampler = CanvasSampler(AttnSampler(tau=TAU), scene.block, scene.vocab)
    sampler.capture = SimpleNamespace(scores=scene.scores)  # type: ignore[assignment]
    config = SimpleNamespace(entropy_bound=0.1)
    theirs = step(own.EntropyBoundSampler(config, scene.block, scene.vocab, 1))
    return {"its own": theirs, "ours, attention": step(sampler)}


#: By the engine's name: the package, and what makes its steps.
ENGINES: dict[str, tuple[str, Callable[[Any, Scene], dict[str, Step]]]] = {
    "SGLang, LowConfidence": ("sglang", sglang),
    "LMDeploy, low_confidence_dynamic": ("lmdeploy", lmdeploy),
    "dInfer, ThresholdParallelDecoder": ("dinfer", dinfer),
    "diffusers, BlockRefinementScheduler": ("diffusers", diffusers),
    "transformers, EntropyBoundSampler": ("transformers", diffusion_gemma),
}
#: What has no step of its own to be called.
LEFT_OUT = {
    "dLLM": "its rule stands in the middle of its sampling loop",
    "vLLM, DiffusionSampler": "ours runs all of its step, and then chooses anew",
}


@contextlib.contextmanager
def patched() -> Iterator[Any]:
    """Where stand-ins are put, and taken away again."""
    import pytest

    patch = pytest.MonkeyPatch()
    try:
        yield patch
    finally:
        patch.undo()
        for name in [x for x in sys.modules if x.startswith("attn_sampler.adapters.") and "_engine" not in x]:
            del sys.modules[name]


def check(steps: dict[str, Step], scene: Scene) -> None:
    """Raise where ours as the engine's rule chooses otherwise than the engine."""
    results = {}
    for name, step in steps.items():
        step.start()
        step.run()
        results[name] = step.result().view(scene.batch, scene.block).clone()
    same = results.get("ours, threshold")
    if same is not None and not torch.equal(same, results["its own"]):
        raise RuntimeError("ours chooses otherwise under the engine's rule")


def measure(steps: dict[str, Step], seconds: float) -> dict[str, float]:
    """Median milliseconds of each, its start left out."""
    through_caches = torch.ones(2 * last_level_cache_bytes() // 4)

    def sample(step: Step) -> float:
        step.start()
        through_caches.sum()
        began = time.perf_counter()
        step.run()
        return 1e3 * (time.perf_counter() - began)

    turns = {name: functools.partial(sample, step) for name, step in steps.items()}
    return {name: statistics.median(taken) for name, taken in take_turns(turns, seconds, 7).items()}


def attention_cost(batch: int, block: int, device: CpuDevice, seconds: float) -> dict[str, float]:
    """Milliseconds of a layer's attention over 2048 keys, and of its scores in the ways of the adapters."""
    heads, kv_heads, headdim, context, page = 32, 8, 128, 2048, 16
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(batch, heads, block, headdim, generator=generator).bfloat16()
    k = torch.randn(batch, kv_heads, context, headdim, generator=generator).bfloat16()
    flat_q = q.transpose(1, 2).flatten(0, 1).contiguous()
    flat_k = k[:, :, -block:].transpose(1, 2).flatten(0, 1).contiguous()
    products = q.float() @ k.float().repeat_interleave(heads // kv_heads, dim=1).transpose(2, 3)
    lse = (products * headdim**-0.5).logsumexp(dim=-1).transpose(1, 2).flatten(0, 1).contiguous()
    pages = batch * context // page
    table = torch.arange(pages, dtype=torch.int32).view(batch, -1)
    cache = k.unflatten(2, (-1, page)).transpose(1, 2).flatten(0, 1).contiguous()  # [pages, Hkv, page, D]
    lengths = torch.full((batch,), context, dtype=torch.int32)
    scores = _engine.BlockScores(block)
    ends = {"first": True, "last": True}
    ways: dict[str, Callable[[], Any]] = {
        "attention": lambda: F.scaled_dot_product_attention(q, k, k, enable_gqa=True),
        "scores, log-sum-exp given": lambda: scores.add(flat_q, flat_k, softmax_lse=lse, **ends),
        "scores inside the block": lambda: scores.add(flat_q, flat_k, **ends),
        "scores over paged keys": lambda: scores.add_paged(q, cache, table, lengths, **ends),
    }
    taken = device.measure(ways, lambda: None, seconds, 7)
    return {name: taken[name]["median_ms"] for name in ways}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's text."""
    return command_line.guarded(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    parser = command_line.Parser(prog="python -m bench.engines", description="Time the engines' steps.")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], metavar="B")
    parser.add_argument("--block", type=int, default=32, metavar="C")
    parser.add_argument("--vocab", type=int, default=126464, metavar="V")
    parser.add_argument("--threads", type=command_line.threads, default=1)
    parser.add_argument("--seconds", type=command_line.seconds, default=2.0, help="for each figure")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER")
    options = parser.parse_args(arguments)
    device = CpuDevice(options.threads)
    device.activate()
    rows: list[dict[str, Any]] = []
    absent = dict(LEFT_OUT)
    for name, (package, make) in ENGINES.items():
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            absent[name] = f"{package} is not installed"
            continue
        for batch in options.batch:
            scene = make_scene(batch, options.block, options.vocab)
            with patched() as patch:
                steps = make(patch, scene)
                check(steps, scene)
                rows.append(
                    {
                        "engine": name,
                        "version": version,
                        "batch": batch,
                        "ms": measure(steps, options.seconds),
                    }
                )
    layer = [
        {"batch": batch, "ms": attention_cost(batch, options.block, device, options.seconds)}
        for batch in options.batch
    ]
    results = {
        "machine": {
            **on_cpu(options.threads),
            "block": options.block,
            "vocab": options.vocab,
        },
        "steps": rows,
        "layer": layer,
        "absent": absent,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "engines.json").write_text(json.dumps(results, indent=1) + "\n")
    text = report(results)
    (options.output / "engines.md").write_text(text)
    Console(width=None if Console().is_terminal else 120).print(text, markup=False, highlight=False)
    return 0


def report(results: dict[str, Any]) -> str:
    """The results as tables."""
    machine = results["machine"]
    what = (
        f"{machine['block']} positions, a vocabulary of {machine['vocab']:,}, {machine['threads']} thread(s)"
    )
    lines = [
        "# Engines: what a step costs",
        "",
        f"Milliseconds a step, from logits to tokens, on the CPU: blocks of {what}.",
        "Without `torch.compile`, which dInfer applies to its rule. In dInfer and diffusers attention is",
        "read in the step, of one small layer; elsewhere its scores are there.",
        "`python -m bench.engines` wrote this.",
        "",
        "| engine | batch | its own rule | ours, the same rule | ours, by attention |",
        "|---|---|---|---|---|",
    ]
    for row in results["steps"]:
        ms = row["ms"]
        same = ms.get("ours, threshold")
        figures = (ms["its own"], same, ms["ours, attention"])
        cells = " | ".join("" if x is None else f"{x:.2f}" for x in figures)
        lines.append(f"| {row['engine']} ({row['version']}) | {row['batch']} | {cells} |")
    lines += ["", "What an attention layer's scores cost (32 heads on 8, 128 each, bfloat16, 2048 keys):", ""]
    names = list(results["layer"][0]["ms"])
    lines += [f"| batch | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row in results["layer"]:
        lines.append(f"| {row['batch']} | " + " | ".join(f"{row['ms'][name]:.2f}" for name in names) + " |")
    lines += ["", *(f"- {name}: left out, as {reason}." for name, reason in results["absent"].items())]
    lines += ["", " ".join(f"{name}={value}" for name, value in machine.items()), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
