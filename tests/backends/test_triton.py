"""The Triton kernels: their own tests, each file in a process in the mode that it needs.

Triton is either interpreted or compiling, decided when it is imported. On a GPU the kernels run natively;
elsewhere they are interpreted on CPU tensors, and what a GPU would be given is compiled and looked at.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attn_sampler.backends import installation_problem

TESTS = Path(__file__).parents[1]


PROBLEM = installation_problem("triton")
if PROBLEM is not None and PROBLEM.startswith("torch sees no GPU"):
    PROBLEM = None  # these tests do without

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM)),
]


def run(*arguments: str, interpret: bool) -> None:
    """Run tests in a process of its own; its report is this test's."""
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0"}
    root = str(TESTS.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, env=environment, cwd=TESTS, capture_output=True, text=True, check=False)
    print(done.stdout[-6000:], done.stderr[-2000:])
    assert done.returncode == 0
    assert " passed" in done.stdout


def test_kernels_against_the_reference() -> None:
    run("backends/triton_kernels.py", interpret=not torch.cuda.is_available())


def test_compiled_code() -> None:
    run("backends/triton_compile.py", interpret=False)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU the contract's tests run it as they run the others"
)
@pytest.mark.parametrize(
    "function",
    [
        "column_scores",
        "attention_map",
        "token_confidence",
        "select_tokens",
        "decode_step",
        "errors",
        "backends",
    ],
)
def test_contract_interpreted(function: str) -> None:
    (path,) = TESTS.glob(f"*/test_{function}.py")
    run("--backend", "triton", "-m", "not slow and not long", str(path), interpret=True)
