"""The commands behind `gptjax data`."""

import argparse
import itertools
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from gptjax import flags


def add_commands(commands: Any, add: Any) -> None:
    """The commands behind `gptjax data`; `add` makes one of them."""
    data = commands.add_parser("data", help="Fetch, prepare and check data.")
    kinds = data.add_subparsers(required=True, metavar="fetch|prepare|preview|verify")
    add(data_fetch, "fetch", kinds).add_argument("name", metavar="NAME")
    flags.prepare(add(data_prepare, "prepare", kinds))
    add(data_verify, "verify", kinds).add_argument("folder", type=Path, metavar="DIR")
    flags.preview(add(data_preview, "preview", kinds))


def data_fetch(args: argparse.Namespace) -> None:
    """Find or download a named data set, and print where it is."""
    from gptjax.data.named import find

    print(find(args.name))


def data_prepare(args: argparse.Namespace) -> None:
    """Turn text files, folders and globs into tokens to train on."""
    from gptjax.data.prepare import prepare, preview

    info = prepare(
        args.paths,
        args.tokenizer,
        args.out,
        val_fraction=args.val_fraction,
        seed=args.seed,
        column=args.column,
        workers=args.workers,
    )
    print(info)
    if speed := info.speed(args.workers or os.cpu_count() or 1):
        print(speed)
    for text in preview(args.out):
        print(f"--- a window\n{text}")


def data_preview(args: argparse.Namespace) -> None:
    """Show prepared data or a file of conversations as the model will see them."""
    if not Path(args.path).is_dir():
        preview_file(args)
        return
    from gptjax.data.prepare import preview

    for text in preview(Path(args.path)):
        print(f"--- a window\n{text}")


def preview_file(args: argparse.Namespace) -> None:
    """A few rows of a file of conversations, in three stages."""
    from gptjax.preview import json_objects, preview_rows, shown, write_html

    preview = preview_rows(
        args.path,
        template=args.template,
        tokenizer=args.tokenizer,
        context=args.context,
        mask_prompt=not args.learn_prompts,
    )
    rows = 3 if args.rows is None else args.rows
    if args.json:
        for row in itertools.islice(json_objects(preview), args.rows):
            print(json.dumps(row, ensure_ascii=False))
    elif args.html:
        write_html(preview, args.html, rows)
        print(f"wrote    {args.html}")
    else:
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print(shown(preview, rows, colour, shutil.get_terminal_size().columns))


def data_verify(args: argparse.Namespace) -> int:
    """Check every byte of prepared data against its meta.json."""
    from gptjax.data.shards import verify

    problems = verify(args.folder)
    print("\n".join(problems) or f"{args.folder}: every byte is as it was written")
    return 1 if problems else 0
