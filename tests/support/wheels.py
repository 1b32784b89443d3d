"""A wheel like one that carries a published model, with a small model of random weights."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import zipfile
from pathlib import Path

import torch

from attn_sampler import published
from attn_sampler.published import Published

VOCABULARY = [
    *("[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ">>", "~", "[Pd]", "Cl", "Br", "%10"),
    *("[N+]", "[O-]", "[Na+]", "[K+]", "[Cs+]", "[Li+]", "[OH-]", "[H-]", "[BH-]", "[BH3-]", "[BH4-]"),
    *("[AlH4-]", "[Cl-]", "[NH4+]", "[Mn]", "[Cr]", "[nH]", "[nH+]", "[Fe]", "[Cu]"),
    *"BCNOFPSIcnos()=#.-+/\\123456789",
]


def albert_wheel(path: Path, weights: bytes | None = None) -> Published:
    """A wheel like rxnmapper's, with a small ALBERT of random weights."""
    from transformers import AlbertConfig, AlbertForMaskedLM

    config = AlbertConfig(
        vocab_size=len(VOCABULARY),
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=160,
    )
    torch.manual_seed(0)
    model = AlbertForMaskedLM(config)
    inside = "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k/"
    if weights is None:
        buffer = io.BytesIO()
        # What language modelling does not read is there too.
        torch.save(
            {**model.state_dict(), "albert.pooler.weight": torch.ones(32, 32)},
            buffer,
            _use_new_zipfile_serialization=False,
        )
        weights = buffer.getvalue()
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{inside}config.json", json.dumps(config.to_dict()))
        wheel.writestr(f"{inside}vocab.txt", "\n".join(VOCABULARY) + "\n")
        wheel.writestr(f"{inside}pytorch_model.bin", weights)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    known = next(p for p in published.PUBLISHED if p.package == "rxnmapper")
    return dataclasses.replace(known, sha256=digest)
