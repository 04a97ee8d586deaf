"""The command `gptjax train`."""

import argparse
import functools
import importlib
import sys
from pathlib import Path

from gptjax import flags, supervise
from gptjax.command import begin, stoppable
from gptjax.config import config_path, read_config
from gptjax.phases import reached

TASKS = {  # train.task: where it is
    "pretrain": ("pretrain", "pretrain"),
    "classify": ("classification", "train_classifier"),
    "instruct": ("instruct", "train_assistant"),
    "preference": ("preference", "train_preference"),
    "book": ("book.training", "train_book"),
}


def arguments(sub: argparse.ArgumentParser) -> None:
    """The arguments of `gptjax train`."""
    sub.usage = "gptjax train CONFIG.toml [--section.option value ...] [--run DIR]"
    sub.epilog = "options:\n" + "\n".join(flags.option_lines())
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


def train(args: argparse.Namespace) -> int:
    """Train as a config says; the same command again resumes.

    Every option of the config can be given as a flag, --section.option value.
    """
    path = config_path(args.config)
    folder = args.run or Path("runs") / path.stem
    if args.supervise:
        words = [word for word in args.words if word != "--supervise"]
        return supervise.supervise([sys.executable, "-m", "gptjax", *words], folder)
    supervise.be_supervised()
    if not args.distributed:
        return stoppable(lambda: start(args, path, folder))
    found: list[int] = []

    def connect() -> None:
        from gptjax import distributed

        distributed.start(args.distributed)
        found.append(0)

    return stoppable(connect) or train_together(args, path, folder)


def train_together(args: argparse.Namespace, path: Path, folder: Path) -> int:
    """`start` as one of many processes, which have found each other."""
    from gptjax import distributed

    with distributed.ending_together():
        return stoppable(lambda: start(args, path, folder), "together")


def start(args: argparse.Namespace, path: Path, folder: Path) -> None:
    """Reads the config and trains."""
    config = flags.on_top(read_config(path), args.rest)
    begin(args, folder / "compiled")
    from gptjax.machine_faults import told
    from gptjax.run_task import Wishes

    module, function = TASKS[config.train.task]
    run = getattr(importlib.import_module(f"gptjax.{module}"), function)
    reached("importing")
    say = functools.partial(print, flush=True)  # into a file as into a terminal
    wishes = Wishes(tuple(args.allow_change), args.on_spike)
    with told():  # not only of training, but of what is written after it
        run(config, folder, say, wishes=wishes)
