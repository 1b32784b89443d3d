"""What a source file defines, read without running it: names, and what functions and methods take."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path


class Outline:
    """The definitions of a source file."""

    def __init__(self, file: Path) -> None:
        #: Module-level names, and ``Class.name`` of what a class body defines or its methods set on ``self``.
        self.names: set[str] = set()
        #: By the same names, what functions and methods take, in order, without self and cls.
        self.parameters: dict[str, list[str]] = {}
        self._read(ast.parse(file.read_text()).body, "")

    def missing(self, expected: str) -> str | None:
        """What of ``name`` or ``name(parameter, ...)`` is not there, parameters in this order; or None."""
        name, _, rest = expected.partition("(")
        if name not in self.names:
            return f"there is no {name}"
        if not rest:
            return None
        taken = iter(self.parameters.get(name, []))
        wanted = [each.strip() for each in rest.rstrip(")").split(",") if each.strip()]
        if all(each in taken for each in wanted):
            return None
        return f"{name} takes ({', '.join(self.parameters.get(name, []))}), not ({', '.join(wanted)})"

    def _read(self, body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                self.names.add(prefix + node.name)
                self._read(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                self.names.add(prefix + node.name)
                taken = [x.arg for x in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                self.parameters[prefix + node.name] = [x for x in taken if x not in ("self", "cls")]
                if prefix:
                    self.names |= {prefix + name for name in _set_on_self(node)}
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                self.names |= {prefix + x.id for x in targets if isinstance(x, ast.Name)}
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                self.names |= {prefix + (x.asname or x.name) for x in node.names}
            elif isinstance(node, (ast.If, ast.Try, ast.With)):
                self._read(node.body, prefix)
                self._read(getattr(node, "orelse", []), prefix)


def _set_on_self(function: ast.AST) -> Iterator[str]:
    for node in ast.walk(function):
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        for target in targets if isinstance(node, (ast.Assign, ast.AnnAssign)) else ():
            if isinstance(target, ast.Attribute) and getattr(target.value, "id", None) == "self":
                yield target.attr
