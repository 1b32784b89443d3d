"""A block-causal toy model, whole and as an engine with a cache runs it; stand-ins for engines' modules.

The engines cannot be imported where these tests run (most need a GPU build, and gigabytes), so the tests
of their adapters bring stand-ins: classes of our own with the signatures that the engine had in the version
that the adapter names. Where an engine's files are installed (``pip install --no-deps`` will do), those that
call the adapter are loaded among the stand-ins, and the same tests run over the engine's own loop.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toy_model import MASK, ToyModel

from attn_sampler import generate

BLOCK = 4  # tokens


def stub(monkeypatch: pytest.MonkeyPatch, modules: dict[str, dict[str, Any]]) -> None:
    """Put modules with these contents, and the packages around them, where imports find them."""
    for name, contents in modules.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            path = ".".join(parts[:end])
            if path not in sys.modules or not hasattr(sys.modules[path], "_stub"):
                module = ModuleType(path)
                module._stub, module.__path__ = True, []  # type: ignore[attr-defined]
                module.__spec__ = _Spec(path)  # type: ignore[assignment]
                monkeypatch.setitem(sys.modules, path, module)
            if end > 1:
                setattr(sys.modules[".".join(parts[: end - 1])], parts[end - 1], sys.modules[path])
        for key, value in contents.items():
            setattr(sys.modules[name], key, value)


def installed(distribution: str, path: str) -> Path | None:
    """An installed engine's source file."""
    try:
        file = Path(str(importlib.metadata.distribution(distribution).locate_file(path)))
    except importlib.metadata.PackageNotFoundError:
        return None
    return file if file.exists() else None


def needs_installed(distribution: str, path: str) -> Any:
    """A mark that skips, with its reason, where an engine's source file is not installed."""
    reason = f"{distribution} is not installed (pip install --no-deps): judged over the stand-in alone"
    return pytest.mark.skip(reason) if installed(distribution, path) is None else ()


def sources(distribution: str, path: str) -> list[Any]:
    """Over what to run an adapter's tests."""
    return ["stand-in", pytest.param("installed", marks=needs_installed(distribution, path))]


def fields(distribution: str, path: str, name: str) -> list[str]:
    """The annotated fields of a class in an installed engine's source file."""
    file = installed(distribution, path)
    assert file is not None
    classes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ClassDef)]
    body = next(node.body for node in classes if node.name == name)
    return [node.target.id for node in body if isinstance(node, ast.AnnAssign)]  # type: ignore[union-attr]


def parameters(distribution: str, path: str, *, suffix: str, method: str) -> set[str]:
    """What a method takes in those classes of an installed engine's source file whose names end so."""
    file = installed(distribution, path)
    assert file is not None
    classes = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)]
    found = set()
    for node in (node for each in classes if each.name.endswith(suffix) for node in each.body):
        if isinstance(node, ast.FunctionDef) and node.name == method:
            found |= {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)} - {"self"}
    return found


def request_class(fields: dict[str, Any]) -> type:
    """A class with these fields and defaults, which are told as msgspec's are."""

    def init(self: Any, **given: Any) -> None:
        vars(self).update(fields | given)

    return type("SamplingParams", (), {"__struct_fields__": tuple(fields), "__init__": init})


def load(monkeypatch: pytest.MonkeyPatch, name: str, distribution: str, path: str) -> ModuleType:
    """A module of an engine from its installed source, with the stand-ins for whatever it imports."""
    file = installed(distribution, path)
    assert file is not None
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module._stub = True  # type: ignore[attr-defined]  # to stay where it is
    monkeypatch.setitem(sys.modules, name, module)
    parent, _, own = name.rpartition(".")
    setattr(sys.modules[parent], own, module)
    spec.loader.exec_module(module)
    return module


def load_alone(
    monkeypatch: pytest.MonkeyPatch, name: str, distribution: str, path: str, given: dict[str, Any]
) -> ModuleType:
    """A module of an engine from its installed source, with a stand-in for every name that it imports.

    ``given`` are those that matter, by their names, beside those that were stubbed before; the others are
    classes of which nothing is asked.
    """
    file = installed(distribution, path)
    assert file is not None
    engine = name.partition(".")[0]
    modules: dict[str, dict[str, Any]] = {name.rpartition(".")[0]: {}}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            parents = name.split(".")[: -node.level] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            if module.partition(".")[0] == engine:
                contents = modules.setdefault(module, {})
                for each in node.names:
                    if not hasattr(sys.modules.get(module), each.name):
                        contents[each.name] = given.get(each.name, _anything(each.name))
    stub(monkeypatch, modules)
    return load(monkeypatch, name, distribution, path)


class _Anything(type):
    def __getattr__(cls, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _anything(name: str) -> type:
    """A class that may be called with anything, and whose attributes may be named."""
    return _Anything(name, (), {"__init__": lambda self, *_, **__: None})


@dataclasses.dataclass
class _Spec:
    name: str
    loader: Any = None
    submodule_search_locations: Any = None
    origin: str = "stub"
    has_location: bool = False
    _initializing: bool = False
    parent: str = ""


def toy(seed: int = 0) -> ToyModel:
    """Its weights; the mask token is never the most probable."""
    model = ToyModel(seed)
    model.head.bias.data[MASK] = -1e4
    return model


class BlockCausal(ToyModel):
    """The toy model with attention to the own block and what precedes it, of any length of tokens."""

    def __init__(self, weights: ToyModel) -> None:
        super().__init__()
        self.load_state_dict(weights.state_dict())

    def compute(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().compute(tokens, tokens)

    def attention_bias(self, attention_mask: Tensor) -> Tensor:
        block = torch.arange(attention_mask.shape[1]) // BLOCK
        return (block[None, :] <= block[:, None])[None, None]


def decode_whole(weights: ToyModel, prompt: list[int], num_blocks: int, **options: Any) -> list[int]:
    """What an engine should answer: ``generate`` on block after block, with no block behind it."""
    model, tokens = BlockCausal(weights), torch.tensor([prompt])
    for _ in range(num_blocks):
        missing = BLOCK - tokens.shape[1] % BLOCK
        masks = torch.full((1, missing), MASK)
        tokens = torch.cat([tokens, masks], dim=1)
        tokens = generate(model, tokens, mask_token_id=MASK, block_length=BLOCK, **options).tokens
    return tokens[0].tolist()


class Request:
    """An engine's request: its tokens, and the keys and values of its finished blocks, a pair a layer."""

    def __init__(self, prompt: list[int], layers: int = 2) -> None:
        self.tokens = list(prompt)
        self.cache: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self.cached = 0
        self.fresh: list[tuple[Tensor, Tensor]] = []

    def block(self) -> list[int]:
        """The tokens after the cached ones, with masks up to the block's end."""
        block = self.tokens[self.cached : self.cached + BLOCK]
        return block + [MASK] * (BLOCK - len(block))

    def store(self, tokens: list[int]) -> None:
        """Take the last forward pass's keys and values, of these tokens, for good."""
        for layer, (k, v) in enumerate(self.fresh):
            old = self.cache[layer]
            self.cache[layer] = (k, v) if old is None else (torch.cat([old[0], k]), torch.cat([old[1], v]))
        self.tokens[self.cached : self.cached + BLOCK] = tokens
        self.cached += BLOCK


class FlatToy(nn.Module):
    """The toy model as engines run it: flat tokens of several requests' blocks, and the engine's layers."""

    def __init__(self, weights: ToyModel, make_attention: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.weights = weights
        self.attention = nn.ModuleList(make_attention(i) for i in range(len(weights.projections)))

    @torch.no_grad()
    def forward(self, tokens: Tensor, requests: list[Request], call: Callable[..., Tensor]) -> Tensor:
        """Logits [T, V]; ``call(layer, q, k, v)`` calls an attention layer as the engine does."""
        model = self.weights
        positions = torch.cat([torch.arange(r.cached, r.cached + BLOCK) for r in requests])
        for request in requests:
            request.fresh = []
        x = model.embedding(tokens)
        for projection, output, layer in zip(model.projections, model.outputs, self.attention, strict=True):
            qkv = projection(F.rms_norm(x, x.shape[-1:])).view(len(x), -1, model.headdim)
            q, k, v = qkv.split((model.heads, model.kv_heads, model.kv_heads), dim=1)
            q, k = rotate_at(q, positions), rotate_at(k, positions)
            for i, request in enumerate(requests):
                own = slice(i * BLOCK, (i + 1) * BLOCK)
                request.fresh.append((k[own].clone(), v[own].clone()))
            x = x + output(call(layer, q, k, v).reshape(x.shape))
        return model.head(F.rms_norm(x, x.shape[-1:])) * 2.0


def rotate_at(x: Tensor, positions: Tensor) -> Tensor:
    """The rotary positions of ``toy_model.rotate`` on [T, H, D]."""
    angle = torch.outer(positions.float(), 3.0 ** -torch.arange(x.shape[2] // 2))[:, None]
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of [M, Hq, D] to [N, Hkv, D], and its log-sum-exp [M, Hq] to base 2, as FlashInfer has it."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    logits = torch.einsum("mhd,nhd->mhn", q, k) * q.shape[-1] ** -0.5
    lse = torch.logsumexp(logits, dim=-1)
    return torch.einsum("mhn,nhd->mhd", torch.exp(logits - lse[..., None]), v), lse / torch.log(
        torch.tensor(2.0)
    )


def attend_blocks(q: Tensor, k: Tensor, v: Tensor, requests: list[Request], layer: int) -> Tensor:
    """Attention of each request's block to its cache and to itself, [T, Hq, D]."""
    outputs = []
    for i, request in enumerate(requests):
        own = slice(i * BLOCK, (i + 1) * BLOCK)
        keys, values = k[own], v[own]
        if request.cache[layer] is not None:
            old_k, old_v = request.cache[layer]
            keys, values = torch.cat([old_k, keys]), torch.cat([old_v, values])
        outputs.append(attend(q[own], keys, values)[0])
    return torch.cat(outputs)
