"""Loads a checkpoint with transformers and decodes prompts: the work of ``attn-sampler generate``."""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from attn_sampler import checks
from attn_sampler.adapters import untested_version
from attn_sampler.adapters.models import FAMILIES, Adapter, Family, adapt, find_family
from attn_sampler.generate import Generation, generate

TESTED_VERSIONS = ("5.24", "5.25")
"""The first version of transformers that the tests cover, and the first that they do not."""


class LoadError(Exception):
    """A checkpoint cannot be decoded here; the message says why in one line."""


class Checkpoint(NamedTuple):
    """What ``load`` gives."""

    adapter: Adapter
    tokenizer: Any
    options: dict[str, Any]  # of generate


def load(
    path: str,
    *,
    family: str | None = None,
    mask_token_id: int | None = None,
    device: str | None = None,
    dtype: str = "auto",
    attention: str | None = None,
    trust_remote_code: bool = False,
    any_version: bool = False,
) -> Checkpoint:
    """A checkpoint, its adapter and its tokenizer.

    Parameters
    ----------
    path
        A folder, or an id on the hub.
    family
        A name of ``FAMILIES``. Default: found by the checkpoint's model_type. ``"bidirectional"`` takes the
        mask off a causal class of transformers.
    mask_token_id
        Default: the config's, the tokenizer's or the family's.
    device, dtype
        Default: CUDA where it is available; the checkpoint's dtype.
    attention
        ``attn_implementation``. Default: ``"attn_sampler"`` for classes of transformers, the model's own for
        remote code.
    trust_remote_code
        Whether code that comes with the checkpoint may run.
    any_version
        Whether versions of transformers that the tests do not cover may be used. Code that comes with
        checkpoints is often written for version 4; with 4.57 the adapters' tests have passed by hand.

    Raises
    ------
    LoadError
        transformers is missing or untested, torch cannot use the device, the checkpoint is not to be had, its
        family is unknown, or its tokenizer lacks the mask token.
    """
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        raise LoadError(
            "transformers is not installed; pip install 'attn_sampler[transformers]' brings it"
        ) from None
    reason = untested_version("transformers", version, *TESTED_VERSIONS)
    if reason is not None and not any_version:
        raise LoadError(f"{reason}; --any-version tries it")
    import transformers

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        checks.device("device", device)
    except ValueError as error:
        raise LoadError(str(error)) from None
    if path.startswith(("/", ".", "~")) and not Path(path).is_dir():
        raise LoadError(f"{path}: no such folder")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # one line tells what its retries would
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    code = {"trust_remote_code": trust_remote_code}
    try:
        config = transformers.AutoConfig.from_pretrained(path, **code)
        named = family is not None
        family = find_family(config) if family is None else family
        if family is None:
            raise LoadError(
                f"{path}: its model_type {config.model_type!r} is none that is known here; --adapter names "
                f"the family whose way of being called it shares ({', '.join(FAMILIES)})"
            )
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **code)
        mask_token_id = _mask_token(path, mask_token_id, config, tokenizer, FAMILIES[family])
        if type(config).__module__.startswith("transformers."):  # else the attention is the code's own
            importlib.import_module("attn_sampler.adapters.transformers")  # registers the names
            attention = "attn_sampler" if attention is None else attention
        given = {} if attention is None else {"attn_implementation": attention}
        auto_class = getattr(transformers, FAMILIES[family].auto_class)
        model = auto_class.from_pretrained(path, dtype=dtype, **given, **code).eval()
    except LoadError:
        raise
    except Exception as error:  # of any type: tokenizers, for one, raises Exception itself at a broken file
        raise LoadError(f"cannot load {path}: {_reason(error)}") from error
    model.to(device)
    if family == "bidirectional":
        from attn_sampler.adapters.transformers import make_bidirectional

        make_bidirectional(model)
    adapter, options = adapt(model, family)
    options["mask_token_id"] = mask_token_id
    if not _has(tokenizer, options.get("eos_token_id")):
        options["eos_token_id"] = getattr(tokenizer, "eos_token_id", None)
    _check_vocabulary(config, filter(None, [mask_token_id, options["eos_token_id"]]))
    if named:  # by the user, who may be wrong: one token tells
        try:
            with torch.no_grad():
                adapter(torch.tensor([[mask_token_id]], device=device))
        except (AttributeError, TypeError) as error:
            raise LoadError(
                f"{path}: cannot be called as those of --adapter {family}: {_reason(error)}"
            ) from error
    return Checkpoint(adapter, tokenizer, options)


def decode(
    checkpoint: Checkpoint, prompts: Sequence[str], *, chat: bool = True, **options: Any
) -> tuple[list[str], Generation]:
    """The continuations of prompts, as text, and what ``generate`` returned.

    Parameters
    ----------
    checkpoint
        As ``load`` gives it.
    prompts
        As many as are to be decoded together.
    chat
        Whether prompts are put into the tokenizer's chat template, where it has one.
    **options
        Of ``generate``; those that are None are left to the checkpoint's family.
    """
    tokenizer = checkpoint.tokenizer
    ids = []
    try:
        for prompt in prompts:
            if chat and getattr(tokenizer, "chat_template", None):
                message = [{"role": "user", "content": prompt}]
                prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
                ids.append(tokenizer(prompt, add_special_tokens=False)["input_ids"])
            else:
                ids.append(tokenizer(prompt)["input_ids"])
    except Exception as error:  # of any type, as the template and the tokenizer come with the checkpoint
        raise LoadError(f"the prompt cannot be encoded: {_reason(error)}") from error
    _check_vocabulary(checkpoint.adapter.model.config, itertools.chain(*ids))
    given = {name: value for name, value in options.items() if value is not None}
    generation = generate(checkpoint.adapter, ids, **{**checkpoint.options, **given})
    length = max(map(len, ids))
    return tokenizer.batch_decode(generation.tokens[:, length:], skip_special_tokens=True), generation


def _reason(error: Exception) -> str:
    """The first line of a message that may have many."""
    if "trust_remote_code" in str(error):
        return "its code comes with the checkpoint; --trust-remote-code runs it"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _check_vocabulary(config: Any, token_ids: Iterable[int]) -> None:
    """Raise LoadError where the tokenizer gives a token that the model does not know."""
    vocab_size, largest = getattr(config, "vocab_size", None), max(token_ids, default=0)
    if isinstance(vocab_size, int) and largest >= vocab_size:
        raise LoadError(f"token {largest} of the tokenizer is outside the model's vocabulary of {vocab_size}")


def _mask_token(path: str, given: int | None, config: Any, tokenizer: Any, family: Family) -> int:
    """The mask token that is given, or else the config's, the tokenizer's or the family's."""
    named = (getattr(source, "mask_token_id", None) for source in (config, tokenizer, family))
    mask_token_id = given if given is not None else next((x for x in named if x is not None), None)
    if mask_token_id is None:
        raise LoadError(
            f"{path}: neither its config nor its tokenizer names a mask token; --mask-token-id does"
        )
    if not _has(tokenizer, mask_token_id):
        raise LoadError(f"{path}: its tokenizer has no token {mask_token_id}, which was to be the mask token")
    return mask_token_id


def _has(tokenizer: Any, token_id: int | None) -> bool:
    return token_id is not None and token_id in tokenizer.get_vocab().values()
