"""Runs the comparisons: checks each result, then times it; keeps the reason for every figure not taken."""

from __future__ import annotations

import hashlib
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from attn_sampler import __version__, collect_env
from attn_sampler.backends import BACKENDS, REGISTRY, unavailable

from .cases import CASES
from .problems import (
    OUR_TOLERANCE,
    RIVAL_TOLERANCE,
    Candidate,
    Problem,
    Setting,
    WrongResultError,
    flash_colreduce,
    require,
)
from .timing import Ceilings, CpuDevice, CudaDevice, Device, summary

ROOT = Path(__file__).resolve().parent.parent
_MEMORY_SHARE = 0.5  # of the free memory that one row or one candidate may take
_SUFFIXES = (".h", ".cpp", ".cu", ".cuh", ".py")

#: What the kernels of a device are made of.
SOURCES = {
    "cpu": ("csrc/cpu", "csrc/include"),
    "cuda": ("csrc/cuda", "csrc/include", "kernels"),
}


class Effort(NamedTuple):
    """How long to measure."""

    seconds: float  # of samples for each candidate
    least: int  # samples of each
    slow: float  # a candidate whose one run takes longer than this gets no other
    floor: float  # a row whose floor takes longer than this is left out


FULL = Effort(seconds=0.2, least=7, slow=0.5, floor=0.1)
BRIEF = Effort(seconds=0.05, least=5, slow=0.3, floor=0.05)


def default_backends() -> list[str]:
    """All but the specification, and but kernels that an interpreter runs."""
    return [b for b in BACKENDS if b != "reference" and REGISTRY[b].device == REGISTRY[b].auto]


def missing(backends: Sequence[str]) -> dict[str, str]:
    """What this machine cannot measure, each with the reason."""
    absent = {name: reason for name in BACKENDS if (reason := unavailable(name))}
    if "reference" not in backends:
        absent["reference"] = "the specification is not timed unless asked for (--backends reference)"
    if "triton" not in backends and REGISTRY["triton"].device == "cpu":
        absent["triton"] = "its kernels are interpreted here (TRITON_INTERPRET=1)"
    if not torch.cuda.is_available():
        absent["flash-colreduce"] = "its kernels need a GPU, and torch sees none"
    elif flash_colreduce() is None:
        absent["flash-colreduce"] = "not installed (pip install flash-colreduce)"
    return absent


def run(
    cases: Iterable[str],
    rows: Iterable[str],
    backends: Sequence[str],
    threads: Sequence[int],
    dtype: torch.dtype,
    effort: Effort,
    *,
    seconds: float = math.inf,
    advance: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> dict[str, Any]:
    """Measure cases x rows x devices x threads.

    Parameters
    ----------
    cases, rows, backends
        Names of ``CASES``, ``ROWS`` and ``BACKENDS``. A backend that cannot run here is left out.
    threads
        Numbers of CPU threads.
    seconds
        No row is started after so long.
    advance
        Called before each row with its label, how many are done and how many there are.

    Returns
    -------
    dict
        ``devices`` (with their measured ceilings) and ``cells``, plain JSON values.
    """
    stop = time.perf_counter() + seconds
    rows = set(rows)
    usable = tuple(name for name in backends if unavailable(name) is None)
    places = {}
    for place in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        own = tuple(b for b in usable if REGISTRY[b].device in (place, None))
        if own:
            places[place] = own
    work = [(p, c, r) for p in places for c in cases for r in CASES[c].rows if r in rows]
    devices: list[tuple[Device, Ceilings]] = []
    measured_devices, cells = [], []
    for done, (place, name, key) in enumerate(work):
        advance(f"{place} {name} {key}", done, len(work))
        if not devices or devices[0][0].name != place:
            devices = [(d, d.ceilings(dtype)) for d in _devices(place, threads)]
            measured_devices += [_describe(*pair) for pair in devices]
        # The peer's rows are float16, which most processors can only emulate.
        precision = torch.float16 if name == "peer" and place == "cuda" else dtype
        late = f"not started: {seconds:g} seconds had passed" if time.perf_counter() > stop else None
        cells += measure_row(name, key, Setting(place, precision, places[place]), devices, effort, late)
    advance("", len(work), len(work))
    return {"devices": measured_devices, "cells": cells}


def _devices(place: str, threads: Sequence[int]) -> list[Device]:
    return [CudaDevice()] if place == "cuda" else [CpuDevice(n) for n in threads]


def _describe(device: Device, ceilings: Ceilings) -> dict[str, Any]:
    gigabytes, gigaops = 1e-9 * ceilings.bytes_per_s, 1e-9 * ceilings.operations_per_s
    return {
        "device": device.name,
        "threads": device.threads,
        "GB_per_s": round(gigabytes, 1),
        "GFLOP_per_s": round(gigaops, 1),
        "cold": device.cold,
    }


def measure_row(
    name: str,
    key: str,
    setting: Setting,
    devices: Sequence[tuple[Device, Ceilings]],
    effort: Effort,
    skipped: str | None = None,
) -> list[dict[str, Any]]:
    """One cell for each device (each number of threads)."""
    case, row = CASES[name], CASES[name].rows[key]
    n_bytes, operations = case.cost(row, setting.element)
    cells = []
    for device, ceilings in devices:
        floor_ms, bound = ceilings.floor_ms(n_bytes, operations)
        cells.append(
            {
                "case": name,
                "row": key,
                "shape": row._asdict(),
                "device": device.name,
                "threads": device.threads,
                "dtype": str(setting.dtype).removeprefix("torch."),
                "bytes": n_bytes,
                "operations": operations,
                "floor_ms": floor_ms,
                "bound": bound,
            }
        )
    least, memory = min(c["floor_ms"] for c in cells), devices[0][0].available_bytes()
    tensors = case.tensor_bytes(row, setting.element)
    if skipped is None and least > 1e3 * effort.floor:
        skipped = f"its floor is {least / 1e3:.1f} s, the limit {effort.floor:g} s"
    if skipped is None and tensors > _MEMORY_SHARE * memory:
        skipped = f"its tensors take {tensors / 2**30:.1f} GiB of {memory / 2**30:.1f} free"
    if skipped is None:
        try:
            problem = case.make(row, setting)
        except torch.OutOfMemoryError:
            skipped = "out of memory"
    for cell, (device, _) in zip(cells, devices, strict=True):
        if skipped is None:
            cell["figures"] = _measure(problem, device, effort)
        else:
            cell["skipped"] = skipped
    return cells


def _measure(problem: Problem, device: Device, effort: Effort) -> dict[str, dict[str, Any]]:
    """The figures of each candidate, or why it has none."""
    device.activate()
    figures: dict[str, dict[str, Any]] = {}
    timed = {}
    for name, candidate in problem.candidates.items():
        figures[name] = {"ours": candidate.ours, **_check(problem, candidate, device, effort)}
        seconds = figures[name].pop("seconds", None)
        if seconds is None:
            continue
        if seconds > effort.slow:
            figures[name] |= summary([1e3 * seconds])
        else:
            timed[name] = candidate.run
    measured = device.measure(timed, problem.reset, effort.seconds, effort.least)
    return {name: figure | measured.get(name, {}) for name, figure in figures.items()}


def _check(problem: Problem, candidate: Candidate, device: Device, effort: Effort) -> dict[str, Any]:
    """Run and judge once: error, peak memory and seconds; or the reason for going no further."""
    memory = device.available_bytes()
    if candidate.scratch_bytes > _MEMORY_SHARE * memory:
        return {"skipped": f"it needs {candidate.scratch_bytes / 2**30:.1f} GiB of {memory / 2**30:.1f} free"}
    try:
        problem.reset()
        observed = device.observe(candidate.run)
        if (
            candidate.compiled or observed.seconds <= effort.slow
        ):  # once more, without what only the first does
            problem.reset()
            observed = device.observe(candidate.run)
        error = problem.error(observed.result, candidate.ours)
        tolerance = OUR_TOLERANCE if candidate.ours else RIVAL_TOLERANCE
        require(error <= tolerance, f"relative error {error:.2g}, tolerance {tolerance:g}")
    except WrongResultError as problem_found:
        return {"failed": f"wrong result: {problem_found}"}
    except Exception as problem_found:  # whatever a rival's library or compiler raises is its figure here
        return {"failed": f"{type(problem_found).__name__}: {problem_found}".splitlines()[0]}
    return {"error": error, "peak_bytes": observed.peak_bytes, "seconds": observed.seconds}


def environment(results: dict[str, Any]) -> dict[str, Any]:
    """The machine, the commit and the sources that the figures were taken with."""
    env = collect_env.collect_env()
    if any(device["device"] == "cuda" for device in results["devices"]):
        machine = torch.cuda.get_device_name()
    else:
        machine = f"{_processor()}, {env['cpu']['cores']} cores, {env['extension']['cpu_isa']}"
    return {
        "machine": machine,
        "processor": _processor(),
        "memory_gib": round(CpuDevice.available_bytes() / 2**30),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "sources": {device: digest(device) for device in SOURCES},
        **env,
    }


def on_cpu(threads: int) -> dict[str, Any]:
    """Where a measurement on the CPU runs: for the files of those that are no cases of this harness."""
    return {
        "processor": _processor(),
        "cpu_isa": collect_env.collect_env()["extension"]["cpu_isa"] or "reference",
        "torch": torch.__version__,
        "attn_sampler": __version__,
        "commit": commit(),
        "load": load_average(),
        "threads": threads,
        "date": time.strftime("%Y-%m-%d"),
    }


def load_average() -> float:
    """Processes that were running in the last minute, before ours."""
    return round(os.getloadavg()[0], 1)


def _processor() -> str:
    """The processor's name as Linux gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def commit() -> str:
    """The tree's commit, marked where files have changed since; "unknown" outside a repository."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()


def digest(device: str, root: Path = ROOT) -> str:
    """A fingerprint of the kernels' sources, by which a table is found to be older than they are."""
    total = hashlib.sha256()
    for folder in SOURCES[device]:
        for path in sorted(p for p in (root / folder).rglob("*") if p.is_file() and p.suffix in _SUFFIXES):
            total.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:12]
