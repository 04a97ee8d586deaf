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

from gptjax import cpu, data_cli, flags, train_cli
from gptjax.command import begin, remark, stoppable
from gptjax.config import config_path, read_config
from gptjax.errors import ConfigError, GptjaxError, MachineError
from gptjax.phases import reached
from gptjax.train_cli import train

VERBOSE = "say what the time to the first result is spent on"
FAST = "set XLA and malloc for a CPU with AVX-512; takes more memory, see gptjax/cpu.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.command not in (train, plan, launch):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    args.rest, args.words = rest, list(sys.argv[1:] if argv is None else argv)
    if getattr(args, "fast_cpu", False):  # before jax starts, which reads it once
        cpu.fast_cpu()
    try:
        with contextlib.ExitStack() as args.until_end:
            return args.command(args) or 0
    except GptjaxError as error:
        print(f"gptjax: {error}", file=sys.stderr)
        return 1 if isinstance(error, MachineError) else 2
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
        if function in (quickstart, train, generate, classify, chat, evaluate):
            sub.add_argument("-v", "--verbose", action="store_true", help=VERBOSE)
        if function in (quickstart, train, generate, classify, chat, evaluate, bench):
            sub.add_argument("--fast-cpu", action="store_true", help=FAST)
        return sub

    sub = add(quickstart, "quickstart")
    sub.add_argument("--run", type=Path, default=Path("runs/quickstart"), metavar="DIR")
    train_cli.arguments(add(train, "train"))
    flags.generate(add(generate, "generate"))
    flags.classify(add(classify, "classify"))
    flags.chat(add(chat, "chat"))
    flags.evaluate(add(evaluate, "eval"))
    sub = add(import_model, "import")
    sub.add_argument("source", metavar="SOURCE", help="as MODEL, see gptjax --help")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR")
    sub = add(export, "export")
    sub.add_argument("model", metavar="MODEL")
    sub.add_argument("--to", required=True, metavar="hf|book")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR")
    flags.plan(add(plan, "plan"))
    flags.launch(add(launch, "launch"))
    flags.bench(add(bench, "bench"))
    add(doctor, "doctor")

    data_cli.add_commands(commands, add)
    return parser


def quickstart(args: argparse.Namespace) -> int:
    """Train a small GPT on text that every Python carries, and let it write."""

    def run() -> None:
        begin(args, args.run / "compiled")
        from gptjax.quickstart import quickstart

        reached("importing")
        quickstart(args.run)

    return stoppable(run)


def begun_with(args: argparse.Namespace) -> Any:
    """`begin`, and the model that is MODEL."""
    begin(args)
    from gptjax.weights.importing import load

    reached("importing")
    model = load(args.model, remark, int8=args.int8)
    reached("loading")
    return model


def generate(args: argparse.Namespace) -> None:
    """Continue a prompt."""
    from gptjax.generation import complete, few_shot_prompt, stream

    prompt = sys.stdin.read() if args.prompt is None else args.prompt
    if args.few_shot:
        prompt = few_shot_prompt(args.few_shot, prompt)
        args.stop = args.stop or ["\n"]
    options = flags.sampling_options(args)
    model = begun_with(args)
    if args.chat:
        from gptjax.answering import answer

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
            print(f"--- {sample.finish}\n{prompt}{sample.text}")


def chat(args: argparse.Namespace) -> None:
    """Talk to an assistant in the terminal."""
    from gptjax.chat import chat

    chat(begun_with(args), args.model, flags.sampling_options(args))


def classify(args: argparse.Namespace) -> None:
    """Label texts, or every row of a file, with probabilities."""
    from gptjax.data.labelling import label_file
    from gptjax.prediction import classify

    if (args.file is None) != (args.out is None) or (args.file and args.texts):
        raise ConfigError(
            "classify takes texts, or --file IN together with --out OUT. Give one."
        )
    model = begun_with(args)
    if args.file:
        label_file(
            args.file,
            args.out,
            lambda texts: [verdict[:2] for verdict in classify(model, texts)],
            text=args.text,
            say=remark,
        )
        return
    texts = args.texts or [line for line in sys.stdin.read().splitlines() if line]
    for text, verdict in zip(texts, classify(model, texts), strict=True):
        if args.json:
            print(json.dumps({"text": text, **verdict._asdict()}, ensure_ascii=False))
        else:
            print(f"{verdict.label} {verdict.probability:.3f}  {text}")


def evaluate(args: argparse.Namespace) -> None:
    """Loss on a text, accuracy on labelled texts, or answers to instructions."""
    model = begun_with(args)
    if args.data:
        from gptjax.judge import Judge
        from gptjax.judged import evaluate_file

        judge = Judge(args.judge, args.judge_model) if args.judge else None
        numbers, tasks = evaluate_file(model, args.data, args.out, judge, remark)
        if args.json:
            print(json.dumps(numbers | ({"tasks": tasks} if tasks else {})))
            return
        for task, scores in tasks.items():
            print(f"{task:<18} {scores['exact_match']:.4f} exact")
        print(
            "\n".join(f"{name:<18} {short(value)}" for name, value in numbers.items())
        )
        return
    if args.labelled:
        from gptjax.prediction import judge_file

        numbers = judge_file(model, args.labelled)
        lines = [f"{name:<18} {value:.4f}" for name, value in numbers.items()]
        print(json.dumps(numbers) if args.json else "\n".join(lines))
        return
    from gptjax.data.text import read_text
    from gptjax.evaluate import score

    result = score(model, read_text(args.text), stride=args.stride)
    if args.json:
        print(json.dumps(result.numbers()))
        return
    print(f"tokens         {result.tokens:,} for {result.bytes:,} bytes")
    print(f"loss           {result.loss:.4f} nats per token")
    print(f"perplexity     {result.perplexity:.4f}")
    if result.bits_per_byte is not None:
        print(f"bits per byte  {result.bits_per_byte:.4f}")


def short(value: float | int | None) -> str:
    """A number for a line of a table."""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def import_model(args: argparse.Namespace) -> None:
    """Read public or foreign weights and write them as a model folder."""
    from gptjax.weights.published import import_model

    import_model(args.source, args.out, print)


def export(args: argparse.Namespace) -> None:
    """Write a model for other tools, read it back and compare its logits."""
    from gptjax.weights.exporting import export
    from gptjax.weights.importing import load

    print(export(load(args.model, remark), args.to, args.out))


def plan(args: argparse.Namespace) -> int:
    """Parameters, FLOPs, memory, what is sent, whether it fits: before anything runs.

    TPUs need not be there: with gptjax[tpu-plan] their own compiler is asked. Exits
    with 1 where the run does not fit.
    """
    from gptjax.chips import here, topology

    config = flags.on_top(read_config(config_path(args.config)), args.rest)
    where = topology(args.topology) if args.topology else here()
    if args.topology:  # before JAX starts: else libtpu looks for a TPU
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        if where.chip.platform == "cpu":
            os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(where.devices))
    from gptjax import ahead, plan

    if able := ahead.can_compile(where) and not args.estimate:
        remark(f"compiling for {where} ...")
    planned = plan.make_plan(config, where, able)
    if args.json:
        print(json.dumps(planned.numbers()))
    else:
        print("\n".join(plan.lines(planned)))
    if not able and not args.estimate and where.chip.platform == "tpu":
        remark("For the compiler's own figures: pip install 'gptjax[tpu-plan]'")
    if args.against:
        plan.compare(planned, args.against, print)
    return 1 if planned.fits is False else 0


def bench(args: argparse.Namespace) -> None:
    """Speed on this machine, alone or beside PyTorch: training, writing, loading."""
    say = functools.partial(print, flush=True)
    if args.device and args.peers:
        from gptjax.bench.beside import bench_beside

        only, options = args.only, {"context": args.context, "pairs": args.pairs}
        sweep = flags.of_sweep(args)
        found = bench_beside(say, preset=args.preset, only=only, sweep=sweep, **options)
    elif args.device:
        from gptjax.bench.device import bench_device
        from gptjax.config import GPTConfig

        shape: Any = {"context_length": args.context, "remat": "none"}
        config = GPTConfig.preset(args.preset, **shape)
        options = {"names": tuple(args.attention), "only": tuple(args.only)}
        found = bench_device(config, say, tuple(args.rows), **options)
    else:
        from gptjax.bench.machine import bench_machine

        options = {"peers": args.peers, "pairs": args.pairs, "only": tuple(args.only)}
        found = bench_machine(say, preset=args.preset, **options)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def launch(args: argparse.Namespace) -> None:
    """Write the file that makes a scheduler train on many hosts; start nothing."""
    from gptjax.launch import launch
    from gptjax.machines import Machines

    flags.on_top(read_config(config_path(args.config)), args.rest)  # refuses mistakes
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


def doctor(args: argparse.Namespace) -> int:
    """Versions, devices, what is missing and the line that fixes it."""
    from gptjax.doctor import doctor

    return doctor()
