"""lm-evaluation-harness: masked-diffusion models under any policy, as its model ``attn_sampler``.

Install: ``pip install 'attn_sampler[lm-eval]'``. The harness knows models of other packages only when these
have been imported, so its command line is started through this module:

    python -m attn_sampler.adapters.lm_eval --model attn_sampler --tasks gsm8k \\
        --model_args pretrained=GSAI-ML/LLaDA-1.5,trust_remote_code=true,policy=attn,tau=0.9

In Python, importing it is enough: ``lm_eval.simple_evaluate(model="attn_sampler", ...)``, or with
``AttnSamplerLM(model=..., tokenizer=...)`` for a model that you have. Tasks that generate are decoded as
``attn_sampler.generate`` decodes; those that compare likelihoods get LLaDA's Monte-Carlo estimate
(arXiv 2502.09992, its evaluation), which needs bidirectional attention. Of a task's ``generation_kwargs``,
which ``--gen_kwargs`` changes, ``GEN_KWARGS`` are served; another that asks for something is an error that
names it. Tested with lm_eval 0.4.13.

Several processes share the documents where torchrun or ``accelerate launch`` starts them, each with the whole
checkpoint, on a GPU of its own; the first one reports what one process would (with a ``batch_size`` above 1,
which pads other prompts together then, up to rounding)::

    torchrun --nproc-per-node 8 -m attn_sampler.adapters.lm_eval --model attn_sampler ...
"""

from __future__ import annotations

import importlib
import itertools
import logging
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from attn_sampler import checks
from attn_sampler.adapters._engine import require, unserved
from attn_sampler.generate import generate
from attn_sampler.ranks import ALONE, join
from attn_sampler.sampler import Policy, make_policy

NAME = "attn_sampler"
_LOGGER = logging.getLogger(__name__)

_INSTALL = "pip install 'attn_sampler[lm-eval]'"
_api: Any = require("lm_eval.api.model", "lm_eval", _INSTALL, "0.4.13", "0.5")
_registry: Any = require("lm_eval.api.registry", "lm_eval", _INSTALL, "0.4.13", "0.5")
_utils: Any = require("lm_eval.models.utils", "lm_eval", _INSTALL, "0.4.13", "0.5")

_GENERATE_OPTIONS = (
    *("block_length", "cache", "logit_shift", "layers", "query_rows", "softmax_scope", "diagonal"),
    *("keep_layers", "backend", "pad_token_id", "rows"),
)

#: What a request may ask for. The harness gives ``max_gen_toks`` three other names.
GEN_KWARGS = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "min_p")

#: With which values other options ask for nothing (transformers' names, and vLLM's).
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "early_stopping": (False,),
    "ignore_eos": (False,),
    "use_cache": (True, False),
    **dict.fromkeys(("n", "num_beams", "num_beam_groups", "num_return_sequences"), (1,)),
    **dict.fromkeys(("typical_p", "guidance_scale", "length_penalty"), (1.0,)),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty"), (1.0,)),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), (0,)),
    **dict.fromkeys(("min_length", "min_new_tokens", "min_tokens"), (0,)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "penalty_alpha", "diversity_penalty"), (0.0,)),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), (0.0,)),
}
#: What has no part in a greedy choice.
_OF_THE_DRAW = ("top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


class _Draw(NamedTuple):
    """What tokens are drawn by."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @classmethod
    def of(cls, keywords: Mapping[str, Any]) -> _Draw:
        """Of a request, greedy where it has no temperature; -1 is vLLM's word for all tokens."""
        if not keywords.get("temperature"):
            return cls()
        draw = cls(**{name: keywords[name] for name in cls._fields if keywords.get(name) is not None})
        return draw._replace(top_k=0) if draw.top_k == -1 else draw


class _Job(NamedTuple):
    """A request to generate."""

    number: int
    seed: int
    prompt: list[int]
    until: list[str]


class AttnSamplerLM(_api.TemplateLM):
    """A masked-diffusion language model of the harness.

    Parameters
    ----------
    pretrained
        A folder or an id on the hub, for the loader of ``attn-sampler generate``. Or give ``model`` and
        ``tokenizer``.
    model, tokenizer
        As ``generate`` takes the model, and a tokenizer of transformers' kind. Where several processes have
        been launched, each answers all requests, as the model may be one that is spread over them.
    mask_token_id, eos_token_id
        Default: what the loader or the tokenizer says.
    device, dtype, family, attention, trust_remote_code
        For the loader, and so not with ``model``. The harness's command line asks for ``cuda:0`` unless told
        otherwise; where torch sees no GPU the model runs on the CPU then, as the harness's own do, with a
        warning. Of several processes each takes the GPU of its number then.
    policy, tau, seed
        As in ``generate``; request i of a task draws from the stream ``seed + i``, and the masks of a
        likelihood depend on ``seed`` and on the tokens.
    batch_size
        Requests decoded together, padded on the left: more than 1 needs a model that masks padding.
    max_batch_size
        Not read, with a warning: it goes with the harness's ``batch_size="auto"``.
    max_gen_toks
        Tokens decoded where the task does not say how many.
    max_length
        Tokens of a prompt and its continuation; longer prompts lose their beginning. Default: no limit.
    mc_samples
        Forward passes for the likelihood of one continuation.
    check_greedy
        Whether to decode each continuation too, for tasks that count the greedy answer. Else it is
        reported as never met.
    **generate_options
        ``block_length``, ``cache``, ``logit_shift``, ``layers``, ``query_rows``, ``softmax_scope``,
        ``diagonal``, ``keep_layers``, ``backend``, ``pad_token_id``, as in ``generate``.

    Raises
    ------
    TypeError, ValueError
        Naming the argument. The loader's own errors say why a checkpoint cannot be had.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        model: Callable[..., Any] | None = None,
        tokenizer: Any = None,
        mask_token_id: int | None = None,
        eos_token_id: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
        family: str | None = None,
        attention: str | None = None,
        trust_remote_code: bool = False,
        policy: str | Policy = "attn",
        tau: float | None = None,
        seed: int = 0,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_gen_toks: int = 256,
        max_length: int | None = None,
        mc_samples: int = 128,
        check_greedy: bool = False,
        **generate_options: Any,
    ) -> None:
        super().__init__()
        unknown = sorted(set(generate_options) - set(_GENERATE_OPTIONS))
        if unknown:
            raise TypeError(f"{NAME}: no such argument: {', '.join(unknown)}")
        if (pretrained is None) == (model is None):
            raise ValueError("pretrained: expected a checkpoint, or a model and its tokenizer, and not both")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size: expected an integer of at least 1, got {batch_size!r}")
        make_policy(policy, **({} if tau is None else {"tau": tau}))  # refuses what it does not know
        if max_batch_size is not None:
            _LOGGER.warning("max_batch_size=%s is not read: batch_size is, and is no 'auto'", max_batch_size)
        loading: dict[str, Any] = {"device": device, "dtype": dtype, "family": family, "attention": attention}
        loading["trust_remote_code"] = trust_remote_code
        options: dict[str, Any] = {}
        self._ranks = ALONE if pretrained is None else join()
        self._rank, self._world_size = self._ranks.rank, self._ranks.size  # as the harness reads them
        if pretrained is None:
            idle = unserved(loading, neutral={"dtype": ["auto"], "trust_remote_code": [False]})
            if idle:
                raise ValueError(f"with a model that is loaded already, {idle}")
        else:
            if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
                _LOGGER.warning("torch sees no GPU: the model runs on the CPU instead of on %s", device)
                loading["device"] = "cpu"
            elif self.world_size > 1 and device in (None, "cuda:0") and torch.cuda.is_available():
                loading["device"] = self._ranks.device("cuda")
            run: Any = importlib.import_module("attn_sampler.adapters.run")  # imports transformers
            model, tokenizer, options = run.load(pretrained, mask_token_id=mask_token_id, **loading)
        if tokenizer is None:
            raise ValueError("tokenizer: goes with a model, got None")
        for name, given in (("mask_token_id", mask_token_id), ("eos_token_id", eos_token_id)):
            if given is not None or name not in options:
                options[name] = getattr(tokenizer, name, None) if given is None else given
        if options["mask_token_id"] is None:
            raise ValueError(
                "mask_token_id: needed, as the tokenizer names none (it is in the model's documentation)"
            )
        self.model: Any = model
        self.tokenizer = tokenizer
        self.batch_size = int(batch_size)
        self._options = {**options, **generate_options, "policy": policy, "tau": tau}
        self._mask: int = checks.integer("mask_token_id", options["mask_token_id"], 0)
        self._seed = checks.integer("seed", seed)
        self._max_gen_toks = checks.integer("max_gen_toks", max_gen_toks, 1)
        self._max_length = None if max_length is None else checks.integer("max_length", max_length, 2)
        self._mc_samples = checks.integer("mc_samples", mc_samples, 1)
        self._check_greedy = check_greedy
        parameter = next(getattr(model, "parameters", lambda: iter(()))(), None)
        self._device = torch.device("cpu") if parameter is None else parameter.device

    @property
    def eot_token_id(self) -> int | None:
        return self._options["eos_token_id"]

    @property
    def prefix_token_id(self) -> int | None:
        """What stands before a text without a context."""
        begin = getattr(self.tokenizer, "bos_token_id", None)
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        return str(getattr(self.tokenizer, "name_or_path", type(self.tokenizer).__name__)).replace("/", "__")

    def all_gather(self, tensor: Tensor) -> Tensor:
        """For the harness, which asks how many requests each rank has, to repeat some where these are fewer.

        That is for models whose ranks run in step. These do not: each gives its own number for all.
        """
        return tensor.expand(self.world_size)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """What the ranks have measured, put together as if one had, for rank ``dst``."""
        gathered = self._ranks.gather(obj)
        return [_in_order(gathered)] if self.rank == dst else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **keywords: Any) -> list[int]:
        if add_special_tokens is None:  # a chat template has written its own
            begin = getattr(self.tokenizer, "bos_token", None)
            add_special_tokens = not (begin and string.startswith(begin))
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens, **keywords)["input_ids"])

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each request, up to the first of its stop sequences.

        Raises
        ------
        ValueError
            A request asks for more than ``GEN_KWARGS``.
        """
        answers = [""] * len(requests)
        jobs: dict[tuple[int, _Draw, int], list[_Job]] = {}
        for index, (request, number) in enumerate(zip(requests, _numbers(requests), strict=True)):
            context, keywords = request.args
            keywords = _utils.normalize_gen_kwargs(keywords, self._max_gen_toks)
            length, temperature = keywords["max_gen_toks"], keywords.get("temperature", 0.0)
            served = GEN_KWARGS if temperature else (*GEN_KWARGS, *_OF_THE_DRAW)
            if refusal := unserved(keywords, served, _NEUTRAL):
                raise ValueError(
                    f"{NAME} serves {', '.join(GEN_KWARGS)} of generation_kwargs; {refusal} "
                    "(--gen_kwargs changes what a task asks for)"
                )
            prompt = self._fitting(self.tok_encode(context), length)
            # A block-causal model takes padding by whole blocks.
            residue = len(prompt) % (getattr(self.model, "causal_block", None) or 1)
            job = _Job(index, self._seed + number, prompt, keywords["until"])
            jobs.setdefault((length, _Draw.of(keywords), residue), []).append(job)
        batches: list[tuple[int, _Draw, list[_Job]]] = []
        for (length, draw, _), members in jobs.items():
            members.sort(key=lambda job: len(job.prompt))  # little padding
            for start in range(0, len(members), self.batch_size):
                batches.append((length, draw, members[start : start + self.batch_size]))
        for length, draw, batch in _track(batches, "Decoding", disable_tqdm):
            prompts, seeds = [job.prompt for job in batch], [job.seed for job in batch]
            rows = self._decode(prompts, length, draw, seeds)
            for job, row in zip(batch, rows, strict=True):
                text = self.tokenizer.decode(row, skip_special_tokens=True)
                answers[job.number] = _utils.postprocess_generated_text(text, job.until, None)
                self.cache_hook.add_partial("generate_until", requests[job.number].args, answers[job.number])
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError(
            "attn_sampler gives no perplexity of whole texts: a masked-diffusion model has a bound on it, "
            "which is not what these tasks compare"
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        if getattr(self.model, "causal_block", None) is not None:
            raise NotImplementedError(
                "attn_sampler estimates likelihoods with models whose attention is bidirectional; this one's "
                "is block-causal, and was trained with whole blocks before the masked one"
            )
        results = []
        for texts, context, target in _track(requests, "Estimating", disable_tqdm):
            if not target:
                raise ValueError(f"continuation: expected at least one token, got none in {texts!r}")
            context = self._fitting(context, len(target))
            greedy = self._check_greedy and self._decode([context], len(target), _Draw(), [0])[0] == target
            results.append((self._estimate(context, target), greedy))
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, results[-1])
        return results

    def _fitting(self, prompt: list[int], length: int) -> list[int]:
        """The end of a prompt that leaves room for so many tokens."""
        if self._max_length is None:
            return prompt
        room = self._max_length - length
        if room < 1:
            raise ValueError(
                f"max_length: {self._max_length} leaves no room for a prompt and {length} tokens"
            )
        return prompt[-room:]

    def _decode(
        self, prompts: list[list[int]], length: int, draw: _Draw, seeds: list[int]
    ) -> list[list[int]]:
        """The tokens after each prompt."""
        generation = generate(
            self.model, prompts, gen_length=length, **draw._asdict(), seed=seeds, **self._options
        )
        return generation.tokens[:, -length:].tolist()

    @torch.no_grad()
    def _estimate(self, context: list[int], target: list[int]) -> float:
        """LLaDA's estimate of log p(target | context), in nats.

        The mean, over a number n of masks that is uniform in 1 to L and a random choice of n tokens, of L / n
        times the log-probability of the masked ones. The numbers are spread evenly over the samples.

        What is drawn depends on the request alone, and not on which others this process has.
        """
        length = len(target)
        samples = self._mc_samples if length > 1 else 1  # there is one way of masking a single token
        own = zlib.crc32(str((context, target)).encode())
        generator = torch.Generator().manual_seed(self._seed + own)
        spread = torch.arange(samples) + torch.rand(1, generator=generator)
        counts = (spread * (length / samples)).long().clamp(max=length - 1) + 1
        order = torch.rand(samples, length, generator=generator).argsort(dim=1)
        masked = (order < counts[:, None]).to(self._device)
        whole = torch.tensor(context + target, device=self._device)
        tokens = whole.repeat(samples, 1)
        tokens[:, len(context) :].masked_fill_(masked, self._mask)
        total = 0.0
        for part, here, n in zip(
            *(x.split(self.batch_size) for x in (tokens, masked, counts.to(self._device))), strict=True
        ):
            logits = self._logits(part)[:, len(context) :].float()
            log_p = logits.log_softmax(dim=-1).gather(
                -1, whole[len(context) :].expand(len(part), -1)[..., None]
            )
            sums = log_p.squeeze(-1).masked_fill(~here, 0.0).double().sum(dim=1)
            total += float((sums * length / n).sum())
        return total / samples

    def _logits(self, tokens: Tensor) -> Tensor:
        output = self.model(tokens)
        logits = getattr(output, "logits", output)
        if self._options.get("logit_shift"):
            return torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
        return logits


def _numbers(requests: Sequence[Any]) -> list[int]:
    """The number of each request among those of its task, whichever of them this process has."""
    numbers, asked = [], Counter[tuple[Any, int]]()
    for index, request in enumerate(requests):
        if request.doc_id is None:  # a request of no task
            numbers.append(index)
            continue
        document = request.task_name, request.doc_id
        numbers.append(request.doc_id * (request.repeats or 1) + asked[document])
        asked[document] += 1
    return numbers


def _in_order(parts: list[Any]) -> Any:
    """Lists of all ranks, in dictionaries, as one: the harness deals documents to the ranks in turn."""
    if isinstance(parts[0], dict):
        return {key: _in_order([part[key] for part in parts]) for key in parts[0]}
    nothing = object()
    turns = itertools.zip_longest(*parts, fillvalue=nothing)
    return [value for turn in turns for value in turn if value is not nothing]


def _track(items: Sequence[Any], what: str, disable: bool) -> Iterable[Any]:
    """The items, with a progress bar beside the harness's output."""
    return track(items, what, console=Console(stderr=True), disable=disable)


# By name, so that the harness makes the class when it is asked for: also where this module runs as a program.
_registry.model_registry.register(NAME, target=f"attn_sampler.adapters.lm_eval:{AttnSamplerLM.__name__}")


def main() -> None:
    """The harness's command line."""
    require("lm_eval.__main__", "lm_eval", _INSTALL, "0.4.13", "0.5").cli_evaluate()


if __name__ == "__main__":
    main()
