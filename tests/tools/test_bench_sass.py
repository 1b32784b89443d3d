"""Reading machine code: loops, their common path, and what a multiprocessor holds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench import cuda_resources, sass


def listing(*lines: str, architecture: str = "sm_90a", symbol: str = "kernel") -> str:
    """What cuobjdump prints of instructions at 0x0, 0x10, ...; with encodings, which nothing should read."""
    code = "".join(
        f"        /*{16 * i:04x}*/                   {line} ;      /* 0x0000000000408947 */\n"
        f"                                                  /* 0x000ff00000000800 */\n"
        for i, line in enumerate(lines)
    )
    return f"\n\tcode for {architecture}\n\t\tFunction : {symbol}\n\t.headerflags\t@x\n{code}"


def loops_of(*lines: str) -> list[sass.Loop]:
    (kernel,) = sass.parse(listing(*lines))
    return sass.loops(kernel)


#: Two loads of four float32 each: each of eight elements has its exponential; a rare ninth is jumped over.
STREAM = [
    "MOV R1, R2",  # 0x00
    "LDG.E.NA.128.CONSTANT R4, desc[UR6][R2.64]",  # 0x10, the head
    "LDG.E.NA.128.CONSTANT R8, desc[UR6][R2.64+0x10]",
    "@!P0 BRA 0x60",  # 0x30: no new maximum
    "MUFU.EX2 R20, R20",
    "FMUL R21, R20, R21",
    *["MUFU.EX2 R4, R4"] * 8,  # 0x60
    "@P1 BRA 0x10",  # 0xe0
    "EXIT",
    "BRA 0x100",  # 0x100: what ends each kernel
    "NOP",
]


def test_a_loop_and_its_common_path() -> None:
    (loop,) = loops_of(*STREAM)
    assert loop.first == 0x10
    assert loop.instructions == 14
    assert (loop.global_loads, loop.shared_loads, loop.copies, loop.exponentials) == (2, 0, 0, 9)
    assert (loop.common, loop.common_loads, loop.common_exponentials, loop.elements) == (12, 2, 8, 8)
    assert loop.per_element() == loop.per_element(2) == 12 / 8


def test_what_skips_the_work_is_not_the_common_path() -> None:
    """A way around without the loads, or with too few exponentials, is shorter and says nothing."""
    lines = list(STREAM)
    lines[3] = "@!P0 BRA 0x70"
    lines[6] = "@P3 BRA 0xe0"  # 0x60
    lines[5] = "MUFU.EX2 R21, R20"
    (loop,) = loops_of(*lines)
    # Over 0x70 there are seven exponentials, fewer than the two loads' eight; from 0x40 on, nine.
    assert (loop.common_exponentials, loop.elements, loop.common) == (9, 8, 14)


def test_code_out_of_line_is_no_loop() -> None:
    """A jump back from rare code that stands behind the end, into the middle of a loop."""
    (loop,) = loops_of(
        "LDS.128 R4, [R2]",
        "BRA.DIV UR5, 0x60",  # where the warp is not together
        "SHFL.BFLY PT, R5, R4, 0x1, 0x1f",
        "FADD R4, R4, R5",  # 0x30
        "@P1 BRA 0x0",
        "EXIT",
        "WARPSYNC.COLLECTIVE R8, 0x70",  # 0x60
        "BRA 0x30",
    )
    assert (loop.first, loop.instructions, loop.common, loop.shared_loads) == (0, 7, 5, 1)
    assert loop.per_element() is None
    assert loop.per_element(4) == 5 / 4


def test_a_nested_loop_counts_once_and_its_loads_are_its_own() -> None:
    outer, inner = loops_of(
        "UBLKCP.S.G [UR4], [UR8], UR10",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3",  # 0x10: a turn of waiting
        "@!P0 BRA 0x10",
        "LDS.128 R4, [R2]",  # 0x30
        "FADD R4, R4, R5",
        "@P1 BRA 0x30",
        "@P2 BRA 0x0",
        "EXIT",
    )
    assert (outer.first, outer.copies, outer.shared_loads, outer.instructions, outer.common) == (
        0,
        1,
        0,
        7,
        7,
    )
    assert (inner.first, inner.copies, inner.shared_loads, inner.instructions) == (0x30, 0, 1, 3)


def test_uniform_and_conditional_jumps() -> None:
    """A predicate may stand before the instruction or among its operands."""
    (kernel,) = sass.parse(
        listing(
            "BRA 0x0",
            "@P0 BRA 0x0",
            "BRA.U !UP0, 0x0",
            "@!P1 BRA P2, 0x0",
            "@P0 EXIT",
            "EXIT",
            "RET.REL.NODEC R8 0x0",
        )
    )
    assert [i.falls_through for i in kernel.code] == [False, True, True, True, True, False, False]
    assert [i.target for i in kernel.code] == [0, 0, 0, 0, None, None, None]


def test_a_called_function_has_loops_and_a_call_over_one_is_a_jump() -> None:
    """The function stands behind the kernel's end, where no jump leads."""
    lines = [
        "CALL.REL.NOINC 0x50",
        "@P0 CALL.REL.NOINC 0x30",  # over the next: no function
        "BRA 0x40",
        "FADD R1, R1, R1",  # 0x30
        "EXIT",
        "LDG.E.128 R4, [R2.64]",  # 0x50, the function
        "@P1 BRA 0x50",
        "RET.REL.NODEC R20 0x0",
    ]
    (kernel,) = sass.parse(listing(*lines))
    assert [i.called for i in kernel.code] == [0x50, *[None] * 7]
    assert [i.target for i in kernel.code] == [None, 0x30, 0x40, None, None, None, 0x50, None]
    assert kernel.code[1].falls_through
    (loop,) = sass.loops(kernel)
    assert (loop.first, loop.instructions, loop.global_loads) == (0x50, 2, 1)


def test_noise_is_counted_apart() -> None:
    """A loop over groups in the one that streams, in which words are made for some, and each is looked at."""
    lines = [
        "LDG.E.128 R4, [R2.64]",  # 0x00, eight float16 logits
        *["HADD2.F32 R8, -RZ, R4.H0_H0"] * 8,
        *["MUFU.EX2 R8, R8"] * 8,  # up to 0x110
        "@!P0 BRA 0x310",  # 0x110: greedy
        "FADD R9, R9, R8",  # 0x120, the loop over groups
        "@!P2 BRA 0x300",  # no key of the group can win
        *["IMAD.WIDE.U32 R10, R11, R12, RZ"] * 20,  # 0x140, the loop over fours
        "FADD R9, R9, R8",  # 0x280, the loop over words
        "@P3 BRA 0x2c0",  # it does not win
        "FADD R9, R9, R8",
        "FADD R9, R9, R8",
        "@P4 BRA 0x280",  # 0x2c0
        "@P5 BRA 0x140",  # 0x2d0
        "NOP",
        "NOP",
        "@P6 BRA 0x120",  # 0x300
        "@P1 BRA 0x0",  # 0x310
        "EXIT",
    ]
    (loop,) = loops_of(*lines)
    assert (loop.common, loop.elements, loop.widens_float16, loop.encloses) == (19, 8, True, False)
    assert (loop.asked, loop.noise) == (3, 20 + 4 * 3 + 1)
    stream = cuda_resources.Stream("kernel", "sm_90a", loop)
    assert stream.dtype == "float16"
    assert stream._replace(loop=loop._replace(widens_float16=False)).dtype == "bfloat16"
    assert stream._replace(loop=loop._replace(elements=4)).dtype == "float32"
    assert stream._replace(loop=loop._replace(elements=0)).dtype is None


def test_a_loop_over_units_encloses() -> None:
    """One of loads only, like those of a row's start, around one that takes exponentials."""
    outer, inner = loops_of(
        "LDG.E.128 R4, [R2.64]",
        *STREAM[1:3],  # 0x10, the inner head
        *["MUFU.EX2 R4, R4"] * 8,
        "@P1 BRA 0x10",
        "@P2 BRA 0x0",
        "EXIT",
    )
    assert (outer.first, outer.encloses) == (0, True)
    assert (inner.first, inner.encloses) == (0x10, False)


def test_what_ptxas_says_of_called_functions() -> None:
    """They have no registers of their own; their spills count."""
    entry = "ptxas info    : Compiling entry function '_Z1kv' for '{}'"
    sizes = "    {} bytes stack frame, {} bytes spill stores, {} bytes spill loads"
    report = "\n".join(
        line
        for architecture in ("sm_80", "sm_90a")
        for line in (
            entry.format(architecture),
            "ptxas info    : Function properties for _Z1kv",
            sizes.format(0, 0, 0),
            "ptxas info    : Used 128 registers, used 1 barriers",
            "ptxas info    : Compile time = 4822.993 ms",
            "ptxas info    : Function properties for _Z1fi",
            sizes.format(8, 4, 12) if architecture == "sm_80" else sizes.format(0, 0, 0),
        )
    )
    found = cuda_resources.parse(report)
    assert found == [
        ("f", "sm_80", None, 8, 4, 12),
        ("f", "sm_90a", None, 0, 0, 0),
        ("k", "sm_80", 128, 0, 0, 0),
        ("k", "sm_90a", 128, 0, 0, 0),
    ]
    assert cuda_resources.table(found).splitlines()[2:] == ["| f | - | - | 16 |", "| k | 128 | 128 | 0 |"]


def test_kernels_by_architecture() -> None:
    text = listing("EXIT", architecture="sm_80", symbol="a") + listing("NOP", "EXIT", symbol="b")
    assert [(k.symbol, k.architecture, len(k.code)) for k in sass.parse(text)] == [
        ("a", "sm_80", 1),
        ("b", "sm_90a", 2),
    ]


@pytest.mark.parametrize(
    ("architecture", "registers", "shared", "expected"),
    [
        ("sm_90a", 128, 0, (4, "registers")),
        ("sm_90a", 129, 0, (3, "registers")),  # of 8 more each
        ("sm_90a", 32, 0, (16, "registers")),
        ("sm_90a", 128, 70 * 1024, (3, "shared memory")),  # 228 KB, and 1 KB for each block
        ("sm_120", 128, 34 * 1024, (2, "shared memory")),
        ("sm_120", 24, 0, (12, "threads")),
        ("sm_123", 24, 0, None),
    ],
)
def test_resident_blocks(
    architecture: str, registers: int, shared: int, expected: tuple[int, str] | None
) -> None:
    assert cuda_resources.resident_blocks(architecture, registers, shared) == expected


def test_elements_by_the_kernels_name() -> None:
    names = "k<BFloat16, 4>", "k<Half>", "k<float, 1>", "k<Float8, 8>", "floats_kernel"
    assert [cuda_resources.element_size(name) for name in names] == [2, 2, 4, 1, None]


def test_shared_memory_of_a_launch() -> None:
    """What all blocks have, and tiles of keys of 128 elements: a row's chunks of 64 bytes, once or twice."""
    assert [
        cuda_resources.launch_shared(name) - 2064
        for name in (
            "select_tokens_kernel",
            "column_scores_or_step_kernel<BFloat16, 4, false>",
            "column_scores_or_step_kernel<Float8, 1, false>",
            "column_scores_kernel<Half>",
            "row_lse_kernel<float, 4>",
            "attention_map_kernel<BFloat16, true>",
        )
    ] == [0, 32 * 256, 8 * 128, 128 * 256, 2 * 32 * 512, 32 * 256]
    assert cuda_resources.launch_shared("row_lse_kernel<Half, 8>", 65) - 2064 == 2 * 64 * 192


def test_what_is_no_machine_code(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.write_bytes(b"")
    command = [sys.executable, "-m", "bench.cuda_resources", "--sass", str(path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
