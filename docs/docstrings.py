"""What the site's reference adds to docstrings from the sources that they stand in.

The shapes that comments give beside parameters and fields, the parameters that a docstring leaves to another
one by ``...``, links between the public names, and examples set as code.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

PACKAGE = "attn_sampler"
_FIELD = re.compile(r"^\s+(\w+): .*?(?:  # (.*))?$")
_SHAPE = re.compile(r"^(?:(\w+)\s*)?(\[[^\]]*\](?: or \[[^\]]*\])*)")
_UNDERLINE = re.compile(r"^-{3,}$")


class Docstrings(griffe.Extension):
    """Rewrites the docstrings of the package, once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        if pkg.path != PACKAGE:
            return
        public = {}
        for name in map(str, pkg.exports or ()):  # "generate" is a function in a module of that name
            public[name] = ".".join([PACKAGE, *[name] * (2 if pkg.members[name].is_module else 1)])
        self._visit(pkg, public)

    def _visit(self, owner: griffe.Object, public: dict[str, str]) -> None:
        for member in owner.members.values():
            if member.is_alias:
                continue
            if member.is_function and member.docstring is not None:
                _tell(member, _expanded(member.docstring.value, _parameters(member)), public)
            elif member.is_class and member.lineno is not None:
                _tell(member, _with_fields(member), public)
            if member.is_module or member.is_class:
                self._visit(member, public)


def _tell(member: griffe.Object, text: str, public: dict[str, str]) -> None:
    """Give the object this docstring, its examples as code and its public names as links."""
    if not text:
        return
    text = re.sub(r"(?m)^( *)>(?!>>)", r"\1\\>", text)  # a line that begins with ">=" is no quotation
    text = re.sub(r"(?m)(?:^(?:>>>|\.\.\.) .*\n?)+", lambda x: f"```pycon\n{x[0].rstrip()}\n```\n", text)

    def link(name: re.Match[str]) -> str:
        target = public.get(name[1])
        return name[0] if target is None or name[1] == member.name else f"[`{name[1]}`][{target}]"

    text = re.sub(r"``(?:functional\.|attn_sampler\.)?(\w+)``", link, text)
    if member.docstring is None:
        member.docstring = griffe.Docstring(text, parent=member, parser="numpy", parser_options=_OPTIONS)
    else:
        member.docstring.value = text


_OPTIONS: Any = {"warn_unknown_params": False, "warn_missing_types": False}


def _lines(member: griffe.Object) -> list[str]:
    """The object's source."""
    return member.source.split("\n")


def _parameters(owner: griffe.Object) -> dict[str, str]:
    """The types of a function's or a class's parameters, with the shapes of the comments beside them."""
    comments = {name[1]: name[2] for line in _lines(owner) if (name := _FIELD.match(line))}
    if owner.is_class and "__init__" not in owner.members:  # a dataclass
        fields = (re.match(r"^    (\w+): ([^=#]+?)(?: = .*)?$", line) for line in _lines(owner))
        return {field[1]: field[2] for field in fields if field}
    types = {}
    for parameter in (owner.members["__init__"] if owner.is_class else owner).parameters:
        kind, shape = str(parameter.annotation or ""), _SHAPE.match(comments.get(parameter.name) or "")
        if shape is not None and " or " not in shape[2]:
            kind = re.sub(r"\bTensor\b", f"Tensor{shape[2]}", kind)
        types[parameter.name.lstrip("*")] = kind
    types.pop("self", None)
    return types


def _expanded(text: str, types: dict[str, str]) -> str:
    """The docstring with a line for each parameter, of its type, and none left to ``...``."""
    lines = text.split("\n")
    try:
        start = next(i for i, line in enumerate(lines) if line == "Parameters") + 2
    except StopIteration:
        return text
    end = next((i - 1 for i in range(start, len(lines)) if _UNDERLINE.match(lines[i])), len(lines))
    entries: list[tuple[list[str], list[str]]] = []  # names, and what is said of them
    for i in range(start, end):
        line = lines[i]
        if line and not line.startswith(" "):
            if entries and not entries[-1][1]:  # names over two lines
                entries[-1][0].extend(_names(line))
            else:
                entries.append((_names(line), []))
        elif entries:
            entries[-1][1].append(line)
    order, told = list(types), {name for names, _ in entries for name in names}
    out = []
    for names, words in entries:
        for name in _spelled_out(names, order, told):
            kind = types.get(name.lstrip("*"), "")
            out += [f"{name} : {kind}" if kind else name, *words]
            out += [] if not words or words[-1] == "" else [""]
    return "\n".join([*lines[:start], *out, *lines[end:]])


def _names(line: str) -> list[str]:
    return [name.strip() for name in line.split(",") if name.strip()]


def _spelled_out(names: list[str], order: list[str], told: set[str]) -> list[str]:
    """The names, with those that are told of nowhere else in the place of "...", as far as its neighbours."""
    if "..." not in names:
        return names
    at = names.index("...")
    first = order.index(names[at - 1])
    last = order.index(names[at + 1]) if at + 1 < len(names) else len(order)
    return [*names[:at], *(name for name in order[first:last] if name not in told), *names[at + 1 :]]


def _with_fields(owner: griffe.Object) -> str:
    """A class's docstring, with what the comments beside its fields, or above them, say."""
    text = _expanded(owner.docstring.value, _parameters(owner)) if owner.docstring is not None else ""
    if re.search(r"(?m)^Attributes$", text):
        return text
    rows, above, lines = [], [], _lines(owner)
    for index, line in enumerate(lines):
        stripped = line.strip()
        if stripped.startswith("#: ") or (above and stripped.startswith("#")):
            above.append(stripped.lstrip("#: "))
            continue
        field = re.match(r"^    (\w+): ([^=#]+?)(?: = (.*?))?(?:  # (.*))?$", line)
        if (
            field
            and not field[1].startswith("_")
            and (said := " ".join(above) or field[4] or _next(lines, index))
        ):
            rows += [f"{field[1]} : {field[2].strip()}", f"    {said[:1].upper()}{said[1:]}."]
        above = []
    if not rows:
        return text
    section = ["Attributes", "----------", *(row.replace("..", ".") for row in rows)]
    return "\n".join([text, "", *section] if text else section)


def _next(lines: list[str], index: int) -> str:
    """The comment of a field that is written over several lines."""
    if not lines[index].rstrip().endswith("("):
        return ""
    return next((line.split("# ", 1)[1] for line in lines[index + 1 : index + 3] if "# " in line), "")
