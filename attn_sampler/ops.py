"""A function's way to its backend: straight there, or by the torch operator ``torch.ops.attn_sampler.*``.

There is one operator for each function, opaque to torch.compile, with a schema that says what it writes. Only
what has to see an operator takes that way: tracing, the profiler, dispatch modes, tensors of subclasses. All
other calls pass it by.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._device import DeviceContext

from attn_sampler import checks
from attn_sampler.backends import Backend, choose_backend, direct_backend
from attn_sampler.operator_arguments import flat, schema, unflat
from attn_sampler.options import Attention, Layer, Masks, Sampling, Selection, Step, Top
from attn_sampler.reference import Selected, StepResult, TopColumns

#: Where the operators are registered: "attn_sampler", or the name by which a copy of the package is loaded.
NAMESPACE = __name__.rpartition(".")[0]
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")

#: The backend that compiles what calls on meta tensors need (``warm_up``).
_WARMING: ContextVar[Backend | None] = ContextVar("warming", default=None)


class Function:
    """One of the six functions, which write into ``out``.

    An argument is a tensor (given by its name, with a question mark where it may be None), a record (given by
    its class), or a list of layers.
    """

    def __init__(self, name: str, written: str, *arguments: str | type) -> None:
        self.name = name
        self._arguments = arguments
        self._count = written.count("Tensor")
        texts = (
            _LAYERS if x is list else schema(x) if isinstance(x, type) else _tensor(x) for x in arguments
        )
        # Compiled graphs hand over tensors in the memory layout that eager code would.
        tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
        _LIBRARY.define(f"{name}({', '.join([written, *texts])}, str backend) -> ()", tags=tags)
        _LIBRARY.impl(name, self._run_flat, "CompositeExplicitAutograd")
        _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *_: None, lib=_LIBRARY)
        self._operator = getattr(getattr(torch.ops, NAMESPACE), name)

    def __call__(self, backend: str, out: Any, *arguments: Any) -> None:
        """Run on checked arguments."""
        if nothing_listens() and _are_ordinary((out, *arguments)):
            self._run(backend, out, *arguments)
            return
        if not torch.compiler.is_compiling() and (compiler := _WARMING.get()) is not None:
            compiler.function(self.name)(out, *arguments)
            return
        values = [*(out if isinstance(out, tuple) else (out,))]
        for argument in arguments:
            if isinstance(argument, list):
                values += ([x for x in field if x is not None] for field in zip(*argument, strict=True))
                values += [[]] * (len(Layer._fields) if not argument else 0)
            else:
                values += flat(argument) if isinstance(argument, tuple) else (argument,)
        self._operator(*values, backend)

    def _run(self, backend: str, out: Any, *arguments: Any) -> None:
        chosen = choose_backend(self.name, backend, *_deciding(arguments))
        written = _written(out, arguments)
        for name, tensor in () if chosen.checks_memory else written:
            others = (x for x in written if x[1] is not tensor)
            checks.own_memory(name, tensor, (*others, *self._read(out, arguments)))
        chosen.function(self.name)(out, *arguments)
        for _, tensor in () if chosen.counts_writes else written:
            count_write(tensor)

    def _read(self, out: Any, arguments: Sequence[Any]) -> Iterator[tuple[str, Tensor | None]]:
        """What it reads, by name."""
        for kind, argument in zip(self._arguments, arguments, strict=True):
            if isinstance(kind, str):
                yield kind.rstrip("?"), argument
            elif isinstance(argument, (Layer, Masks)):
                yield from zip(argument._fields, argument, strict=True)
            elif isinstance(argument, list):
                for index, layer in enumerate(argument):
                    yield from (
                        (f"layers[{index}] {name}", x) for name, x in zip(Layer._fields, layer, strict=True)
                    )
                if not argument:
                    yield "scores", out.scores
            for record in argument if isinstance(argument, Step) else (argument,):
                if isinstance(record, (Sampling, Selection)):
                    options = zip(record._fields, record, strict=True)
                    yield from ((name, x) for name, x in options if isinstance(x, Tensor))

    def _run_flat(self, *values: Any) -> None:
        """What the operator does."""
        *rest, backend = values
        written, given = rest[: self._count], iter(rest[self._count :])
        records = {"decode_step": StepResult, "select_tokens": Selected, "top_columns": TopColumns}
        record = records.get(self.name)
        out = tuple(written) if record is None else record(*written)
        arguments: list[Any] = []
        for argument in self._arguments:
            if isinstance(argument, str):
                arguments.append(next(given))
            elif argument is list:
                fields = [next(given) for _ in Layer._fields]
                none = [None] * len(fields[0])
                arguments.append([Layer(*x) for x in zip(*(field or none for field in fields), strict=True)])
            else:
                arguments.append(unflat(argument, given))
        self._run(backend, out if self._count > 1 else out[0], *arguments)


def _tensor(name: str) -> str:
    return f"Tensor? {name[:-1]}" if name.endswith("?") else f"Tensor {name}"


_LAYERS = ", ".join(f"Tensor[] {name}" for name in Layer._fields)

column_scores = Function("column_scores", "Tensor(a!) out", Layer, Masks, Attention)
attention_map = Function("attention_map", "Tensor(a!) out", Layer, Masks, Attention)
top_columns = Function("top_columns", "Tensor(a!) positions, Tensor(b!) scores", Layer, Masks, Top)
token_confidence = Function(
    "token_confidence",
    "Tensor(a!) token_ids, Tensor(b!) confidence, Tensor(c!) log_prob, Tensor(d!)? current",
    *("logits", "current_ids?", Sampling),
)
select_tokens = Function(
    "select_tokens",
    "Tensor(a!) selected, Tensor(b!)? revised, Tensor(c!)? budget",
    *("scores", "confidence", "masked", "current?", "differs?", Selection),
)
decode_step = Function(
    "decode_step",
    "Tensor(a!) tokens, Tensor(b!) token_ids, Tensor(c!) confidence, Tensor(d!) scores, Tensor(e!) selected, "
    "Tensor(f!)? log_prob, Tensor(g!)? current, Tensor(h!)? revised, Tensor(i!)? budget",
    *("logits", list, Masks, Step),
)


def _deciding(arguments: Sequence[Any]) -> list[Tensor]:
    """The floating-point tensors by which a backend is chosen."""
    tensors: list[Tensor] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            tensors += [argument] if argument.is_floating_point() else []
        elif isinstance(argument, (Layer, list)):
            layers = [argument] if isinstance(argument, Layer) else argument
            tensors += [x for layer in layers for x in layer[:2]]
    return tensors


def _written(out: Any, arguments: Sequence[Any]) -> list[tuple[str, Tensor]]:
    """What a user gave to be written, by its name; other outputs are new."""
    if isinstance(out, (StepResult, Selected)):
        given = {name: getattr(out, name, None) for name in ("tokens", "budget")}
        return [(name, tensor) for name, tensor in given.items() if tensor is not None]
    adds = any(isinstance(x, Attention) and x.accumulate for x in arguments)
    return [("out", out)] if adds else []


@contextlib.contextmanager
def warming(backend: Backend) -> Iterator[None]:
    """Calls on meta tensors are this backend's, which compiles for them."""
    token = _WARMING.set(backend)
    try:
        yield
    finally:
        _WARMING.reset(token)


#: Lets autograd know that a tensor was written past torch: what it saved of it is no longer that.
count_write = torch.autograd.graph.increment_version


def direct(backend: Any, tensor: Any) -> Backend | None:
    """The backend that takes a call on this tensor before it is checked, if there is one."""
    return direct_backend(backend, tensor) if nothing_listens() and is_plain(tensor) else None


def nothing_listens() -> bool:
    """Whether nothing is at work that has to see a torch operator."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and (not torch._C._len_torch_function_stack() or _modes_only_choose_devices())
        and not torch._C._autograd._profiler_enabled()
        and torch._C._get_tracing_state() is None
    )


def is_plain(tensor: Any) -> bool:
    """Whether it is a dense tensor of no subclass."""
    return type(tensor) is Tensor and checks.is_dense(tensor)


def _are_ordinary(values: Sequence[Any]) -> bool:
    """Whether the dispatcher has nothing to take care of in checked arguments: no tensor of a subclass, on
    meta, with a pending negation or without memory for its zeros."""
    for x in values:
        if isinstance(x, Tensor):
            if type(x) is not Tensor or x.is_meta or x.is_neg() or x._is_zerotensor():
                return False
        elif isinstance(x, (tuple, list)) and not _are_ordinary(x):
            return False
    return True


def _modes_only_choose_devices() -> bool:
    """Whether every mode is that of torch.set_default_device, which is about new tensors alone."""
    count = torch._C._len_torch_function_stack()
    return all(type(torch._C._get_function_stack_at(i)) is DeviceContext for i in range(count))
