"""Train and evaluate the bundled models.

    python -m attn_sampler.bundled.train sudoku --out sudoku.safetensors --compile
    python -m attn_sampler.bundled.train sudoku --evaluate sudoku.safetensors

The objective is LLaDA's: each sequence draws a masking rate t from (0, 1], each of its answer positions is
blanked with probability t, and the cross-entropy at the blanks is weighted by 1 / t, which bounds the
negative log-likelihood per answer token. ``--edits`` trains a model that judges the tokens it sees too, as
LLaDA2.1 does (``edit_loss``). Matrices inside the blocks are trained by Muon, everything else by AdamW; the
learning rate warms up, stays, and decays linearly. Training needs ``torch.optim.Muon`` (torch 2.9 or later);
using the models does not.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attn_sampler import command_line
from attn_sampler.generate import generate

from . import TASKS, load_model, load_task
from .model import TinyMaskedLM, TinyMaskedLMConfig, load_weights, save_weights
from .tasks import SUDOKU_PUZZLES_COUNT, Addition, Score

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .tasks import Task

__all__ = ["RECIPES", "Recipe", "edit_loss", "evaluate", "masked_loss", "train"]

MIN_MASKING_RATE = 1e-3
WILD_GUESSES = 0.05  # part of those of edit_loss


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How long and how fast to train.

    Attributes
    ----------
    steps, batch_size, seed
        Number of updates, sequences per update, and the seed of weights, data and masks.
    muon_lr, muon_weight_decay, adamw_lr
        Peak learning rates and Muon's weight decay (AdamW decays nothing).
    warmup_steps, decay_fraction
        Linear warm-up, and the part of all steps spent in the linear decay to zero at the end.
    max_grad_norm
        Gradients are clipped to this global norm.
    edits
        Train by ``edit_loss``, not by ``masked_loss``.
    """

    steps: int
    batch_size: int = 128
    seed: int = 0
    muon_lr: float = 0.02
    muon_weight_decay: float = 0.01
    adamw_lr: float = 2e-3
    warmup_steps: int = 100
    decay_fraction: float = 0.4
    max_grad_norm: float = 1.0
    edits: bool = False

    def learning_rate_factor(self, step: int) -> float:
        """Part of the peak learning rate at ``step`` (counted from 0)."""
        warmup = (step + 1) / max(1, self.warmup_steps)
        decay = (self.steps - step) / max(1.0, self.decay_fraction * self.steps)
        return min(1.0, warmup, decay)


RECIPES = {
    "sudoku": Recipe(steps=6000),
    "addition": Recipe(steps=5500),
    # These go on from the models above: how blanks are filled is known.
    "sudoku-edits": Recipe(steps=2000, muon_lr=0.01, adamw_lr=1e-3, edits=True),
    "addition-edits": Recipe(steps=2000, muon_lr=0.01, adamw_lr=1e-3, edits=True),
}


def masked_loss(
    model: Callable[[Tensor], Tensor],
    tokens: Tensor,  # [B, L] int64
    answer: Tensor,  # [B, L] bool
    mask_token_id: int,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> Tensor:
    """LLaDA's training loss in nats per answer token, one draw of masks; the model is on ``device``.

    The masking rates of a batch are the B points of one randomly shifted regular grid on (0, 1]: each
    is uniform, and together they cover the range evenly, which lowers the variance of the sum.
    """
    rate = MIN_MASKING_RATE + (1 - MIN_MASKING_RATE) * _grid(len(tokens), generator)
    blank = answer & (torch.rand(tokens.shape, generator=generator) < rate)
    rate, blank, tokens, answer = (x.to(device) for x in (rate, blank, tokens, answer))
    logits = model(tokens.masked_fill(blank, mask_token_id))
    return _nats_per_answer_token(logits, tokens, answer, blank, rate)


def edit_loss(
    model: Callable[[Tensor], Tensor],
    tokens: Tensor,  # [B, L] int64
    answer: Tensor,  # [B, L] bool
    mask_token_id: int,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> Tensor:
    """``masked_loss`` on half of the sequences; on the others, and on these, the nats at what is shown.

    What a decoder gets wrong is what its model was sure of when it committed several tokens at once. So in
    half of the sequences the blanks of which the model is surer than a threshold, uniform on [0.3, 1), show
    what it draws for each apart from the others, and one in twenty any token. The prediction at a token that
    is shown then says how likely it is right. Blanks count in the other half alone: what is predicted there
    stays what follows from the tokens around it, as if they were right.
    """
    batch = len(tokens)
    rate = MIN_MASKING_RATE + (1 - MIN_MASKING_RATE) * _grid(batch, generator)
    tau = 0.3 + 0.7 * torch.rand(batch, 1, generator=generator)
    guesses_here = torch.rand(batch, 1, generator=generator) < 0.5
    blank, wild = (torch.rand(tokens.shape, generator=generator) < x for x in (rate, WILD_GUESSES))
    moved = (x.to(device) for x in (rate, tau, guesses_here, blank & answer, wild, tokens, answer))
    rate, tau, guesses_here, blank, wild, tokens, answer = moved
    shown = tokens.masked_fill(blank, mask_token_id)
    with torch.no_grad():
        logits = model(shown)
        guessed = blank & guesses_here & (logits.softmax(dim=2).amax(dim=2) >= tau)
        logits = torch.where(wild[..., None] & logits.isfinite(), 0.0, logits)
        noise = torch.empty(logits.shape).exponential_(generator=generator).log().to(device)
        guesses = (logits - noise).argmax(dim=2)
    logits = model(torch.where(guessed, guesses, shown))
    loss = _nats_per_answer_token(logits, tokens, answer, blank & ~guesses_here, rate)
    seen = answer & (guessed | ~blank)
    return loss + _nats_per_answer_token(logits, tokens, answer, seen, torch.ones_like(rate))


def _grid(batch: int, generator: torch.Generator) -> Tensor:
    """B points [B, 1] of a regular grid on [0, 1), randomly shifted."""
    return ((torch.arange(batch) + torch.rand(1, generator=generator)) / batch)[:, None]


def _nats_per_answer_token(
    logits: Tensor, tokens: Tensor, answer: Tensor, counted: Tensor, rate: Tensor
) -> Tensor:
    """Cross-entropy at the positions ``counted`` [B, L], weighted by 1 / rate [B, 1], over answer length."""
    nats = F.cross_entropy(logits[counted], tokens[counted], reduction="none")
    weight = 1 / (rate * answer.sum(dim=1, keepdim=True))
    return (nats * weight.expand_as(counted)[counted]).sum() / len(tokens)


def make_optimizers(model: TinyMaskedLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else, at their peak rates."""
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    in_matrices = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in in_matrices]
    return [
        torch.optim.Muon(matrices, lr=recipe.muon_lr, momentum=0.95, weight_decay=recipe.muon_weight_decay),
        torch.optim.AdamW(others, lr=recipe.adamw_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(
    task: Task,
    recipe: Recipe,
    config: TinyMaskedLMConfig | None = None,
    initial: TinyMaskedLM | None = None,
    compile_model: bool = False,
    report: Callable[[int, float], None] | None = None,
) -> TinyMaskedLM:
    """Train a model from scratch on the training side of the task's split.

    Parameters
    ----------
    task, recipe
        What to learn, and how.
    config
        Sizes of the model; by default those of the bundled models.
    initial
        A model to go on from, which is trained itself, instead of one from scratch.
    compile_model
        Run the forward and backward passes through ``torch.compile`` (needs a C++ compiler).
    report
        Called after every step with the step (from 0) and its loss.

    Returns
    -------
    TinyMaskedLM
        In evaluation mode, float32.

    Raises
    ------
    RuntimeError
        This torch has no ``torch.optim.Muon``.
    """
    if not hasattr(torch.optim, "Muon"):
        raise RuntimeError(
            f"training needs torch.optim.Muon, from torch 2.9 on, and this is torch {torch.__version__}"
        )
    with torch.random.fork_rng(devices=[]):  # the caller's global stream stays as it was
        torch.manual_seed(recipe.seed)
        model = initial or TinyMaskedLM(config or TinyMaskedLMConfig(task.vocab_size, task.mask_token_id))
    generator = torch.Generator().manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    parameters = list(model.parameters())
    optimizers = make_optimizers(model, recipe)
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    forward: Callable[[Tensor], Tensor] = torch.compile(model) if compile_model else model
    model.train()
    for step in range(recipe.steps):
        factor = recipe.learning_rate_factor(step)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * factor
        tokens, answer = task.sample(recipe.batch_size, rng, held_out=False)
        loss = (edit_loss if recipe.edits else masked_loss)(
            forward,
            torch.from_numpy(tokens),
            torch.from_numpy(answer),
            task.mask_token_id,
            generator,
        )
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
        for optimizer in optimizers:
            optimizer.step()
        if report is not None:
            report(step, loss.item())
    return model.eval()


def evaluate(model: TinyMaskedLM, task: Task, prompt: NDArray[np.int64], policy: str = "confidence") -> Score:
    """Decode problems in one batch and judge them by the task's rules.

    Parameters
    ----------
    prompt
        int64 [n, L], for example the first array that ``task.problems`` returns. At least one problem.
    policy
        The order of decoding, a name of ``attn_sampler.sampler.POLICIES``.
    """
    generation = generate(
        model,
        torch.from_numpy(prompt),
        mask_token_id=task.mask_token_id,
        block_length=task.length,
        policy=policy,
    )
    return Score.of(task.check(generation.tokens.numpy(), prompt))


def _report_scores(model: TinyMaskedLM, task: Task, n: int, seed: int) -> None:
    prompts = {"": task.problems(n, seed=seed)[0]}
    if isinstance(task, Addition):
        prompts = {
            f", {blank} blank": task.problems(n, seed=seed, blank=blank)[0]
            for blank in ("sum", "first", "second")
        }
    for title, prompt in prompts.items():
        print(f"{task.name}, held out{title}: {evaluate(model, task, prompt)}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's text."""
    return command_line.guarded(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    parser = command_line.Parser(
        prog="python -m attn_sampler.bundled.train", description="Train or evaluate a bundled model."
    )
    parser.add_argument("task", choices=TASKS)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument(
        "--out", type=command_line.output_file, help="train, and write float16 safetensors here"
    )
    action.add_argument(
        "--evaluate", type=command_line.input_file, metavar="FILE", help="score this file's model"
    )
    parser.add_argument("--steps", type=command_line.positive, help="updates (default: the recipe's)")
    parser.add_argument(
        "--seed", type=command_line.seed, default=0, help="of training and of the problems (default: 0)"
    )
    parser.add_argument(
        "--edits",
        action="store_true",
        help="train the bundled model further, with wrong tokens among those shown",
    )
    parser.add_argument("--compile", action="store_true", help="train through torch.compile")
    parser.add_argument("--threads", type=command_line.threads, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--problems", type=int, default=500, help="how many to score (default: 500)")
    options = parser.parse_args(arguments)
    if not 1 <= options.problems <= SUDOKU_PUZZLES_COUNT:
        parser.error(f"argument --problems: expected 1 to {SUDOKU_PUZZLES_COUNT}, got {options.problems}")
    torch.set_num_threads(options.threads)
    task = load_task(options.task)
    if options.out is not None:
        name = f"{options.task}-edits" if options.edits else options.task
        recipe = dataclasses.replace(RECIPES[name], seed=options.seed)
        if options.steps is not None:
            recipe = dataclasses.replace(recipe, steps=options.steps)
        cpu_start, wall_start = time.process_time(), time.perf_counter()
        window: list[float] = []

        def report(step: int, loss: float) -> None:
            window.append(loss)
            if len(window) == 200 or step + 1 == recipe.steps:
                print(
                    f"step {step + 1}/{recipe.steps}  mean loss {sum(window) / len(window):.4f}  "
                    f"cpu {time.process_time() - cpu_start:.0f} s  "
                    f"wall {time.perf_counter() - wall_start:.0f} s",
                    flush=True,
                )
                window.clear()

        initial = load_model(options.task) if options.edits else None
        model = train(task, recipe, initial=initial, compile_model=options.compile, report=report)
        save_weights(model, options.out, {"task": task.name, "recipe": str(dataclasses.asdict(recipe))})
    # From the file in both cases: the score is that of the rounded weights.
    try:
        model = load_weights(options.evaluate or options.out)
    except ValueError as error:
        parser.error(str(error))
    if model.config.vocab_size != task.vocab_size:
        parser.error(f"argument --evaluate: expected a model of {task.name}, got {options.evaluate}")
    _report_scores(model, task, options.problems, options.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
