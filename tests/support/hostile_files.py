"""Files that are wrong in any way: JSON documents, weights, checkpoints."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from attn_sampler.bundled.model import TinyMaskedLM, TinyMaskedLMConfig, save_weights

VOCAB, MASK = 11, 10
CONFIG = TinyMaskedLMConfig(VOCAB, MASK, hidden_size=8, num_layers=2, num_heads=2, ffn_size=8)

VALUES: list[Any] = [None, True, False, -1, 0, 1, 12, 2**31, 2**63, 2**70, 10**400, 0.5, 1e300, -0.0]
SMALL = [value for value in VALUES if value is None or value <= 12]  # what transformers would count to
WORSE = [
    float("nan"),
    float("inf"),
    -float("inf"),
    "",
    "x",
    "\ud800",
    "1" * 3000,
    [],
    {},
    [[]],
    [None],
    {"a": 1},
]
SMALL += WORSE
VALUES += WORSE


def mutated(value: Any, rng: random.Random, values: list[Any]) -> Any:
    """The value with something else at one of its places, or something missing or more."""
    if not isinstance(value, (list, dict)) or not value or rng.random() < 0.15:
        return rng.choice(values)
    copy = list(value) if isinstance(value, list) else dict(value)
    key = rng.choice(range(len(copy)) if isinstance(copy, list) else list(copy))
    change = rng.random()
    if change < 0.1:
        del copy[key]
    elif change < 0.2:
        copy = [*copy, rng.choice(values)] if isinstance(copy, list) else {**copy, "more": rng.choice(values)}
    else:
        copy[key] = mutated(copy[key], rng, values)
    return copy


def hostile_text(value: Any, rng: random.Random, values: list[Any] = VALUES) -> bytes:
    """A JSON document like this one, and wrong."""
    text = json.dumps(mutated(value, rng, values)).encode()
    kind = rng.random()
    if kind < 0.6:
        return text
    good = json.dumps(value).encode()
    cut = rng.randrange(len(good))
    deep = rng.choice([b"[", b'{"a":', b"[[", b'{"tasks":'])
    return rng.choice(
        [
            b"",
            b"\xef\xbb\xbf" + good,
            b"\xff\xfe" + good.decode().encode("utf-16-le"),
            good[:cut],
            good[:cut] + bytes([rng.randrange(256)]) + good[cut + 1 :],
            good + good,
            good.replace(b"{", b'{"tasks": 1, ', 1),
            good.replace(b": ", b": {}, ", 1) if rng.random() < 0.5 else good.replace(b'"', b"'"),
            deep * 100_000,
            deep * 900 + good,
            b'{"prompt": ' + b"9" * 5000 + b"}",
            rng.randbytes(50),
            b"\0" * 100,
        ]
    )


def hostile_weights(path: Path, rng: random.Random) -> None:
    """A safetensors file of the bundled format, broken."""
    model = TinyMaskedLM(CONFIG)
    if rng.random() < 0.2:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(rng.choice([float("nan"), float("inf"), 0.0, 60000.0]))
    save_weights(model, path)
    config = dataclasses.asdict(CONFIG)
    kind = rng.random()
    if kind < 0.4:
        tensors = load_file(path)
        text = hostile_text(config, rng).decode("utf-8", "replace")
        if rng.random() < 0.3:
            size = rng.choice([2**20, 2**31 - 1, 2**40])
            config[rng.choice(["vocab_size", "hidden_size", "num_layers", "num_heads", "ffn_size"])] = size
            text = json.dumps(config)
        save_file(tensors, path, metadata={"config": text})
    elif kind < 0.6:
        tensors = load_file(path)
        name = rng.choice(list(tensors))
        other = rng.choice([None, torch.zeros(0), torch.zeros(3, 5), torch.zeros(1, dtype=torch.int64)])
        tensors.pop(name) if other is None else tensors.update({name: other})
        tensors |= {"more": torch.zeros(1)} if rng.random() < 0.3 else {}
        save_file(tensors, path, metadata={"config": json.dumps(config)})
    else:
        content = bytearray(path.read_bytes())
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(min(len(content), 900))] = rng.randrange(256)
        path.write_bytes(content[: rng.choice([0, 7, 8, 100, len(content) - 1, len(content)])])


def place(folder: Path, rng: random.Random) -> str:
    """Somewhere that nothing should be written to or read from."""
    return rng.choice(
        ["/dev/full", "/dev/zero", str(folder), "/no/such/file", "", "x" * 300, "/dev/null/x", "\udcff"]
    )


def make_checkpoint(folder: Path) -> None:
    """A Llama of random weights with a tokenizer of words, saved by transformers."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[UNK]", "[PAD]", "[EOS]", *(f"w{i}" for i in range(12)), "[MASK]"]
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "eos_token": "[EOS]", "mask_token": "[MASK]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
