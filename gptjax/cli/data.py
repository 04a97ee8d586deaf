"""The `gptjax data` commands."""

import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from gptjax.cli.arguments import PATH, Command, flag_option, value_option
from gptjax.cli.session import log_to_console
from gptjax.config import CONTEXT, COUNT, FRACTION, SEED, Range
from gptjax.errors import ConfigError
from gptjax.fileio.paths import user_path
from gptjax.runtime.terminal import is_terminal, print_progress, print_result

WORKERS = Range(1, 1024)


@click.command("fetch", cls=Command)
@click.argument("name")
def data_fetch(name: str) -> None:
    """Find or download a named data set and print its path."""
    from gptjax.data.datasets import fetch_dataset

    print_result(fetch_dataset(name))


@click.command("prepare", cls=Command)
@click.argument("paths", nargs=-1, required=True, metavar="PATH ...")
@value_option("--tokenizer", "tokenizer", "gpt2", metavar="gpt2|bytes|bpe:N|DIR")
@value_option("--out", "new folder", type=PATH, required=True, metavar="DIR")
@value_option("--val-fraction", "fraction of documents for validation", 0.1, valid_range=FRACTION)
@value_option("--seed", "seed of the validation split", 0, valid_range=SEED)
@value_option("--column", "text column of JSON and CSV rows", "", shown="detect")
@value_option("--workers", "number of processes", type=int, shown="all cores", valid_range=WORKERS)
def data_prepare(
    paths: tuple[str, ...],
    tokenizer: str,
    out: Path,
    val_fraction: float,
    seed: int,
    column: str,
    workers: int | None,
) -> None:
    """Tokenize text files, folders and globs for training."""
    from gptjax.data.prepare import prepare_dataset, sample_windows

    options: Any = {"val_fraction": val_fraction, "seed": seed, "column": column}
    with log_to_console():
        info = prepare_dataset(paths, tokenizer, out, workers=workers, **options)
    print_progress(info)
    for text in sample_windows(out):
        print_progress(f"--- sample\n{text}")


@click.command("preview", cls=Command)
@click.argument("path", metavar="DIR|FILE")
@value_option(
    "--chat-template",
    "template of the conversations: alpaca, phi3, chatml, qa, single or a file",
    "alpaca",
    metavar="NAME|FILE.jinja",
)
@value_option("--tokenizer", "tokenizer", "gpt2", metavar="gpt2|bytes|DIR")
@value_option("--context", "maximum sequence length in tokens", 1024, valid_range=CONTEXT)
@flag_option("--train-on-prompts", "loss on prompts too, as with data.completion_only_loss=false")
@value_option(
    "--rows", "number of conversations", type=int, shown="3; all with --json", valid_range=COUNT
)
@value_option("--html", "write a page instead of printing", type=PATH)
@flag_option("--json", "print one JSON object per conversation", "as_json")
def data_preview(
    path: str,
    chat_template: str,
    tokenizer: str,
    context: int,
    train_on_prompts: bool,
    rows: int | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """Show prepared data or a file of conversations as model input."""
    is_prepared = user_path(path).is_dir()
    if [as_json, html is not None, is_prepared].count(True) > 1:
        raise ConfigError("--json and --html exclude each other, and need a file of conversations.")
    if is_prepared:
        from gptjax.data.prepare import sample_windows

        for text in sample_windows(user_path(path)):
            print_result(f"--- sample\n{text}")
        return
    from gptjax.plots.preview import json_objects, preview_rows, render_terminal, write_html

    preview = preview_rows(
        path,
        chat_template=chat_template,
        tokenizer=tokenizer,
        context=context,
        completion_only_loss=not train_on_prompts,
    )
    shown_rows = 3 if rows is None else rows
    if as_json:
        for row in itertools.islice(json_objects(preview), rows):
            print_result(json.dumps(row))
    elif html:
        write_html(preview, html, shown_rows)
        print_progress(f"wrote    {html}")
    else:
        use_color = is_terminal(sys.stdout) and "NO_COLOR" not in os.environ
        print_result(render_terminal(preview, shown_rows, use_color), is_safe=True)


@click.command("verify", cls=Command)
@click.argument("folder", type=PATH, metavar="DIR")
def data_verify(folder: Path) -> int:
    """Verify all files of prepared data against its meta.json."""
    from gptjax.data.token_files import verify_prepared

    problems = verify_prepared(folder)
    print_progress("\n".join(problems) or f"{folder}: all files verified")
    return 1 if problems else 0
