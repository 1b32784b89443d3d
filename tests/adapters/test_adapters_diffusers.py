"""The diffusers adapter: over stand-ins for diffusers' base classes, and in the real pipeline of 0.42.1."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import importlib.metadata
import inspect
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_toy import installed, needs_installed, sources, stub, toy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from toy_model import MASK, VOCAB, ToyModel

from attn_sampler import AttentionCapture, decode_step, generate
from attn_sampler.errors import DecodingError

SOURCE = ("diffusers", "diffusers/schedulers/scheduling_block_refinement.py")
PIPELINE = ("diffusers", "diffusers/pipelines/llada2/pipeline_llada2.py")
MODULE = "attn_sampler.adapters.diffusers"
BLOCK = 4
real = pytest.mark.parametrize(
    "adapter", [pytest.param("installed", marks=needs_installed(*SOURCE))], indirect=True
)


@dataclasses.dataclass
class BlockRefinementSchedulerOutput:
    prev_sample: Tensor
    transfer_index: Tensor
    editing_transfer_index: Tensor
    sampled_tokens: Tensor
    sampled_probs: Tensor
    pred_logits: Tensor


class Mixin:
    """Enough of diffusers' mixins: options of the constructor become ``config``."""


def register_to_config(init: Any) -> Any:
    @functools.wraps(init)
    def registered(self: Any, *given: Any, **options: Any) -> None:
        bound = inspect.signature(init).bind(self, *given, **options)
        bound.apply_defaults()
        self.config = SimpleNamespace(**{k: v for k, v in bound.arguments.items() if k != "self"})
        init(self, *given, **options)

    return registered


@pytest.fixture(params=sources(*SOURCE))
def adapter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    if request.param == "stand-in":
        own = {"BlockRefinementSchedulerOutput": BlockRefinementSchedulerOutput}
        contents = {
            "diffusers": {"__version__": "0.42.1"},
            "diffusers.configuration_utils": {
                "ConfigMixin": type("ConfigMixin", (), {}),
                "register_to_config": register_to_config,
            },
            "diffusers.schedulers.scheduling_utils": {"SchedulerMixin": Mixin},
            "diffusers.schedulers.scheduling_block_refinement": own,
        }
        stub(monkeypatch, contents)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield importlib.import_module(MODULE)
    sys.modules.pop(MODULE, None)  # the next test's is of another base


def brute_force(
    tokens: list[int],
    probs: list[float],
    block: list[int],
    prompt: list[bool],
    quota: int,
    threshold: float,
    editing_threshold: float | None,
) -> tuple[set[int], set[int]]:
    """Which positions of one block are committed and which replaced, by ``rule="threshold"``."""
    masked = [i for i, token in enumerate(block) if token == MASK]
    commit = {i for i in masked if probs[i] > threshold}
    if len(commit) < quota:
        commit = set(sorted(masked, key=lambda i: (-probs[i], i))[:quota])
    edit = set()
    if editing_threshold is not None and editing_threshold > 0:
        edit = {
            i
            for i, token in enumerate(block)
            if token != MASK and not prompt[i] and tokens[i] != token and probs[i] > editing_threshold
        }
    return commit, edit


def problems(count: int, first: int = 0) -> Any:
    """Random steps: options of the scheduler's, and the arguments of ``step``."""
    for seed in range(first, first + count):
        g = torch.Generator().manual_seed(seed)

        def draw(low: int, high: int, g: torch.Generator = g) -> int:
            return int(torch.randint(low, high, (), generator=g))

        batch, length, vocab = draw(1, 5), draw(1, 17), draw(MASK + 1, MASK + 20)
        logits = torch.randn(batch, length, vocab, generator=g) * draw(1, 5)
        sample = torch.randint(vocab, (batch, length), generator=g)
        sample[torch.rand(sample.shape, generator=g) < draw(0, 5) / 4] = MASK
        agree = torch.rand(sample.shape, generator=g) < 0.3  # what stands is what is predicted
        sample = torch.where(agree & (sample != MASK), without_mask(logits).argmax(-1), sample)
        steps = draw(1, length + 1)
        timesteps = {"num_inference_steps": steps, "block_length": length}
        arguments = {
            "timestep": draw(0, steps + 2),
            "sample": sample,
            "mask_token_id": MASK,
            "threshold": [0.0, 0.2, 0.4, 0.7, 0.95, 1.0, 2.0][draw(0, 7)],
            "editing_threshold": [None, 0.0, -1.0, 0.3, 0.5, 1.0][draw(0, 6)],
            "prompt_mask": None if draw(0, 3) == 0 else torch.rand(length, generator=g) < 0.3,
        }
        yield timesteps, logits, arguments


def without_mask(logits: Tensor) -> Tensor:
    logits = logits.clone()
    logits[..., MASK] = -torch.inf
    return logits


def check(output: Any, logits: Tensor, arguments: dict[str, Any], quota: int) -> None:
    """That the step decided by its tokens and probabilities as the plain statement does."""
    sample, prompt = arguments["sample"], arguments["prompt_mask"]
    prompt = [False] * sample.shape[1] if prompt is None else prompt.tolist()
    tokens, probs = output.sampled_tokens.tolist(), output.sampled_probs.tolist()
    limits = [arguments[name] for name in ("threshold", "editing_threshold")]
    limits = [None if x is None else float(torch.tensor(x, dtype=torch.float32)) for x in limits]
    for b, block in enumerate(sample.tolist()):
        commit, edit = brute_force(tokens[b], probs[b], block, prompt, quota, *limits)
        assert set(output.transfer_index[b].nonzero()[:, 0].tolist()) == commit
        assert set(output.editing_transfer_index[b].nonzero()[:, 0].tolist()) == edit
        expected = [tokens[b][i] if i in commit | edit else token for i, token in enumerate(block)]
        assert output.prev_sample[b].tolist() == expected
    assert output.pred_logits is logits


def test_step_by_brute_force(adapter: Any):
    for timesteps, logits, arguments in problems(300):
        scheduler = adapter.AttnSamplerScheduler(rule="threshold")
        scheduler.set_timesteps(**timesteps)
        before = arguments["sample"].clone()
        output = scheduler.step(logits, **arguments)
        assert torch.equal(arguments["sample"], before)
        probs, tokens = torch.softmax(without_mask(logits), dim=-1).max(dim=-1)
        assert torch.equal(output.sampled_tokens, tokens)
        torch.testing.assert_close(output.sampled_probs, probs)
        length, steps = timesteps["block_length"], timesteps["num_inference_steps"]
        step = min(arguments["timestep"], steps - 1)
        check(output, logits, arguments, length // steps + (step < length % steps))


@real
def test_step_as_the_block_refinement_scheduler(adapter: Any):
    """On the same logits, those of the mask token out of its reach."""
    theirs = importlib.import_module("diffusers").BlockRefinementScheduler()
    ours = adapter.AttnSamplerScheduler.from_config(theirs.config, rule="threshold")
    for timesteps, logits, arguments in problems(500, first=1000):
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(**timesteps)
        output = ours.step(logits, **arguments)
        expected = theirs.step(without_mask(logits), **arguments)
        for name in ("prev_sample", "transfer_index", "editing_transfer_index", "sampled_tokens"):
            assert torch.equal(output[name], expected[name]), name
        torch.testing.assert_close(output.sampled_probs, expected.sampled_probs)
        fields = ours.step(logits, **arguments, return_dict=False)
        assert all(map(torch.equal, fields, output.to_tuple()))


def test_thresholds_are_exceeded_not_reached(adapter: Any):
    scheduler = adapter.AttnSamplerScheduler(rule="threshold", block_length=2, num_inference_steps=2)
    sample, logits = torch.tensor([[MASK, MASK, 0]]), torch.zeros(1, 3, VOCAB)
    logits[0, range(3), range(5, 8)] = torch.tensor([5.0, 4.0, 4.5])
    step = functools.partial(scheduler.step, logits, 0, sample, mask_token_id=MASK)
    best, second, third = step().sampled_probs[0].tolist()
    assert best > second
    for threshold, count in ((second, 1), (second - 1e-6, 2)):
        assert int(step(threshold=threshold).transfer_index.sum()) == count
    for threshold, count in ((third, 0), (third - 1e-6, 1)):
        assert int(step(editing_threshold=threshold).editing_transfer_index.sum()) == count
    logits[0, :2] = -torch.inf
    logits[0, :2, 5] = 0.0
    for threshold, count in ((0.999, 2), (1.0, 1)):
        output = step(threshold=threshold)
        assert output.sampled_probs[0, :2].tolist() == [1.0, 1.0]
        assert output.transfer_index.tolist() == [[True, count > 1, False]]


SAMPLING = [{}, {"top_k": 3}, {"top_p": 0.6}, {"top_k": 5, "top_p": 0.7}, {"top_k": 0, "top_p": 1.0}]


@pytest.mark.parametrize("options", SAMPLING)
def test_sampling(adapter: Any, options: dict[str, Any]):
    """Only likely tokens are drawn, as often as their probabilities say, and by these a step decides."""
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(1, 1, VOCAB, generator=g).expand(200, 16, VOCAB)
    sample = torch.full((200, 16), MASK)
    scheduler = adapter.AttnSamplerScheduler(rule="threshold", block_length=16, num_inference_steps=16)
    arguments = {"sample": sample, "threshold": 0.1, "editing_threshold": None, "prompt_mask": None}
    given = {"mask_token_id": MASK, "temperature": 0.7, "sampling_method": "multinomial", **options}

    def step() -> Any:
        generator = torch.Generator().manual_seed(5)
        return scheduler.step(logits, 0, **arguments, **given, generator=generator)

    output = step()
    check(output, logits, arguments, 1)
    kept = sorted(enumerate((without_mask(logits)[0, 0] / 0.7).softmax(0).tolist()), key=lambda x: -x[1])
    kept = kept[: options.get("top_k") or VOCAB]
    total, before, nucleus = sum(p for _, p in kept), 0.0, {}
    for token, p in kept:
        if before <= options.get("top_p", 1.0):
            nucleus[token] = p / total
            before += p / total
    probs = torch.zeros(VOCAB)
    probs[list(nucleus)] = torch.tensor(list(nucleus.values())) / sum(nucleus.values())
    torch.testing.assert_close(output.sampled_probs, probs[output.sampled_tokens])
    counts = output.sampled_tokens.flatten().bincount(minlength=VOCAB)
    assert (counts[probs == 0.0] == 0).all()
    error = (counts / counts.sum() - probs).abs()
    assert (error <= 4.5 * (probs * (1 - probs) / counts.sum()).sqrt()).all()
    assert torch.equal(step().sampled_tokens, output.sampled_tokens)
    greedy = scheduler.step(logits, 0, **arguments, **given | {"sampling_method": "greedy"})
    assert (greedy.sampled_tokens == without_mask(logits).argmax(-1)).all()


@real
@pytest.mark.parametrize("options", SAMPLING)
def test_sampling_probabilities_as_the_block_refinement_scheduler(adapter: Any, options: dict[str, Any]):
    theirs = importlib.import_module("diffusers").BlockRefinementScheduler
    scheduler = adapter.AttnSamplerScheduler(rule="threshold")
    for _, logits, arguments in problems(50, first=2000):
        output = scheduler.step(logits, **arguments, temperature=0.8, **options)
        kept = theirs._top_k_filtering(without_mask(logits) / 0.8, options.get("top_k"))
        kept = theirs._top_p_filtering(kept, options.get("top_p"))
        expected = kept.softmax(-1).gather(-1, output.sampled_tokens[..., None])[..., 0]
        torch.testing.assert_close(output.sampled_probs, expected)


class HFToy(ToyModel):
    """Called as the pipeline calls its model."""

    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, tokens: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None) -> Any:
        return SimpleNamespace(logits=self.compute(tokens, attention_mask.bool()))


def hf_toy() -> HFToy:
    model = HFToy()
    model.load_state_dict(toy().state_dict())
    return model


RULES = [
    {"rule": "parallel"},
    {"rule": "parallel", "fallback": "score", "layers": [-1], "metric": "margin"},
    {"rule": "sequential", "softmax_scope": "block", "diagonal": False},
    {"rule": "threshold", "fallback": "score", "metric": "entropy"},
]


@pytest.mark.parametrize("options", RULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_attention(adapter: Any, options: dict[str, Any], steps: int):
    """A step is a ``decode_step`` on what the model's pass shows; missing positions are the best others."""
    model, (batch, length) = hf_toy(), (3, 12)
    tokens = torch.randint(MASK, (batch, length), generator=torch.Generator().manual_seed(1))
    tokens[:, -BLOCK:] = MASK
    tokens[1, -2] = 5
    padding = torch.ones(batch, length, dtype=torch.int64)
    padding[0, :3] = 0
    scheduler = adapter.AttnSamplerScheduler(**options)
    scheduler.set_timesteps(steps, block_length=BLOCK)
    sample = tokens[:, -BLOCK:]
    with scheduler.attach(model):
        logits = model(tokens, attention_mask=padding).logits[:, -BLOCK:]
    output = scheduler.step(logits, 0, sample, mask_token_id=MASK, threshold=0.3, editing_threshold=0.2)

    seen = {k: v for k, v in options.items() if k in ("layers", "softmax_scope", "diagonal")}
    with AttentionCapture(slice(-BLOCK, None), **seen, query_mask=padding.bool()) as capture:
        model(tokens, attention_mask=padding)
    choice = {k: v for k, v in options.items() if k in ("rule", "fallback", "metric")}
    result = decode_step(
        sample.clone(),
        logits,
        scores=capture.scores,
        block=slice(0, BLOCK),
        mask_token_id=MASK,
        tau=0.3,
        budget=torch.ones(sample.shape, dtype=torch.int32),
        replace_tau=0.2,
        **choice,
    )
    by_score = "score" in (options.get("fallback"), {"sequential": "score"}.get(options["rule"]))
    value = (result.scores if by_score else result.confidence).tolist()
    for b, row in enumerate(sample.tolist()):
        commit = set(result.selected[b].nonzero()[:, 0].tolist())
        others = [i for i in range(BLOCK) if row[i] == MASK and i not in commit]
        missing = max(-(-BLOCK // steps) - len(commit), 0)
        commit |= set(sorted(others, key=lambda i, v=value[b]: -v[i])[:missing])
        assert set(output.transfer_index[b].nonzero()[:, 0].tolist()) == commit
    assert torch.equal(output.editing_transfer_index, result.revised > 0)
    changed = output.transfer_index | output.editing_transfer_index
    assert torch.equal(output.prev_sample, torch.where(changed, result.token_ids, sample))
    torch.testing.assert_close(output.sampled_probs, result.log_prob.exp())


class HostReads(TorchDispatchMode):
    """Refuses what waits for the device where tensors are on one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = str(func.overloadpacket)
        assert name not in ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal"), (
            name
        )
        indices = args[1] if name in ("aten.index", "aten.index_put", "aten.index_put_") else ()
        assert all(i is None or i.dtype != torch.bool for i in indices), "a boolean index waits"
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("rule", ["parallel", "threshold"])
def test_nothing_waits_for_the_device(adapter: Any, rule: str):
    model, tokens = hf_toy(), torch.full((2, 3 * BLOCK), MASK)
    scheduler = adapter.AttnSamplerScheduler(rule=rule, block_length=BLOCK, num_inference_steps=2)
    options = {"temperature": 0.9, "top_k": 5, "top_p": 0.8, "threshold": 0.4, "editing_threshold": 0.5}
    with scheduler.attach(model):
        logits = model(tokens, attention_mask=torch.ones_like(tokens)).logits[:, -BLOCK:]
    prompt = torch.tensor([True, False, False, False])
    with HostReads():
        scheduler.step(logits, 0, tokens[:, -BLOCK:], mask_token_id=MASK, prompt_mask=prompt, **options)
    with HostReads(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        bool(tokens.any())


def test_attention_that_is_missing(adapter: Any):
    model, tokens = hf_toy(), torch.full((1, BLOCK), MASK)
    scheduler = adapter.AttnSamplerScheduler(block_length=BLOCK)

    def run(scheduler: Any = scheduler) -> Any:
        logits = model(tokens, attention_mask=torch.ones_like(tokens)).logits
        return logits, scheduler.step(logits, 0, tokens, mask_token_id=MASK)

    missing = r"rule: 'parallel' reads attention, and none was seen .* call scheduler\.attach\(pipe\.model\)"
    with pytest.raises(DecodingError, match=missing):
        run()
    with scheduler.attach(HFToy()), scheduler.attach(model):
        logits, _ = run()
        with pytest.raises(DecodingError, match=missing):  # a pass is used once
            scheduler.step(logits, 0, tokens, mask_token_id=MASK)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got function"):
        scheduler.attach(run)
    plain = adapter.AttnSamplerScheduler(rule="threshold")
    plain.attach(model)
    assert not model._forward_hooks
    run(plain)


BAD = [
    ({"mask_token_id": None}, ValueError, "mask_token_id: expected an id, got None"),
    ({"mask_token_id": VOCAB}, ValueError, "mask_token_id: "),
    ({"temperature": -1.0}, ValueError, "temperature: "),
    ({"temperature": 1.0, "top_p": 0.0}, ValueError, "top_p: "),
    ({"temperature": 1.0, "top_k": 0.5}, TypeError, "top_k: "),
    ({"temperature": 1.0, "generator": [1]}, TypeError, r"generator: expected a torch\.Generator, got list"),
    ({"sampling_method": "beam"}, ValueError, "sampling_method: "),
    ({"threshold": -0.1}, ValueError, "threshold: "),
    ({"editing_threshold": "0.5"}, TypeError, "editing_threshold: "),
    ({"minimal_topk": 0}, ValueError, "minimal_topk: "),
    ({"prompt_mask": torch.zeros(3, dtype=torch.bool)}, ValueError, "prompt_mask: "),
    ({"sample": torch.zeros(1, 4)}, ValueError, "sample: "),
    ({"model_output": torch.zeros(1, 5, VOCAB)}, ValueError, "model_output: "),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD)
def test_misuse_of_a_step(adapter: Any, change: dict[str, Any], kind: type[Exception], message: str):
    scheduler = adapter.AttnSamplerScheduler(rule="threshold")
    arguments = {"model_output": torch.zeros(1, 4, VOCAB), "sample": torch.full((1, 4), MASK), "timestep": 0}
    with pytest.raises(kind, match=message):
        scheduler.step(**arguments | {"mask_token_id": MASK} | change)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("rule", "attn"), ("fallback", "both"), ("metric", "sum"), ("layers", slice(2)), ("layers", [])),
        *(("softmax_scope", "all"), ("diagonal", 1), ("backend", "gpu")),
        *(("block_length", 0), ("num_inference_steps", 0)),
    ],
)
def test_misuse_of_the_options(adapter: Any, name: str, value: Any):
    with pytest.raises((TypeError, ValueError), match=f"{name}: expected"):
        adapter.AttnSamplerScheduler(**{name: value})


def test_diffusers_that_is_missing_or_of_another_version(adapter: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, MODULE)
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", lambda _: "0.41.2")
        with pytest.raises(RuntimeError, match=r"diffusers 0\.41\.2 is outside the tested range"):
            importlib.import_module(MODULE)
    for name in [name for name in sys.modules if name.partition(".")[0] == "diffusers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"diffusers cannot be imported .* pip install 'attn_sampler\[diff"):
        importlib.import_module(MODULE)


def loop_cases(count: int) -> Any:
    """Random states between two steps: arguments of ``check_eos_finished`` and of the other check."""
    for seed in range(count):
        g = torch.Generator().manual_seed(seed)
        numbers = torch.randint(6, (8,), generator=g).tolist()
        cur_x = torch.randint(5, (3, 9), generator=g)  # 0 is the end's, 1 the mask's token
        sampled = torch.randint(3, (3, BLOCK), generator=g)
        chosen = torch.rand(3, BLOCK, generator=g) < 0.4
        cur_x[:, -BLOCK:] = torch.where(chosen, sampled, cur_x[:, -BLOCK:])
        finished = torch.rand(3, generator=g) < (0.3 if numbers[0] else 1.0)
        yield (
            {
                **{"cur_x": cur_x, "sampled_tokens": sampled, "final_transfer": chosen, "finished": finished},
                **{"eos_token_id": 0, "mask_token_id": 1, "prompt_length": numbers[1] % 4},
            },
            {
                **{"step_idx": numbers[2], "masks_remaining": torch.tensor(numbers[3] > 2)},
                **{"editing_enabled": numbers[4] > 1, "editing_transfer_index": chosen & (numbers[5] > 1)},
                **{"post_steps": numbers[6], "max_post_steps": numbers[7], "finished": finished},
            },
        )


def is_finished(row: list[int], commits: list[int], was: bool, prompt_length: int) -> bool:
    if was or 0 not in commits or 0 not in row:
        return was
    end = row.index(0)
    return end >= prompt_length and 1 not in row[prompt_length:end]


def test_checks_between_steps(adapter: Any):
    scheduler = adapter.AttnSamplerScheduler(block_length=BLOCK, num_inference_steps=3)
    for of_end, of_block in loop_cases(300):
        expected = [
            is_finished(row, sampled[chosen].tolist(), was, of_end["prompt_length"])
            for row, sampled, chosen, was in zip(
                of_end["cur_x"].tolist(),
                of_end["sampled_tokens"],
                of_end["final_transfer"],
                of_end["finished"].tolist(),
                strict=True,
            )
        ]
        assert scheduler.check_eos_finished(**of_end).tolist() == expected
        edited = of_block["editing_enabled"] and bool(of_block["editing_transfer_index"].any())
        more = edited and of_block["post_steps"] <= of_block["max_post_steps"]
        if of_block["masks_remaining"]:
            more = of_block["step_idx"] < 3
        if of_block["finished"].all():
            more = False
        assert scheduler.check_block_should_continue(**of_block) is more


@real
def test_checks_between_steps_as_the_block_refinement_scheduler(adapter: Any):
    options = {"block_length": BLOCK, "num_inference_steps": 3}
    theirs = importlib.import_module("diffusers").BlockRefinementScheduler(**options)
    ours = adapter.AttnSamplerScheduler(**options)
    for of_end, of_block in loop_cases(500):
        output = ours.check_eos_finished(**of_end)
        theirs_finished = of_end["finished"].clone()  # written in place
        assert torch.equal(output, theirs.check_eos_finished(**of_end | {"finished": theirs_finished}))
        expected = theirs.check_block_should_continue(**of_block)
        assert ours.check_block_should_continue(**of_block) == expected


@real
def test_options_are_kept(adapter: Any, tmp_path: Any):
    """In a file, and when one scheduler takes the place of another."""
    options = {"rule": "sequential", "layers": [0, -1], "metric": "margin", "softmax_scope": "block"}
    scheduler = adapter.AttnSamplerScheduler(**options, threshold=0.8, backend="reference", diagonal=False)
    scheduler.save_pretrained(tmp_path)
    again = adapter.AttnSamplerScheduler.from_pretrained(tmp_path)
    assert {k: v for k, v in again.config.items() if k[0] != "_"} == {
        k: v for k, v in scheduler.config.items() if k[0] != "_"
    }
    theirs = importlib.import_module("diffusers").BlockRefinementScheduler(block_length=8, threshold=0.6)
    swapped = adapter.AttnSamplerScheduler.from_config(theirs.config, rule="threshold")
    assert (swapped.config.block_length, swapped.config.threshold) == (8, 0.6)
    assert theirs.from_config(swapped.config).config.threshold == 0.6


def pipeline(scheduler: Any, model: Any) -> Any:
    pipe = importlib.import_module("diffusers").LLaDA2Pipeline(model=model, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@real
def test_pipeline_is_saved_and_loaded(adapter: Any, tmp_path: Any):
    pipeline(adapter.AttnSamplerScheduler(rule="sequential"), None).save_pretrained(tmp_path)
    loaded = importlib.import_module("diffusers").LLaDA2Pipeline.from_pretrained(tmp_path, model=None)
    assert type(loaded.scheduler) is adapter.AttnSamplerScheduler
    assert loaded.scheduler.config.rule == "sequential"


CALL = {"mask_token_id": MASK, "block_length": BLOCK, "eos_early_stop": False, "output_type": "seq"}


@real
@pytest.mark.parametrize("rule", ["parallel", "sequential", "threshold"])
@pytest.mark.parametrize("length", [5, 8])
def test_pipeline_decodes_as_generate(adapter: Any, rule: str, length: int):
    """Block after block, with none behind it."""
    model = hf_toy()
    prompts = torch.randint(MASK, (3, length), generator=torch.Generator().manual_seed(2))
    scheduler = adapter.AttnSamplerScheduler(rule=rule)
    with scheduler.attach(model):
        output = pipeline(scheduler, model)(
            **{**CALL, "input_ids": prompts, "gen_length": 16 - length, "num_inference_steps": BLOCK},
            **{"threshold": 0.3, "editing_threshold": None},
        )
    policy = {"parallel": "attn", "sequential": "attn-sequential"}.get(rule, rule)
    tokens, tau = prompts, {} if rule == "sequential" else {"tau": 0.3}
    while tokens.shape[1] < 16:
        masks = torch.full((3, BLOCK - tokens.shape[1] % BLOCK), MASK)
        tokens = torch.cat([tokens, masks], dim=1)
        options = {"mask_token_id": MASK, "block_length": BLOCK, "policy": policy, **tau}
        tokens = generate(toy(), tokens, **options).tokens
    assert torch.equal(output.sequences, tokens[:, length:])


@real
@pytest.mark.parametrize("steps", [2, 4, 32])
@pytest.mark.parametrize("editing_threshold", [None, 0.15])
def test_pipeline_decodes_as_with_the_block_refinement_scheduler(
    adapter: Any, editing_threshold: float | None, steps: int
):
    theirs = importlib.import_module("diffusers").BlockRefinementScheduler()
    ours = adapter.AttnSamplerScheduler.from_config(theirs.config, rule="threshold")
    prompts = torch.randint(MASK, (4, 6), generator=torch.Generator().manual_seed(4))
    options = {"gen_length": 15, "num_inference_steps": steps, "threshold": 0.3, "minimal_topk": 2}
    options |= {"editing_threshold": editing_threshold, "eos_early_stop": True, "eos_token_id": 3}
    told: list[list[Tensor]] = [[], []]
    outputs = []
    for scheduler, steps_told in zip((ours, theirs), told, strict=True):

        def tell(
            pipe: Any, step: int, timestep: int, tensors: dict[str, Tensor], to: Any = steps_told
        ) -> dict:
            to.append(torch.stack([tensors["transfer_index"], tensors["editing_transfer_index"]]))
            return {}

        names = ["transfer_index", "editing_transfer_index"]
        pipe = pipeline(scheduler, hf_toy())
        given = {"callback_on_step_end": tell, "callback_on_step_end_tensor_inputs": names}
        outputs.append(pipe(input_ids=prompts, **CALL | options | given).sequences)
    assert torch.equal(*outputs)
    assert len(told[0]) == len(told[1])
    assert all(map(torch.equal, *told))
    assert editing_threshold is None or any(t[1].any() for t in told[0]), "nothing was edited"


#: What the pipeline asks of its scheduler, and the adapter gives.
USED = {"step", "set_timesteps", "check_eos_finished", "check_block_should_continue", "config"}


@real
def test_interface_of_diffusers(adapter: Any):
    """That nothing moved since 0.42.1."""
    theirs = importlib.import_module("diffusers").BlockRefinementScheduler
    for name in sorted(USED - {"config"}):
        own, their = (
            [(p.name, p.kind, p.default) for p in inspect.signature(getattr(c, name)).parameters.values()]
            for c in (adapter.AttnSamplerScheduler, theirs)
        )
        assert own == their, f"diffusers' BlockRefinementScheduler.{name} takes other arguments now"
    options = set(inspect.signature(theirs).parameters)
    unknown = options - set(inspect.signature(adapter.AttnSamplerScheduler).parameters)
    assert not unknown, f"diffusers' BlockRefinementScheduler has options that the adapter lacks: {unknown}"
    module = importlib.import_module("diffusers.schedulers.scheduling_block_refinement")
    own, their = (
        [field.name for field in dataclasses.fields(c)]
        for c in (BlockRefinementSchedulerOutput, module.BlockRefinementSchedulerOutput)
    )
    assert own == their, "diffusers' BlockRefinementSchedulerOutput has other fields now"
    file = installed(*PIPELINE)
    assert file is not None, "diffusers has its LLaDA2Pipeline elsewhere now"
    used = {
        node.attr
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self.scheduler"
    }
    assert used == USED, f"diffusers' LLaDA2Pipeline asks other things of its scheduler now: {used ^ USED}"
