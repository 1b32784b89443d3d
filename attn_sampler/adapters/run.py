"""Loads a checkpoint with transformers and decodes prompts: the work of ``attn-sampler generate``."""

from __future__ import annotations

import functools
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
from attn_sampler.endings import cut
from attn_sampler.generate import Generation, generate

TESTED_VERSIONS = ("5.24", "5.25")
"""The first version of transformers that the tests cover, and the first that they do not."""


DEFAULT_GEN_LENGTH = 128
"""The tokens that ``decode`` appends, where the model continues a text."""


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
        family is unknown, its class is not served, or its tokenizer lacks the mask token.
    """
    transformers = _transformers(any_version)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        checks.device("device", device)
    except ValueError as error:
        raise LoadError(str(error)) from None
    _check_folder(path)
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
        ends = _ends_named(path)
    except LoadError:
        raise
    except Exception as error:  # of any type: tokenizers, for one, raises Exception itself at a broken file
        sought = "" if Path(path).exists() else " (no folder here is called so: it was sought on the Hub)"
        raise LoadError(f"cannot load {path}: {_reason(error)}{sought}") from error
    if attention == "attn_sampler" and not getattr(model, "_supports_sdpa", True):
        raise LoadError(
            f"{path}: {type(model).__name__} writes its attention out by hand, so that nothing can read it; "
            "--attention eager decodes by the rules that need not (--policy confidence, for one)"
        )
    model.to(device)
    if family == "bidirectional":
        from attn_sampler.adapters.transformers import make_bidirectional

        make_bidirectional(model)
    infills = FAMILIES[family].adapter.infills
    _check_vocabulary(config, [mask_token_id])
    suppressed = _never_predicted(config, tokenizer, mask_token_id) if infills else None
    try:
        adapter, options = adapt(model, family, suppressed)
    except ValueError as error:
        raise LoadError(f"{path}: {error}") from None
    options["mask_token_id"] = mask_token_id
    end = options.get("eos_token_id")
    end = end if _has(tokenizer, end) else getattr(tokenizer, "eos_token_id", None)
    ends = [x for x in dict.fromkeys([end, *ends]) if _has(tokenizer, x)]
    options["eos_token_id"] = None if infills or not ends else ends  # what is filled in does not end early
    _check_vocabulary(config, options["eos_token_id"] or ())
    if named:  # by the user, who may be wrong: one token tells
        try:
            with torch.no_grad():
                adapter(torch.tensor([[mask_token_id]], device=device))
        except (AttributeError, TypeError) as error:
            raise LoadError(
                f"{path}: cannot be called as those of --adapter {family}: {_reason(error)}"
            ) from error
    return Checkpoint(adapter, tokenizer, options)


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint, with any version of transformers.

    Parameters
    ----------
    path, trust_remote_code
        As in ``load``.

    Raises
    ------
    LoadError
        transformers is missing, or the tokenizer is not to be had.
    """
    transformers = _transformers(any_version=True)
    _check_folder(path)
    try:
        return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # of any type, as in load
        raise LoadError(f"cannot load {path}: {_reason(error)}") from error


def token_text(tokenizer: Any, token_id: int) -> str | None:
    """What a token adds to a text, with the space before it; its name where it adds none; None if unknown."""
    try:
        # Behind another token, as many tokenizers leave out the space before the first.
        start = tokenizer.encode("a", add_special_tokens=False)
        before, text = tokenizer.decode(start), tokenizer.decode([*start, token_id])
        text = text.removeprefix(before) if text.startswith(before) else tokenizer.decode([token_id])
        return text or tokenizer.convert_ids_to_tokens(token_id)
    except Exception:  # of any type: an id beyond what it counts to, for one
        return None


def decode(
    checkpoint: Checkpoint,
    prompts: Sequence[str],
    *,
    chat: bool = True,
    gen_length: int | None = None,
    suffixes: Sequence[str] | None = None,
    stop: Sequence[str] | None = None,
    **options: Any,
) -> tuple[list[str], Generation]:
    """The texts of prompts, filled in or continued, and what ``generate`` returned.

    Parameters
    ----------
    checkpoint
        As ``load`` gives it.
    prompts
        As many as are to be decoded together. The mask token's text in them stands for a token to fill in.
    chat
        Whether prompts are put into the tokenizer's chat template, where it has one.
    gen_length
        Masked tokens behind each prompt. Default: none for masked language models, ``DEFAULT_GEN_LENGTH``
        for others.
    suffixes
        A text for each prompt that follows the masked tokens. The tokenizer's own tokens at the end
        ([SEP]) stand behind it; for a masked language model they stand behind the masked tokens in any case.
    stop
        Texts that end what is continued, and are cut off with what follows.
    **options
        Of ``generate``; those that are None are left to the checkpoint's family.

    Returns
    -------
    texts, generation
        Without special tokens: what follows the prompts; or, where one of them or a suffix makes it
        infilling, the whole texts.

    Raises
    ------
    LoadError
        A prompt cannot be encoded, or has a token that the model does not know.
    ValueError
        A prompt has nothing to fill; a stop text is given, and something to fill in; the suffixes are of
        another number than the prompts, or the model does not see them; or as ``generate``, which raises
        other errors too.
    """
    adapter, tokenizer, family_options = checkpoint
    mask_token_id = family_options["mask_token_id"]
    mask = tokenizer.convert_ids_to_tokens(mask_token_id)
    if gen_length is None:
        gen_length = 0 if adapter.infills else DEFAULT_GEN_LENGTH
    if suffixes is not None and adapter.causal_block is not None:
        raise ValueError(
            f"suffix: {type(adapter).__name__} is block-causal, so that no block sees the text behind it"
        )
    inside = adapter.infills or suffixes is not None  # the masked tokens stand in the text
    behind = [""] * len(prompts) if suffixes is None else suffixes
    if len(behind) != len(prompts):
        raise ValueError(f"suffix: expected one for each of {len(prompts)} prompts, got {len(behind)}")
    chat = chat and bool(getattr(tokenizer, "chat_template", None))
    ids = []
    try:
        for prompt, suffix in zip(prompts, behind, strict=True):
            if chat:
                message = [{"role": "user", "content": prompt}]
                prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
            text = f"{prompt}{mask * gen_length}{suffix}" if inside else prompt
            ids.append(tokenizer(text, add_special_tokens=not chat)["input_ids"])
    except Exception as error:  # of any type, as the template and the tokenizer come with the checkpoint
        raise LoadError(f"the prompt cannot be encoded: {_reason(error)}") from error
    _check_vocabulary(adapter.model.config, itertools.chain(*ids))
    masked = [row.count(mask_token_id) for row in ids]
    for number, count in enumerate(masked, start=1):
        if inside and count < gen_length:
            raise LoadError(
                f"the tokenizer does not read {mask!r}, the text of the mask token, as that token"
            )
        if not count and not gen_length:
            raise ValueError(
                f"prompt {number}: expected {mask} where it is to be filled, or a gen_length > 0"
            )
    if stop and (inside or any(masked)):
        raise ValueError("stop: goes with text that is continued, not with text that is filled in")
    given = {name: value for name, value in options.items() if value is not None}
    given["gen_length"] = 0 if inside else gen_length
    if stop:
        given |= {"stop": stop, "decode": functools.partial(tokenizer.decode, skip_special_tokens=True)}
    generation = generate(adapter, ids, **{**family_options, **given})
    length = max(map(len, ids))
    starts = [length - len(row) if any(masked) else length for row in ids]
    tokens = [row[start:] for row, start in zip(generation.tokens.tolist(), starts, strict=True)]
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [text[: cut(text, stop or ())] for text in texts], generation


def _transformers(any_version: bool) -> Any:
    """The package, where it is here and its version may be used."""
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

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # one line tells what its retries would
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    return transformers


def _check_folder(path: str) -> None:
    if path.startswith(("/", ".", "~")) and not Path(path).is_dir():
        raise LoadError(f"{path}: no such folder")


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


def _never_predicted(config: Any, tokenizer: Any, mask_token_id: int) -> list[int]:
    """The ids that a masked language model is not to fill in: special tokens, and those of no token."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    special = {*tokenizer.all_special_ids, *(token_id for token_id, token in added if token.special)}
    words = set(tokenizer.get_vocab().values()) - special | {mask_token_id}
    return [token_id for token_id in range(config.vocab_size) if token_id not in words]


def _ends_named(path: str) -> list[int | None]:
    """The end-of-text tokens that the checkpoint's generation_config.json names, where it has one."""
    import transformers

    try:
        named = transformers.GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:
        return []
    return named if isinstance(named, list) else [named]


def _has(tokenizer: Any, token_id: int | None) -> bool:
    return token_id is not None and token_id in tokenizer.get_vocab().values()
