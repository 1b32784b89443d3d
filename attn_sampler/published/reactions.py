"""Reactions made from building blocks: problems for the models of reaction SMILES.

A reaction is ``precursors>>product`` as the models read it: canonical SMILES, the precursors (reagents and
solvent among them) in alphabetical order, the ions of a salt joined by ``~``. The generator draws a template,
building blocks that it accepts and reagents, runs the template by RDKit, and keeps what gives one product.
An answer is right where it is the same chemistry as the true one, whatever its spelling: both sides equal
after canonicalisation, the order of the precursors aside.
"""

from __future__ import annotations

import functools
import itertools
import random
from typing import Any

__all__ = ["canonical", "draw", "is_valid", "same"]

#: Where a substituent and the functional group go: {r} and {f}.
_CORES = (
    *("c1cc({r})ccc1{f}", "c1c({r})cccc1{f}", "c1ccc({r})c(c1){f}", "c1nc({r})ccc1{f}", "c1cnc({r})cc1{f}"),
    *("c1cc({r})cnc1{f}", "c1c({r})scc1{f}", "c1cc({r})oc1{f}", "c1cc2cc({r})ccc2cc1{f}"),
    *("c1cc({r})c(F)cc1{f}", "c1c({r})cc(Cl)cc1{f}", "c1cc({r})c(OC)cc1{f}", "Cn1nc({r})cc1{f}"),
)
_ALKYL_CORES = (
    *("C{f}", "CC{f}", "CC(C){f}", "CCCC{f}", "C1CC1{f}", "C1CCCC1{f}", "C1CCCCC1{f}", "C1CCOCC1{f}"),
    *("COCC{f}", "CC(C)C{f}", "c1ccc({r})cc1C{f}", "c1ccc({r})cc1CC{f}", "c1cc({r})ncc1C{f}", "FC(F)(F)C{f}"),
)
_SUBSTITUENTS = (
    *("[H]", "F", "Cl", "C", "OC", "C(F)(F)F", "C#N", "CC", "C(C)C", "OCC", "N(C)C", "S(C)(=O)=O"),
    *("OC(F)(F)F", "C(C)=O", "c3ccccc3", "N3CCOCC3"),
)
#: What can stand at {f}, and whether it does at an aryl, an alkyl core or both.
_GROUPS = {
    "acid": ("C(=O)O", "both"),
    "acid chloride": ("C(=O)Cl", "both"),
    "ester": ("C(=O)OC", "both"),
    "amine": ("N", "both"),
    "aryl bromide": ("Br", "aryl"),
    "aryl fluoride": ("F", "aryl"),
    "boronic acid": ("B(O)O", "aryl"),
    "phenol": ("O", "aryl"),
    "alcohol": ("CO", "both"),
    "bromide": ("CBr", "aryl"),
    "aldehyde": ("C=O", "aryl"),
    "nitro": ("[N+](=O)[O-]", "aryl"),
    "sulfonyl chloride": ("S(=O)(=O)Cl", "both"),
    "isocyanate": ("N=C=O", "aryl"),
    "alkyne": ("C#C", "both"),
    "carbamate": ("NC(=O)OC(C)(C)C", "both"),
    "ketone": ("C(C)=O", "aryl"),
}
_CYCLIC_AMINES = ("C1CCNCC1", "C1CCNC1", "C1COCCN1", "CN1CCNCC1", "CC1CCNCC1", "OC1CCNCC1", "FC1CCNCC1")
_AMINES = ("amine", "cyclic amine")
#: The groups of each precursor, the reaction, and the sets of reagents that it is run with.
_TEMPLATES: dict[str, tuple[tuple[tuple[str, ...], ...], str, tuple[str, ...]]] = {
    "amide coupling": (
        (("acid",), _AMINES),
        "[C:1](=[O:2])[OX2H1].[NX3;H1,H2;!$(NC=O);!$(N-a-[!c;!n;!s;!o]):3]>>[C:1](=[O:2])[N:3]",
        ("CCN=C=NCCCN(C)C.ClCCl", "CCN(CC)CC.CN(C)C=O.O=C(n1ccnc1)n1ccnc1", "C(=NC1CCCCC1)=NC1CCCCC1.ClCCl"),
    ),
    "acylation": (
        (("acid chloride",), _AMINES),
        "[C:1](=[O:2])Cl.[NX3;H1,H2;!$(NC=O):3]>>[C:1](=[O:2])[N:3]",
        ("CCN(CC)CC.ClCCl", "ClCCl.c1ccncc1", "C1CCOC1.CCN(C(C)C)C(C)C"),
    ),
    "esterification": (
        (("acid",), ("alcohol",)),
        "[C:1](=[O:2])[OX2H1].[OX2H1:3][CX4;!$(C=O):4]>>[C:1](=[O:2])[O:3][C:4]",
        ("O=S(=O)(O)O", "CN(C)c1ccncc1.ClCCl.C(=NC1CCCCC1)=NC1CCCCC1"),
    ),
    "Suzuki coupling": (
        (("aryl bromide",), ("boronic acid",)),
        "[c:1]Br.[c:2]B(O)O>>[c:1][c:2]",
        ("O=C([O-])[O-]~[Na+]~[Na+].C1COCCO1.O", "O=C([O-])[O-]~[K+]~[K+].CN(C)C=O", "Cc1ccccc1.CCO.O"),
    ),
    "Sonogashira coupling": (
        (("aryl bromide",), ("alkyne",)),
        "[c:1]Br.[CH1:2]#[C:3]>>[c:1][C:2]#[C:3]",
        ("CCN(CC)CC.[Cu]I", "C1CCOC1.CCN(CC)CC.[Cu]I"),
    ),
    "amination": (
        (("aryl bromide",), _AMINES),
        "[c:1]Br.[NX3;H1,H2;!$(NC=O):2]>>[c:1][N:2]",
        ("CC(C)(C)[O-]~[Na+].Cc1ccccc1", "Cc1ccccc1.O=C([O-])[O-]~[Cs+]~[Cs+]"),
    ),
    "aromatic substitution": (
        (("aryl fluoride",), ("cyclic amine",)),
        "[c:1]F.[NX3;H1;R:2]>>[c:1][N:2]",
        ("CS(C)=O.O=C([O-])[O-]~[K+]~[K+]", "CC#N.CCN(C(C)C)C(C)C"),
    ),
    "reductive amination": (
        (("aldehyde",), _AMINES),
        "[c:4][CX3H1:1]=O.[NX3;H1,H2;!$(NC=O):2]>>[c:4][C:1][N:2]",
        ("[BH3-]C#N~[Na+].CO", "CC(=O)O[BH-](OC(C)=O)OC(C)=O~[Na+].ClCCl", "[BH4-]~[Na+].CO"),
    ),
    "ether synthesis": (
        (("phenol",), ("bromide",)),
        "[c:1][OX2H1:2].[CX4:3]Br>>[c:1][O:2][C:3]",
        ("CN(C)C=O.O=C([O-])[O-]~[K+]~[K+]", "CC(C)=O.O=C([O-])[O-]~[K+]~[K+]", "CN(C)C=O.[H-]~[Na+]"),
    ),
    "alkylation": (
        (("bromide",), ("cyclic amine",)),
        "[CX4:1]Br.[NX3;H1;R:2]>>[C:1][N:2]",
        ("CC#N.O=C([O-])[O-]~[K+]~[K+]", "CCN(CC)CC.ClCCl"),
    ),
    "sulfonamide synthesis": (
        (("sulfonyl chloride",), _AMINES),
        "[S:1](=[O:2])(=[O:3])Cl.[NX3;H1,H2;!$(NC=O):4]>>[S:1](=[O:2])(=[O:3])[N:4]",
        ("c1ccncc1", "CCN(CC)CC.ClCCl"),
    ),
    "urea synthesis": (
        (("isocyanate",), _AMINES),
        "[N:1]=[C:2]=[O:3].[NX3;H1,H2;!$(NC=O):4]>>[N:1][C:2](=[O:3])[N:4]",
        ("ClCCl", "C1CCOC1"),
    ),
    "nitro reduction": (
        (("nitro",),),
        "[c:1][N+:2](=O)[O-]>>[c:1][N+0:2]",
        ("CO.[Pd]", "CCO.[Fe].[Cl-]~[NH4+]", "CCO.O.[Fe]"),
    ),
    "hydrolysis": (
        (("ester",),),
        "[C:1](=[O:2])O[CH3]>>[C:1](=[O:2])O",
        ("CO.O.[Na+]~[OH-]", "C1CCOC1.O.[Li+]~[OH-]"),
    ),
    "deprotection": (
        (("carbamate",),),
        "[N:1]C(=O)OC(C)(C)C>>[N:1]",
        ("ClCCl.O=C(O)C(F)(F)F", "C1COCCO1.Cl"),
    ),
    "reduction": (
        (("aldehyde", "ketone"),),
        "[c:3][CX3:1]=[O:2]>>[c:3][C:1][O:2]",
        ("CO.[BH4-]~[Na+]", "C1CCOC1.[AlH4-]~[Li+]"),
    ),
    "oxidation": (
        (("alcohol",),),
        "[c:3][CH2:1][OX2H1:2]>>[c:3][C:1]=[O:2]",
        ("ClCCl.O=[Mn]=O", "ClCCl.O=[Cr](=O)([O-])Cl~c1cc[nH+]cc1"),
    ),
}


def draw(rng: random.Random) -> tuple[list[str], list[str], str]:
    """A reaction: its reactants, its reagents and its product, as the models read them."""
    while True:
        groups, smarts, reagents = _TEMPLATES[rng.choice(list(_TEMPLATES))]
        reactants = [_building_block(rng.choice(accepted), rng) for accepted in groups]
        product = _product(smarts, reactants)
        if product is not None and product not in reactants:
            return reactants, rng.choice(reagents).split("."), product


def canonical(smiles: str) -> str:
    """Canonical SMILES of one component, whose ions are joined by ``~``.

    Raises
    ------
    ValueError
        It is no molecule.
    """
    molecules = [_chem().MolFromSmiles(part) if part else None for part in smiles.split("~")]
    if any(molecule is None for molecule in molecules):
        raise ValueError(f"smiles: expected SMILES, got {smiles!r}")
    return "~".join(sorted(_chem().MolToSmiles(molecule) for molecule in molecules))


def is_valid(reaction: str) -> bool:
    """Whether both sides of ``precursors>>product`` are molecules."""
    return _sides(reaction) is not None


def same(reaction: str, other: str) -> bool:
    """Whether two reactions have the same components on each side."""
    sides = _sides(reaction)
    return sides is not None and sides == _sides(other)


def _sides(reaction: str) -> list[list[str]] | None:
    try:
        sides = [sorted(map(canonical, side.split("."))) for side in reaction.split(">>")]
    except ValueError:
        return None
    return sides if len(sides) == 2 else None


def _building_block(group: str, rng: random.Random) -> str:
    if group == "cyclic amine":
        return canonical(rng.choice(_CYCLIC_AMINES))
    written, where = _GROUPS[group]
    cores = {"aryl": _CORES, "both": _CORES + _ALKYL_CORES}[where]
    return canonical(rng.choice(cores).format(r=rng.choice(_SUBSTITUENTS), f=written))


def _product(smarts: str, reactants: list[str]) -> str | None:
    """The one product of a template; None where it gives none or different ones."""
    molecules = [_chem().MolFromSmiles(smiles) for smiles in reactants]
    products = set()
    for (product,) in itertools.islice(_reaction(smarts).RunReactants(molecules), 20):
        try:
            _chem().SanitizeMol(product)
            # Read again, so that the spelling does not hang on how the product was made.
            products.add(canonical(_chem().MolToSmiles(product)))
        except ValueError:
            return None
    return products.pop() if len(products) == 1 else None


@functools.cache
def _reaction(smarts: str) -> Any:
    from rdkit.Chem import rdChemReactions

    return rdChemReactions.ReactionFromSmarts(smarts)


@functools.cache
def _chem() -> Any:
    """RDKit, whose complaints about what is no molecule are kept quiet."""
    try:
        from rdkit import Chem, rdBase
    except ImportError:
        raise ImportError("reactions need RDKit: pip install 'attn_sampler[published]'") from None
    rdBase.DisableLog("rdApp.*")
    return Chem
