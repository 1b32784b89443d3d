"""Human antibody chains from germline genes: problems for the models of antibodies.

A chain is a V gene, a loop and a J gene, as recombination joins them; the loop, of two to ten letters in a
heavy chain and none to three in a light one, is random. What mutation adds later is left out, so that an
answer can be checked: outside the loop it is the germline's. Positions are IMGT's, which say what is
framework and what is a complementarity-determining region (CDR): 27 to 38, 56 to 65 and 105 to 117.
"""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

from attn_sampler import documents

__all__ = ["CHAINS", "draw"]

#: The genes that a chain is drawn from.
CHAINS = {"heavy": "H", "light": "KL"}
_CDR = (range(27, 39), range(56, 66), range(105, 118))
# Of human loops, roughly: tyrosine, glycine, serine, aspartate and arginine are common.
_LOOP_LETTERS = "GGGGSSSSYYYYDDDRRRAATTVVPPLLNNEWWFKQIHM"
_LOOP_LENGTHS = {"heavy": range(2, 11), "light": range(4)}


def draw(kind: str, rng: random.Random, germlines: Path) -> tuple[str, list[bool]]:
    """A chain, and whether each of its positions belongs to a CDR.

    Parameters
    ----------
    kind
        "heavy" or "light".
    germlines
        The folder of the published part of that name.
    """
    tables = _tables(germlines)
    locus = rng.choice(CHAINS[kind])
    v, j = (_gene(tables[gene][locus], rng) for gene in "VJ")
    loop = rng.choices(_LOOP_LETTERS, k=rng.choice(_LOOP_LENGTHS[kind]))
    letters = [letter for letter, _ in v] + loop + [letter for letter, _ in j]
    in_cdr = [cdr for _, cdr in v] + [True] * len(loop) + [cdr for _, cdr in j]
    return "".join(letters), in_cdr


def _gene(table: dict[str, Any], rng: random.Random) -> list[tuple[str, bool]]:
    """The letters of a gene, gaps left out, and whether each stands in a CDR."""
    aligned = table["genes"][rng.choice(sorted(table["genes"]))]
    numbers = [int(position.rstrip("ABCDEFGH")) for position in table["positions"]]
    return [
        (letter, any(number in region for region in _CDR))
        for letter, number in zip(aligned, numbers, strict=True)
        if letter != "-"
    ]


@functools.cache
def _tables(germlines: Path) -> Any:
    return json.loads(documents.read_text(germlines / "germlines.json"))
