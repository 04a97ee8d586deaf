"""The arguments of the commands, one function each, and the options of a config."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptjax.config import RunConfig


def add_model_arguments(sub: argparse.ArgumentParser) -> None:
    """MODEL, and how its weights are read."""
    sub.add_argument("model", metavar="MODEL")
    sub.add_argument("--int8", action="store_true", help="round weights to 8 bits")


def add_generate_arguments(sub: argparse.ArgumentParser) -> None:
    """The arguments of `gptjax generate`."""
    add_model_arguments(sub)
    sub.add_argument("prompt", nargs="?", metavar="PROMPT", help="default: stdin")
    sub.add_argument("--few-shot", type=Path, metavar="FILE.jsonl")
    sub.add_argument("--chat", action="store_true", help="PROMPT is for an assistant")
    sub.add_argument("--max-new-tokens", type=int, default=100, metavar="N")
    sub.add_argument("--temperature", type=float, default=0.8, help="0 = greedy")
    sub.add_argument("--top-k", type=int, default=0, help="0 = all tokens")
    sub.add_argument("--top-p", type=float, default=1.0)
    sub.add_argument("--min-p", type=float, default=0.0)
    sub.add_argument("--repetition-penalty", type=float, default=1.0)
    sub.add_argument("--stop", action="append", default=[], metavar="TEXT")
    sub.add_argument("--samples", type=int, default=1, metavar="N")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--json", action="store_true", help="one JSON object per sample")


def add_classify_arguments(sub: argparse.ArgumentParser) -> None:
    """The arguments of `gptjax classify`."""
    add_model_arguments(sub)
    sub.add_argument("texts", nargs="*", metavar="TEXT", help="default: lines of stdin")
    sub.add_argument("--file", type=Path, metavar="IN", help="CSV, TSV, JSONL or text")
    sub.add_argument("--out", type=Path, metavar="OUT", help="IN with its labels")
    sub.add_argument("--text", default="", metavar="NAME", help="column of IN")
    sub.add_argument("--json", action="store_true", help="one JSON object per text")


def add_chat_arguments(sub: argparse.ArgumentParser) -> None:
    """The arguments of `gptjax chat`."""
    add_model_arguments(sub)
    sub.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    sub.add_argument("--temperature", type=float, default=0.7, help="0 = greedy")
    sub.add_argument("--top-k", type=int, default=0, help="0 = all tokens")
    sub.add_argument("--top-p", type=float, default=1.0)
    sub.add_argument("--seed", type=int, default=0)


def add_evaluate_arguments(sub: argparse.ArgumentParser) -> None:
    """The arguments of `gptjax eval`."""
    add_model_arguments(sub)
    source = sub.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=Path, metavar="FILE", help="text to predict")
    source.add_argument("--labelled", metavar="FILE", help="texts with their classes")
    source.add_argument("--data", metavar="FILE", help="conversations to be answered")
    sub.add_argument("--stride", type=int, metavar="N", help="default: the context")
    sub.add_argument("--out", type=Path, metavar="FILE", help="answers, JSON lines")
    sub.add_argument("--judge", metavar="URL", help="of an OpenAI-compatible endpoint")
    sub.add_argument("--judge-model", default="llama3", metavar="NAME")
    sub.add_argument("--json", action="store_true", help="print one JSON object")


def add_prepare_arguments(sub: argparse.ArgumentParser) -> None:
    """The arguments of `gptjax data prepare`."""
    sub.add_argument("paths", nargs="+", metavar="PATH")
    sub.add_argument("--tokenizer", default="gpt2", metavar="gpt2|bytes|bpe:N|DIR")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR")
    sub.add_argument("--val-fraction", type=float, default=0.1)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--column", default="", help="field of JSON and CSV rows")
    sub.add_argument("--workers", type=int, help="default: all cores")


def add_preview_arguments(sub: argparse.ArgumentParser) -> None:
    """The arguments of `gptjax data preview`."""
    sub.add_argument("path", metavar="DIR|FILE", help="tokens, or conversations")
    sub.add_argument("--template", default="alpaca", metavar="NAME|FILE.jinja")
    sub.add_argument("--tokenizer", default="gpt2", metavar="gpt2|bytes|DIR")
    sub.add_argument("--context", type=int, default=1024, metavar="N")
    sub.add_argument("--learn-prompts", action="store_true", help="not only answers")
    sub.add_argument("--rows", type=int, metavar="N", help="default: 3, of --json all")
    sub.add_argument("--html", type=Path, metavar="FILE", help="write a page instead")
    sub.add_argument("--json", action="store_true", help="one JSON object per row")


def add_plan_arguments(sub: argparse.ArgumentParser) -> None:
    """The arguments of `gptjax plan`."""
    sub.usage = "gptjax plan CONFIG.toml [--section.option value ...] [--topology T]"
    sub.add_argument("config", metavar="CONFIG.toml", help="a file, or one of configs/")
    sub.add_argument(
        "--topology",
        default="",
        metavar="v5e:2x4|v6e:1|v5p:2x2x4|h100:8|cpu:8",
        help="default: the devices of this machine",
    )
    sub.add_argument("--against", type=Path, metavar="RUN", help="what a run measured")
    sub.add_argument("--estimate", action="store_true", help="compile nothing")
    sub.add_argument("--json", action="store_true", help="print one JSON object")


def add_bench_arguments(sub: argparse.ArgumentParser) -> None:
    """The arguments of `gptjax bench`."""
    sub.add_argument("--preset", default="gpt2", metavar="NAME", help="GPT-2's size")
    sub.add_argument("--peers", action="store_true", help="beside PyTorch's, in turns")
    sub.add_argument("--pairs", type=int, default=5, metavar="N", help="of turns")
    parts = ["train", "decode", "prefill", "load", "input", "import", "start"]
    parts += ["compile", "save"]
    sub.add_argument("--only", nargs="+", choices=parts, default=[], metavar="PART")
    sub.add_argument(
        "--device",
        action="store_true",
        help="an accelerator's: each attention, its rates, the share of its limits",
    )
    sub.add_argument("--context", type=int, default=1024, metavar="T", help="--device")
    sub.add_argument(
        "--rows",
        type=int,
        nargs="+",
        default=[4, 8, 16, 32, 64, 128],
        metavar="N",
        help="--device: on each, until the memory is full",
    )
    sub.add_argument(
        "--attention",
        nargs="+",
        default=[],
        metavar="NAME",
        help="--device: these backends; default: all that can",
    )
    sub.add_argument("--json", type=Path, metavar="FILE", help="write all figures")


def sweep_flags(args: argparse.Namespace) -> list[str]:
    """The flags of `gptjax bench` that say what of the device is measured."""
    sweep = ["--rows", *map(str, args.rows)]
    for name in ("attention", "only"):
        sweep += [f"--{name}", *getattr(args, name)] if getattr(args, name) else []
    return sweep


def add_launch_arguments(sub: argparse.ArgumentParser) -> None:
    """The arguments of `gptjax launch`."""
    sub.usage = "gptjax launch KIND CONFIG.toml [--section.option value ...] [options]"
    sub.add_argument("kind", choices=["slurm", "gke", "tpu-vm", "skypilot"])
    sub.add_argument("config", metavar="CONFIG.toml", help="a file, or one of configs/")
    sub.add_argument("--run", type=Path, metavar="DIR", help="default: runs/CONFIG")
    sub.add_argument("--out", type=Path, metavar="FILE", help="write it to a new file")
    sub.add_argument("--dry-run", action="store_true", help="print, and write nothing")
    sub.add_argument("--nodes", type=int, metavar="N", help="default: 1")
    sub.add_argument("--devices", type=int, metavar="N", help="GPUs per node")
    sub.add_argument("--accelerator", default="", metavar="GPU", help="H100")
    sub.add_argument("--topology", default="", metavar="SLICE", help="TPUs: v5e:4x8")
    sub.add_argument("--volume", default="", metavar="CLAIM|HOST:/EXPORT")
    sub.add_argument("--partition", default="", help="of Slurm")
    sub.add_argument("--account", default="", help="of Slurm")
    sub.add_argument("--time", default="", help="limit of Slurm: 24:00:00")
    sub.add_argument("--zone", default="", help="of Google's cloud: us-west4-a")
    sub.add_argument("--project", default="", help="of Google's cloud")
    sub.add_argument("--image", default="", help="container with gptjax in it (gke)")
    sub.add_argument("--install", default="", help="for pip; default: gptjax[EXTRA]")
    sub.add_argument("--spot", action="store_true", help="machines that may be taken")


def sampling_options_from(args: argparse.Namespace) -> dict[str, Any]:
    """The flags of a command that are fields of `gptjax.inference.generate.Sampling`."""
    from gptjax.inference.generate import GenerationConfig

    names = [field.name for field in dataclasses.fields(GenerationConfig)]
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def format_config_options() -> list[str]:
    """Every option of a config with its default, as flags."""
    lines = []
    for section in dataclasses.fields(RunConfig):
        default: Any = getattr(RunConfig(), section.name)
        for field in dataclasses.fields(default):
            flag = f"--{section.name}.{field.name}"
            lines.append(f"  {flag:<28} {field.default!r}")
    return lines


def apply_overrides(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The config with `--section.option value` flags on top of it."""
    if not overrides:
        return config
    import tyro

    return tyro.cli(
        RunConfig,
        prog="gptjax train CONFIG.toml",
        args=overrides,
        default=config,
        config=(tyro.conf.FlagConversionOff,),
        use_underscores=True,
    )
