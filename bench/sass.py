"""The loops of compiled kernels, from their SASS: what a multiprocessor issues for each element it reads.

The flow graph of each kernel is cut into natural loops. Of a loop that reads 16 bytes at a time, the *common
path* is the shortest way around it that makes all of those loads and takes an exponential for each element:
code for rare events (a new maximum, a masked token), which is jumped over, is not on it. Functions that a
kernel calls are part of its code, with loops of their own. Where such a loop has another in it that makes
random words, it is counted too what a group of tokens costs that asks for none, and what four words cost that
do not win.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.MULTILINE)
_HEADER = re.compile(r"^\s*code for (\w+)\s*$|^\s*Function : (\S+)\s*$", re.MULTILINE)
_RESOURCES = re.compile(r"^arch = (\w+)$|^ Function (\S+):\s+REG:(\d+) .*?SHARED:(\d+)", re.MULTILINE)
_FAR = 1 << 30
#: Products of ten rounds of Philox, but for a few that the compiler saves.
_PRODUCTS = 16


class Instruction(NamedTuple):
    """One line of SASS."""

    address: int
    guard: str  # the predicate before it, "" for none
    opcode: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where it jumps to, if it jumps."""
        if self._jumps_by_call:
            return self.address + 32
        if self.opcode.split(".")[0] not in ("BRA", "JMP"):
            return None
        addresses = re.findall(r"0x([0-9a-f]+)", self.operands)
        return int(addresses[-1], 16) if addresses else None

    @property
    def called(self) -> int | None:
        """Where the function starts that it calls, if it calls one of its own file."""
        if not self.opcode.startswith("CALL") or self._jumps_by_call:
            return None
        found = re.search(r"0x([0-9a-f]+)", self.operands)
        return int(found[1], 16) if found else None

    @property
    def _jumps_by_call(self) -> bool:
        """Whether it is a call over the next instruction, which the compiler for sm_80 writes for a jump."""
        return self.opcode.startswith("CALL") and self.operands.endswith(f"0x{self.address + 32:x}")

    @property
    def falls_through(self) -> bool:
        """Whether the next one may follow."""
        always = self.guard in ("", "PT")
        name = self.opcode.split(".")[0]
        if name in ("EXIT", "RET", "BRX", "JMX"):
            return not always
        if name in ("BRA", "JMP") or self._jumps_by_call:
            return not always or self.opcode.startswith("BRA.DIV") or "P" in self.operands.partition("0x")[0]
        return True

    @property
    def is_wide_load(self) -> bool:
        """Whether each thread reads 16 bytes, of global or of shared memory."""
        return re.match(r"(LDG|LDS)\b.*\.128\b", self.opcode) is not None

    @property
    def is_copy(self) -> bool:
        """Whether it fills shared memory without the registers: cp.async, or a bulk copy."""
        return re.match(r"LDGSTS|UBLKCP|UTMALDG|UBLKPF", self.opcode) is not None


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel for one architecture."""

    symbol: str
    architecture: str
    text: str

    @functools.cached_property
    def code(self) -> list[Instruction]:
        """Its instructions."""
        return [_instruction(int(m[1], 16), m[2]) for m in _INSTRUCTION.finditer(self.text)]


class Loop(NamedTuple):
    """A natural loop; nested loops' instructions are among its own."""

    first: int  # address of its head
    instructions: int  # of all of it
    global_loads: int  # of 16 bytes, in none of its nested loops
    shared_loads: int
    copies: int
    exponentials: int
    common: int  # instructions of the common path
    common_loads: int
    common_exponentials: int
    elements: int  # of which each has its exponential on the common path; 0 where they do not
    encloses: bool = False  # another of these loops, which takes exponentials
    widens_float16: bool = False  # on the common path
    asked: int = 0  # of a group of tokens that asks for no random words; 0 where none are made
    noise: int = 0  # of four words that do not win; as `asked`

    def per_element(self, element_size: int | None = None) -> float | None:
        """Issued instructions for each element on the common path. Without exponentials the loads tell how
        many elements there are, by their size."""
        elements = self.elements or (self.common_loads * 16 // element_size if element_size else 0)
        return self.common / elements if elements else None


def tool(name: str) -> str:
    """cuobjdump or nvdisasm: that of the CUDA toolkit, or the one that Triton brings."""
    if (found := shutil.which(name)) is not None:
        return found
    try:
        import triton
    except ImportError:
        pass
    else:
        bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        if bundled.exists():
            return str(bundled)
    raise FileNotFoundError(f"{name} was not found: neither on PATH nor among Triton's own tools")


def read(path: Path, architecture: str | None = None) -> str:
    """The SASS of an object file, a library or a cubin, of all architectures or of one."""
    chosen = () if architecture is None else ("-arch", architecture)
    return _output(tool("cuobjdump"), "-sass", *chosen, str(path))


def resources(path: Path) -> dict[tuple[str, str], tuple[int, int]]:
    """Registers and static shared memory, with what the system takes, by symbol and architecture."""
    found, architecture = {}, ""
    for match in _RESOURCES.finditer(_output(tool("cuobjdump"), "-res-usage", str(path))):
        if match[1]:
            architecture = match[1]
        else:
            found[match[2], architecture] = int(match[3]), int(match[4])
    return found


def images(path: Path) -> set[str]:
    """The architectures that a file has machine code for, as sm_90a, and PTX, as compute_80."""
    command = (tool("cuobjdump"), "--list-elf", "--list-ptx", str(path))
    names = re.findall(r"\.(sm_\w+)\.(cubin|ptx)", _output(*command))
    return {arch if kind == "cubin" else arch.replace("sm_", "compute_") for arch, kind in names}


def _output(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise ValueError(f"{' '.join(command)}: {(result.stderr or result.stdout).strip()}")
    return result.stdout


def parse(sass: str) -> list[Kernel]:
    """The kernels in what cuobjdump -sass prints."""
    kernels: list[Kernel] = []
    headers, architecture = list(_HEADER.finditer(sass)), ""
    ends = [match.start() for match in headers[1:]] + [len(sass)]
    for header, end in zip(headers, ends, strict=True):
        if header[1]:
            architecture = header[1]
            continue
        kernels.append(Kernel(header[2], architecture, sass[header.end() : end]))
    return kernels


def _instruction(address: int, text: str) -> Instruction:
    guard = ""
    if text.startswith("@"):
        guard, _, text = text[1:].partition(" ")
    opcode, _, operands = text.strip().partition(" ")
    return Instruction(address, guard, opcode, operands)


def loops(kernel: Kernel) -> list[Loop]:
    """All of a kernel's loops that read 16 bytes a thread or copy to shared memory, in the code's order."""
    graph = _Graph(kernel.code)
    found: dict[int, Loop] = {}
    bodies = graph.natural_loops()
    for head, body in sorted(bodies.items()):
        own = graph.own(head, bodies)
        wide = [i for i in own if i.is_wide_load]
        copies = sum(i.is_copy for i in own)
        if not wide and not copies:
            continue
        every = [i for n in body for i in graph.blocks[n]]
        common, elements = graph.common_path(head, body)
        asked, noise = graph.noise(head, bodies) if elements else (0, 0)
        found[head] = Loop(
            first=graph.blocks[head][0].address,
            instructions=len(every),
            global_loads=sum(i.opcode.startswith("LDG") for i in wide),
            shared_loads=sum(i.opcode.startswith("LDS") for i in wide),
            copies=copies,
            exponentials=sum(_is_exponential(i) for i in every),
            common=len(common),
            common_loads=sum(i.is_wide_load for i in common),
            common_exponentials=sum(_is_exponential(i) for i in common),
            elements=elements,
            widens_float16=sum(i.opcode.startswith("HADD2.F32") for i in common) >= max(elements, 1),
            asked=asked,
            noise=noise,
        )
    exponential = {head for head, loop in found.items() if loop.common_exponentials}
    return [
        loop._replace(encloses=any(h != head and h in bodies[head] for h in exponential))
        for head, loop in found.items()
    ]


def _is_exponential(instruction: Instruction) -> bool:
    return instruction.opcode.startswith("MUFU.EX2")


def _is_load(instruction: Instruction) -> bool:
    return instruction.is_wide_load


def _is_product(instruction: Instruction) -> bool:
    """Whether it is a wide product, of which Philox takes two a round."""
    return re.match(r"U?IMAD\.(WIDE|HI)", instruction.opcode) is not None


class _Graph:
    """The flow of a kernel: blocks of instructions, each a number, and what may follow it."""

    def __init__(self, code: Sequence[Instruction]) -> None:
        calls = {c for i in code if (c := i.called) is not None}
        targets = calls | {t for i in code if (t := i.target) is not None}
        self.blocks: list[list[Instruction]] = []
        ended = True
        for instruction in code:
            if ended or instruction.address in targets:
                self.blocks.append([])
            self.blocks[-1].append(instruction)
            ended = instruction.target is not None or not instruction.falls_through
        at = {block[0].address: n for n, block in enumerate(self.blocks)}
        self.entries = [0, *sorted(at[c] for c in calls if c in at)]
        self.after: list[list[int]] = []
        for n, block in enumerate(self.blocks):
            last = block[-1]
            follows = [at[last.target]] if last.target in at else []
            if last.falls_through and n + 1 < len(self.blocks):
                follows.append(n + 1)
            self.after.append(follows)
        self.before: list[list[int]] = [[] for _ in self.blocks]
        for n, follows in enumerate(self.after):
            for m in follows:
                self.before[m].append(n)

    def natural_loops(self) -> dict[int, set[int]]:
        """The blocks of each loop, by its head: what reaches a jump back to it without passing through it."""
        bodies: dict[int, set[int]] = {}
        for entry in self.entries:
            order = self._reverse_postorder(entry, range(len(self.blocks)))
            dominators = self._dominators(order)
            for n in order:
                for head in self.after[n]:
                    if not dominators[n] >> head & 1:
                        continue
                    body, pending = bodies.setdefault(head, {head}), [n]
                    while pending:
                        m = pending.pop()
                        if m not in body:
                            body.add(m)
                            pending += [p for p in self.before[m] if p in dominators]
        return bodies

    def own(self, head: int, bodies: Mapping[int, set[int]]) -> list[Instruction]:
        """A loop's instructions that are in none of its nested loops."""
        body = bodies[head]
        # A loop that is another's part, and not the same.
        nested = [b for h, b in bodies.items() if h != head and b < body and h in body]
        return [i for n in body if not any(n in b for b in nested) for i in self.blocks[n]]

    def noise(self, head: int, bodies: Mapping[int, set[int]]) -> tuple[int, int]:
        """Loop.asked and Loop.noise."""
        body = bodies[head]
        nested = {h: b for h, b in bodies.items() if h != head and b < body and h in body}
        makes = [h for h in nested if sum(map(_is_product, self.own(h, bodies))) >= _PRODUCTS]
        if not makes:
            return 0, 0
        (words,) = makes
        of_group = max((h for h, b in nested.items() if nested[words] <= b), key=lambda h: len(nested[h]))
        shortest, _ = self.common_path(of_group, nested[of_group])
        path, _ = self.common_path(words, nested[words], _is_product)
        of_word = [b for b in nested if b != words and nested[b] < nested[words]]
        # The path passes once through a loop over the four.
        again = sum(3 * len(self.common_path(b, nested[b])[0]) for b in of_word)
        return len(shortest), len(path) + again

    def _reverse_postorder(self, start: int, within: Iterable[int], cut: int | None = None) -> list[int]:
        """Blocks that are reached, each before what follows it but for jumps back. None goes on to `cut`."""
        allowed, seen, order = set(within), {start}, []
        stack = [(start, iter(self.after[start]))]
        while stack:
            n, follows = stack[-1]
            for m in follows:
                if m in allowed and m not in seen and m != cut:
                    seen.add(m)
                    stack.append((m, iter(self.after[m])))
                    break
            else:
                order.append(n)
                stack.pop()
        return order[::-1]

    def _dominators(self, order: Sequence[int]) -> dict[int, int]:
        """Of each block that is reached, the blocks that every way to it passes, as bits."""
        everything = (1 << len(self.blocks)) - 1
        found = dict.fromkeys(order, everything)
        found[order[0]] = 1 << order[0]
        changed = True
        while changed:
            changed = False
            for n in order[1:]:
                common = everything
                for p in self.before[n]:
                    common &= found.get(p, everything)
                common |= 1 << n
                changed |= common != found[n]
                found[n] = common
        return found

    def common_path(
        self, head: int, body: set[int], wanted: Callable[[Instruction], bool] = _is_load
    ) -> tuple[list[Instruction], int]:
        """The shortest way around with the most wide loads and an exponential for each element of these: for
        eight or four of a load, and where there are not so many, any number. And how many elements that are.
        Other instructions may be wanted in place of the loads.
        """
        order = self._reverse_postorder(head, body, cut=head)
        place = {n: i for i, n in enumerate(order)}
        loads = [sum(map(wanted, self.blocks[n])) for n in order]
        powers = [sum(_is_exponential(i) for i in self.blocks[n]) for n in order]
        # By loads and exponentials so far: the fewest instructions, and where from.
        ways: list[dict[tuple[int, int], tuple[int, int, tuple[int, int]]]] = [{} for _ in order]
        ways[0][loads[0], powers[0]] = (len(self.blocks[head]), -1, (0, 0))
        ends: list[tuple[int, tuple[int, int]]] = []
        for i, n in enumerate(order):
            for m in self.after[n]:
                if m == head:
                    ends += [(i, state) for state in ways[i]]
                    continue
                j = place.get(m, -1)
                if j <= i:
                    continue  # out of the loop, or back in a nested one
                for state, (length, _, _) in ways[i].items():
                    reached = state[0] + loads[j], state[1] + powers[j]
                    longer = length + len(self.blocks[m])
                    if longer < ways[j].get(reached, (_FAR, 0, (0, 0)))[0]:
                        ways[j][reached] = longer, i, state
        most_loads = max(state[0] for _, state in ends)
        with_loads = [(i, state) for i, state in ends if state[0] == most_loads]
        # Rescaling at a new maximum takes exponentials too, so that there may be more than one of an element.
        per_load = [
            count for count in (8, 4) if max(state[1] for _, state in with_loads) >= count * most_loads
        ]
        needed = per_load[0] * most_loads if per_load else 0
        able = [(i, state) for i, state in with_loads if state[1] >= needed]
        i, state = min(able, key=lambda way: ways[way[0]][way[1]][0])
        path: list[Instruction] = []
        while i >= 0:
            path = self.blocks[order[i]] + path
            _, i, state = ways[i][state]
        return path, needed
