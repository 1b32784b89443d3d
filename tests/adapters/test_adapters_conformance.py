"""The names and signatures that each adapter relies on, in the engines' own published sources.

Read without importing them, where they are installed (``pip install --no-deps`` will do); judged by hand over
the versions below, the newest published ones. A moved interface fails with a sentence that says what moved.
"""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from engine_toy import installed
from outline import Outline

from attn_sampler.adapters.vllm_model_state import _CanvasStep


class Engine(NamedTuple):
    distribution: str
    read: str  # the version, and commit, that was read
    files: dict[str, list[str]]  # by path: names, with the parameters that are relied on, in their order


ENGINES = {
    "sglang": Engine(
        "sglang",
        "0.5.23",
        {
            "sglang/srt/dllm/algorithm/base.py": [
                *("DllmAlgorithm.block_size", "DllmAlgorithm.mask_id"),
                "DllmAlgorithm.step(forward_batch, states)",  # between them the logits, or their holder
                "DllmAlgorithm.prepare_inputs(model_runner, forward_batch, states)",
                *("DllmAlgorithm.validate_request(req)", "DllmAlgorithm.configure_server_args(server_args)"),
                *("DllmAlgorithm.max_steps(block_size)", "DllmAlgorithm.required_attention_backend"),
            ],
            "sglang/srt/dllm/algorithm/__init__.py": ["algo_name_to_cls"],
            "sglang/srt/dllm/config.py": [
                "DllmConfig.from_server_args(server_args)",
                *("DllmConfig.algorithm", "DllmConfig.algorithm_config", "DllmConfig.block_size"),
            ],
            "sglang/srt/layers/radix_attention.py": [
                "RadixAttention.forward(q, k, v, forward_batch, save_kv_cache)",
                *("RadixAttention.tp_q_head_num", "RadixAttention.tp_k_head_num", "RadixAttention.head_dim"),
                *("RadixAttention.scaling", "RadixAttention.logit_cap", "RadixAttention.sliding_window_size"),
            ],
            "sglang/srt/sampling/sampling_batch_info.py": [
                *("SamplingBatchInfo.temperatures", "SamplingBatchInfo.top_ks", "SamplingBatchInfo.top_ps"),
                *("SamplingBatchInfo.min_ps", "SamplingBatchInfo.is_all_greedy"),
                *("SamplingBatchInfo.need_top_k_sampling", "SamplingBatchInfo.need_top_p_sampling"),
                *("SamplingBatchInfo.need_min_p_sampling", "SamplingBatchInfo.sampling_seed"),
            ],
            "sglang/srt/model_executor/forward_batch_info.py": [
                *("ForwardBatch.sampling_info", "ForwardBatch.positions", "ForwardBatch.dllm_prompt_mask"),
            ],
            "sglang/srt/runtime_context.py": ["get_exec"],
            "sglang/srt/layers/attention/flashinfer_backend.py": ["_safe_merge_state"],
            "sglang/srt/layers/logits_processor.py": ["LogitsProcessorOutput.full_logits"],
            "sglang/srt/arg_groups/overrides.py": [
                "resolving_view",
                "declare_resolution(server_args, source)",
            ],
            "sglang/srt/plugins/hook_registry.py": [
                "HookRegistry.register(target, hook, hook_type)",
                "HookType.AFTER",
            ],
            "sglang/srt/model_executor/model_runner.py": [
                "ModelRunner.load_model",
                "ModelRunner.server_args",
            ],
        },
    ),
    "vllm": Engine(
        "vllm",
        "0.33.0",
        {
            "vllm/v1/worker/gpu/model_states/interface.py": [
                "ModelState.custom_sampler(sampler)",
                "ModelState.prepare_inputs(input_batch, req_states)",
                *("ModelState.vllm_config", "ModelState.model"),
            ],
            "vllm/model_executor/models/diffusion_gemma.py": [
                f"_compiled_sample_step({', '.join(_CanvasStep.needs)})",
                *("sample_row_stats", "sample_row_stats_reference"),
                "DiffusionSampler.__call__(logits, input_batch, draft_logits)",
                "DiffusionSampler.diffusion_states",
                "DiffusionGemmaRequestStates.canvas_length",
            ],
            "vllm/model_executor/models/diffusion_gemma_sampler.py": [
                "sample_row_stats(logits, temps, canvas_len)",
                "sample_row_stats_reference(logits, temps, canvas_len)",
            ],
            "vllm/v1/worker/gpu/input_batch.py": [
                *("InputBatch.num_reqs", "InputBatch.cu_num_logits_np", "InputBatch.num_draft_tokens"),
                *("InputBatch.seq_lens", "InputBatch.idx_mapping_np"),
            ],
            "vllm/v1/attention/backends/triton_attn.py": [
                "TritonAttentionImpl.forward(layer, query, key, value, kv_cache, attn_metadata, output)",
                *("TritonAttentionImpl.scale", "TritonAttentionImpl.sliding_window"),
                *("TritonAttentionMetadata.query_start_loc", "TritonAttentionMetadata.seq_lens"),
                "TritonAttentionMetadata.block_table",
            ],
            "vllm/v1/attention/backends/flash_attn.py": [
                "FlashAttentionImpl.forward(layer, query, key, value, kv_cache, attn_metadata, output)",
                *("FlashAttentionImpl.scale", "FlashAttentionImpl.sliding_window"),
                *("FlashAttentionMetadata.query_start_loc", "FlashAttentionMetadata.seq_lens"),
                "FlashAttentionMetadata.block_table",
            ],
            "vllm/model_executor/layers/attention/__init__.py": ["Attention"],
            "vllm/config/vllm.py": ["VllmConfig.additional_config", "VllmConfig.diffusion_config"],
            "vllm/config/compilation.py": ["CUDAGraphMode.has_full_cudagraphs"],
            "vllm/v1/worker/gpu/sample/states.py": ["SamplingStates.temperature"],
            "vllm/sampling_params.py": ["SamplingParams._validate_diffusion(model_config)"],
        },
    ),
    "lmdeploy": Engine(
        "lmdeploy",
        "0.18.0",
        {
            "lmdeploy/pytorch/strategies/dllm/unmasking.py": [
                "UnmaskingProcessor.__init__(dllm_config)",
                "UnmaskingProcessor.__call__(logits, input_ids, token_ids, dllm_mask)",
            ],
            "lmdeploy/pytorch/engine/model_agent/agent.py": ["build_patched_model"],
            "lmdeploy/pytorch/nn/attention.py": [
                "Attention.forward(query, key, value, k_cache, v_cache, attn_metadata)"
            ],
            "lmdeploy/pytorch/consts.py": ["DLLM_MASKED", "DLLM_UNMASKED", "DLLM_CACHED"],
        },
    ),
    "dllm": Engine(
        "dllm",
        "0.1.0, commit ca17675",
        {
            "dllm/core/samplers/base.py": [
                *("BaseSampler.model", "BaseSampler.tokenizer", "BaseSampler.scheduler"),
                *("BaseSampler.sample(config)", "BaseSampler.infill(inputs, config)"),
                *("BaseSamplerConfig.return_dict", "BaseSamplerOutput.sequences"),
            ],
            "dllm/core/samplers/mdlm.py": [
                *("MDLMSampler.sample(inputs, config)", "MDLMSampler.infill(inputs, config)"),
                *("MDLMSamplerConfig.cfg_scale", "MDLMSamplerConfig.cfg_keep_tokens"),
            ],
            "dllm/pipelines/llada21/sampler.py": ["LLaDA21SamplerConfig.eos_early_stop"],
        },
    ),
    "dinfer": Engine(
        "dinfer",
        "0.1, commit fce4e32",
        {
            "dinfer/decoding/parallel_strategy.py": [
                "ParallelDecoder.__init__(temperature, mask_id)",
                "ParallelDecoder.block_init(block_x, block_id)",
                "ParallelDecoder.decode(logits, block_start, block_end, x)",
            ],
            "dinfer/decoding/generate_uniform.py": ["BlockWiseDiffusionLLM.generate(prompt, gen_length)"],
        },
    ),
    "transformers": Engine(
        "transformers",
        "5.24.0",
        {
            "transformers/generation/utils.py": [
                "GenerationMixin.generate(generation_config, custom_generate)",
                "GenerationMixin._sample(input_ids, logits_processor, stopping_criteria, generation_config)",
                *("GenerateDecoderOnlyOutput.sequences", "GenerateDecoderOnlyOutput.scores"),
            ],
            "transformers/generation/configuration_utils.py": [
                "GenerationConfig._get_default_generation_params",
                "GenerationConfig.update",
            ],
            "transformers/models/diffusion_gemma/generation_diffusion_gemma.py": [
                "EntropyBoundSampler.accept_canvas(current_canvas, denoiser_canvas, logits, cur_step)",
            ],
        },
    ),
    "kvpress": Engine(
        "kvpress",
        "0.5.5",
        {
            "kvpress/presses/base_press.py": ["BasePress.forward_hook(module, input, kwargs, output)"],
            "kvpress/presses/scorer_press.py": [
                "ScorerPress.compression_ratio",
                "ScorerPress.score(module, hidden_states, keys, values, attentions, kwargs)",
            ],
            "kvpress/presses/snapkv_press.py": ["SnapKVPress.window_size", "SnapKVPress.kernel_size"],
            "kvpress/presses/pyramidkv_press.py": ["PyramidKVPress.beta", "PyramidKVPress.compress"],
            "kvpress/presses/observed_attention_press.py": ["ObservedAttentionPress.score"],
            "kvpress/utils.py": ["get_prerope_query_states(module, hidden_states)"],
        },
    ),
    "diffusers": Engine(
        "diffusers",
        "0.42.1",
        {
            "diffusers/schedulers/scheduling_block_refinement.py": [
                "BlockRefinementScheduler.step(model_output, timestep, sample, mask_token_id)",
                *(
                    "BlockRefinementSchedulerOutput.prev_sample",
                    "BlockRefinementSchedulerOutput.transfer_index",
                ),
            ],
        },
    ),
}


@pytest.mark.parametrize("name", ENGINES)
def test_what_the_adapter_relies_on_is_in_the_engine_s_source(name: str):
    engine = ENGINES[name]
    try:
        version = importlib.metadata.version(engine.distribution)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(
            f"{name} is not installed (pip install --no-deps): its interface was read in {engine.read}"
        )
    moved = []
    for path, expected in engine.files.items():
        file = installed(engine.distribution, path)
        if file is None:
            moved.append(f"there is no {path}")
            continue
        outline = Outline(file)
        moved += [f"{path}: {text}" for each in expected if (text := outline.missing(each)) is not None]
    read = f"{name} {version} has moved since {engine.read}, which the adapter was written for"
    assert not moved, f"{read}: {'; '.join(moved)}"


def test_a_moved_interface_is_told(tmp_path: Path):
    file = tmp_path / "engine.py"
    file.write_text(
        "from elsewhere import helper as tool\n"
        "class Sampler:\n"
        "    kind: str = 'x'\n"
        "    def __init__(self, states):\n"
        "        self.states = states\n"
        "    def step(self, batch, logits, *, seed=None): ...\n"
        "try:\n"
        "    def merge(a, b): ...\n"
        "except ImportError: ...\n"
    )
    outline = Outline(file)
    for there in ("tool", "Sampler.kind", "Sampler.states", "Sampler.step(batch, seed)", "merge(a)"):
        assert outline.missing(there) is None
    for gone, text in {
        "Sampler.run": "there is no Sampler.run",
        "Sampler.step(logits, batch)": "Sampler.step takes (batch, logits, seed), not (logits, batch)",
        "merge(a, c)": "merge takes (a, b), not (a, c)",
    }.items():
        assert outline.missing(gone) == text


@pytest.mark.parametrize("name", ENGINES)
def test_the_adapters_say_which_version_they_were_written_for(name: str):
    adapters = Path(str(importlib.import_module("attn_sampler.adapters").__file__)).parent
    files = {"vllm": "vllm_model_state", "transformers": "run"}
    text = (adapters / f"{files.get(name, name)}.py").read_text()
    version, _, commit = ENGINES[name].read.partition(", commit ")
    known: Any = re.search(re.escape(commit or version.removesuffix(".0")), text)
    assert known is not None
