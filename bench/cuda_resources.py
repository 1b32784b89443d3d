"""What every CUDA kernel takes on every architecture: a build is enough, no GPU.

    cmake --build build --verbose | python -m bench.cuda_resources
    python -m bench.cuda_resources --sass FILE [--kernels PATTERN] [--architecture sm_90a] [--shared BYTES]

The first shows registers and spills, as ptxas printed them. The second reads the machine code of an object
file, a library or a cubin: instructions, blocks on a multiprocessor, and of each loop that streams 16 bytes a
thread what it issues for each element (see sass.py).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from . import sass

THREADS = 128  # of a block, in all our kernels


class Resources(NamedTuple):
    """What ptxas says of one kernel on one architecture, or of a function that it calls."""

    kernel: str
    architecture: str
    registers: int | None  # None of a function: it has those of the kernel
    stack: int  # bytes, as the spills
    spill_stores: int
    spill_loads: int


# An entry, and what follows of it and of the functions that are compiled with it.
_REPORT = re.compile(
    r"entry function '(?P<entry>\S+)' for '(?P<architecture>\S+)'"
    r"|Function properties for (?P<symbol>\S+)\s+"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r"|Used (?P<registers>\d+) registers"
)


def parse(build_output: str) -> list[Resources]:
    """The kernels that ptxas reported with -v and the functions that they call, by name and architecture."""
    entry = architecture = ""
    found: dict[tuple[str, str], Resources] = {}
    for match in _REPORT.finditer(build_output):
        if match["entry"]:
            entry, architecture = match["entry"], match["architecture"]
        elif match["symbol"]:
            sizes = (int(match[name]) for name in ("stack", "stores", "loads"))
            key = match["symbol"], architecture
            found[key] = Resources(match["symbol"], architecture, None, *sizes)
        else:
            key = entry, architecture
            found[key] = found[key]._replace(registers=int(match["registers"]))
    names = demangle([r.kernel for r in found.values()])
    resources = [r._replace(kernel=name) for name, r in zip(names, found.values(), strict=True)]
    return sorted(resources, key=lambda r: (r.kernel, _number(r.architecture)))


def demangle(symbols: list[str]) -> list[str]:
    """Short names of kernels and functions: ``row_lse_kernel<Half, 8>``."""
    result = subprocess.run(["c++filt", *symbols], capture_output=True, text=True, check=True)
    spaces = re.compile(r"_INTERNAL_\w+::|attn_sampler::cuda::|\(anonymous namespace\)::")
    names = [spaces.sub("", x) for x in result.stdout.splitlines()]
    return [re.sub(r"^void |\(.*", "", name) for name in names]


def table(resources: list[Resources]) -> str:
    """A Markdown table: a row for each kernel, its registers on each architecture, and for each function."""
    architectures = sorted({r.architecture for r in resources}, key=_number)
    lines = [
        f"| kernel | {' | '.join(architectures)} | spilled bytes |",
        "|---" * (len(architectures) + 2) + "|",
    ]
    for kernel in sorted({r.kernel for r in resources}):
        own = {r.architecture: r for r in resources if r.kernel == kernel}
        registers = (str((own[a].registers if a in own else None) or "-") for a in architectures)
        spilled = sum(r.spill_stores + r.spill_loads for r in own.values())
        lines.append(f"| {kernel} | {' | '.join(registers)} | {spilled} |")
    return "\n".join(lines)


def _number(architecture: str) -> int:
    return int(re.sub(r"\D", "", architecture))


class Multiprocessor(NamedTuple):
    """What its blocks share ("CUDA C++ Programming Guide", technical specifications)."""

    threads: int
    blocks: int
    shared: int  # bytes, of which each block takes RESERVED more than it asks for
    registers: int = 65536


RESERVED = 1024
SCRATCH = 2064  # of every block, struct Shared
MULTIPROCESSORS = {
    80: Multiprocessor(2048, 32, 164 * 1024),
    86: Multiprocessor(1536, 16, 100 * 1024),
    89: Multiprocessor(1536, 24, 100 * 1024),
    90: Multiprocessor(2048, 32, 228 * 1024),
    100: Multiprocessor(2048, 32, 228 * 1024),
    103: Multiprocessor(2048, 32, 228 * 1024),
    120: Multiprocessor(1536, 24, 100 * 1024),
}


def resident_blocks(
    architecture: str, registers: int, shared: int, threads: int = THREADS
) -> tuple[int, str] | None:
    """Blocks on a multiprocessor at a time, and what allows no more; None for an architecture not known."""
    which = MULTIPROCESSORS.get(_number(architecture))
    if which is None:
        return None
    of_warp = -(-registers * 32 // 256) * 256  # handed out by 256
    limits = {
        "registers": which.registers // of_warp // 4 * 4 // -(-threads // 32),  # of four schedulers alike
        "shared memory": which.shared // (shared + RESERVED),
        "threads": which.threads // threads,
        "blocks": which.blocks,
    }
    limit = min(limits, key=lambda name: limits[name])
    return limits[limit], limit


def element_size(kernel: str) -> int | None:
    """Bytes of what a kernel of this name reads, by its template arguments; None where they do not tell."""
    sizes = {"BFloat16": 2, "Half": 2, "float": 4, "Float8": 1}
    found = re.search(rf"\b({'|'.join(sizes)})\b", kernel)
    return sizes[found[1]] if found else None


def launch_shared(kernel: str, headdim: int = 128) -> int:
    """Dynamic shared memory of a block of a kernel of this name: what all have, and tiles of keys."""
    size = element_size(kernel)
    if size is None:
        return SCRATCH
    columns = {"column_scores_kernel": 128, "attention_map_kernel": 32}.get(kernel.partition("<")[0])
    tiles = re.search(r", (\d+)", kernel)
    if columns is None:
        columns = 8 * int(tiles[1]) if tiles else 0
    stages = 2 if kernel.startswith("row_lse") else 1
    return SCRATCH + stages * -(-headdim * size // 64) * 64 * columns


class Stream(NamedTuple):
    """A loop that streams, and the kernel that it is in."""

    kernel: str
    architecture: str
    loop: sass.Loop

    @property
    def per_element(self) -> float | None:
        """Issued instructions for each element, by its exponential or by the type in the kernel's name."""
        return self.loop.per_element(element_size(self.kernel))

    @property
    def dtype(self) -> str | None:
        """What a loop over logits reads, by how many 16 bytes hold and how they widen; None of others."""
        loop = self.loop
        if not loop.elements or loop.common_loads != loop.global_loads:
            return None
        if loop.elements == 4 * loop.global_loads:
            return "float32"
        return "float16" if loop.widens_float16 else "bfloat16"


class Machine(NamedTuple):
    """What the machine code of one kernel for one architecture says."""

    kernel: str
    architecture: str
    instructions: int
    registers: int
    shared: int  # static, in bytes
    streams: list[Stream]


def machine_code(path: Path, kernels: str = "", architecture: str | None = None) -> list[Machine]:
    """The kernels of an object file, a library or a cubin whose names match a pattern, by name."""
    taken = sass.resources(path)
    found = sass.parse(sass.read(path, architecture))
    machines = []
    for name, kernel in zip(demangle([k.symbol for k in found]), found, strict=True):
        if not re.search(kernels, name):
            continue
        # From sm_90 on what the system takes is counted in.
        key = kernel.symbol, kernel.architecture
        registers, shared = taken[key] if key in taken else taken[kernel.symbol, ""]  # of a cubin
        shared -= min(shared, RESERVED) if _number(kernel.architecture) >= 90 else 0
        # Those around another are over units or tiles, and have no common path to speak of.
        streams = [
            Stream(name, kernel.architecture, loop) for loop in sass.loops(kernel) if not loop.encloses
        ]
        code = [i for i in kernel.code if i.opcode != "NOP"]  # which pad the end
        machines.append(Machine(name, kernel.architecture, len(code), registers, shared, streams))
    return sorted(machines, key=lambda m: (m.kernel, _number(m.architecture)))


def machine_table(machines: Sequence[Machine], shared: int | None = None) -> str:
    """Two Markdown tables, kernels and their loops. Their blocks take so much dynamic shared memory, or what
    they do at a head dimension of 128.
    """
    lines = [
        "| kernel | architecture | instructions | registers | shared | blocks a multiprocessor "
        "| KB in flight |",
        "|---" * 7 + "|",
    ]
    for m in machines:
        all_shared = m.shared + (launch_shared(m.kernel) if shared is None else shared)
        resident = resident_blocks(m.architecture, m.registers, all_shared)
        blocks, limit = resident or (0, "architecture not known")
        loads = max((s.loop.global_loads + s.loop.copies for s in m.streams), default=0)
        flight = f"{blocks * THREADS * 16 * loads / 1024:.0f}" if loads and blocks else "-"
        lines.append(
            f"| {m.kernel} | {m.architecture} | {m.instructions} | {m.registers} | {all_shared} "
            f"| {blocks} ({limit}) | {flight} |"
        )
    lines += [
        "",
        "| kernel | architecture | loop at | instructions | loads, global / shared | copies "
        "| on the common path | its loads | its exponentials | instructions an element | of logits "
        "| asked of eight | noise of four |",
        "|---" * 13 + "|",
    ]
    for s in (stream for m in machines for stream in m.streams):
        each = "-" if s.per_element is None else f"{s.per_element:.1f}"
        loop = s.loop
        lines.append(
            f"| {s.kernel} | {s.architecture} | {loop.first:#x} | {loop.instructions} "
            f"| {loop.global_loads} / {loop.shared_loads} | {loop.copies} | {loop.common} "
            f"| {loop.common_loads} | {loop.common_exponentials} | {each} | {s.dtype or '-'} "
            f"| {loop.asked or '-'} | {loop.noise or '-'} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.cuda_resources",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--sass", type=Path, metavar="FILE", help="of machine code, instead of ptxas's output"
    )
    parser.add_argument("--kernels", default="", metavar="PATTERN", help="those whose names it is found in")
    parser.add_argument("--architecture", metavar="NAME", help="such as sm_90a; all without")
    parser.add_argument(
        "--shared", type=int, metavar="BYTES", help="dynamic ones of each block; those of D = 128 without"
    )
    options = parser.parse_args(arguments)
    if options.sass is None:
        print(table(parse(sys.stdin.read())))
        return 0
    try:
        machines = machine_code(options.sass, options.kernels, options.architecture)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not machines:
        print(f"error: {options.sass} has no such kernels", file=sys.stderr)
        return 1
    print(machine_table(machines, options.shared))
    return 0


if __name__ == "__main__":
    sys.exit(main())
