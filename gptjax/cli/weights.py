"""The commands `gptjax import` and `gptjax export`."""

from pathlib import Path

import click

from gptjax.cli.arguments import PATH, Command, value_option
from gptjax.cli.session import log_to_stderr


@click.command("import", cls=Command)
@click.argument("source")
@value_option("--out", "new model folder", type=PATH, required=True, metavar="DIR")
def run_import(source: str, out: Path) -> None:
    """Convert public or foreign weights to a model folder.

    SOURCE is any MODEL of gptjax --help.
    """
    from gptjax.weights.load import convert_model

    convert_model(source, out, print)


@click.command("export", cls=Command)
@click.argument("model")
@value_option("--to", "format of the export", required=True, metavar="hf|book", dest="layout")
@value_option("--out", "new folder", type=PATH, required=True, metavar="DIR")
def run_export(model: str, layout: str, out: Path) -> None:
    """Export a model for other tools and verify its logits.

    MODEL is described in gptjax --help.
    """
    from gptjax.weights.export import export_model
    from gptjax.weights.load import load

    print(export_model(load(model, log_to_stderr), layout, out))
