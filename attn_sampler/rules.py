"""The rules that an evaluation compares: a policy with its options, and which attention it reads."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from attn_sampler import checks
from attn_sampler.capture import AttentionCapture
from attn_sampler.demo import default_tau
from attn_sampler.documents import shown
from attn_sampler.options import QUERY_ROWS
from attn_sampler.policy import Policy
from attn_sampler.sampler import make_policy

BASELINE = "confidence"
RULES = (
    *(BASELINE, "margin", "entropy", "left-to-right", "random"),
    *("attn-sequential", "attn-parallel", "attn-random", "threshold", "factor", "eb", "klass", "pard"),
    *("dawn", "dapd", "clad", "adas"),
)
_ATTENTION_SWITCHES = (
    *("query_rows=masked", "softmax_scope=block", "diagonal=false"),
    *("layers=last", "layers=0:2"),
)
#: Attn-Sampler's switches, one at a time.
SWITCHES = (
    *(f"{mode}:{switch}" for mode in ("attn-sequential", "attn-parallel") for switch in _ATTENTION_SWITCHES),
    "attn-parallel:fallback=score",
    "attn-parallel:threshold=mean",
)
_ATTENTION_OPTIONS = ("layers", "query_rows", "softmax_scope", "diagonal")


@dataclasses.dataclass(frozen=True)
class Rule:
    """A policy with its options, and which attention it reads.

    ``layers`` is written ``all``, ``last``, a slice ``0:2`` or indices ``0+3``; ``diagonal`` true or false.
    """

    label: str
    policy: str
    options: dict[str, Any] = dataclasses.field(hash=False)  # of the policy
    attention: dict[str, Any] = dataclasses.field(hash=False)  # of ``generate``

    @classmethod
    def parse(cls, text: str) -> Rule:
        """The rule written ``policy:option=value,...``.

        Raises
        ------
        ValueError
            The policy or an option is unknown, or a value is not accepted.
        """
        text = current(text)
        try:
            return cls._of(text)
        except (TypeError, ValueError) as error:
            raise ValueError(f"rule {shown(text)}: {error}") from None

    @classmethod
    def _of(cls, text: str) -> Rule:
        policy, _, rest = text.partition(":")
        options: dict[str, Any] = {}
        attention: dict[str, Any] = {}
        for pair in filter(None, rest.split(",")):
            name, equals, value = pair.partition("=")
            if not equals:
                raise ValueError(f"expected policy:option=value,..., got {pair!r}")
            if name in options or name in attention:
                raise ValueError(f"expected each option once, got {name} twice")
            if name in _ATTENTION_OPTIONS:
                attention[name] = _layers(value) if name == "layers" else _literal(value)
            else:
                options[name] = _literal(value)
        make_policy(policy, **options)
        capture = {name: value for name, value in attention.items() if name != "query_rows"}
        AttentionCapture(**capture)
        checks.choice("query_rows", attention.get("query_rows", "all"), QUERY_ROWS)
        return cls(text, policy, options, attention)

    def make(self) -> Policy:
        """A fresh policy object."""
        return make_policy(self.policy, **self.options)


def spelled(text: str) -> str:
    """A rule as it is written now: ``rows`` was the name of ``query_rows``."""
    return re.sub("(?<=[:,])rows=", "query_rows=", text)


def current(text: str) -> str:
    """The same, with a warning where it is written in the old way."""
    result = spelled(text)
    if result != text:
        warnings.warn(f"rule {text!r}: rows is called query_rows now", DeprecationWarning, stacklevel=3)
    return result


def expand(texts: Iterable[str], taus: Sequence[float] = ()) -> list[Rule]:
    """The rules, those that read a confidence threshold and fix none once for each of ``taus``."""
    rules: dict[str, Rule] = {}
    for text in texts:
        rule = Rule.parse(text)
        labels = [rule.label]
        if taus and "tau" not in rule.options and default_tau(rule.policy) is not None:
            separator = "," if ":" in rule.label else ":"
            labels = [f"{rule.label}{separator}tau={tau:g}" for tau in taus]
        rules |= {label: Rule.parse(label) for label in labels}
    return list(rules.values())


def _literal(text: str) -> Any:
    try:
        if abs(value := int(text)) < 1 << 63:  # what torch takes; larger ones may be meant as floats
            return value
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return {"true": True, "false": False, "none": None}.get(text, text)


def _layers(text: str) -> str | slice | list[int]:
    if text in ("all", "last"):
        return text if text == "all" else [-1]
    try:
        if ":" in text:
            start, stop = (int(end) if end else None for end in text.split(":"))
            return slice(start, stop)
        return [int(index) for index in text.split("+")]
    except ValueError:
        raise ValueError(f"layers: expected all, last, a slice 0:2 or indices 0+3, got {text!r}") from None
