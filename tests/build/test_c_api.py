"""The C API from C and C++, built by CMake as a C++ engine would build it, and under the sanitizers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cmake_build import CPU_ISAS, ROOT, build_once, tool

import attn_sampler
from attn_sampler import generate
from attn_sampler.bundled import TASKS, load_model, load_task

SANITIZERS = ["address,undefined", "thread"]


def built(factory: pytest.TempPathFactory, sanitizers: str) -> Path:
    """The folder of the build; of sanitized code, compilers warn of what is not there."""
    warnings = f"-DATTN_SAMPLER_WERROR={'OFF' if sanitizers else 'ON'}"
    options = "-DATTN_SAMPLER_CUDA=0", warnings, f"-DATTN_SAMPLER_SANITIZE={sanitizers}"
    return build_once(factory, f"c_api_{sanitizers.replace(',', '_')}", *options)[0]


def outputs(folder: Path, *command: str) -> dict[str, str]:
    """What this command prints with each instruction set that this processor has."""
    printed = {}
    for isa in CPU_ISAS:
        environment = {**os.environ, "ATTN_SAMPLER_CPU_ISA": isa}
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
        output = result.stdout + result.stderr
        if "ATTN_SAMPLER_CPU_ISA: expected one of" not in output:
            assert result.returncode == 0, output
            printed[isa] = output
    assert "portable" in printed
    return printed


@pytest.mark.parametrize("sanitizers", ["", *SANITIZERS])
def test_c_program_decodes_a_block(tmp_path_factory: pytest.TempPathFactory, sanitizers: str) -> None:
    """On each instruction set; and, sanitized, random calls are answered as promised (support/c_api_fuzz)."""
    folder = built(tmp_path_factory, sanitizers)
    for isa, output in outputs(folder, tool("ctest"), "--verbose").items():
        assert "100% tests passed" in output
        assert f"attn_sampler {attn_sampler.__version__}, CPU kernels: {isa}" in output
        assert "12345678+87654329=100000007" in output
        assert "refused: params.tau: expected a number in [0, 1], got 1.5" in output
        assert len(re.findall(r"(?:parallel|sequential|threshold):(?: \d+){21}  \(\d+ passes\)", output)) == 3
        if sanitizers:
            assert_fuzzed(output, isa, 3000)
    if not sanitizers:  # they export symbols of their own
        command = ["nm", "-D", "--defined-only", "libattn_sampler.so"]
        listing = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
        names = listing.split()[2::3]
        assert names
        assert all(name.startswith("attn_sampler_") for name in names), names


def test_the_installed_package_serves_a_project(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """By CMake's find_package, wherever it was moved to, and by pkg-config."""
    source = ROOT / "csrc" / "examples"

    def run(*command: object) -> str:
        result = subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    run(tool("cmake"), "--install", built(tmp_path_factory, ""), "--prefix", tmp_path / "first")
    prefix = (tmp_path / "first").rename(tmp_path / "moved")
    libraries = {p.name: p for p in prefix.rglob("libattn_sampler.so*")}
    major, minor, _ = attn_sampler.__version__.split(".")
    assert f"libattn_sampler.so.{major}.{minor}" in libraries
    configure = "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DCMAKE_PREFIX_PATH={prefix}"
    run(tool("cmake"), "-S", source, "-B", tmp_path / "mine", *configure)
    run(tool("cmake"), "--build", tmp_path / "mine")
    for program in ("decode_step", "diffusion_generate"):
        assert run(tmp_path / "mine" / program)
    for task in TASKS:
        assert_decodes_as_python(run, tmp_path / "mine" / "decode_model", task)
    refused = subprocess.run(
        [tool("cmake"), "-S", str(source), "-B", str(tmp_path / "other"), *configure[:3]],
        capture_output=True,
        text=True,
    )
    assert refused.returncode != 0
    assert "attn_sampler-config.cmake" in refused.stderr

    if shutil.which("pkg-config") is None:
        return
    (description,) = prefix.rglob("attn_sampler.pc")
    environment = {**os.environ, "PKG_CONFIG_PATH": str(description.parent)}
    command = ["pkg-config", "--cflags", "--libs", f"attn_sampler = {attn_sampler.__version__}"]
    flags = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout.split()
    folder = libraries["libattn_sampler.so"].parent
    program = tmp_path / "by_pkg_config"
    run(
        os.environ.get("CC", "cc"),
        source / "decode_step.c",
        "-o",
        program,
        *flags,
        "-lm",
        f"-Wl,-rpath,{folder}",
    )
    assert f"attn_sampler {attn_sampler.__version__}, CPU kernels: " in run(program)


def assert_decodes_as_python(run: Callable[..., str], program: Path, name: str) -> None:
    """Of held-out problems, the same tokens in as many passes.

    Only problems are taken whose commits are the same in float64 too: rounding decides nothing there.
    """
    task, model, weights = load_task(name), load_model(name), ROOT / "attn_sampler" / "bundled"
    prompts = torch.from_numpy(task.problems(12)[0])
    options: dict[str, Any] = {"mask_token_id": task.mask_token_id, "block_length": 20, "tau": 0.9}
    expected = generate(model, prompts, **options)
    exact = generate(model.double(), prompts, **options)
    safe = (expected.commit_steps == exact.commit_steps).all(dim=1).tolist()
    assert sum(safe) >= 6
    texts = [task.format(row).replace("\n", "").replace(" ", "") for row in expected.tokens]
    for i in range(12):
        if safe[i]:
            masked = (prompts[i] == task.mask_token_id).tolist()
            text = "".join("." if blank else symbol for blank, symbol in zip(masked, texts[i], strict=True))
            last = run(program, weights / f"{name}.safetensors", 20, 0.9, text).splitlines()[-1]
            assert last == f"{expected.num_forward_passes[i]}\t{texts[i]}"


def test_the_decoder_says_what_is_wrong(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    program = built(tmp_path_factory, "") / "decode_model"
    model = ROOT / "attn_sampler" / "bundled" / "sudoku.safetensors"
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(model.read_bytes()[:20000])
    for arguments, message in (
        ((), "usage: decode_model MODEL"),
        ((ROOT / "README.md", 8, 0.9, "."), "no safetensors file"),
        ((tmp_path / "none", 8, 0.9, "."), "none: cannot be read"),
        ((cut, 8, 0.9, "."), "its data are not in the file"),
        ((model, 0, 0.9, "."), "BLOCK_LENGTH: expected 1 or more"),
        ((model, 8, "high", "."), "expected a number, got 'high'"),
        ((model, 8, 1.5, "."), "params.tau: expected a number in [0, 1], got 1.5"),
        ((model, 8, 0.9, "17."), "17.: expected symbols of 123456."),
    ):
        result = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)
        assert result.returncode == 1, arguments
        assert message in result.stderr


@pytest.mark.long
@pytest.mark.parametrize("first", range(10000, 100000, 10000))
@pytest.mark.parametrize("sanitizers", SANITIZERS)
def test_many_random_calls(tmp_path_factory: pytest.TempPathFactory, sanitizers: str, first: int) -> None:
    folder = built(tmp_path_factory, sanitizers)
    for isa, output in outputs(folder, "./c_api_fuzz", str(first), "10000").items():
        assert_fuzzed(output, isa, 10000)


def assert_fuzzed(output: str, isa: str, count: int) -> None:
    """So many calls were judged; half of them were broken, of which nearly all are refused."""
    found = re.search(rf"(\d+) valid calls, (\d+) refused, (\d+) broken without harm, on {isa}\n", output)
    assert found is not None, output
    valid, refused, harmless = map(int, found.groups())
    assert valid == refused + harmless == count // 2
    assert refused > 0.9 * valid
