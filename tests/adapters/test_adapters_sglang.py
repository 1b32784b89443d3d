"""The SGLang adapter, driven by a stand-in for SGLang 0.5.23's ``DllmAlgorithm``, or by the installed one."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_toy import (
    BLOCK,
    FlatToy,
    Request,
    attend,
    decode_whole,
    fields,
    load,
    load_alone,
    needs_installed,
    request_class,
    sources,
    stub,
    toy,
)
from torch import Tensor, nn
from toy_model import MASK

from attn_sampler.reference import truncation

SOURCE = ("sglang", "sglang/srt/dllm/algorithm/base.py")
over_stand_ins = pytest.mark.parametrize("adapter", ["stand-in"], indirect=True)
PROMPTS = [[5, 7, 2, 9, 11], [1, 4, 8], [6] * 8, [2, 3, 5, 7, 11, 13]]


class ForwardMode(Enum):
    EXTEND = 1
    DLLM_EXTEND = 2

    def is_dllm_extend(self) -> bool:
        return self is ForwardMode.DLLM_EXTEND


class DllmConfig:
    def __init__(self, algorithm_config: dict[str, Any], fdfo: bool = False) -> None:
        self.algorithm, self.algorithm_config = "AttnSampler", algorithm_config
        self.block_size, self.mask_id, self.max_running_requests = BLOCK, MASK, 8
        self.first_done_first_out_mode = fdfo

    @staticmethod
    def from_server_args(server_args: Any) -> DllmConfig | None:
        return server_args.dllm_config


class DllmAlgorithm:
    """The interface, and the two loops that call it."""

    #: What ``step`` is given: all logits in 0.5.23; in the main branch after it their holder, or less.
    hands_over = "logits"

    def __init__(self, config: DllmConfig) -> None:
        self.block_size = config.block_size
        self.mask_id = config.mask_id
        self.fdfo = config.first_done_first_out_mode

    def init_step_state(self, forward_batch: Any) -> list[Any]:
        return [None] * forward_batch.batch_size

    def max_steps(self, block_size: int) -> int:
        return block_size + 1

    def prepare_inputs(self, model_runner: Any, forward_batch: Any, states: list[Any]) -> None:
        pass

    def step(self, forward_batch: Any, logits_output: Any, states: list[Any]) -> list[bool]:
        raise NotImplementedError

    def run(self, model_runner: Any, forward_batch: Any, algo_states: Any = None) -> tuple[Any, ...]:
        batch = forward_batch.batch_size
        tokens = forward_batch.input_ids.view(batch, self.block_size)
        given = (tokens != self.mask_id).sum(dim=1).tolist()
        states = list(algo_states or [None] * batch)
        if None in states:
            fresh = self.init_step_state(forward_batch)
            states = [new if state is None else state for state, new in zip(states, fresh, strict=True)]
        for _ in range(1 if self.fdfo else self.max_steps(self.block_size)):
            self.prepare_inputs(model_runner, forward_batch, states)
            out = model_runner.forward(forward_batch, pp_proxy_tensors=None)
            if not self.fdfo and min(given) == self.block_size:
                return out.logits_output, [], None, None, False
            output = out.logits_output
            done = self.step(
                forward_batch, output.full_logits if self.hands_over == "logits" else output, states
            )
            if all(done):
                break
        if self.fdfo:
            lengths = [self.block_size if d else 0 for d in done]
            states = [None if d else state for d, state in zip(done, states, strict=True)]
            return out.logits_output, tokens.tolist(), lengths, states, False
        return out.logits_output, [row[n:] for row, n in zip(tokens, given, strict=True)], None, None, False


class RadixAttention(nn.Module):
    """Calls the FlashInfer backend, which joins the block to the cached context by their log-sum-exps."""

    def __init__(
        self, num_heads: int, head_dim: int, scaling: float, num_kv_heads: int, layer_id: int
    ) -> None:
        super().__init__()
        self.tp_q_head_num, self.tp_k_head_num, self.head_dim = num_heads, num_kv_heads, head_dim
        self.scaling, self.layer_id = scaling, layer_id

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, forward_batch: Any, save_kv_cache: bool = True
    ) -> Tensor:
        q = q.view(-1, self.tp_q_head_num, self.head_dim)
        k, v = (x.view(-1, self.tp_k_head_num, self.head_dim) for x in (k, v))
        states = [[], [], [], []]
        for i, request in enumerate(forward_batch.requests):
            own = slice(i * BLOCK, (i + 1) * BLOCK)
            cached = request.cache[self.layer_id]
            context = (torch.zeros_like(q[own]), torch.full(q[own].shape[:2], -torch.inf))
            if cached is not None:
                context = attend(q[own], *cached)
            for values, value in zip(states, (*attend(q[own], k[own], v[own]), *context), strict=True):
                values.append(value)
        o1, s1, o2, s2 = (torch.cat(values) for values in states)
        if forward_batch.joins:
            o1, _ = sys.modules["sglang.srt.layers.attention.flashinfer_backend"]._safe_merge_state(
                o1, s1, o2, s2
            )
        return o1.flatten(1)


def merge_state(v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.logaddexp2(s_a, s_b)
    return v_a * torch.exp2(s_a - s)[..., None] + v_b * torch.exp2(s_b - s)[..., None], s


class HookRegistry:
    hooks: list[tuple[Any, ...]]

    @classmethod
    def register(cls, target: str, hook: Any, hook_type: Any, *, source: Any = None) -> None:
        cls.hooks.append((target, hook, hook_type))


class ModelRunner:
    compact = False

    def __init__(self, config: DllmConfig, seed: int = 0) -> None:
        self.server_args = SimpleNamespace(dllm_config=config)
        weights = toy(seed)
        self.model = FlatToy(
            weights,
            lambda i: RadixAttention(
                weights.heads, weights.headdim, weights.headdim**-0.5, weights.kv_heads, i
            ),
        )

    def forward(self, forward_batch: Any, pp_proxy_tensors: Any) -> Any:
        logits = self.model(
            forward_batch.input_ids,
            forward_batch.requests,
            lambda layer, q, k, v: layer(q.flatten(1), k.flatten(1), v.flatten(1), forward_batch),
        )
        state = None
        if self.compact:
            p, best = logits.softmax(dim=-1).max(dim=-1)
            logits, state = None, SimpleNamespace(argmax_ids=best, max_probs=p)
        output = SimpleNamespace(full_logits=logits, dllm_vocab_state=state)
        return SimpleNamespace(logits_output=output, can_run_graph=False)


@pytest.fixture(params=sources(*SOURCE))
def adapter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    HookRegistry.hooks = []
    group = SimpleNamespace(world_size=1, device_group=None)
    stub(
        monkeypatch,
        {
            "sglang": {"__version__": "0.5.23"},
            "sglang.srt.dllm.algorithm": {"algo_name_to_cls": {}, "get_algorithm": None},
            "sglang.srt.dllm.algorithm.base": {"DllmAlgorithm": DllmAlgorithm},
            "sglang.srt.dllm.config": {"DllmConfig": DllmConfig},
            "sglang.srt.layers.radix_attention": {"RadixAttention": RadixAttention},
            "sglang.srt.layers.attention.flashinfer_backend": {"_safe_merge_state": merge_state},
            "sglang.srt.distributed.parallel_state": {"get_attn_tp_group": lambda: group},
            "sglang.srt.arg_groups.overrides": {
                "resolving_view": lambda arguments: arguments,
                "declare_resolution": lambda arguments, _, **fields: vars(arguments).update(fields),
            },
            "sglang.srt.plugins.hook_registry": {
                "HookRegistry": HookRegistry,
                "HookType": SimpleNamespace(AFTER="after"),
            },
        },
    )
    if request.param == "installed":
        stub(
            monkeypatch,
            {
                "sglang.srt.layers.logits_processor": {"LogitsProcessorOutput": object},
                "sglang.srt.model_executor.forward_batch_info": {"ForwardBatch": object},
                "sglang.srt.model_executor.model_runner": {"ModelRunner": object},
                "sglang.srt.server_args": {"ServerArgs": object},
                "sglang.srt.utils": {"is_npu": lambda: False},
            },
        )
        load(monkeypatch, "sglang.srt.dllm.algorithm.base", *SOURCE)
    monkeypatch.delitem(sys.modules, "attn_sampler.adapters.sglang", raising=False)
    return importlib.import_module("attn_sampler.adapters.sglang")


def sampling_info(asked: list[dict[str, Any]], deterministic: bool = True) -> Any:
    """SGLang's ``SamplingBatchInfo`` of requests with these normalized parameters."""
    plain = {"temperature": 1.0, "top_k": 1 << 30, "top_p": 1.0, "min_p": 0.0, "sampling_seed": 42}
    given = [plain | each for each in asked]

    def of(name: str, dtype: torch.dtype) -> Tensor:
        return torch.tensor([each[name] for each in given], dtype=dtype)

    return SimpleNamespace(
        temperatures=of("temperature", torch.float32)[:, None],
        top_ks=of("top_k", torch.int32),
        top_ps=of("top_p", torch.float32),
        min_ps=of("min_p", torch.float32),
        is_all_greedy=all(each["top_k"] <= 1 for each in given),
        need_top_p_sampling=any(each["top_p"] != 1.0 for each in given),
        need_top_k_sampling=any(each["top_k"] != 1 << 30 for each in given),
        need_min_p_sampling=any(each["min_p"] > 0 for each in given),
        sampling_seed=of("sampling_seed", torch.int64) if deterministic else None,
    )


def make_batch(requests: list[Request], **fields: Any) -> Any:
    prefixes = [request.cached for request in requests]
    own = torch.arange(BLOCK, dtype=torch.int32)
    return SimpleNamespace(
        **{
            "batch_size": len(requests),
            "input_ids": torch.tensor([token for request in requests for token in request.block()]),
            "forward_mode": ForwardMode.DLLM_EXTEND,
            "requests": requests,
            "extend_prefix_lens_cpu": prefixes,
            "joins": any(prefixes),
            "dllm_prompt_mask": None,
            "positions": torch.cat([own + cached for cached in prefixes]),
            "sampling_info": sampling_info([getattr(request, "asks", {}) for request in requests]),
        }
        | fields
    )


def serve(
    algorithm: Any,
    runner: ModelRunner,
    num_blocks: int,
    prompts: list[list[int]] = PROMPTS,
    asked: list[dict[str, Any]] | None = None,
) -> list[list[int]]:
    """All prompts at once, block after block, as the scheduler does."""
    requests = [Request(prompt) for prompt in prompts]
    for request, asks in zip(requests, asked or [], strict=False):
        request.asks = asks  # type: ignore[attr-defined]
    goals = [-(-(len(prompt) + 1) // BLOCK) + num_blocks - 1 for prompt in prompts]
    kept: dict[int, Any] = {}
    for _ in range(100):
        running = [r for r, goal in zip(requests, goals, strict=True) if r.cached < goal * BLOCK]
        if not running:
            return [request.tokens for request in requests]
        batch = make_batch(running)
        carried = [kept.get(id(request)) for request in running]
        _, tokens, lengths, states, _ = algorithm.run(runner, batch, carried)
        kept = {id(request): state for request, state in zip(running, states or [], strict=False)}
        for place, request in enumerate(running):
            block = request.block()
            if lengths is None:  # what was asked for, of finished blocks
                given = [token for token in block if token != MASK]
                request.store(given + torch.as_tensor(tokens[place]).tolist() if tokens else block)
            elif lengths[place]:
                request.store(tokens[place])
            else:
                request.tokens[request.cached :] = tokens[place]
    raise AssertionError("the blocks are never done")


@pytest.mark.parametrize("fdfo", [False, True])
@pytest.mark.parametrize(
    "options", [{"tau": 0.3}, {"policy": "attn-sequential"}, {"tau": 0.3, "layers": [1]}]
)
def test_serves_the_tokens_of_generate(adapter: Any, options: dict[str, Any], fdfo: bool):
    config = DllmConfig(options, fdfo)
    served = serve(adapter.algorithm()(config), ModelRunner(config), 2)
    expected = [decode_whole(toy(), prompt, 2, **({"policy": "attn"} | options)) for prompt in PROMPTS]
    assert served == expected


@pytest.mark.parametrize("policy", ["klass", "t2t", "t2m", "saber", "attn-check", "rollback"])
def test_rules_that_remember_their_steps_or_take_back(adapter: Any, policy: str):
    """Each request with a policy and a budget of its own; prompts stay."""
    expected = [decode_whole(toy(), prompt, 2, policy=policy) for prompt in PROMPTS[1:]]
    for fdfo in (False, True):
        config = DllmConfig({"policy": policy}, fdfo)
        algorithm = adapter.algorithm()(config)
        revisions = 0 if policy == "klass" else algorithm._decoder.policy.max_edits
        assert algorithm.max_steps(BLOCK) == (BLOCK * (1 + 2 * revisions) + 2 if revisions else BLOCK + 1)
        assert serve(algorithm, ModelRunner(config), 2, PROMPTS[1:]) == expected


@over_stand_ins
def test_a_rule_that_remembers_needs_all_logits(adapter: Any):
    algorithm, batch = adapter.algorithm()(DllmConfig({"policy": "t2t"})), make_batch([Request([])])
    output = SimpleNamespace(full_logits=None, dllm_vocab_state=SimpleNamespace())
    with pytest.raises(RuntimeError, match=r"T2T.* needs all logits, which SGLang kept apart"):
        algorithm.step(batch, output, algorithm.init_step_state(batch))


@over_stand_ins
def test_blocks_of_a_rule_that_remembers_draw_streams_of_their_own(adapter: Any):
    algorithm = adapter.algorithm()(DllmConfig({"policy": "t2t", "tau": 0.0, "temperature": 1.0}))
    drawn = []
    for _ in range(2):
        batch = make_batch([Request([]), Request([])])
        algorithm.step(batch, torch.zeros(2 * BLOCK, MASK + 1), algorithm.init_step_state(batch))
        drawn += batch.input_ids.view(2, BLOCK).tolist()
    assert len({tuple(block) for block in drawn}) == 4


@over_stand_ins
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("options", [{"tau": 0.3}, {"policy": "threshold", "tau": 0.5}])
def test_what_the_main_branch_hands_over(
    adapter: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], compact: bool
):
    """The holder of the logits, or of each most probable token and its probability."""
    monkeypatch.setattr(DllmAlgorithm, "hands_over", "holder")
    config = DllmConfig(options)
    runner = ModelRunner(config)
    runner.compact = compact
    served = serve(adapter.algorithm()(config), runner, 2)
    assert served == [decode_whole(toy(), prompt, 2, **({"policy": "attn"} | options)) for prompt in PROMPTS]


@over_stand_ins
def test_what_a_compact_state_does_not_tell(adapter: Any):
    batch = make_batch([Request([])])
    state = SimpleNamespace(argmax_ids=torch.full((BLOCK,), MASK), max_probs=torch.ones(BLOCK))
    output = SimpleNamespace(full_logits=None, dllm_vocab_state=state)
    for options in ({"policy": "entropy"}, {"policy": "threshold", "temperature": 0.5}):
        algorithm = adapter.algorithm()(DllmConfig(options))
        with pytest.raises(RuntimeError, match=r"most probable token alone, and .* needs all logits"):
            algorithm.step(batch, output, [None])
    algorithm = adapter.algorithm()(DllmConfig({"policy": "confidence"}))
    with pytest.raises(RuntimeError, match="of the mask token's rivals the engine tells nothing"):
        algorithm.step(batch, output, [None])
    state.argmax_ids[2] = 5
    assert algorithm.step(batch, output, [None]) == [False]
    assert batch.input_ids.tolist() == [MASK, MASK, 5, MASK]


@over_stand_ins
@pytest.mark.parametrize(
    ("text", "given", "chosen"),
    [
        ("", {"attention_backend": None}, "flashinfer"),
        ("tau: 0.5", {"attention_backend": "fa3", "decode_attention_backend": "triton"}, "flashinfer"),
        ("softmax_scope: block", {"attention_backend": "fa3"}, "fa3"),
        ("policy: threshold", {"attention_backend": "fa3"}, "fa3"),
        ("", {"attention_backend": "flashinfer"}, "flashinfer"),
    ],
)
def test_the_backend_whose_log_sum_exp_is_read_is_chosen(
    adapter: Any,
    tmp_path: Any,
    text: str,
    given: dict[str, Any],
    chosen: str,
    recwarn: pytest.WarningsRecorder,
):
    pytest.importorskip("yaml")
    file = tmp_path / "attn.yaml"
    file.write_text(text)
    arguments = SimpleNamespace(dllm_algorithm_config=str(file) if text else None, **given)
    adapter.algorithm().configure_server_args(arguments)
    assert arguments.attention_backend == chosen
    assert getattr(arguments, "decode_attention_backend", "flashinfer") == "flashinfer"
    assert len(recwarn) == (given["attention_backend"] != chosen)
    for name, value in given.items():
        assert all(f"{name}={value}" in str(warning.message) for warning in recwarn)
    file.write_text("[1, 2]")
    arguments.dllm_algorithm_config = str(file)
    with pytest.raises(ValueError, match="expected a mapping in"):
        adapter.algorithm().configure_server_args(arguments)


def test_the_log_sum_exp_over_the_context_is_what_decides(adapter: Any):
    """Where the softmax over the block alone would choose otherwise."""
    differing = 0
    for seed in range(6):
        whole = [decode_whole(toy(seed), p, 2, policy="attn-sequential") for p in PROMPTS]
        block = [
            decode_whole(toy(seed), p, 2, policy="attn-sequential", softmax_scope="block") for p in PROMPTS
        ]
        differing += whole != block
        for scope, expected in (("sequence", whole), ("block", block)):
            config = DllmConfig({"policy": "attn-sequential", "softmax_scope": scope})
            assert serve(adapter.algorithm()(config), ModelRunner(config, seed), 2) == expected
    assert differing > 0


def test_the_model_is_watched_when_it_is_loaded(adapter: Any):
    adapter.register()
    (target, hook, _), config = HookRegistry.hooks[0], DllmConfig({"tau": 0.3})
    assert target == "sglang.srt.model_executor.model_runner.ModelRunner.load_model"
    runner = ModelRunner(config)
    hook(None, runner)
    algorithm = sys.modules["sglang.srt.dllm.algorithm"].algo_name_to_cls["AttnSampler"](config)
    batch = make_batch([Request(prompt) for prompt in PROMPTS])
    runner.forward(batch, None)
    algorithm.prepare_inputs(runner, batch, [])
    hooks = sum(len(layer._forward_hooks) for layer in runner.model.attention)
    assert hooks == len(runner.model.attention), "watched once"
    assert algorithm._scores.read(len(PROMPTS)).sum() > 0


def test_models_that_need_no_watching_are_left_alone(adapter: Any):
    adapter.register()
    for config in (None, SimpleNamespace(algorithm="LowConfidence"), DllmConfig({"policy": "threshold"})):
        runner = ModelRunner(DllmConfig({}))
        runner.server_args.dllm_config = config
        HookRegistry.hooks[0][1](None, runner)
        assert not any(layer._forward_hooks for layer in runner.model.attention)


def test_a_mask_token_in_a_prompt_is_text(adapter: Any):
    config = DllmConfig({"tau": 0.3})
    algorithm, runner, request = adapter.algorithm()(config), ModelRunner(config), Request([5, MASK, 7])
    literal = torch.tensor([[True, True, True, False]])
    batch = make_batch([request], dllm_prompt_mask=literal)
    algorithm.run(runner, batch)
    tokens = batch.input_ids.tolist()
    assert tokens[:3] == [5, MASK, 7]
    assert tokens[3] != MASK


def test_policies_without_attention_watch_nothing(adapter: Any):
    config = DllmConfig({"policy": "confidence"})
    runner = ModelRunner(config)
    served = serve(adapter.algorithm()(config), runner, 1)
    assert served == [decode_whole(toy(), prompt, 1, policy="confidence") for prompt in PROMPTS]
    assert not any(layer._forward_hooks for layer in runner.model.attention)


#: SGLang 0.5.23's ``SamplingParams``: what it applies around a block's decoding, and the rest's defaults.
PARAMS = ("sglang", "sglang/srt/sampling/sampling_params.py", "SamplingParams")
APPLIED = {
    **{"max_new_tokens": 128, "n": 1, "ignore_eos": False, "stop": None, "stop_token_ids": None},
    **{"stop_regex": None, "no_stop_trim": False, "skip_special_tokens": True, "custom_params": None},
    **{"spaces_between_special_tokens": True, "stream_interval": None, "ebnf_full_assistant": False},
    **{"stop_strs": None, "stop_regex_strs": None, "stop_str_max_len": 0, "stop_regex_max_len": 0},
    "is_normalized": False,
}
REFUSED = {
    **{"temperature": 1.0, "top_p": 1.0, "top_k": 1 << 30, "min_p": 0.0, "frequency_penalty": 0.0},
    **{"presence_penalty": 0.0, "repetition_penalty": 1.0, "min_new_tokens": 0, "beam_width": None},
    **{"json_schema": None, "regex": None, "ebnf": None, "structural_tag": None, "logit_bias": None},
    **{"sampling_seed": None, "watermark": None},
}
SamplingParams = request_class(APPLIED | REFUSED)


def refusal(adapter: Any, config: dict[str, Any], request: dict[str, Any], **asked: Any) -> str | None:
    req = SimpleNamespace(sampling_params=SamplingParams(**asked), dllm_config=DllmConfig(config), **request)
    return adapter.algorithm().validate_request(req)


@over_stand_ins
@pytest.mark.parametrize("name", [*APPLIED, *REFUSED])
def test_what_a_request_asks_for_is_applied_or_refused_by_name(adapter: Any, name: str):
    value = {"temperature": 0.5, "top_k": 20}.get(name, "asked")
    for config in ({}, {"temperature": 0.7}):
        assert refusal(adapter, config, {}, **{name: (APPLIED | REFUSED)[name]}) is None
        text = refusal(adapter, config, {}, **{name: value})
        if name in APPLIED or (name == "sampling_seed" and not config):
            assert text is None
        else:
            assert text is not None
            assert f"{name}: expected {REFUSED[name]!r}" in text
            assert f"got {value!r}" in text


def test_what_a_request_asks_for_beside_its_parameters(adapter: Any):
    plain = dict.fromkeys(("return_logprob", "return_hidden_states", "return_sampling_mask"), False)
    plain["custom_logit_processor"] = None
    assert refusal(adapter, {}, plain) is None
    for name in plain:
        assert f"{name}: expected None, got 'x'" in (refusal(adapter, {}, plain | {name: "x"}) or "")


def test_a_temperature_of_its_own(adapter: Any):
    """SGLang turns 0 into top_k=1, and asks for it itself when it warms up."""
    greedy = {"top_k": 1, "top_p": 0.5, "min_p": 0.2}
    assert refusal(adapter, {}, {}, **greedy) is None
    assert refusal(adapter, {"temperature": 0.7}, {}, temperature=0.7) is None
    with pytest.warns(UserWarning, match="a request's temperature of 0 is not served beside the file's"):
        assert refusal(adapter, {"temperature": 0.7}, {}, **greedy) is None


ASKED = [
    {"top_k": 1},  # which is what SGLang makes of a temperature of 0
    {"temperature": 0.8, "top_k": 7, "sampling_seed": 5},
    {"temperature": 1.5, "top_p": 0.9, "min_p": 0.05, "sampling_seed": 6},
    {"sampling_seed": 7},
]


@pytest.mark.parametrize(
    ("policy", "fdfo"), [("attn", False), ("threshold", True), ("klass", False), ("t2m", True)]
)
def test_requests_that_draw_in_their_own_way(adapter: Any, policy: str, fdfo: bool):
    """Each as it would alone, by its seed; one of a temperature of 0 as by a file that says so."""
    config = DllmConfig({"temperature": "request", "policy": policy}, fdfo)
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[3], PROMPTS[1]]
    algorithm, runner = adapter.algorithm()(config), ModelRunner(config)
    served = serve(algorithm, runner, 2, prompts, ASKED)
    assert served[0] == decode_whole(toy(), prompts[0], 2, policy=policy)
    for i in (3, 1, 2):
        assert serve(algorithm, runner, 2, prompts[i : i + 1], ASKED[i : i + 1]) == [served[i]]
    others = [asks | {"sampling_seed": 9} for asks in ASKED]
    assert serve(algorithm, runner, 2, prompts, others) != served


@over_stand_ins
def test_greedy_batches_and_single_filters_read_no_tensor_more_than_they_need(adapter: Any):
    def draws(asked: list[dict[str, Any]], deterministic: bool = False) -> dict[str, Any]:
        info = sampling_info(asked, deterministic)
        return adapter._draws(make_batch([Request([])] * len(asked), sampling_info=info), BLOCK)

    assert draws([{"top_k": 1}, {"top_k": 1, "top_p": 0.5}]) == {"temperature": 0.0}
    mixed = draws([{"top_k": 1}, {"temperature": 0.5, "top_k": 1 << 30}])
    assert mixed["temperature"].tolist() == [0.0, 0.5]
    assert set(mixed) == {"temperature", "top_k"}
    for name, value in (("top_p", 0.5), ("min_p", 0.25)):
        assert draws([{name: value}])[name].tolist() == [value]
        assert set(draws([{name: value}])) == {"temperature", name}
    assert set(draws([{}], deterministic=True)) == {"temperature", "seeds", "position"}


SAMPLER = ("sglang", "sglang/srt/layers/sampler.py")


@over_stand_ins
@pytest.mark.parametrize(
    "asks",
    [
        pytest.param(asks, marks=needs_installed(*SAMPLER))
        for asks in ({"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.3}, {"top_k": 9, "min_p": 0.2}, *ASKED[1:])
    ],
)
def test_what_may_be_drawn_is_what_the_installed_sampler_leaves(
    adapter: Any, monkeypatch: pytest.MonkeyPatch, asks: dict[str, Any]
):
    """SGLang's own, in PyTorch; of that a part, where it takes top_p of more than top_k leaves."""
    names = ("is_cuda", "is_hip", "is_musa", "is_npu", "is_xpu", "is_gfx1250_supported", "get_bool_env_var")
    no = dict.fromkeys(names, lambda *_: False)
    sampler = load_alone(monkeypatch, "sglang.srt.layers.sampler", *SAMPLER, no)
    info = sampling_info([asks], deterministic=False)
    logits = torch.randn(60, MASK + 1, generator=torch.Generator().manual_seed(2)) * 2.0
    logits[:, MASK] = -torch.inf
    _, weights, ids, _ = sampler.top_k_top_p_min_p_sampling_from_probs_torch(
        (logits / info.temperatures).softmax(dim=-1),
        *(x.expand(60) for x in (info.top_ks, info.top_ps, info.min_ps)),
        need_min_p_sampling=info.need_min_p_sampling,
        sampling_seed=None,
        positions=None,
        return_filtered_probs=True,
    )
    own = torch.zeros_like(weights).scatter(1, ids.long(), weights) > 0
    filters = (x.view(1, 1, 1) for x in (info.top_ks, info.top_ps, info.min_ps))
    mine = truncation((logits / info.temperatures)[None], *filters)[0] & logits.isfinite()
    joint = info.need_top_k_sampling and info.need_top_p_sampling
    assert (mine & ~own).sum() == 0
    assert joint or (own == mine).all()


@over_stand_ins
def test_what_a_request_asks_for_that_draws_in_its_own_way(adapter: Any, monkeypatch: pytest.MonkeyPatch):
    file = {"temperature": "request"}
    for name, value in (("temperature", 0.5), ("top_k", 20), ("top_k", 1), ("top_p", 0.5), ("min_p", 0.1)):
        assert refusal(adapter, file, {}, **{name: value}) is None
    assert "by requests' temperature, top_k, top_p and min_p; ebnf: expected None, got 'x'" in (
        refusal(adapter, file, {}, ebnf="x") or ""
    )
    assert "return_logprob: expected None, got True" in (
        refusal(adapter, file, {"return_logprob": True}) or ""
    )
    flags = SimpleNamespace(deterministic=SimpleNamespace(enable_deterministic_inference=False))
    stub(monkeypatch, {"sglang.srt.runtime_context": {"get_exec": lambda: flags}})
    assert "sampling_seed: expected None, got 5" in (refusal(adapter, file, {}, sampling_seed=5) or "")
    flags.deterministic.enable_deterministic_inference = True
    assert refusal(adapter, file, {}, sampling_seed=5) is None
    with pytest.raises(TypeError, match="temperature: expected"):
        adapter.algorithm()(DllmConfig({"temperature": "file"}))


@over_stand_ins
def test_a_request_that_draws_needs_all_logits(adapter: Any):
    algorithm = adapter.algorithm()(DllmConfig({"policy": "threshold", "temperature": "request"}))
    state = SimpleNamespace(argmax_ids=torch.ones(BLOCK, dtype=torch.int64), max_probs=torch.ones(BLOCK))
    output = SimpleNamespace(full_logits=None, dllm_vocab_state=state)
    greedy = make_batch([Request([])], sampling_info=sampling_info([{"top_k": 1}]))
    assert algorithm.step(greedy, output, [None]) == [False]
    assert MASK not in greedy.input_ids
    with pytest.raises(RuntimeError, match="a request that draws needs all logits"):
        algorithm.step(make_batch([Request([])]), output, [None])


@pytest.mark.parametrize("known", [pytest.param(APPLIED | REFUSED, marks=needs_installed(*PARAMS[:2]))])
def test_installed_parameters_are_classified(known: dict[str, Any]):
    assert set(fields(*PARAMS)) == set(known)


@over_stand_ins
@pytest.mark.parametrize(
    "kind",
    [
        *({"logit_cap": 50.0}, {"sliding_window_size": BLOCK - 1}, {"is_cross_attention": True}),
        *({"use_irope": True}, {"xai_temperature_len": 1024}, {"pos_encoding_mode": "ALIBI"}),
        {"attn_type": SimpleNamespace(value="decoder")},
    ],
)
def test_kinds_of_attention_that_are_not_served(adapter: Any, kind: dict[str, Any]):
    config = DllmConfig({})
    runner = ModelRunner(config)
    plain = {"logit_cap": 0.0, "sliding_window_size": -1, "pos_encoding_mode": "NONE", "use_irope": False}
    plain |= {"attn_type": SimpleNamespace(value="encoder_only"), "xai_temperature_len": -1}
    vars(runner.model.attention[1]).update(plain)
    adapter.watch(runner.model, BLOCK, {})
    runner = ModelRunner(config)
    vars(runner.model.attention[1]).update(plain | kind)
    with pytest.raises(NotImplementedError, match=f"{next(iter(kind))}: attention with it is not served"):
        adapter.watch(runner.model, BLOCK, {})


def test_attention_sinks_are_refused(adapter: Any, monkeypatch: pytest.MonkeyPatch):
    config = DllmConfig({})
    runner = ModelRunner(config)
    adapter.watch(runner.model, BLOCK, {})
    monkeypatch.setattr(RadixAttention, "forward", lambda self, q, k, v, forward_batch, **_: q)
    layer, batch = runner.model.attention[0], make_batch([Request([])])
    q, k = torch.zeros(BLOCK, 32), torch.zeros(BLOCK, 16)
    layer(q, k, k, batch, save_kv_cache=False)
    with pytest.raises(NotImplementedError, match="sinks: attention with it is not served, got a Tensor"):
        layer(q, k, k, batch, sinks=torch.zeros(4))


def test_misuse(adapter: Any, monkeypatch: pytest.MonkeyPatch):
    algorithm = adapter.algorithm()
    with pytest.raises(ValueError, match=r"expected options among .* got threshold"):
        algorithm(DllmConfig({"threshold": 0.9}))
    with pytest.raises(ValueError, match="backend: expected one of"):
        algorithm(DllmConfig({"backend": "gpu"}))
    with pytest.raises(ValueError, match="policy: 'clad' reads the block's attention map"):
        algorithm(DllmConfig({"policy": "clad"}))
    with pytest.raises(ValueError, match="policy: 'wino' judges tokens at shadow positions"):
        algorithm(DllmConfig({"policy": "wino"}))
    config = DllmConfig({})
    runner = ModelRunner(config)
    runner.model.attention = nn.ModuleList()
    with pytest.raises(RuntimeError, match="FlatToy has no RadixAttention layer"):
        algorithm(config).prepare_inputs(runner, None, [])
    runner = ModelRunner(config)
    request = Request([1] * 8)
    batch = make_batch([request])
    runner.forward(batch, None)
    request.store(batch.input_ids.tolist())
    batch = make_batch([request], joins=False)
    with pytest.raises(RuntimeError, match="--attention-backend flashinfer"):
        algorithm(config).run(runner, batch)
    unseen = algorithm(config)
    unseen.prepare_inputs(ModelRunner(config), batch, [])
    with pytest.raises(RuntimeError, match="no attention of the model was seen"):
        unseen.step(make_batch([Request([])]), torch.zeros(BLOCK, MASK + 1), [None])
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.4.9")
    with pytest.raises(RuntimeError, match=r"sglang 0\.4\.9 is outside the tested range"):
        adapter.register()
    monkeypatch.setitem(sys.modules, "sglang.srt.dllm.algorithm", None)
    with pytest.raises(ImportError, match=r'sglang cannot be imported .* pip install "sglang'):
        adapter.register()
