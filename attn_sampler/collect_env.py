"""What attn_sampler finds on this machine: versions, processor, and each backend with its reason.

``python -m attn_sampler.collect_env`` and ``attn-sampler info`` print it; ``--json`` for programs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from typing import Any

import torch

from attn_sampler import command_line
from attn_sampler._version import __version__
from attn_sampler.backends import BACKENDS, extension, unavailable


def collect_env() -> dict[str, Any]:
    """The report as plain JSON values.

    Returns
    -------
    dict
        ``attn_sampler``, ``python``, ``platform``, ``torch``, ``torch_cuda`` (the CUDA version that torch
        was built with) and ``triton``: versions, None where absent. ``cpu``: ``{"isa", "cores",
        "torch_threads"}``, the instruction set as torch sees it. ``extension``: ``{"installed", "reason",
        "cpu_isa", "cpu_amx_refusal"}``, the compiled part, the instruction set that it runs with, and why an
        AMX unit of this processor does not serve (None where it does, or there is none). ``gpus``: for each
        ``{"name", "compute_capability", "memory_gib"}``. ``backends``: for each name
        ``{"available", "reason"}``.
    """
    installed = extension.UNAVAILABLE is None
    gpus = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": gpu.name,
                "compute_capability": f"{gpu.major}.{gpu.minor}",
                "memory_gib": round(gpu.total_memory / 2**30, 1),
            }
        )
    reasons = {name: unavailable(name) for name in BACKENDS}
    return {
        "attn_sampler": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": _version("triton") or _version("pytorch-triton"),
        "cpu": {
            "isa": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
        },
        "extension": {
            "installed": installed,
            "reason": extension.UNAVAILABLE or "",
            "cpu_isa": extension.cpu_isa() if installed else None,
            "cpu_amx_refusal": extension.cpu_amx_refusal() if installed else None,
        },
        "gpus": gpus,
        "backends": {
            name: {"available": reason is None, "reason": reason or ""} for name, reason in reasons.items()
        },
    }


def format_env(env: dict[str, Any]) -> str:
    """The report as lines of text."""
    cpu, extension = env["cpu"], env["extension"]
    built = f"built with CUDA {env['torch_cuda']}" if env["torch_cuda"] else "built without CUDA"
    gpus = [
        f"{g['name']}, compute capability {g['compute_capability']}, {g['memory_gib']} GiB"
        for g in env["gpus"]
    ]
    rows = [
        ("attn_sampler", env["attn_sampler"]),
        ("python", f"{env['python']} on {env['platform']}"),
        ("torch", f"{env['torch']}, {built}"),
        ("triton", env["triton"] or "not installed"),
        ("cpu", f"{cpu['isa']}, {cpu['cores']} cores, {cpu['torch_threads']} torch threads"),
        ("gpu", "; ".join(gpus) or "none that torch can use"),
        ("extension", _kernels(extension) if extension["installed"] else extension["reason"]),
    ]
    lines = [f"{name:<13} {value}" for name, value in rows]
    lines.append("backends")
    for name, state in env["backends"].items():
        lines.append(f"  {name:<11} {'on' if state['available'] else 'off: ' + state['reason']}")
    return "\n".join(lines)


def _kernels(extension: dict[str, Any]) -> str:
    """What the CPU kernels run with, and what is to be known of it."""
    isa, refusal = extension["cpu_isa"], extension.get("cpu_amx_refusal")
    if isa == "amx":
        return "runs amx, to which bfloat16 numbers below 2^-126 are 0"
    return f"runs {isa}" + (f", without this processor's AMX: {refusal}" if refusal else "")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Print the report."""
    env = collect_env()
    print(json.dumps(env, indent=2) if options.json else format_env(env))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command ``python -m attn_sampler.collect_env``."""
    parser = command_line.Parser(
        prog="python -m attn_sampler.collect_env", description="Print versions and backends, with reasons."
    )
    add_arguments(parser)
    return command_line.guarded(lambda: run(parser.parse_args(arguments)))


if __name__ == "__main__":
    raise SystemExit(main())
