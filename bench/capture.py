"""What attention guidance costs a decoding step, on this machine's CPU.

    python -m bench.capture [--layers 8] [--width 256] [--prompt-length 192] [--compile] [--json FILE]

Decodes with one random-weight model of LLaDA's shape, one token a step, in several ways:

confidence          the most confident token; no attention is read
attention           the token that receives most attention, from captured queries, keys and log-sum-exps
attention, in pass  the same, each layer reduced while the model runs
eager extraction    the same, from materialised attention weights, as with ``output_attentions``

Before anything is timed, attention-guided ways that commit other tokens than the first are named. Runs are
interleaved; times are medians over all steps of the processor time of this process, which other processes
disturb least. Extra memory is the difference of the peaks of what tensors hold in one step, graphs are those
that torch.compile makes of the model over a run.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import attn_sampler
from attn_sampler import Generation, Policy, StepState, command_line, decode_step, generate
from attn_sampler.backends import extension

MASK = 0


class Model(nn.Module):
    """A bidirectional Llama. ``eager`` writes attention out and keeps the weights of all layers."""

    def __init__(self, vocab: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.heads, self.eager = heads, False
        self.weights: list[Tensor] = []  # [B, H, T, T] a layer
        self.embedding = nn.Embedding(vocab, width)
        hidden = 8 * width // 3
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width, bias=False) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(width, 2 * hidden, bias=False) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(hidden, width, bias=False) for _ in range(layers))
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        width = (x.shape[-1],)
        cos, sin = self.rotation(tokens.shape[1], x)
        self.weights = []
        for qkv, out, up, down in zip(self.qkv, self.out, self.up, self.down, strict=True):
            qkv_heads = qkv(F.rms_norm(x, width)).view(*tokens.shape, 3, self.heads, -1)
            q, k, v = qkv_heads.permute(2, 0, 3, 1, 4)
            q, k = (torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
                    for a, b in (t.chunk(2, dim=-1) for t in (q, k)))  # fmt: skip
            if self.eager:
                weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
                self.weights.append(weights)
                y = weights @ v
            else:
                y = F.scaled_dot_product_attention(q, k, v)
            x = x + out(y.transpose(1, 2).flatten(2))
            a, b = up(F.rms_norm(x, width)).chunk(2, dim=-1)
            x = x + down(F.silu(a) * b)
        return self.head(F.rms_norm(x, width))

    @property
    def received(self) -> Tensor:
        """The attention [B, T] that each position received in the last eager pass."""
        return torch.stack([weights.sum(dim=(1, 2)) for weights in self.weights]).sum(dim=0)

    def rotation(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        half = like.shape[-1] // self.heads // 2
        rate = 10000.0 ** (-torch.arange(half, device=like.device) / half)
        angle = torch.outer(torch.arange(length, device=like.device), rate)
        return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


class EagerExtraction(Policy):
    """Attn-Sampler, one token a step, on attention that the model has materialised."""

    needs_scores: ClassVar[bool] = False

    def __init__(self, model: Model) -> None:
        self.model = model

    def select(self, state: StepState) -> Tensor:
        raise NotImplementedError  # step does it

    def step(self, tokens: Tensor, logits: Tensor, attention: Any = None, **options: Any) -> Any:
        scores = self.model.received[:, options["block"]].float().contiguous()
        del options["sequence"]
        options["seed"] = options.pop("seeds")
        return decode_step(tokens, logits, scores=scores, rule="sequential", **options)


def ways(model: Model, forward: Callable[[Tensor], Tensor], prompt: Tensor, options: dict) -> dict:
    """The ways to decode by name; ``forward`` runs ``model``."""

    def run(policy: Any, *, eager: bool = False, **more: Any) -> Generation:
        model.eager = eager
        try:
            return generate(
                model if eager else forward, prompt, mask_token_id=MASK, policy=policy, **options, **more
            )
        finally:
            model.eager = False

    return {
        "confidence": functools.partial(run, "confidence"),
        "attention": functools.partial(run, "attn-sequential"),
        "attention, in pass": functools.partial(run, "attn-sequential", keep_layers=False),
        "eager extraction": functools.partial(run, EagerExtraction(model), eager=True),
    }


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most that tensors held at a time, beyond what they held before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def graphs_compiled(model: Model, prompt: Tensor, options: dict, policy: str) -> int:
    """How many graphs torch.compile makes of the model over a whole run."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    generate(compiled, prompt, mask_token_id=MASK, policy=policy, **options)
    return counter.frame_count


def measure(runs: dict[str, Callable[..., Generation]], repeats: int) -> dict[str, dict[str, float]]:
    """Median processor milliseconds over all steps, and median of the runs' shares outside the model."""
    steps: dict[str, list[float]] = {name: [] for name in runs}
    shares: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            ends: list[float] = []
            generation = run(on_step=lambda _, ends=ends: ends.append(time.process_time()))
            steps[name] += [1e3 * (end - start) for start, end in itertools.pairwise(ends)]
            seconds = generation.forward_seconds + generation.sampling_seconds
            shares[name].append(generation.sampling_seconds / seconds)
    return {
        name: {"step_ms": statistics.median(steps[name]), "sampling_share": statistics.median(shares[name])}
        for name in runs
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's text."""
    return command_line.guarded(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    parser = command_line.Parser(prog="python -m bench.capture", description="What guidance costs a step.")
    for name, default in (
        *(("width", 256), ("heads", 8), ("layers", 6), ("vocab", 8192), ("batch", 1), ("threads", 1)),
        *(("prompt-length", 480), ("gen-length", 32), ("block-length", 32), ("repeats", 4)),
    ):
        kind = command_line.threads if name == "threads" else command_line.integer(1, 2**20)
        parser.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=f"default: {default}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="time the model under torch.compile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args(arguments)
    if options.width % (2 * options.heads):
        parser.error(f"argument --width: expected a multiple of twice the heads, got {options.width}")
    if options.vocab < 3:
        parser.error(f"argument --vocab: expected the mask token and two more, got {options.vocab}")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = Model(options.vocab, options.width, options.heads, options.layers)
    model.to(getattr(torch, options.dtype)).eval().requires_grad_(False)
    prompt = torch.randint(1, options.vocab, (options.batch, options.prompt_length))
    decoding = {"gen_length": options.gen_length, "block_length": options.block_length}
    forward = torch.compile(model, fullgraph=True) if options.compile else model
    runs = ways(model, forward, prompt, decoding)
    tokens = {name: run().tokens for name, run in runs.items()}  # and everything is warm
    for name in ("attention, in pass", "eager extraction"):
        same = (tokens[name] == tokens["attention"]).float().mean().item()
        if same < 1.0:
            print(f"{name} committed other tokens than attention at {1 - same:.1%} of the positions")
    figures = measure(runs, options.repeats)
    short = {"gen_length": 1, "block_length": options.block_length}
    peaks = {name: peak_bytes(run) for name, run in ways(model, model, prompt, short).items()}
    policies = {"confidence": "confidence", "attention": "attn-sequential"}
    graphs = {name: graphs_compiled(model, prompt, decoding, policy) for name, policy in policies.items()}

    parameters = sum(p.numel() for p in model.parameters())
    table = Table("way", "CPU ms a step", "over confidence", "sampling", "extra MiB", "graphs")
    base = figures["confidence"]["step_ms"]
    for name, row in figures.items():
        row |= {
            "over_confidence": row["step_ms"] / base - 1,
            "extra_bytes": peaks[name] - peaks["confidence"],
        }
        row["graphs"] = graphs.get(name, 0)
        table.add_row(
            name, f"{row['step_ms']:.2f}", f"{row['over_confidence']:+.1%}", f"{row['sampling_share']:.1%}",
            f"{row['extra_bytes'] / 2**20:.2f}", str(graphs.get(name, "")),
        )  # fmt: skip
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "cpu_isa": extension.cpu_isa() if extension.UNAVAILABLE is None else "reference",
        "torch": torch.__version__,
        "attn_sampler": attn_sampler.__version__,
        "parameters": parameters,
        **{name: value for name, value in vars(options).items() if name != "json"},
        "date": time.strftime("%Y-%m-%d"),
    }
    console = Console(width=None if Console().is_terminal else 120)
    console.print(table)
    console.print(" ".join(f"{name}={value}" for name, value in machine.items()))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": machine, "results": figures}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
