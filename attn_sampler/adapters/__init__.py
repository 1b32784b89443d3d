"""Attn-Sampler in the models and engines that people run: a file for each, imported by its name.

Nothing here is imported by the rest of the package but by the command ``attn-sampler``, and each file imports
its library itself.
"""

from __future__ import annotations

import re


def untested_version(library: str, version: str, first: str, end: str) -> str | None:
    """Why a library of this version may not work: it is not in [first, end); suffixes do not count.

    >>> untested_version("transformers", "4.57.1", "5.24", "5.25")
    'transformers 4.57.1 is outside the tested range, 5.24 to below 5.25'
    """
    lowest, highest, given = (tuple(map(int, re.findall(r"\d+", v))) for v in (first, end, version))
    if lowest <= given < highest:
        return None
    return f"{library} {version} is outside the tested range, {first} to below {end}"
