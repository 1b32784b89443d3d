"""Registers, shared memory and spills of every CUDA kernel and architecture, from the output of a build.

cmake --build build --verbose | python -m bench.cuda_resources
"""

from __future__ import annotations

import re
import subprocess
import sys
from typing import NamedTuple


class Resources(NamedTuple):
    """What ptxas says of one kernel on one architecture."""

    kernel: str
    architecture: str
    registers: int
    stack: int  # bytes, as the spills
    spill_stores: int
    spill_loads: int


_ENTRY = re.compile(
    r"entry function '(?P<symbol>\S+)' for '(?P<architecture>\S+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def parse(build_output: str) -> list[Resources]:
    """The kernels that ptxas reported with -v, by name and architecture."""
    found = list(_ENTRY.finditer(build_output))
    names = demangle([m["symbol"] for m in found])
    return sorted(
        Resources(name, m["architecture"], *(int(m[k]) for k in ("registers", "stack", "stores", "loads")))
        for name, m in zip(names, found, strict=True)
    )


def demangle(symbols: list[str]) -> list[str]:
    """Short names of kernels: ``row_lse_kernel<Half, 8>``."""
    result = subprocess.run(["c++filt", *symbols], capture_output=True, text=True, check=True)
    names = [
        re.sub(r"attn_sampler::cuda::|\(anonymous namespace\)::", "", x) for x in result.stdout.splitlines()
    ]
    return [re.sub(r"^void |\(.*", "", name) for name in names]


def table(resources: list[Resources]) -> str:
    """A Markdown table: a row for each kernel, its registers on each architecture."""
    architectures = sorted({r.architecture for r in resources}, key=lambda a: int(re.sub(r"\D", "", a)))
    lines = [
        f"| kernel | {' | '.join(architectures)} | spilled bytes |",
        "|---" * (len(architectures) + 2) + "|",
    ]
    for kernel in sorted({r.kernel for r in resources}):
        own = {r.architecture: r for r in resources if r.kernel == kernel}
        registers = (str(own[a].registers) if a in own else "-" for a in architectures)
        spilled = sum(r.spill_stores + r.spill_loads for r in own.values())
        lines.append(f"| {kernel} | {' | '.join(registers)} | {spilled} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(parse(sys.stdin.read())))
