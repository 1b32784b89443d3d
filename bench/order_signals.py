"""What one pass tells of where its predictions are right: confidence, attention received, attention given.

    python -m bench.order_signals --task reactions reactions-50 heavy-framework --problems 1000 --out FOLDER

A rule that commits one token is as good as its choice. Of each problem, the model's first pass predicts every
blank; which predictions are right is known. A signal is judged by its AUC: how often a blank whose prediction
is right has the larger value than one whose prediction is wrong (0.5 is chance; problems with both kinds
count), and by how often the blank of the largest value is right. Differences to confidence are paired over
the problems, with bootstrap intervals. Attention is that of every head and layer, apart and added up:

received           column sums, over all rows, or those of masked, visible or special tokens alone
received share     of what a position receives, the part from visible and special rows
given              row sums, over the columns of masked, visible or special tokens
lean               the attention given to masked columns, each by the doubt 1 - p of what is predicted there
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from attn_sampler import AttentionCapture, command_line, documents
from attn_sampler.problem_sets import EvaluatedModel, ProblemSet, default_model, load_model, make_problems
from attn_sampler.report import bootstrap_mean


def attention(model: EvaluatedModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [T, V], the mask token's -inf, and attention [layers, H, T, T] of a sequence [T], float64."""
    with torch.no_grad(), AttentionCapture(keep=True) as capture:
        logits = model.model(tokens[None])[0].to(torch.float64, copy=True)
    logits[:, model.mask_token_id] = -torch.inf
    maps = []
    for q, k, softmax_lse in capture.layers:
        q, k = q[0].double(), k[0].double()  # [H, T, D]
        k = k.repeat_interleave(len(q) // len(k), dim=0)
        maps.append(
            (q @ k.transpose(1, 2) / math.sqrt(q.shape[2]) - softmax_lse[0].double()[..., None]).exp()
        )
    return logits, torch.stack(maps)


def signals(logits: Tensor, maps: Tensor, tokens: Tensor, model: EvaluatedModel) -> dict[str, Tensor]:
    """The signals, [T] each, larger where a prediction should be right."""
    p = logits.softmax(dim=-1)
    confidence = p.amax(dim=-1)
    masked = tokens == model.mask_token_id
    special = torch.isin(
        tokens, torch.tensor(sorted({*model.tokenizer.all_special_ids} - {model.mask_token_id}))
    )
    visible = ~masked & ~special
    depth, heads, length = maps.shape[:3]
    mean = maps.mean(dim=(0, 1))
    received = mean.sum(dim=0)
    lean = (mean * (masked * (1 - confidence))[None]).sum(dim=1)
    result = {
        "confidence": confidence,
        "entropy": torch.special.xlogy(p, p).sum(dim=-1),
        "received": received,
        "received, masked rows": mean[masked].sum(dim=0),
        "received, visible rows": mean[visible].sum(dim=0),
        "received, special rows": mean[special].sum(dim=0),
        "received, no special rows": mean[~special].sum(dim=0),
        "received share": mean[~masked].sum(dim=0) / received,
        "given, not to masked": 1 - mean[:, masked].sum(dim=1),
        "given, to visible": mean[:, visible].sum(dim=1),
        "given, to special": mean[:, special].sum(dim=1),
        "diagonal": mean.diagonal(),
        "lean": 1 - lean,
        "confidence x lean": confidence * (1 - lean),
        "confidence x received": confidence * received,
        "confidence x given": confidence * (1 - mean[:, masked].sum(dim=1)),
        "left to right": -torch.arange(length).double(),
        "random": torch.rand(length, generator=torch.Generator().manual_seed(length)).double(),
    }
    for name, layers in (("first", maps[: depth // 3]), ("last", maps[-(depth // 3) :])):
        result[f"received, {name} third"] = layers.mean(dim=(0, 1)).sum(dim=0)
    by_head = maps.mean(dim=0).sum(dim=1)  # [H, T], over the layers
    result |= {f"received, head {head}": by_head[head] for head in range(heads)}
    return result


def auc(value: Tensor, right: Tensor) -> float:
    """How often a right one has the larger value; ties count half."""
    difference = value[right][:, None] - value[~right][None]
    return float(((difference > 0).double() + 0.5 * (difference == 0).double()).mean())


def judge(problems: ProblemSet, model: EvaluatedModel) -> dict[str, object]:
    """Of each signal: its AUC and the rate at which its first choice is right, as (value, low, high)."""
    aucs: dict[str, list[float]] = defaultdict(list)
    firsts: dict[str, list[float]] = defaultdict(list)
    base, self_reliance = [], []
    for prompt, answer in zip(problems.prompts, problems.answers, strict=True):
        logits, maps = attention(model, prompt)
        masked = prompt == model.mask_token_id
        values = signals(logits, maps, prompt, model)
        right = logits.argmax(dim=-1)[masked] == answer
        base.append(float(right.double().mean()))
        self_reliance.append(float(maps.mean(dim=(0, 1))[masked][:, masked].sum(dim=1).mean()))
        for name, value in values.items():
            firsts[name].append(float(right[value[masked].argmax()]))
            if right.any() and not right.all():
                aucs[name].append(auc(value[masked], right))
    summary = {}
    for name in firsts:
        less = [x - y for x, y in zip(aucs[name], aucs["confidence"], strict=True)]
        summary[name] = {
            "auc": bootstrap_mean(aucs[name]) if less else None,
            "auc less confidence": bootstrap_mean(less) if less else None,
            "first choice": bootstrap_mean(firsts[name]),
        }
    return {
        "problems": len(problems),
        "with both": len(aucs["confidence"]),
        "predicted right": bootstrap_mean(base),
        "masked to masked": bootstrap_mean(self_reliance),
        "signals": summary,
    }


def table(results: dict[str, dict], tasks: list[str]) -> str:
    """AUC of each signal by task, with the interval's half width; bold above confidence, its interval too."""
    names = list(dict.fromkeys(name for task in tasks for name in results[task]["signals"]))
    names = [name for name in names if "head" not in name]
    lines = ["| signal | " + " | ".join(tasks) + " |", "|---|" + "---|" * len(tasks)]
    facts = {
        "predictions right, %": "predicted right",
        "attention of masked rows to masked, %": "masked to masked",
    }
    for label, key in facts.items():
        lines.append(
            f"| {label} | " + " | ".join(f"{100 * results[task][key][0]:.0f}" for task in tasks) + " |"
        )
    for name in names:
        cells = []
        for task in tasks:
            signal = results[task]["signals"][name]
            cell = f"{signal['auc'][0]:.3f}" if signal["auc"] else "none"
            above = signal["auc"] and signal["auc less confidence"][1] > 0
            cells.append(f"**{cell}**" if above else cell)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    cells = []
    for task in tasks:
        heads = [v["auc"][0] for k, v in results[task]["signals"].items() if "head" in k and v["auc"]]
        cells.append(f"{min(heads):.2f} to {max(heads):.2f}" if heads else "none")
    lines.append("| received, each head | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> int:
    """Judge what ``--out`` does not hold yet, and write its table beside it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", nargs="+", required=True, metavar="NAME", help="as in attn-sampler eval")
    parser.add_argument("--model", metavar="SPEC", help="default: the task's")
    parser.add_argument("--problems", type=command_line.positive, default=1000, metavar="N")
    parser.add_argument("--split", choices=("heldout", "dev"), default="heldout")
    parser.add_argument("--threads", type=command_line.threads, default=1, metavar="N")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSON, whose tasks are kept; a table is written beside it",
    )
    options = parser.parse_args(words)
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    with command_line.cpu_threads(options.threads):
        for name in options.task:
            if name in results:
                continue
            model = load_model(options.model or default_model(name))
            results[name] = judge(make_problems(name, options.problems, model, options.split), model)
            documents.write(options.out, json.dumps(results, indent=1) + "\n")
    documents.write(options.out.with_suffix(".md"), table(results, list(results)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
