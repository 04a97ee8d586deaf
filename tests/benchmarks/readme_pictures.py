"""Draws the README's pictures from a run of `gptjax quickstart`.

    python tests/benchmarks/readme_pictures.py runs/quickstart

Needs the book's instructions too, which are downloaded where they are not there yet.
"""

import dataclasses
import sys
from pathlib import Path

import jax

import gptjax
from gptjax.checkpoint.checkpoint import restore
from gptjax.config import load_config
from gptjax.plots.curves import loss_figure
from gptjax.plots.figures import attention_figure, loss_mask_figure, token_loss_figure
from gptjax.plots.preview import preview_rows
from gptjax.training.metrics import read_events
from gptjax.training.trainer import checkpoint_state

PICTURES = Path(__file__).resolve().parent.parent.parent / "colab" / "pictures"
TEXT = """\
The "for" statement is used to iterate over the elements of a sequence (such
as a string, tuple or list) or other iterable object. It returns a new list
whose items are the names of all modules. The class body is then executed.
"""


def earlier(run: Path, model: gptjax.Model, step: int) -> gptjax.Model:
    """The model as it was after so many steps, from the run's checkpoint."""
    config = load_config(run / "config.toml")
    optimizer = gptjax.make_optimizer(config.optim, config.train.steps)
    state = gptjax.init_state(model.params, optimizer, jax.random.key(0))
    kept = restore(run / "checkpoints", step, checkpoint_state(state))
    return dataclasses.replace(model, params=kept["params"])


def main() -> None:
    run = Path(sys.argv[1])
    config, model = load_config(run / "config.toml"), gptjax.load(run)
    per_step = config.data.batch_size * config.model.context_length
    preview = preview_rows("instructions")
    figures = {
        "loss": loss_figure(read_events(run / "metrics.jsonl"), per_step),
        "compared": token_loss_figure(model, TEXT, earlier(run, model, 400)),
        "attention": attention_figure(model, "The class body is then executed.", 1),
        "mask": loss_mask_figure(preview, 2),
    }
    for name, figure in figures.items():
        figure.savefig(PICTURES / f"{name}.png", dpi=100)
        print(name, (PICTURES / f"{name}.png").stat().st_size, "bytes")


if __name__ == "__main__":
    main()
