"""From what a wheel holds to a folder that transformers opens, without running any code of the wheel."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import io
import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

#: A token of reaction SMILES: a bracketed atom, an element, a bond, a ring number or punctuation.
_SMILES = r"\[[^\]]+\]|Br|Cl|>>|%[0-9]{2}|[A-Za-z0-9().=#+\\/:~@?>*$-]"
_REACTION_SPECIALS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
_ANTIBODY_SPECIALS = {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}


def check_requirements(parts: Iterable[str]) -> None:
    """Raise ImportError where what conversion needs is not installed."""
    if set(parts) != {"germlines"} and importlib.util.find_spec("transformers") is None:
        raise ImportError("published models need transformers: pip install 'attn_sampler[transformers]'")


def rxnmapper(wheel: zipfile.ZipFile, target: Path) -> None:
    """The ALBERT of rxnmapper, which stands there as transformers saves it, but for its pickle."""
    inside = "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k/"
    _transformers_checkpoint(wheel, inside, target, "AlbertForMaskedLM", "albert")


def rxnfp(wheel: zipfile.ZipFile, target: Path) -> None:
    """The pretrained BERT of rxnfp, likewise."""
    inside = "rxnfp/models/transformers/bert_pretrained/"
    _transformers_checkpoint(wheel, inside, target, "BertForMaskedLM", "bert")


def sapiens_heavy(wheel: zipfile.ZipFile, target: Path) -> None:
    """The RoBERTa of heavy chains, from fairseq's names."""
    _fairseq_roberta(wheel, "sapiens/models/v1/", "checkpoint_vh.pt", target)


def sapiens_light(wheel: zipfile.ZipFile, target: Path) -> None:
    """The RoBERTa of light chains, kappa and lambda."""
    _fairseq_roberta(wheel, "sapiens/models/v1/", "checkpoint_vl.pt", target)


def germlines(wheel: zipfile.ZipFile, target: Path) -> None:
    """The germline genes of abnumber: {"V" | "J": {"H" | "K" | "L": {"positions", "genes"}}}, as JSON."""
    tables: dict[str, Any] = {}
    for statement in ast.parse(wheel.read("abnumber/germlines.py")).body:
        if isinstance(statement, ast.Assign) and isinstance(target_name := statement.targets[0], ast.Name):
            for gene in "VJ":
                if target_name.id == f"HUMAN_IMGT_IG_{gene}":
                    tables[gene] = {
                        chain: {
                            "positions": [position[1:] for position in table["positions"]],
                            "genes": table["aligned_sequences"],
                        }
                        for chain, table in ast.literal_eval(statement.value).items()
                    }
    (target / "germlines.json").write_text(json.dumps(tables), encoding="utf-8")


def _transformers_checkpoint(
    wheel: zipfile.ZipFile, inside: str, target: Path, architecture: str, model_type: str
) -> None:
    config = json.loads(wheel.read(f"{inside}config.json"))
    vocabulary = wheel.read(f"{inside}vocab.txt").decode().split("\n")
    vocabulary = vocabulary[: config["vocab_size"]]
    _write_tokenizer(vocabulary, _SMILES, _REACTION_SPECIALS, target)
    kept = (
        *("vocab_size", "hidden_size", "embedding_size", "num_hidden_layers", "num_attention_heads"),
        *("intermediate_size", "hidden_act", "max_position_embeddings", "type_vocab_size", "layer_norm_eps"),
        *("num_hidden_groups", "inner_group_num"),
    )
    written = {key: config[key] for key in kept if key in config}
    written |= {"architectures": [architecture], "model_type": model_type}
    written |= {
        f"{key}_token_id": vocabulary.index(token)
        for key, token in _REACTION_SPECIALS.items()
        if key in ("pad", "mask")
    }
    (target / "config.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    weights = _unpickled(wheel.read(f"{inside}pytorch_model.bin"))
    # Only the language model: a pooler, a second head or a buffer of positions is not read.
    unread = ("pooler", "seq_relationship", "sop_classifier", "position_ids")
    weights = {key: value for key, value in weights.items() if not any(part in key for part in unread)}
    _write_weights(weights, target)


def _fairseq_roberta(wheel: zipfile.ZipFile, inside: str, name: str, target: Path) -> None:
    letters = [line.split()[0] for line in wheel.read(f"{inside}dict.txt").decode().splitlines()]
    # fairseq's order: its own symbols, the dictionary, the mask.
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", *letters, "<mask>"]
    _write_tokenizer(vocabulary, ".", _ANTIBODY_SPECIALS, target)
    checkpoint = _unpickled(wheel.read(f"{inside}{name}"), [argparse.Namespace])
    sizes, given = vars(checkpoint["args"]), checkpoint["model"]
    # What is saved twice is tied.
    encoder = "decoder.sentence_encoder."
    names = {
        f"{encoder}embed_tokens.": "roberta.embeddings.word_embeddings.",
        f"{encoder}embed_positions.": "roberta.embeddings.position_embeddings.",
        f"{encoder}emb_layer_norm.": "roberta.embeddings.LayerNorm.",
        "decoder.lm_head.dense.": "lm_head.dense.",
        "decoder.lm_head.layer_norm.": "lm_head.layer_norm.",
        "decoder.lm_head.weight": "lm_head.decoder.weight",
        "decoder.lm_head.bias": "lm_head.bias",
    }
    in_layer = {
        "self_attn.q_proj.": "attention.self.query.",
        "self_attn.k_proj.": "attention.self.key.",
        "self_attn.v_proj.": "attention.self.value.",
        "self_attn.out_proj.": "attention.output.dense.",
        "self_attn_layer_norm.": "attention.output.LayerNorm.",
        "fc1.": "intermediate.dense.",
        "fc2.": "output.dense.",
        "final_layer_norm.": "output.LayerNorm.",
    }
    for layer in range(sizes["encoder_layers"]):
        names |= {
            f"{encoder}layers.{layer}.{old}": f"roberta.encoder.layer.{layer}.{new}"
            for old, new in in_layer.items()
        }
    weights = {}
    for key, value in given.items():
        prefix = max((old for old in names if key.startswith(old)), key=len)
        weights[names[prefix] + key[len(prefix) :]] = value
    width = sizes["encoder_embed_dim"]
    # fairseq's RoBERTa knows one type of token and has no embedding for it.
    weights["roberta.embeddings.token_type_embeddings.weight"] = torch.zeros(1, width)
    weights["lm_head.decoder.bias"] = weights["lm_head.bias"].clone()
    config = {
        "architectures": ["RobertaForMaskedLM"],
        "model_type": "roberta",
        "vocab_size": len(vocabulary),
        "hidden_size": width,
        "num_hidden_layers": sizes["encoder_layers"],
        "num_attention_heads": sizes["encoder_attention_heads"],
        "intermediate_size": sizes["encoder_ffn_embed_dim"],
        "hidden_act": sizes["activation_fn"],
        "max_position_embeddings": sizes["max_positions"] + 2,  # positions count from behind the padding's
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "mask_token_id": len(vocabulary) - 1,
    }
    (target / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    _write_weights(weights, target)


def _unpickled(data: bytes, classes: Iterable[Any] = ()) -> Any:
    """A checkpoint's tensors and plain values; anything else in it raises."""
    with torch.serialization.safe_globals(list(classes)):
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _write_weights(weights: dict[str, Tensor], target: Path) -> None:
    whole = {key: value.float().contiguous().clone() for key, value in weights.items()}
    save_file(whole, target / "model.safetensors", metadata={"format": "pt"})


def _write_tokenizer(vocabulary: list[str], pattern: str, specials: dict[str, str], target: Path) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=specials["unk"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    first, last = specials["cls"], specials["sep"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=[(token, ids[token]) for token in (first, last)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{key}_token": token for key, token in specials.items()}
    )
    wrapped.save_pretrained(target)
