"""The command `gptjax train`."""

import argparse
import functools
import importlib
import sys
from pathlib import Path

from gptjax.cli import arguments
from gptjax.cli.session import run_interruptible, setup_session
from gptjax.config import find_config, load_config
from gptjax.runtime import supervisor
from gptjax.runtime.timing import mark_phase

TASKS = {  # train.task: where it is
    "pretrain": ("tasks.pretrain", "pretrain"),
    "classify": ("tasks.classify", "train_classifier"),
    "sft": ("tasks.sft", "train_sft"),
    "dpo": ("tasks.dpo", "train_dpo"),
    "book": ("book.training", "train_book"),
}


def add_train_arguments(sub: argparse.ArgumentParser) -> None:
    """The arguments of `gptjax train`."""
    sub.usage = "gptjax train CONFIG.toml [--section.option value ...] [--run DIR]"
    sub.epilog = "options:\n" + "\n".join(arguments.format_config_options())
    sub.add_argument("config", metavar="CONFIG.toml", help="a file, or one of configs/")
    sub.add_argument("--run", type=Path, metavar="DIR", help="default: runs/CONFIG")
    sub.add_argument(
        "--distributed",
        metavar="auto|HOST:PORT,N,I",
        help="one of N processes, I from 0; HOST:PORT is of process 0",
    )
    sub.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="SECTION.OPTION",
        help="may differ from what the run was started with; can be given again",
    )
    sub.add_argument(
        "--on-spike",
        default="",
        metavar="log|skip|rollback",
        help="where loss or gradient jumps: say so, skip such steps, or go back",
    )
    sub.add_argument(
        "--supervise",
        action="store_true",
        help="start it again where it crashes or hangs",
    )


def run_train(args: argparse.Namespace) -> int:
    """Train as a config says; the same command again resumes.

    Every option of the config can be given as a flag, --section.option value.
    """
    path = find_config(args.config)
    run_dir = args.run or Path("runs") / path.stem
    if args.supervise:
        words = [word for word in args.words if word != "--supervise"]
        return supervisor.supervise([sys.executable, "-m", "gptjax", *words], run_dir)
    supervisor.init_child()
    if not args.distributed:
        return run_interruptible(lambda: run_training(args, path, run_dir))
    found: list[int] = []

    def connect() -> None:
        from gptjax.parallel import distributed

        distributed.initialize(args.distributed)
        found.append(0)

    return run_interruptible(connect) or train_distributed(args, path, run_dir)


def train_distributed(args: argparse.Namespace, path: Path, run_dir: Path) -> int:
    """`start` as one of many processes, which have found each other."""
    from gptjax.parallel import distributed

    with distributed.abort_all_on_error():
        return run_interruptible(
            lambda: run_training(args, path, run_dir), "collective"
        )


def run_training(args: argparse.Namespace, path: Path, run_dir: Path) -> None:
    """Reads the config and trains."""
    config = arguments.apply_overrides(load_config(path), args.rest)
    setup_session(args, run_dir / "compiled")
    from gptjax.training.resource_errors import translate_resource_errors
    from gptjax.training.task import ResumeOptions

    module, function = TASKS[config.train.task]
    run = getattr(importlib.import_module(f"gptjax.{module}"), function)
    mark_phase("importing")
    log = functools.partial(print, flush=True)  # into a file as into a terminal
    options = ResumeOptions(tuple(args.allow_change), args.on_spike)
    with (
        translate_resource_errors()
    ):  # not only of training, but of what is written after it
        run(config, run_dir, log, wishes=options)
