"""Decode with a bundled model and compare with the reference: the installed wheel works as a whole."""

import torch

import attn_sampler
from attn_sampler.bundled import load_model, load_task

task, model = load_task("sudoku"), load_model("sudoku")
prompts = torch.from_numpy(task.problems(4)[0])
options = {"mask_token_id": task.mask_token_id, "block_length": task.length}
with_kernels = attn_sampler.generate(model, prompts, backend="cpu", **options)
by_reference = attn_sampler.generate(model, prompts, backend="reference", **options)
assert torch.equal(with_kernels.tokens, by_reference.tokens)
assert not (with_kernels.tokens == task.mask_token_id).any()
right = task.check(with_kernels.tokens.numpy(), prompts.numpy())
print(f"{right.sum()} of 4 sudokus solved by {attn_sampler.__file__}, with torch {torch.__version__}")
