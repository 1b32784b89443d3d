"""The command ``attn-sampler``: ``demo``, ``generate``, ``trace``, ``eval``, ``models`` and ``info``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from attn_sampler import __version__, checks, collect_env, command_line, evaluate, ranks, trace_command
from attn_sampler.adapters.models import FAMILIES
from attn_sampler.backends import BACKENDS, is_backend_supported
from attn_sampler.bundled import TASKS, load_model
from attn_sampler.caching import CACHES
from attn_sampler.errors import DecodingError
from attn_sampler.key_cache import AdaptiveCache, SparseCache, parse_cache
from attn_sampler.problem_sets import parse_published
from attn_sampler.published import MODELS, FetchError, folder
from attn_sampler.published import command as published
from attn_sampler.sampler import POLICIES, make_policy

_MAX_PROBLEMS = 1000  # as many sudoku puzzles are packaged
_DEFAULT_PROBLEMS = 100
_FEW_PROBLEMS = 8
_MAX_GEN_LENGTH = 2**20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    arguments
        The words after the command's name. Default: those of this process.

    Returns
    -------
    int
        The exit status: 0; 1 where a file could not be read or written, a model not be loaded or decoded, the
        memory not suffice, or nothing reads the output any more; 130 where the user interrupted. Bad
        arguments, and files that hold something else than they should, exit with status 2.
    """
    return command_line.guarded(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    parser = command_line.Parser(
        prog="attn-sampler", description="Attention-guided decoding of masked-diffusion language models."
    )
    parser.add_argument("--version", action="version", version=f"attn-sampler {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="versions, and which backends run here and why others do not")
    collect_env.add_arguments(info)
    demo = commands.add_parser("demo", help="decode with the bundled models, all rules side by side")
    _add_demo_arguments(demo)
    evaluation = commands.add_parser("eval", help="accuracy against forward passes of every rule")
    evaluate.add_arguments(evaluation)
    generate = commands.add_parser("generate", help="decode prompts with a model of your own")
    _add_generate_arguments(generate)
    trace = commands.add_parser("trace", help="what --trace wrote, step by step: a page, or in the terminal")
    trace_command.add_arguments(trace)
    models = commands.add_parser("models", help="trained models that packages carry, and bringing one here")
    published.add_arguments(models)
    options = parser.parse_args(arguments)
    if options.command == "info":
        return collect_env.run(options)
    if options.command == "models":
        return _told(models, lambda: published.run(options))
    if options.command == "trace":
        return _told(trace, lambda: trace_command.run(options))
    if options.command == "eval":
        with ranks.joined() as group:  # left, which ends the others, when what went wrong has been told
            return _told(evaluation, lambda: evaluate.run(options, group))
    return _generate(generate, options) if options.command == "generate" else _demo(demo, options)


def _cache(text: str) -> str | SparseCache | AdaptiveCache:
    try:
        cache = parse_cache(text)
        if isinstance(cache, str):
            checks.choice("cache", cache, CACHES)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("cache: ")) from None
    return cache


def _add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--task",
        type=_demo_task,
        default="both",
        metavar="NAME",
        help="sudoku, addition or both (default); or problems of published models, as in eval: reactions, "
        "heavy-framework, light-30",
    )
    parser.add_argument(
        "--policy",
        nargs="+",
        choices=sorted(POLICIES),
        metavar="NAME",
        help=f"rules to compare, of {', '.join(sorted(POLICIES))} (default: all but attn-random "
        "and those on attention maps)",
    )
    parser.add_argument(
        "--tau",
        type=command_line.unit_interval,
        help="confidence threshold of the rules that read one (default: 0.9)",
    )
    parser.add_argument(
        "--problems",
        type=command_line.integer(1, _MAX_PROBLEMS),
        metavar="N",
        help=f"held-out problems for each task, 1 to {_MAX_PROBLEMS} (default: {_DEFAULT_PROBLEMS}, or "
        f"{_FEW_PROBLEMS} for a published model)",
    )
    parser.add_argument(
        "--temperature",
        type=command_line.temperature,
        default=0.0,
        help="0 takes the most probable token (default)",
    )
    parser.add_argument(
        "--seed", type=command_line.seed, default=0, help="of the problems and of sampling (default: 0)"
    )
    parser.add_argument(
        "--layers",
        type=command_line.layers,
        default="all",
        help="whose attention counts: all (default), last, or indices such as 0,1,-1",
    )
    parser.add_argument(
        "--backend", choices=("auto", *BACKENDS), default="auto", help="of the sampling step (default: auto)"
    )
    parser.add_argument(
        "--threads",
        type=command_line.threads,
        default=1,
        metavar="N",
        help="CPU threads (default: 1, for models this small)",
    )
    parser.add_argument("--no-live", dest="live", action="store_false", help="no animation")
    parser.add_argument(
        "--trace",
        type=command_line.output_file,
        metavar="FILE",
        help="write every commit as JSON, for attn-sampler trace; with several tasks or rules, one "
        "FILE-TASK-RULE.json for each",
    )
    parser.add_argument(
        "--svg",
        type=command_line.output_file,
        metavar="FILE",
        help="write the drawn orders of commitment as a picture",
    )


def _demo_task(name: str) -> str:
    """A name of problems to show, for argparse."""
    if name not in (*TASKS, "both"):
        try:
            parse_published(name)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"expected both, {', '.join(TASKS)} or problems of published models (reactions, "
                f"heavy-framework, light-30), got {name!r}"
            ) from None
    return name


def _told(parser: argparse.ArgumentParser, run: Callable[[], int]) -> int:
    from attn_sampler.adapters.run import LoadError

    try:
        return run()
    except (LoadError, FetchError, ImportError, DecodingError) as error:
        return command_line.fail(error)
    except ValueError as error:
        parser.error(str(error))


def _demo(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from rich.console import Console

    from attn_sampler.demo import RULES, default_tau, run_demo

    tasks = TASKS if options.task == "both" else (options.task,)
    bundled = set(tasks) <= set(TASKS)
    # No published model was trained to judge what it sees, which rules that take back need.
    default = RULES if bundled else [rule for rule in RULES if not make_policy(rule).revises]
    policies = tuple(dict.fromkeys(options.policy or default))
    if options.tau is not None and all(default_tau(policy) is None for policy in policies):
        parser.error(f"argument --tau: none of the chosen rules reads it ({', '.join(policies)})")
    support = is_backend_supported("decode_step", options.backend) if options.backend != "auto" else None
    if support is not None and not support.supported:
        parser.error(f"argument --backend: {options.backend} cannot run here: {support.reason}")
    if bundled and options.layers != "all":
        depth = min(load_model(task).config.num_layers for task in tasks)
        for layer in options.layers:
            if not -depth <= layer < depth:
                parser.error(f"argument --layers: the models have layers 0 to {depth - 1}, got {layer}")

    try:
        command_line.check_distinct({"--trace": options.trace, "--svg": options.svg})
    except ValueError as error:
        parser.error(str(error))
    several = len(tasks) * len(policies) > 1
    if several and options.trace is not None and options.trace.exists() and not options.trace.is_file():
        parser.error(f"argument --trace: expected a name for several files, got {options.trace}")
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, 100))
    from attn_sampler.adapters.run import LoadError

    try:
        with command_line.cpu_threads(options.threads):
            runs = run_demo(
                console,
                tasks=tasks,
                policies=policies,
                tau=options.tau,
                problems=options.problems or (_DEFAULT_PROBLEMS if bundled else _FEW_PROBLEMS),
                temperature=options.temperature,
                seed=options.seed,
                layers=options.layers,
                backend=options.backend,
                live=options.live,
                svg=options.svg,
            )
    except (LoadError, FetchError, ImportError, DecodingError, TypeError, ValueError) as error:
        if bundled:
            raise  # which is a fault of ours
        return command_line.fail(error)
    if options.trace is not None:
        for run in runs:
            path = options.trace
            if several:
                path = path.with_name(f"{path.stem}-{run.task.name}-{run.policy}{path.suffix}")
            run.trace.name_tokens(run.task.symbols)
            run.trace.width = run.task.grid_width if run.task.cell_separator else None
            run.trace.save(path)
            console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    return 0


def _add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        metavar="PATH",
        help=f"a folder, an id on the hub, or one of attn-sampler models ({', '.join(MODELS)})",
    )
    parser.add_argument(
        "--prompt",
        type=command_line.text,
        required=True,
        nargs="+",
        metavar="TEXT",
        help="decoded together; mask tokens in their text are filled in, and the whole text is printed",
    )
    parser.add_argument(
        "--suffix",
        type=command_line.text,
        nargs="+",
        metavar="TEXT",
        help="what follows the new tokens: one for all prompts, or one for each",
    )
    parser.add_argument(
        "--policy", choices=sorted(POLICIES), metavar="NAME", default="attn", help="the rule (default: attn)"
    )
    parser.add_argument(
        "--tau", type=command_line.unit_interval, help="confidence threshold of rules that read one"
    )
    parser.add_argument(
        "--gen-length",
        type=command_line.integer(0, _MAX_GEN_LENGTH),
        metavar="N",
        help="new tokens behind each prompt (default: 128; none for masked language models such as BERT, "
        "which fill in those that the prompt masks)",
    )
    parser.add_argument(
        "--block-length",
        type=command_line.positive,
        metavar="N",
        help="positions decoded together (default: the model's)",
    )
    parser.add_argument(
        "--eos-token-id",
        type=command_line.seed,
        nargs="+",
        metavar="ID",
        help="tokens that end a text (default: the model's)",
    )
    parser.add_argument(
        "--eos-last",
        action="store_true",
        help="leave the end of text for last in each block, as models that predict it too early need",
    )
    parser.add_argument(
        "--stop",
        type=command_line.text,
        nargs="+",
        metavar="TEXT",
        help="texts that end a continuation, and are cut off",
    )
    parser.add_argument(
        "--guidance-scale",
        type=command_line.non_negative,
        default=0.0,
        metavar="W",
        help="of classifier-free guidance, which takes a second pass in each step (default: 0, none)",
    )
    parser.add_argument(
        "--cache",
        type=_cache,
        default="none",
        metavar="NAME",
        help=f"of keys and values: {', '.join(CACHES)}; with options as in sparse:budget=256 (default: none)",
    )
    parser.add_argument(
        "--layers",
        type=command_line.layers,
        default="all",
        help="whose attention counts, as in demo (default: all)",
    )
    parser.add_argument(
        "--temperature",
        type=command_line.temperature,
        default=0.0,
        help="0 takes the most probable token (default)",
    )
    parser.add_argument(
        "--top-k",
        type=command_line.integer(0, 2**31 - 1),
        default=0,
        metavar="K",
        help="draw from the K most probable tokens (default: 0, all)",
    )
    parser.add_argument(
        "--top-p",
        type=command_line.top_p,
        default=1.0,
        metavar="P",
        help="draw from the most probable tokens that make up P of the probability (default: 1, all)",
    )
    parser.add_argument(
        "--min-p",
        type=command_line.unit_interval,
        default=0.0,
        metavar="P",
        help="draw from tokens at least P times as probable as the most probable one (default: 0, all)",
    )
    parser.add_argument("--seed", type=command_line.seed, default=0, help="of sampling (default: 0)")
    parser.add_argument("--backend", choices=("auto", *BACKENDS), default="auto", help="default: auto")
    parser.add_argument(
        "--trace",
        type=command_line.output_file,
        metavar="FILE",
        help="write every commit as JSON, for attn-sampler trace",
    )
    parser.add_argument("--no-chat", dest="chat", action="store_false", help="leave out the chat template")
    parser.add_argument("--device", help="default: cuda where there is one, or else cpu")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="default: auto"
    )
    parser.add_argument(
        "--adapter", choices=tuple(FAMILIES), help="how the model is called (default: by its model_type)"
    )
    parser.add_argument("--attention", metavar="NAME", help="attn_implementation of transformers")
    parser.add_argument("--mask-token-id", type=command_line.seed, metavar="ID", help="default: the model's")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the model, as most need"
    )
    parser.add_argument("--any-version", action="store_true", help="use an untested version of transformers")


def _generate(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from attn_sampler.adapters.run import LoadError, decode, load, token_text

    if options.tau is not None:
        try:
            make_policy(options.policy, tau=options.tau)
        except TypeError:
            parser.error(f"argument --tau: the rule {options.policy} does not read it")
    count = len(options.prompt)
    suffixes = options.suffix * count if options.suffix and len(options.suffix) == 1 else options.suffix
    if suffixes and len(suffixes) != count:
        parser.error(f"argument --suffix: expected 1 or {count}, as there are prompts, got {len(suffixes)}")
    try:
        known = options.model in MODELS
        checkpoint = load(
            str(folder(options.model)) if known else options.model,
            family=options.adapter,
            mask_token_id=options.mask_token_id,
            device=options.device,
            dtype=options.dtype,
            attention=options.attention,
            trust_remote_code=options.trust_remote_code,
            any_version=options.any_version,
        )
        texts, generation = decode(
            checkpoint,
            options.prompt,
            chat=options.chat,
            suffixes=suffixes,
            stop=options.stop,
            eos_token_id=options.eos_token_id,
            eos_last=options.eos_last,
            guidance_scale=options.guidance_scale,
            policy=options.policy,
            tau=options.tau,
            gen_length=options.gen_length,
            block_length=options.block_length,
            cache=options.cache,
            layers=options.layers,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            seed=options.seed,
            backend=options.backend,
            trace=options.trace is not None,
            progress=sys.stderr.isatty(),
        )
    except (LoadError, FetchError, ImportError, TypeError, ValueError, RuntimeError) as error:
        return command_line.fail(error)
    for text in texts:
        print(text)
    seconds = generation.forward_seconds + generation.sampling_seconds
    print(
        f"{generation.num_forward_passes.tolist()} forward passes, {seconds:.1f} s, "
        f"{generation.sampling_seconds / seconds:.1%} of it sampling",
        file=sys.stderr,
    )
    if generation.trace is not None:
        generation.trace.name_tokens(lambda token_id: token_text(checkpoint.tokenizer, token_id))
        generation.trace.save(options.trace)
        print(f"wrote {options.trace}", file=sys.stderr)
    return 0
