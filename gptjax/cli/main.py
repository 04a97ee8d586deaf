"""The `gptjax` command. Each command imports what it needs when it runs.

Exit codes: 0 done; 1 a check, or the machine, failed; 2 bad input; 75 stopped on
request with everything saved.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptjax.cli import arguments, data, train
from gptjax.cli.session import log_to_stderr, run_interruptible, setup_session
from gptjax.cli.train import run_train
from gptjax.config import find_config, load_config
from gptjax.errors import ConfigError, GptjaxError, ResourceError
from gptjax.runtime import cpu_flags
from gptjax.runtime.timing import mark_phase

HELP_VERBOSE = "say what the time to the first result is spent on"
HELP_FAST_CPU = "set XLA and malloc for a CPU with AVX-512; takes more memory, see gptjax/runtime/cpu_flags.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.command not in (run_train, run_plan, run_launch):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    args.rest, args.words = rest, list(sys.argv[1:] if argv is None else argv)
    if getattr(args, "fast_cpu", False):  # before jax starts, which reads it once
        cpu_flags.enable_fast_cpu()
    try:
        with contextlib.ExitStack() as args.until_end:
            return args.command(args) or 0
    except GptjaxError as error:
        print(f"gptjax: {error}", file=sys.stderr)
        return 1 if isinstance(error, ResourceError) else 2
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        return 130


def make_parser() -> argparse.ArgumentParser:
    """All commands; none of their modules is imported for it."""
    parser = argparse.ArgumentParser(
        prog="gptjax",
        allow_abbrev=False,
        description="The whole life of a GPT in JAX.",
        epilog="MODEL is a run folder, a model folder, a Hugging Face, OpenAI or book "
        "folder, a public size (gpt2, gpt2-medium, gpt2-large, gpt2-xl), or the "
        "OWNER/NAME of a GPT-2 on the Hugging Face hub.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(function: Any, name: str, into: Any = commands) -> Any:
        sub = into.add_parser(
            name,
            help=function.__doc__.splitlines()[0],
            description=function.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,  # a typo is a mistake, not a guess
        )
        sub.set_defaults(command=function)
        if function in (
            run_quickstart,
            run_train,
            run_generate,
            run_classify,
            start_chat,
            run_evaluate,
        ):
            sub.add_argument("-v", "--verbose", action="store_true", help=HELP_VERBOSE)
        if function in (
            run_quickstart,
            run_train,
            run_generate,
            run_classify,
            start_chat,
            run_evaluate,
            run_bench,
        ):
            sub.add_argument("--fast-cpu", action="store_true", help=HELP_FAST_CPU)
        return sub

    sub = add(run_quickstart, "quickstart")
    sub.add_argument("--run", type=Path, default=Path("runs/quickstart"), metavar="DIR")
    train.add_train_arguments(add(run_train, "train"))
    arguments.add_generate_arguments(add(run_generate, "generate"))
    arguments.add_classify_arguments(add(run_classify, "classify"))
    arguments.add_chat_arguments(add(start_chat, "chat"))
    arguments.add_evaluate_arguments(add(run_evaluate, "eval"))
    sub = add(run_import, "import")
    sub.add_argument("source", metavar="SOURCE", help="as MODEL, see gptjax --help")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR")
    sub = add(run_export, "export")
    sub.add_argument("model", metavar="MODEL")
    sub.add_argument("--to", required=True, metavar="hf|book")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR")
    arguments.add_plan_arguments(add(run_plan, "plan"))
    arguments.add_launch_arguments(add(run_launch, "launch"))
    arguments.add_bench_arguments(add(run_bench, "bench"))
    add(check_installation, "doctor")

    data.add_data_commands(commands, add)
    return parser


def run_quickstart(args: argparse.Namespace) -> int:
    """Train a small GPT on text that every Python carries, and let it write."""

    def run() -> None:
        setup_session(args, args.run / "compiled")
        from gptjax.tasks.quickstart import quickstart

        mark_phase("importing")
        quickstart(args.run)

    return run_interruptible(run)


def load_model(args: argparse.Namespace) -> Any:
    """`begin`, and the model that is MODEL."""
    setup_session(args)
    from gptjax.weights.load import load

    mark_phase("importing")
    model = load(args.model, log_to_stderr, int8=args.int8)
    mark_phase("loading")
    return model


def run_generate(args: argparse.Namespace) -> None:
    """Continue a prompt."""
    from gptjax.inference.generate import complete, few_shot_prompt, stream

    prompt = sys.stdin.read() if args.prompt is None else args.prompt
    if args.few_shot:
        prompt = few_shot_prompt(args.few_shot, prompt)
        args.stop = args.stop or ["\n"]
    options = arguments.sampling_options_from(args)
    model = load_model(args)
    if args.chat:
        from gptjax.inference.assistant import answer

        print(answer(model, prompt, **options))
        return
    if args.samples == 1 and not args.json:
        print("" if args.few_shot else prompt, end="", flush=True)
        for piece in stream(model, prompt, **options):
            print(piece, end="", flush=True)
        print()
        return
    for sample in complete(model, prompt, samples=args.samples, **options):
        if args.json:
            print(json.dumps(dataclasses.asdict(sample), ensure_ascii=False))
        else:
            print(f"--- {sample.finish_reason}\n{prompt}{sample.text}")


def start_chat(args: argparse.Namespace) -> None:
    """Talk to an assistant in the terminal."""
    from gptjax.cli.chat import run_chat

    run_chat(load_model(args), args.model, arguments.sampling_options_from(args))


def run_classify(args: argparse.Namespace) -> None:
    """Label texts, or every row of a file, with probabilities."""
    from gptjax.inference.classify import classify
    from gptjax.inference.label_file import label_file

    if (args.file is None) != (args.out is None) or (args.file and args.texts):
        raise ConfigError(
            "classify takes texts, or --file IN together with --out OUT. Give one."
        )
    model = load_model(args)
    if args.file:
        label_file(
            args.file,
            args.out,
            lambda texts: [verdict[:2] for verdict in classify(model, texts)],
            text_column=args.text,
            log=log_to_stderr,
        )
        return
    texts = args.texts or [line for line in sys.stdin.read().splitlines() if line]
    for text, verdict in zip(texts, classify(model, texts), strict=True):
        if args.json:
            print(json.dumps({"text": text, **verdict._asdict()}, ensure_ascii=False))
        else:
            print(f"{verdict.label} {verdict.probability:.3f}  {text}")


def run_evaluate(args: argparse.Namespace) -> None:
    """Loss on a text, accuracy on labelled texts, or answers to instructions."""
    model = load_model(args)
    if args.data:
        from gptjax.evaluation.instructions import evaluate_file
        from gptjax.evaluation.llm_judge import LLMJudge

        judge = LLMJudge(args.judge, args.judge_model) if args.judge else None
        numbers, tasks = evaluate_file(model, args.data, args.out, judge, log_to_stderr)
        if args.json:
            print(json.dumps(numbers | ({"tasks": tasks} if tasks else {})))
            return
        for task, scores in tasks.items():
            print(f"{task:<18} {scores['exact_match']:.4f} exact")
        print(
            "\n".join(
                f"{name:<18} {format_value(value)}" for name, value in numbers.items()
            )
        )
        return
    if args.labelled:
        from gptjax.evaluation.classification import evaluate_labeled_file

        numbers = evaluate_labeled_file(model, args.labelled)
        lines = [f"{name:<18} {value:.4f}" for name, value in numbers.items()]
        print(json.dumps(numbers) if args.json else "\n".join(lines))
        return
    from gptjax.data.text import read_text_file
    from gptjax.evaluation.perplexity import score

    result = score(model, read_text_file(args.text), stride=args.stride)
    if args.json:
        print(json.dumps(result.to_dict()))
        return
    print(f"tokens         {result.tokens:,} for {result.bytes:,} bytes")
    print(f"loss           {result.loss:.4f} nats per token")
    print(f"perplexity     {result.perplexity:.4f}")
    if result.bits_per_byte is not None:
        print(f"bits per byte  {result.bits_per_byte:.4f}")


def format_value(value: float | int | None) -> str:
    """A number for a line of a table."""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def run_import(args: argparse.Namespace) -> None:
    """Read public or foreign weights and write them as a model folder."""
    from gptjax.weights.load import convert_model

    convert_model(args.source, args.out, print)


def run_export(args: argparse.Namespace) -> None:
    """Write a model for other tools, read it back and compare its logits."""
    from gptjax.weights.export import export_model
    from gptjax.weights.load import load

    print(export_model(load(args.model, log_to_stderr), args.to, args.out))


def run_plan(args: argparse.Namespace) -> int:
    """Parameters, FLOPs, memory, what is sent, whether it fits: before anything runs.

    TPUs need not be there: with gptjax[tpu-plan] their own compiler is asked. Exits
    with 1 where the run does not fit.
    """
    from gptjax.training.hardware import local_topology, parse_topology

    config = arguments.apply_overrides(load_config(find_config(args.config)), args.rest)
    where = parse_topology(args.topology) if args.topology else local_topology()
    if args.topology:  # before JAX starts: else libtpu looks for a TPU
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        if where.chip.platform == "cpu":
            os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(where.devices))
    from gptjax.planning import aot, plan

    if able := aot.can_compile(where) and not args.estimate:
        log_to_stderr(f"compiling for {where} ...")
    planned = plan.make_plan(config, where, able)
    if args.json:
        print(json.dumps(planned.to_dict()))
    else:
        print("\n".join(plan.format_plan(planned)))
    if not able and not args.estimate and where.chip.platform == "tpu":
        log_to_stderr("For the compiler's own figures: pip install 'gptjax[tpu-plan]'")
    if args.against:
        plan.compare_with_profile(planned, args.against, print)
    return 1 if planned.fits is False else 0


def run_bench(args: argparse.Namespace) -> None:
    """Speed on this machine, alone or beside PyTorch: training, writing, loading."""
    say = functools.partial(print, flush=True)
    if args.device and args.peers:
        from gptjax.bench.compare_torch import bench_against_torch

        only, options = args.only, {"context": args.context, "repeats": args.pairs}
        sweep = arguments.sweep_flags(args)
        found = bench_against_torch(
            say, preset=args.preset, only=only, device_flags=sweep, **options
        )
    elif args.device:
        from gptjax.bench.device import bench_device
        from gptjax.config import GPTConfig

        shape: Any = {"context_length": args.context, "remat": "none"}
        config = GPTConfig.preset(args.preset, **shape)
        options = {"backends": tuple(args.attention), "only": tuple(args.only)}
        found = bench_device(config, say, tuple(args.rows), **options)
    else:
        from gptjax.bench.suite import bench_machine

        options = {"peers": args.peers, "repeats": args.pairs, "only": tuple(args.only)}
        found = bench_machine(say, preset=args.preset, **options)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def run_launch(args: argparse.Namespace) -> None:
    """Write the file that makes a scheduler train on many hosts; start nothing."""
    from gptjax.cli.launch import launch
    from gptjax.cli.machines import Machines

    arguments.apply_overrides(
        load_config(find_config(args.config)), args.rest
    )  # refuses mistakes
    machines = {f.name: getattr(args, f.name) for f in dataclasses.fields(Machines)}
    text = launch(
        args.kind,
        args.config,
        args.rest,
        run=args.run,
        out=args.out,
        dry_run=args.dry_run,
        **machines,
    )
    if args.out is None or args.dry_run:
        print(text, end="")
    else:
        print(f"wrote    {args.out}")


def check_installation(args: argparse.Namespace) -> int:
    """Versions, devices, what is missing and the line that fixes it."""
    from gptjax.cli.doctor import run_doctor

    return run_doctor()
