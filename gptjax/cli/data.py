"""The `gptjax data` commands."""

import argparse
import itertools
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from gptjax.cli import arguments


def add_data_commands(commands: Any, add_command: Any) -> None:
    """Adds the `gptjax data` commands; `add_command` adds a single one."""
    data = commands.add_parser("data", help="Fetch, prepare and check data.")
    kinds = data.add_subparsers(required=True, metavar="fetch|prepare|preview|verify")
    add_command(data_fetch, "fetch", kinds).add_argument("name", metavar="NAME")
    arguments.add_prepare_arguments(add_command(data_prepare, "prepare", kinds))
    add_command(data_verify, "verify", kinds).add_argument(
        "folder", type=Path, metavar="DIR"
    )
    arguments.add_preview_arguments(add_command(data_preview, "preview", kinds))


def data_fetch(args: argparse.Namespace) -> None:
    """Find or download a named data set and print its path."""
    from gptjax.data.datasets import fetch_dataset

    print(fetch_dataset(args.name))


def data_prepare(args: argparse.Namespace) -> None:
    """Tokenize text files, folders and globs for training."""
    from gptjax.data.prepare import prepare_dataset, sample_windows

    info = prepare_dataset(
        args.paths,
        args.tokenizer,
        args.out,
        val_fraction=args.val_fraction,
        seed=args.seed,
        column=args.column,
        workers=args.workers,
    )
    print(info)
    if throughput := info.format_throughput(args.workers or os.cpu_count() or 1):
        print(throughput)
    for text in sample_windows(args.out):
        print(f"--- sample\n{text}")


def data_preview(args: argparse.Namespace) -> None:
    """Show prepared data or a file of conversations as model input."""
    if not Path(args.path).is_dir():
        preview_conversations(args)
        return
    from gptjax.data.prepare import sample_windows

    for text in sample_windows(Path(args.path)):
        print(f"--- sample\n{text}")


def preview_conversations(args: argparse.Namespace) -> None:
    """Shows rows of a file of conversations: raw, rendered and tokenized."""
    from gptjax.plots.preview import (
        json_objects,
        preview_rows,
        render_terminal,
        write_html,
    )

    preview = preview_rows(
        args.path,
        chat_template=args.template,
        tokenizer=args.tokenizer,
        context=args.context,
        completion_only_loss=not args.learn_prompts,
    )
    rows = 3 if args.rows is None else args.rows
    if args.json:
        for row in itertools.islice(json_objects(preview), args.rows):
            print(json.dumps(row, ensure_ascii=False))
    elif args.html:
        write_html(preview, args.html, rows)
        print(f"wrote    {args.html}")
    else:
        use_color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print(
            render_terminal(
                preview, rows, use_color, shutil.get_terminal_size().columns
            )
        )


def data_verify(args: argparse.Namespace) -> int:
    """Verify all files of prepared data against its meta.json."""
    from gptjax.data.token_files import verify_prepared

    problems = verify_prepared(args.folder)
    print("\n".join(problems) or f"{args.folder}: all files verified")
    return 1 if problems else 0
