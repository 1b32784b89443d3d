"""Write attn_sampler's functions as a kernel of the Hugging Face Hub, from the package's own files.

    python release/hf_kernel.py FOLDER

FOLDER receives ``build.toml`` and ``torch-ext/attn_sampler``, which kernel-builder reads, and what it would
make of them, ``build/torch-{cpu,cuda,rocm}``, which ``get_local_kernel(Path(FOLDER))`` of the package
``kernels`` loads. The kernel is the public functions and all that they need: PyTorch's reference and the
Triton kernels, no compiled extension; nothing is imported but the standard library, torch and triton.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "attn_sampler"
BACKENDS = ("cpu", "cuda", "rocm")
VERSION = 1  # of the kernel's interface, which the Hub counts for itself
LICENSE = "Apache-2.0"

INIT = '''\
"""Exact, fast kernels for attention-guided decoding of masked-diffusion language models."""

from .attention import attention_map, column_scores, top_columns
from .backends import BackendUnavailableError, Support, is_backend_supported
from .functional import decode_step, revise_tokens, select_tokens, token_confidence
from .warming import warm_up

__all__ = [
    "BackendUnavailableError",
    "Support",
    "attention_map",
    "column_scores",
    "decode_step",
    "is_backend_supported",
    "revise_tokens",
    "select_tokens",
    "token_confidence",
    "top_columns",
    "warm_up",
]
'''

BUILD = f"""\
[general]
name = "attn-sampler"
version = {VERSION}
edition = 5
license = "{LICENSE}"
backends = {json.dumps(BACKENDS)}

[torch-noarch]
"""


def source(module: str) -> Path | None:
    """The file of a module of the package, named below it, as in "backends.base"; None where it is none."""
    folder = ROOT / "kernels" / "triton" if module.split(".")[0] == "kernels" else PACKAGE
    path = folder.joinpath(*module.split(".")[folder != PACKAGE :])
    return next((x for x in (path.with_suffix(".py"), path / "__init__.py") if x.is_file()), None)


def imports(module: str) -> set[str]:
    """The package's modules that a module imports.

    Raises
    ------
    ValueError
        It imports what a kernel may not.
    """
    path = source(module)
    assert path is not None
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            bases = [(alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1
            base = ".".join(filter(None, ("attn_sampler", package if node.level else "", node.module)))
            bases = [(base if node.level else node.module or "", node.names)]
        else:
            continue
        for base, names in bases:
            top, _, below = base.partition(".")
            if top != "attn_sampler":
                if top not in sys.stdlib_module_names | {"torch", "triton"}:
                    raise ValueError(f"{path}: imports {base}, which a kernel may not")
                continue
            candidates = [below, *(f"{below}.{alias.name}".lstrip(".") for alias in names)]
            found |= {name for name in candidates if name and source(name) is not None}
    return found


def needed() -> list[str]:
    """The modules that the functions and the Triton kernels need, those among them that are packages too."""
    todo = {"attention", "functional", "warming", "backends", "kernels"}
    done: set[str] = set()
    while todo:
        module = todo.pop()
        done.add(module)
        todo |= imports(module) - done
    return sorted(done)


def relative(text: str, depth: int) -> str:
    """The text of a module so many packages below the first, with imports that hold by any name of it."""
    dots = "." * (depth + 1)
    text = re.sub(r"^( *)import attn_sampler\.(\w+) as \2$", rf"\1from {dots} import \2", text, flags=re.M)
    text = re.sub(r"^( *)from attn_sampler import", rf"\1from {dots} import", text, flags=re.M)
    text = re.sub(r"^( *)from attn_sampler\.", rf"\1from {dots}", text, flags=re.M)
    assert not re.search(r"^ *(from|import) attn_sampler", text, flags=re.M)
    return text


def main(folder: Path) -> None:
    """Write the kernel, in place of an earlier one."""
    files = {"__init__.py": INIT}
    for module in needed():
        path = source(module)
        assert path is not None
        is_package = path.name == "__init__.py"
        name = module.replace(".", "/") + ("/__init__.py" if is_package else ".py")
        files[name] = relative(path.read_text(encoding="utf-8"), name.count("/"))
    digest = hashlib.sha256("".join(f"{name}\n{files[name]}" for name in sorted(files)).encode()).hexdigest()

    for part in ("torch-ext", "build"):
        shutil.rmtree(folder / part, ignore_errors=True)
    variants = {backend: folder / "build" / f"torch-{backend}" for backend in BACKENDS}
    for target in (folder / "torch-ext" / "attn_sampler", *variants.values()):
        for name, text in files.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_text(text, encoding="utf-8")
    for backend, target in variants.items():
        metadata = {
            "name": "attn-sampler",
            "id": f"_attn_sampler_{backend}_{digest[:7]}",
            "version": VERSION,
            "license": LICENSE,
            "python-depends": [],
            "backend": {"type": backend},
        }
        (target / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    (folder / "build.toml").write_text(BUILD, encoding="utf-8")
    shutil.copy(ROOT / "LICENSE", folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python release/hf_kernel.py FOLDER")
    main(Path(sys.argv[1]))
