"""A page that plays decode traces in a browser: one HTML file, which asks for nothing from anywhere.

    from attn_sampler.viewer import page
    Path("trace.html").write_text(page({"attn": generation.trace}), encoding="utf-8")

``viewer.html`` is the page; here it is given its data, as JSON in a ``script`` element that no browser runs.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attn_sampler.trace import DecodeTrace

_LARGEST = 2**53 - 1  # up to which the numbers of a browser are exact


def page(traces: Mapping[str, DecodeTrace]) -> str:
    """The page of decode traces side by side, on one slider of steps.

    Parameters
    ----------
    traces
        By the names that stand above them. Tokens are shown by the ``symbols`` of their trace, or by id
        where it has none (``DecodeTrace.name_tokens``), ``width`` to a line.

    Returns
    -------
    str
        The whole HTML document, for a file in UTF-8.

    Raises
    ------
    ValueError
        There is no trace, or one counts further than a browser does.
    """
    if not traces:
        raise ValueError("traces: expected at least one, got none")
    text = json.dumps({"traces": [_data(name, trace) for name, trace in traces.items()]}, allow_nan=False)
    # Nothing in it ends the element or starts another, whatever a trace holds.
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    template = Path(__file__).with_name("viewer.html").read_text(encoding="utf-8")
    for tag in ("style", "script"):  # the page's own alone, by the policy in its head
        content = template.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        template = template.replace(f"{{{{{tag}}}}}", f"'sha256-{digest}'")
    before, _, after = template.partition("{{data}}")
    return before + text + after


def _data(name: str, trace: DecodeTrace) -> dict[str, Any]:
    """What the page reads of a trace."""
    largest = max([*trace.token_ids(), *(commit.step for commit in trace.commits)])
    if largest > _LARGEST:
        raise ValueError(f"traces: {name!r}: expected tokens and steps up to {_LARGEST}, got {largest}")
    commits: list[list[list[Any]]] = [[] for _ in trace.prompt]
    for c in trace.commits:
        numbers = (x if math.isfinite(x) else None for x in (c.score, c.confidence))
        commits[c.sequence].append([c.step, c.position, c.token, *numbers, c.kind])
    padding = trace.padding or [0] * len(trace.prompt)
    return {
        "name": name,
        "policy": trace.policy,
        "mask": trace.mask_token_id,
        "symbols": trace.symbols,
        "width": trace.width,
        "sequences": [
            {"padding": first, "prompt": prompt, "commits": of_sequence}
            for first, prompt, of_sequence in zip(padding, trace.prompt, commits, strict=True)
        ],
    }
