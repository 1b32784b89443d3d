"""Compile every kernel for GPUs that are not here, as its launcher would launch it, and look at the code.

The file has a place of its own, without ``TRITON_INTERPRET``. The launchers run on CPU tensors that are
never touched, against a stand-in for the driver that names the target: shapes, strides and alignment are
specialised exactly as on the device. ``python tests/backends/test_triton_compile.py FOLDER`` writes the table
of registers, shared memory and instructions to FOLDER.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import triton
from attn_sampler.kernels import launch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from attn_sampler import kernels, warm_up, warming
from attn_sampler.backends.triton import TRITON
from attn_sampler.options import Attention, Layer, Masks, Sampling, Selection, Step
from attn_sampler.reference import Selected, StepResult

pytestmark = [
    pytest.mark.slow,
    pytest.mark.places("triton@compiler"),
    pytest.mark.usefixtures("backend"),
]

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "sm120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that one program can have.
SHARED_LIMIT = {
    "sm80": 163 << 10,
    "sm90": 227 << 10,
    "sm100": 227 << 10,
    "sm120": 99 << 10,
    "gfx942": 64 << 10,
}
# The assembler gives up a register or two for occupancy, that of older Triton releases up to four.
SPILLS_ALLOWED = 8 if triton.__version__ >= "3.9" else 16
# What revises runs once for each sequence, at a step's end.
REVISION_ALLOWED = 8
# The pointers and strides of 32 layers are more than gfx942 has scalar registers: a few go to memory.
SCALARS_ALLOWED = {"gfx942": 32}
MATRIX_INSTRUCTION = {
    "sm80": "mma.sync",
    "sm90": "wgmma",
    "sm100": "tcgen05.mma",
    "sm120": "mma.sync",
    "gfx942": "v_mfma",
}


def attention(
    kernel: Callable[..., None],
    *,
    batch: int = 1,
    heads: tuple[int, int] = (32, 32),
    rows: int = 1280,
    keys: int = 1280,
    columns: int = 32,
    headdim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    lse: bool = True,
    causal: bool = False,
    scope: str = "sequence",
    per_head: bool = False,
    reduction: str = "sum",
    page_size: int = 0,
) -> None:
    """Launch column_scores or attention_map on tensors [B, H, M, D] that are views of [B, M, H, D]; the keys
    in pages of a cache, if these have a size, and the sequences with ends of their own then."""
    q = torch.empty(batch, rows, heads[0], headdim, dtype=dtype).transpose(1, 2)
    places = where_keys_are(batch, keys, page_size)
    k_sizes = (batch * keys // page_size, page_size) if page_size else (batch, keys)
    k = torch.empty(*k_sizes, heads[1], headdim, dtype=dtype).transpose(1, 2)
    softmax_lse = torch.empty(batch, heads[0], rows) if lse else None
    is_float8 = dtype == torch.float8_e4m3fn
    descales = [torch.empty(1).expand(batch, heads[1]) if is_float8 else None for _ in range(2)]
    first = (keys - columns) // 16 * 16
    is_map = kernel is kernels.attention_map
    is_reduced = is_map and reduction != "none"
    shape = (batch, *([heads[0]] if per_head else []), *([min(columns, rows)] if is_map else []), columns)
    mask = torch.empty(batch, columns, dtype=torch.bool) if is_reduced else None
    end = keys if page_size else 0
    options = attention_options(
        slice(first - end, first + columns - end),
        keys - rows - end,
        headdim,
        rows=slice(0, min(columns, rows)),
        causal=causal,
        softmax_scope=scope,
        reduction=reduction,
        per_head=per_head,
    )
    out = torch.empty(shape[:-1] if is_reduced else shape)
    kernel(out, Layer(q, k, softmax_lse, *descales), Masks(None, None, mask, *places), options)


def where_keys_are(batch: int, keys: int, page_size: int) -> list[Tensor]:
    """A block table and the lengths of sequences, of keys in pages."""
    sizes = [(batch, keys // page_size), (batch,)] if page_size else []
    return [torch.empty(size, dtype=torch.int32) for size in sizes]


def attention_options(columns: slice, query_start: int, headdim: int, **given: Any) -> Attention:
    plain = Attention(
        columns, None, query_start, headdim**-0.5, "e", False, "sequence", True, "sum", False, False
    )
    return plain._replace(**given)


columns = functools.partial(attention, kernels.column_scores)
attention_map = functools.partial(attention, kernels.attention_map, reduction="none")


def confidence(
    metric: str = "probability",
    temperature: float | Tensor = 0.0,
    dtype: torch.dtype = torch.bfloat16,
    vocab: int = 126464,
    vocab_start: int = 0,
    current: bool = False,
    **rows: Any,
) -> None:
    logits, ids = torch.empty(1, 32, vocab, dtype=dtype), torch.empty(1, 32, dtype=torch.int64)
    outputs = ids, torch.empty(1, 32), torch.empty(1, 32), torch.empty(1, 32) if current else None
    options = Sampling(metric, temperature, 7, 126336, vocab_start, **rows)
    kernels.token_confidence(outputs, logits, ids if current else None, options)


REVISING = Selection("threshold", "confidence", 0.9, 0.9, 0.1, 4)


def select(
    positions: int = 32, revises: bool = False, rule: str | Tensor = "parallel", tau: float | Tensor = 0.9
) -> None:
    scores, masked = torch.empty(8, positions), torch.empty(8, positions, dtype=torch.bool)
    if revises:
        revision = masked.to(torch.uint8), masked.to(torch.int32)
        out = Selected(masked, *revision)
        kernels.select_tokens(out, scores, scores, masked, scores, masked, REVISING)
    else:
        out = Selected(masked, None, None)
        kernels.select_tokens(out, scores, scores, masked, None, None, Selection(rule, "score", tau))


def step(
    layers: int = 32,
    batch: int = 1,
    heads: tuple[int, int] = (32, 32),
    rows: int = 1280,
    keys: int = 1280,
    columns: int = 32,
    headdim: int = 128,
    vocab: int = 126464,
    lse: bool = True,
    given_scores: bool = False,
    revises: bool = False,
    page_size: int = 0,
) -> None:
    def empty(count: int, n_heads: int, length: int) -> Tensor:
        return torch.empty(count, length, n_heads, headdim, dtype=torch.bfloat16).transpose(1, 2)

    def layer() -> Layer:
        softmax_lse = torch.empty(batch, heads[0], rows) if lse else None
        k = empty(batch, heads[1], keys)
        if page_size:
            k = empty(batch * keys // page_size, heads[1], page_size)
        return Layer(empty(batch, heads[0], rows), k, softmax_lse)

    first = (keys - columns) // 16 * 16
    block, shape = slice(first, first + columns), (batch, columns)
    out = StepResult(
        tokens=torch.empty(batch, keys, dtype=torch.int64),
        token_ids=torch.empty(shape, dtype=torch.int64),
        confidence=torch.empty(shape),
        scores=torch.empty(shape),
        selected=torch.empty(shape, dtype=torch.bool),
    )
    if revises:
        revision = torch.empty(shape, dtype=torch.uint8), torch.empty(shape, dtype=torch.int32)
        out = StepResult(*out[:5], torch.empty(shape), torch.empty(shape), *revision)
    end = keys if page_size else 0
    options = Step(
        block,
        126336,
        "all",
        attention_options(slice(block.start - end, block.stop - end), keys - rows - end, headdim),
        Sampling("probability", 0.0, 0),
        REVISING if revises else Selection("parallel", "confidence", 0.9),
    )
    logits = torch.empty(*shape, vocab, dtype=torch.bfloat16)
    masks = Masks(None, None, None, *where_keys_are(batch, keys, page_size))
    kernels.decode_step(out, logits, [layer() for _ in range(0 if given_scores else layers)], masks, options)


#: Launches by name: decode shapes, the peer's shapes, and what is hardest on registers.
SCENARIOS: dict[str, Callable[[], None]] = {
    "columns, LSE given": columns,
    "columns, LSE given, block decode": functools.partial(columns, batch=8, rows=32),
    "columns, GQA 8, few rows": functools.partial(columns, heads=(32, 4), rows=8, columns=8),
    "columns, D 96, mean": functools.partial(columns, headdim=96, reduction="mean"),
    "columns, D 512, 256 columns, max": functools.partial(
        columns, heads=(8, 4), rows=256, columns=256, headdim=512, reduction="max"
    ),
    "columns, D 128, block scope": functools.partial(columns, lse=False, scope="block"),
    "columns, block scope, 128 columns": functools.partial(columns, lse=False, scope="block", columns=128),
    "all columns per head, no LSE": functools.partial(
        columns, columns=1024, rows=1024, keys=1024, lse=False, per_head=True, dtype=torch.float16
    ),
    "all columns per head, no LSE, causal, few rows": functools.partial(
        columns,
        columns=16384,
        rows=64,
        keys=16384,
        lse=False,
        per_head=True,
        causal=True,
        dtype=torch.float16,
    ),
    "all columns, no LSE, D 512": functools.partial(
        columns, heads=(8, 4), columns=1280, lse=False, headdim=512
    ),
    "columns, float32, no LSE": functools.partial(columns, lse=False, dtype=torch.float32),
    "columns, float8, LSE given": functools.partial(columns, dtype=torch.float8_e4m3fn),
    "all columns, float8, GQA 8, no LSE": functools.partial(
        columns, heads=(32, 4), columns=1024, rows=1024, keys=1024, lse=False, dtype=torch.float8_e4m3fn
    ),
    "map, float8, D 512": functools.partial(
        attention_map, heads=(8, 4), rows=256, columns=256, headdim=512, dtype=torch.float8_e4m3fn
    ),
    "map, LSE given": attention_map,
    "map, 256 columns, no LSE, D 192": functools.partial(attention_map, columns=256, lse=False, headdim=192),
    "map, float8, sums of rows": functools.partial(
        attention_map, heads=(32, 8), columns=1280, dtype=torch.float8_e4m3fn, reduction="sum"
    ),
    "map, sums of rows, no LSE": functools.partial(attention_map, columns=1280, lse=False, reduction="sum"),
    "map, diagonal": functools.partial(attention_map, columns=1280, reduction="diagonal"),
    "columns in pages of 17, GQA 4, no LSE": functools.partial(
        columns, batch=2, heads=(32, 8), rows=32, keys=1360, lse=False, page_size=17
    ),
    "map in pages of 16": functools.partial(attention_map, page_size=16),
    "confidence": confidence,
    "confidence and current tokens": functools.partial(confidence, current=True),
    "confidence, margin, sampled": functools.partial(confidence, metric="margin", temperature=0.7),
    "confidence, sampled, a far shard": functools.partial(
        confidence, temperature=0.7, vocab_start=(1 << 34) - 126464
    ),
    "confidence, entropy, float32": functools.partial(confidence, metric="entropy", dtype=torch.float32),
    "confidence, of what may be drawn": functools.partial(
        confidence, temperature=0.7, current=True, top_k=50, top_p=0.9
    ),
    "confidence, each row by its own": functools.partial(
        confidence,
        metric="margin",
        temperature=torch.empty(1),
        top_k=torch.empty(1, dtype=torch.int32),
        top_p=torch.empty(1),
        min_p=torch.empty(1),
        token_bitmask=torch.empty(1, 32, 3952, dtype=torch.int32),
    ),
    "select": select,
    "select, each row by its own rule": functools.partial(
        select, rule=torch.empty(8, dtype=torch.int32), tau=torch.empty(8)
    ),
    "select and revise": functools.partial(select, revises=True),
    "select and revise, 2048 positions": functools.partial(select, positions=2048, revises=True),
    "step, 32 layers": step,
    "step, 28 layers, GQA 7, no LSE": functools.partial(
        step, layers=28, heads=(28, 4), rows=1024, keys=1024, vocab=152064, lse=False
    ),
    "step, 28 layers in pages of 16": functools.partial(
        step, layers=28, batch=4, heads=(32, 8), rows=32, page_size=16
    ),
    "step, scores given": functools.partial(step, given_scores=True),
    "step, 32 layers, revising": functools.partial(step, revises=True),
    "step, scores given, revising": functools.partial(step, given_scores=True, revises=True),
}


class StandIn:
    """A driver that knows its target and nothing else: enough to compile, not to launch."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled(NamedTuple):
    """One kernel of a scenario, compiled."""

    kernel: str
    parameters: launch.Config
    binary: Any
    dtype: str  # of the products


def compile_scenario(scenario: Callable[[], None], target: str) -> list[Compiled]:
    """What the scenario launches, compiled for the target."""
    compiled: list[Compiled] = []

    def record(
        kernel: Any,
        programs: int,
        arguments: Mapping[str, Any],
        parameters: launch.Config,
        *,
        device: torch.device,
        fuse_multiply_add: bool = True,
    ) -> None:
        kernel.device_caches.clear()  # they are kept by device, and all targets stand in for device 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            binary = kernel.warmup(
                **arguments,
                grid=(programs,),
                num_warps=parameters.num_warps,
                num_stages=parameters.num_stages,
                enable_fp_fusion=fuse_multiply_add,
            )
        dtype = str(arguments["layers"].q.data[0].dtype) if "layers" in arguments else ""
        compiled.append(Compiled(kernel.__name__, parameters, binary, dtype))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "launch", record)
        patch.setattr(launch, "architecture", lambda device: "hip" if target == "gfx942" else target)
        patch.setattr(launch, "last_program_commits", lambda device: True)
        driver.set_active(StandIn(TARGETS[target]))
        scenario()
    assert compiled
    return compiled


def resources(binary: Any) -> dict[str, int]:
    """Registers, bytes of local memory (what is spilled, and arrays), bytes of shared memory."""
    shared = binary.metadata.shared
    if "amdgcn" in binary.asm:
        text = binary.asm["amdgcn"]
        found = {
            name: int(re.search(rf"\.{key}:\s*(\d+)", text)[1])  # type: ignore[index]
            for name, key in (("registers", "vgpr_count"), ("local", "private_segment_fixed_size"))
        }
        return {**found, "shared": shared}
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert found, text
    registers, stack, local = (int(group) for group in found.groups())
    return {"registers": registers, "local": stack + local, "shared": shared}


def assembly(binary: Any) -> str:
    return binary.asm.get("ptx") or binary.asm["amdgcn"]


def instructions(text: str) -> dict[str, int]:
    """How many of the instructions that decide speed."""
    wide = (
        r"ld\.global\S*\.v[48]|cp\.async\.c[ag]\S* \[[^;]*, (?:0x10|16)|(?:global|buffer)_load\S*_dwordx[24]"
    )
    return {
        "matrix": len(re.findall(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma", text)),
        "wide loads": len(re.findall(wide, text)),
    }


@functools.cache
def compiled(name: str, target: str) -> list[Compiled]:
    return compile_scenario(SCENARIOS[name], target)


# What differs little from another scenario is compiled for the other targets where there is time.
CASES = [
    pytest.param(name, target, marks=[pytest.mark.long] * (rarer and target not in ("sm90", "gfx942")))
    for name in SCENARIOS
    for rarer in [re.search("revis|sums of rows|diagonal|current", name) is not None]
    for target in TARGETS
]
ATTENTION_KERNELS = ("column_scores_kernel", "row_lse_kernel", "attention_map_kernel")


@pytest.mark.parametrize(("name", "target"), CASES)
def test_compiles_without_spills(name: str, target: str) -> None:
    for kernel, _, binary, _ in compiled(name, target):
        used = resources(binary)
        allowed = max(
            SPILLS_ALLOWED, SCALARS_ALLOWED.get(target, 0), REVISION_ALLOWED if "revis" in name else 0
        )
        assert used["local"] <= allowed, f"{kernel}: {used}"
        assert used["shared"] <= SHARED_LIMIT[target], f"{kernel}: {used}"


@pytest.mark.parametrize(("name", "target"), CASES)
def test_products_run_on_the_matrix_units(name: str, target: str) -> None:
    """Every product of 16-bit tiles; those of 64 rows and more on the wide units of sm90 and sm100."""
    for kernel, _, binary, dtype in compiled(name, target):
        products = re.findall(r"tt\.dot .*: tensor<(\d+)x\d+x\w+> \*", binary.asm["ttir"])
        assert bool(products) == (kernel in ATTENTION_KERNELS)
        if not products or dtype == "torch.float32":
            continue
        wanted = MATRIX_INSTRUCTION[target]
        if target in ("sm90", "sm100") and int(products[0]) < 64:
            wanted = "mma.sync"
        text = assembly(binary)
        assert text.count(wanted) >= len(products), kernel
        assert wanted == "mma.sync" or "mma.sync" not in text, kernel


@pytest.mark.parametrize(("name", "target"), CASES)
def test_large_tensors_are_read_in_vectors(name: str, target: str) -> None:
    """q, k and logits come 16 bytes at a time (8 at least on gfx942), and no element of q or k by itself (but
    a logit of every position where a step revises)."""
    for kernel, _, binary, dtype in compiled(name, target):
        if kernel not in (*ATTENTION_KERNELS, "token_partials_kernel"):
            continue
        text = assembly(binary)
        assert instructions(text)["wide loads"] >= 2, kernel
        if kernel in ATTENTION_KERNELS and dtype == "torch.bfloat16" and "revising" not in name:
            assert not re.search(r"ld\.global\S*\.[bu]16\b|global_load\S*_(ushort|short)", text), kernel


@pytest.fixture
def keys_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is compiled: a variant is known by its key, whatever its tensors are on."""

    def compile_nothing(kernel: Any, key: str, _signature: Any, device: int, *_: Any) -> Any:
        return kernel.device_caches[device][0].setdefault(key, SimpleNamespace(run=None))

    start = launch.launch

    def on_meta(*arguments: Any, device: torch.device, **how: Any) -> None:
        kernels_met.add(arguments[0])
        start(*arguments, device=torch.device("meta"), **how)

    kernels_met: set[Any] = set()
    driver.set_active(StandIn(TARGETS["sm90"]))
    monkeypatch.setattr(JITFunction, "_do_compile", compile_nothing)
    monkeypatch.setattr(launch, "launch", on_meta)
    monkeypatch.setattr(launch, "architecture", lambda device: "sm90")
    monkeypatch.setattr(launch, "last_program_commits", lambda device: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(warming, "_backend", lambda *_: TRITON)
    yield
    for kernel in kernels_met:
        kernel.device_caches.clear()


SERVED = {"layers": 3, "heads": 8, "kv_heads": 2, "headdim": 64, "block": 32, "vocab": 4096}


@pytest.mark.usefixtures("keys_alone")
@pytest.mark.parametrize(
    ("softmax_lse", "cached", "page_size"),
    [(True, True, 0), (True, False, 0), (False, True, 0), (False, False, 0), (False, True, 16)],
)
def test_steps_need_nothing_beyond_what_is_warmed_up(softmax_lse: bool, cached: bool, page_size: int) -> None:
    how = {"softmax_lse": softmax_lse, "cached": cached, "page_size": page_size, "mask_token_id": 0}
    assert 2 <= warm_up(**SERVED, max_keys=6000, **how) <= 16
    assert warm_up(**SERVED, max_keys=6000, **how) == 0

    def steps() -> None:
        for batch, keys in itertools.product((1, 3, 16), (*range(32, 200), *range(200, 6000, 97))):
            length = keys // page_size * page_size if page_size else keys
            sizes = {"rows": 32 if cached else length, "keys": length, "lse": softmax_lse}
            step(3, batch, (8, 2), **sizes, headdim=64, vocab=4096, page_size=page_size)

    assert launch.compiled_by(torch.device("cuda"), steps) == 0


@pytest.mark.usefixtures("keys_alone")
def test_a_model_of_other_options_needs_other_kernels() -> None:
    how = {"max_keys": 100, "mask_token_id": 0, "temperature": 0.7, "seed": 1}
    assert warm_up(**SERVED, **how) > 0
    assert warm_up(**SERVED, **how, layer_by_layer=True) > 0
    masks = {"key_mask": torch.ones(2, 9, dtype=torch.bool), "seqlens_k": torch.ones(2, dtype=torch.int32)}
    assert warm_up(**SERVED, **how, **masks) > 0
    assert warm_up(**SERVED, **how, page_size=16, layer_by_layer=True) > 0
    assert warm_up(**SERVED, **how, dtype=torch.float8_e4m3fn, logits_dtype=torch.bfloat16) > 0
    assert warm_up(**SERVED, **how, top_k=torch.ones(4, dtype=torch.int32), layer_by_layer=True) > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kv_heads": 3}, "kv_heads: expected a number that divides the 8 heads, got 3"),
        ({"max_keys": 31}, "max_keys: expected from block, 32, to"),
        ({"page_size": -1}, "page_size"),
        ({"dtype": torch.float8_e4m3fn}, "logits_dtype: needed"),
        ({"rule": "fastest"}, "rule"),
        ({"temperature": 0.5}, "seed"),
        ({"backend": "cpu", "device": "meta"}, "backend"),
        ({"speed": 1}, "speed"),
    ],
)
def test_what_is_warmed_up_is_checked(given: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        warm_up(**{**SERVED, "max_keys": 64, "mask_token_id": 0, **given})


def test_other_backends_compile_nothing() -> None:
    assert warm_up(**SERVED, max_keys=64, mask_token_id=0, backend="reference", device="cpu") == 0


def main(folder: Path) -> None:
    """Write the table of what every scenario compiles to."""
    lines = [
        f"# What the Triton kernels compile to (Triton {triton.__version__})",
        "",
        "No GPU takes part: each row is a kernel as its launcher would launch it on the target. *Local* is",
        "local memory in bytes, where spilled registers go. *Tile* is `block_m x block_n, warps, stages` of",
        "the launch table (a launch with fewer rows or columns than that cuts it down).",
        "",
        "| scenario | target | kernel | tile | registers | local | shared | matrix instr. | wide loads |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in SCENARIOS:
        for target in TARGETS:
            for kernel, (block_m, block_n, warps, stages), binary, _ in compiled(name, target):
                used, counts = resources(binary), instructions(assembly(binary))
                lines.append(
                    f"| {name} | {target} | `{kernel}` | {block_m} x {block_n}, {warps}, {stages} "
                    f"| {used['registers']} | {used['local']} | {used['shared']} "
                    f"| {counts['matrix']} | {counts['wide loads']} |"
                )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "triton_compile.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
