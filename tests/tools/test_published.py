"""Published models: fetched by hash, converted without running their code, and the problems made for them."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from wheels import VOCABULARY, albert_wheel

from attn_sampler import published
from attn_sampler.cli import main
from attn_sampler.problem_sets import (
    PUBLISHED_TASKS,
    EvaluatedModel,
    load_model,
    parse_published,
    published_problems,
    read_problems,
)
from attn_sampler.published import FetchError, antibodies, reactions

REACTION = "CCN(CC)CC.CN1CCNCC1.ClCCl.O=C(Cl)c1ccccc1>>CN1CCN(C(=O)c2ccccc2)CC1"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own; that of the user stays as it is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a real part, fetched from the index once; the test is skipped where there is none."""
    cache = tmp_path_factory.mktemp("published")

    def folder(name: str) -> Path:
        try:
            return published.folder(name, cache)
        except FetchError as error:
            pytest.skip(f"nothing can be fetched here: {error}")

    return folder


def test_a_wheel_becomes_a_folder_that_transformers_opens(tmp_path: Path) -> None:
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    wheel = tmp_path / "rxnmapper-0.4.3-py3-none-any.whl"
    (folder,) = published.fetch(albert_wheel(wheel), archive=wheel)
    assert not list(folder.parent.glob(".*"))  # nothing half-made is left
    source = json.loads((folder / "SOURCE.json").read_text())
    assert source["licence"] == "MIT"
    assert "model.safetensors" in source["files"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(REACTION)["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens[:8] == ["[CLS]", "C", "C", "N", "(", "C", "C", ")"]
    assert ">>" in tokens
    assert "Cl" in tokens
    assert tokenizer.decode(ids, skip_special_tokens=True) == REACTION
    assert tokenizer.encode("C[MASK]O[Zz]", add_special_tokens=False) == [
        VOCABULARY.index(token) for token in ("C", "[MASK]", "O", "[UNK]")
    ]
    model, report = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    torch.manual_seed(0)
    inside = zipfile.ZipFile(wheel).read(
        next(n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("bin"))
    )
    given = torch.load(io.BytesIO(inside), weights_only=True)
    key = "albert.encoder.embedding_hidden_mapping_in.weight"
    assert torch.equal(model.state_dict()[key], given[key])


def test_a_changed_wheel_is_refused_and_nothing_is_written(tmp_path: Path, own_cache: Path) -> None:
    wheel = tmp_path / "rxnmapper-0.4.3-py3-none-any.whl"
    known = albert_wheel(wheel)
    changed = bytearray(wheel.read_bytes())
    changed[len(changed) // 2] ^= 1
    wheel.write_bytes(changed)
    with pytest.raises(
        FetchError, match=f"refused: its SHA-256 is .*, that of rxnmapper 0.4.3 is {known.sha256}"
    ):
        published.fetch(known, archive=wheel)
    assert not own_cache.exists()
    with pytest.raises(FetchError, match="No such file"):
        published.fetch(known, archive=tmp_path / "none.whl")


class Malicious:
    """Unpickled by a plain pickle, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_pickle_is_not_run(tmp_path: Path, own_cache: Path) -> None:
    proof = tmp_path / "ran"
    wheel = tmp_path / "rxnmapper-0.4.3-py3-none-any.whl"
    buffer = io.BytesIO()
    torch.save({"weight": Malicious(proof)}, buffer)
    known = albert_wheel(wheel, buffer.getvalue())
    with pytest.raises(pickle.UnpicklingError):
        published.fetch(known, archive=wheel)
    assert not proof.exists()
    assert not [path for path in own_cache.rglob("*") if path.is_file()]


def test_files_changed_since_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "rxnmapper-0.4.3-py3-none-any.whl"
    known = albert_wheel(wheel)
    monkeypatch.setattr(published, "PUBLISHED", (known,))
    assert not published.is_here("rxnmapper")
    (folder,) = published.fetch(known, archive=wheel)
    assert published.is_here("rxnmapper")
    assert published.folder("rxnmapper") == folder
    with open(folder / "model.safetensors", "ab") as file:
        file.write(b"\0")
    with pytest.raises(FetchError, match=r"model\.safetensors: was changed since it was fetched; remove"):
        published.folder("rxnmapper")
    (folder / "SOURCE.json").write_text("{")
    with pytest.raises(FetchError, match=r"SOURCE\.json: was changed since it was fetched; remove"):
        published.folder("rxnmapper")
    published.fetch(known, archive=wheel)  # takes its place
    assert published.folder("rxnmapper") == folder


def test_what_the_index_does_not_have_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    known = published.PUBLISHED[0]
    with pytest.raises(
        FetchError, match=r"^pip cannot download rxnmapper==0\.4\.3: [^\n]*; --archive takes [^\n]*$"
    ):
        published.fetch(known)


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = tmp_path / "rxnmapper-0.4.3-py3-none-any.whl"
    monkeypatch.setattr(published, "PUBLISHED", (albert_wheel(wheel),))
    monkeypatch.setattr(published.command, "PUBLISHED", published.PUBLISHED)
    assert main(["models"]) == 0
    listed = capsys.readouterr().out
    assert "MIT" in listed
    assert "Schwaller" in listed
    assert " no " in listed
    assert main(["models", "--fetch", "rxnmapper", "--archive", str(wheel)]) == 0
    assert Path(capsys.readouterr().out.strip()) == published.folder("rxnmapper")
    assert main(["models"]) == 0
    assert " yes " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["models", "--archive", str(wheel)])
    assert "--archive: is one wheel: expected --fetch with its package, got 0" in capsys.readouterr().err


def test_antibody_weights_mean_what_they_meant(fetched: Callable[[str], Path]) -> None:
    """Logits of transformers' RoBERTa equal those of the network that fairseq trained, written out here."""
    from transformers import AutoModelForMaskedLM

    chain = "QVQLVQSGAEVKKPGASVKVSCKASGYTFTSYGISWVRQAPGQGLEWMGWISAYNGNTNYAQKLQGRVTMTTDTSTSTAYMELRSLRSDDTAVYYC"
    folder = fetched("sapiens-heavy")
    model = AutoModelForMaskedLM.from_pretrained(folder).double().eval()
    tokenizer = load_model(f"hub:{folder}").tokenizer
    ids = torch.tensor([tokenizer.encode(chain)])
    ids[0, 5:60:7] = tokenizer.mask_token_id
    w = dict(model.state_dict().items())
    assert ids[0, 0] == 0
    assert ids[0, -1] == 2

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    positions = torch.arange(ids.shape[1]) + 2  # those of tokens begin behind padding's, 1
    x = w["roberta.embeddings.word_embeddings.weight"][ids[0]]
    x = norm(
        x + w["roberta.embeddings.position_embeddings.weight"][positions], "roberta.embeddings.LayerNorm"
    )
    for i in range(4):
        at = f"roberta.encoder.layer.{i}"
        q, k, v = (
            linear(x, f"{at}.attention.self.{part}").view(len(x), 8, 16).transpose(0, 1)
            for part in ("query", "key", "value")
        )
        mixed = (q @ k.transpose(1, 2) / math.sqrt(16)).softmax(-1) @ v
        mixed = linear(mixed.transpose(0, 1).reshape(len(x), 128), f"{at}.attention.output.dense")
        x = norm(x + mixed, f"{at}.attention.output.LayerNorm")
        inner = linear(F.gelu(linear(x, f"{at}.intermediate.dense")), f"{at}.output.dense")
        x = norm(x + inner, f"{at}.output.LayerNorm")
    x = norm(F.gelu(linear(x, "lm_head.dense")), "lm_head.layer_norm")
    expected = F.linear(x, w["lm_head.decoder.weight"], w["lm_head.bias"])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[0], expected, rtol=1e-9, atol=1e-9)
    masked = ids[0] == tokenizer.mask_token_id
    truth = torch.tensor(tokenizer.encode(chain))[masked]
    assert (expected[masked].argmax(-1) == truth).double().mean() >= 0.9  # trained


@pytest.mark.parametrize(
    ("name", "task", "least"),
    [
        ("rxnmapper", "reactions-10", 0.9),
        ("sapiens-heavy", "heavy-10", 0.85),
        ("sapiens-light", "light-10", 0.85),
    ],
)
def test_published_models_fill_in_what_they_were_trained_on(
    fetched: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, name: str, task: str, least: float
) -> None:
    """One pass over problems with a tenth blank: a wrong weight or token would show."""
    folder = fetched(name)
    germlines = fetched("germlines")
    monkeypatch.setattr(published, "folder", lambda _: germlines)
    model = load_model(f"hub:{folder}")
    problems = published_problems(task, 30, model)
    right = total = 0
    for prompt, answer in zip(problems.prompts, problems.answers, strict=True):
        with torch.no_grad():
            predicted = model.model(prompt[None])[0].argmax(-1)[prompt == model.mask_token_id]
        right, total = right + int((predicted == answer).sum()), total + len(answer)
    assert right / total >= least, f"{right} of {total}"


@pytest.fixture(scope="module")
def speller(tmp_path_factory: pytest.TempPathFactory) -> EvaluatedModel:
    """A small model of random weights with a tokenizer that spells reactions."""
    folder = tmp_path_factory.mktemp("speller")
    wheel = folder / "rxnmapper-0.4.3-py3-none-any.whl"
    (made,) = published.fetch(albert_wheel(wheel), archive=wheel, cache=folder)
    return load_model(f"hub:{made}")


def spelled(model: EvaluatedModel, tokens: torch.Tensor) -> str:
    return model.tokenizer.decode(tokens, skip_special_tokens=True)


def test_reactions_are_chemistry() -> None:
    from rdkit import Chem

    rng = random.Random(3)
    for _ in range(150):
        reactants, reagents, product = reactions.draw(rng)
        assert reactions.canonical(product) == product
        assert all(reactions.canonical(reactant) == reactant for reactant in reactants)
        written = f"{'.'.join(reactants + reagents)}>>{product}"
        assert reactions.is_valid(written)
        respelled = Chem.MolToSmiles(Chem.MolFromSmiles(product), canonical=False, doRandom=True)
        others = rng.sample(reactants + reagents, len(reactants + reagents))
        assert reactions.same(written, f"{'.'.join(others)}>>{respelled}")
        assert not reactions.same(written, f"{'.'.join(reactants + reagents)}>>C{product}")
        # What leaves the molecules is no more than what they held, of the elements that no reagent brings.
        carbons = [
            sum(a.GetSymbol() == "C" for a in Chem.MolFromSmiles(s).GetAtoms()) for s in [*reactants, product]
        ]
        assert carbons[-1] <= sum(carbons[:-1])


@pytest.mark.parametrize("written", ["C(C>>CC", "CC", "CC>>CC>>CC", "c1cccc1>>CC", ">>", "", "CC>>", "C~>>C"])
def test_what_is_no_reaction(written: str) -> None:
    assert not reactions.is_valid(written)
    assert not reactions.same(written, written)


def test_the_same_reaction_spelled_otherwise() -> None:
    assert reactions.same("CCO.CC(=O)O>>CCOC(C)=O", "C(C)(=O)O.OCC>>O=C(C)OCC")
    assert not reactions.same("CCO.CC(=O)O>>CCOC(C)=O", "CCO>>CCOC(C)=O")
    assert reactions.same("[Na+]~[OH-].CO>>C", "CO.[OH-]~[Na+]>>C")


def test_blanks_of_reactions(speller: EvaluatedModel) -> None:
    product = published_problems("reactions", 30, speller)
    reagent = published_problems("reactions-reagent", 30, speller)
    mask = speller.mask_token_id
    texts = []
    for i in range(30):
        truth = product.truth(i, mask)
        texts.append(spelled(speller, truth))
        assert torch.equal(truth, reagent.truth(i, mask))  # the same reactions
        before = product.prompts[i][product.prompts[i] != mask]
        assert spelled(speller, before) == texts[-1].split(">>")[0] + ">>"
        seen, whole = (spelled(speller, x) for x in (reagent.prompts[i][reagent.prompts[i] != mask], truth))
        assert seen.split(">>")[1] == whole.split(">>")[1]
        kept = [part for part in seen.split(">>")[0].split(".") if part]
        gone = whole.split(">>")[0].split(".")
        assert set(kept) < set(gone)
        assert product.judge(i, truth, mask)
        assert product.measures["tokens"](i, truth) == product.measures["valid"](i, truth) == 1
        wrong = truth.clone()
        wrong[-2] = VOCABULARY.index("(")
        assert not product.judge(i, wrong, mask)
        assert not product.measures["valid"](i, wrong)
        blanks = int((product.prompts[i] == mask).sum())
        assert product.measures["tokens"](i, wrong) == pytest.approx(1 - 1 / blanks)
    assert len(set(texts)) == 30


def test_percentages_are_nested_and_splits_disjoint(speller: EvaluatedModel) -> None:
    mask = speller.mask_token_id
    few, many, whole = (published_problems(f"reactions-{n}", 20, speller) for n in (20, 60, 100))
    for i in range(20):
        blank = [x.prompts[i] == mask for x in (few, many, whole)]
        assert (blank[0] <= blank[1]).all()
        assert (blank[1] <= blank[2]).all()
        inner = len(blank[0]) - 2
        assert [int(b.sum()) for b in blank] == [round(inner * share) for share in (0.2, 0.6, 1.0)]
        assert not blank[2][0]
        assert not blank[2][-1]
    again = published_problems("reactions-20", 20, speller)
    assert again.fingerprint == few.fingerprint
    assert published_problems("reactions-20", 10, speller).prompts[9].equal(few.prompts[9])
    dev = published_problems("reactions-20", 20, speller, "dev")
    held_out = {spelled(speller, few.truth(i, mask)) for i in range(20)}
    assert held_out.isdisjoint(spelled(speller, dev.truth(i, mask)) for i in range(20))


def test_eval_and_demo_fetch_what_they_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = tmp_path / "rxnmapper-0.4.3-py3-none-any.whl"
    known = albert_wheel(wheel)
    monkeypatch.setattr(published, "PUBLISHED", (known,))
    monkeypatch.setattr(published, "_download", lambda *_: wheel)
    out = tmp_path / "results.json"
    words = ["--task", "reactions-20", "reactions-reagent", "--problems", "3", "--batch", "2"]
    rules = ["confidence", "grounded:tau=0.05", "attn-sequential:query_rows=masked"]
    table = tmp_path / "table.md"
    assert main(["eval", *words, "--rule", *rules, "--out", str(out), "--table", str(table)]) == 0
    assert published.is_here("rxnmapper")
    cells = json.loads(out.read_text())["tasks"]
    for task in ("reactions-20", "reactions-reagent"):
        assert cells[task]["model"] == "rxnmapper"
        assert cells[task]["rules"].keys() == {*rules}
        for values in cells[task]["rules"].values():
            assert values.keys() == {"right", "tokens", "valid", "passes"}
            assert all(0 <= share <= 1 for share in values["tokens"])
    assert min(cells["reactions-20"]["rules"]["confidence"]["passes"]) >= 5
    heading = next(line for line in table.read_text().splitlines() if line.startswith("| rule"))
    assert heading.endswith("| tokens | less confidence | 95 % | valid | less confidence | 95 % |")
    capsys.readouterr()
    prompt = ["--prompt", "CC[MASK].O>>C[MASK]", "--policy", "threshold"]
    assert main(["generate", "--model", "rxnmapper", *prompt]) == 0
    assert re.fullmatch(r"CC.+\.O>>C.+\n", capsys.readouterr().out)
    shown = ["--task", "reactions-20", "--problems", "2", "--policy", "confidence", "threshold"]
    assert main(["demo", *shown, "--trace", str(tmp_path / "trace.json")]) == 0
    printed = capsys.readouterr().out
    assert "reactions-20: 2 held-out problems" in printed
    assert printed.count("passes\n") == 2
    trace = json.loads((tmp_path / "trace-reactions-20-confidence.json").read_text())
    lengths = [len(row) - pad for row, pad in zip(trace["prompt"], trace["padding"], strict=True)]
    assert lengths == [len(p) for p in published_problems("reactions-20", 2, load_model("rxnmapper")).prompts]
    assert main(["demo", "--task", "reactions", "--policy", "wino"]) == 1  # told in one line
    assert "forward_shadow" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["demo", "--task", "sudokus"])
    told = capsys.readouterr().err
    assert "argument --task: expected both, sudoku, addition or problems of published models (" in told
    assert told.endswith("got 'sudokus'\n")


def test_several_processes_may_fetch_the_same(tmp_path: Path) -> None:
    wheel = tmp_path / "rxnmapper-0.4.3-py3-none-any.whl"
    known = albert_wheel(wheel)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: published.fetch(known, archive=wheel), range(8)))
    assert len({folder for (folder,) in folders}) == 1
    (folder,) = folders[0]
    source = json.loads((folder / "SOURCE.json").read_text())
    assert all(
        hashlib.sha256((folder / name).read_bytes()).hexdigest() == d for name, d in source["files"].items()
    )


def test_chains_are_germline(fetched: Callable[[str], Path]) -> None:
    germlines = fetched("germlines")
    tables = json.loads((germlines / "germlines.json").read_text())
    rng = random.Random(0)
    for kind, loci in antibodies.CHAINS.items():
        v, j = ({g.replace("-", "") for c in loci for g in tables[x][c]["genes"].values()} for x in "VJ")
        lengths = set()
        for _ in range(100):
            chain, in_cdr = antibodies.draw(kind, rng, germlines)
            assert len(chain) == len(in_cdr)
            assert set(chain) <= set("ACDEFGHIKLMNPQRSTVWY")
            assert any(chain.startswith(gene) for gene in v)
            assert any(chain.endswith(gene) for gene in j)
            # Three runs, between four of framework; the first framework is 26 positions less a gap.
            runs = "".join("C" if x else "f" for x in in_cdr)
            assert [len(run) > 0 for run in runs.split("f") if run] == [True] * 3
            assert runs[0] == runs[-1] == "f"
            assert 24 <= runs.index("C") <= 26
            lengths.add(len(chain))
        assert len(lengths) > 5


@pytest.mark.parametrize(
    "name",
    ["reactions-0", "reactions-101", "reactions-007", "reactions-cdr", "heavy-product", "proteins", "heavy-"],
)
def test_unknown_problems(name: str) -> None:
    with pytest.raises(ValueError, match=f"expected one of sudoku, .*reactions-product, .*, got '{name}'"):
        parse_published(name)


def test_no_more_problems_than_there_are(speller: EvaluatedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    products = itertools.cycle(["CCO", "CCN", "CCF"])
    monkeypatch.setattr(reactions, "draw", lambda _: (["C"], ["N"], next(products)))
    with pytest.raises(ValueError, match=r"reactions: expected at most some [0-3] different problems, got 4"):
        published_problems("reactions", 4, speller)


def test_texts_for_a_model_that_fills_in(speller: EvaluatedModel, tmp_path: Path) -> None:
    """Its special tokens stand around the text, blanks and all."""
    file = tmp_path / "texts.jsonl"
    texts = [{"prompt": "CC[MASK].O>>C[MASK]", "answer": "NF"}, {"prompt": "CO>>", "answer": "CBrC"}]
    file.write_text("".join(json.dumps(text) + "\n" for text in texts))
    problems = read_problems(file, speller, 32)
    decoded = [speller.tokenizer.convert_ids_to_tokens(prompt.tolist()) for prompt in problems.prompts]
    assert decoded == [
        ["[CLS]", "C", "C", "[MASK]", ".", "O", ">>", "C", "[MASK]", "[SEP]"],
        ["[CLS]", "C", "O", ">>", "[MASK]", "[MASK]", "[MASK]", "[SEP]"],
    ]
    assert [spelled(speller, problems.truth(i, speller.mask_token_id)) for i in (0, 1)] == [
        "CCN.O>>CF",
        "CO>>CBrC",
    ]


def test_models_that_do_not_spell_the_problems(speller: EvaluatedModel) -> None:
    with pytest.raises(ValueError, match="reactions: needs a model with a tokenizer"):
        published_problems("reactions", 3, dataclasses.replace(speller, tokenizer=None))
    with pytest.raises(ValueError, match="split: expected one of"):
        published_problems("reactions", 3, speller, "train")
    with pytest.raises(ValueError, match=r"published: expected one of rxnmapper, .*, got 'bert'"):
        published.folder("bert")
    assert {task.model for task in PUBLISHED_TASKS.values()} <= set(published.MODELS)
