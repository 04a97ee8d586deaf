"""Draws the README's picture from a run of `gptjax quickstart`.

    python tests/benchmarks/readme_pictures.py runs/quickstart

Needs the book's instructions too, which are downloaded unless they are cached.
"""

import dataclasses
import io
import sys
from pathlib import Path

import jax
import matplotlib.image
import numpy as np
from matplotlib.figure import Figure

import gptjax
from gptjax.checkpoint.checkpoint import restore
from gptjax.config import load_config
from gptjax.plots.curves import loss_figure
from gptjax.plots.figures import attention_figure, loss_mask_figure, token_loss_figure
from gptjax.plots.preview import preview_rows
from gptjax.training.metrics import read_events
from gptjax.training.trainer import checkpoint_state

PICTURE = Path(__file__).resolve().parents[2] / "colab" / "pictures" / "overview.png"
TEXT = """\
The "for" statement is used to iterate over the elements of a sequence (such
as a string, tuple or list) or other iterable object. It returns a new list
whose items are the names of all modules. The class body is then executed.
"""


def load_step(run: Path, model: gptjax.Model, step: int) -> gptjax.Model:
    config = load_config(run / "config.toml")
    optimizer = gptjax.make_optimizer(config.optim, config.train.steps)
    state = gptjax.init_state(model.params, optimizer, jax.random.key(0))
    restored = restore(run / "checkpoints", step, checkpoint_state(state))
    return dataclasses.replace(model, params=restored["params"])


def render(figure: Figure) -> np.ndarray:
    file = io.BytesIO()
    figure.savefig(file, dpi=100)
    file.seek(0)
    return matplotlib.image.imread(file)


def tile(rows: list[list[np.ndarray]]) -> np.ndarray:
    """Arranges images in rows, with white space around smaller ones."""
    images = [image for row in rows for image in row]
    height, width = np.max([image.shape[:2] for image in images], axis=0)

    def pad(image: np.ndarray) -> np.ndarray:
        top, left = height - image.shape[0], width - image.shape[1]
        sizes = [(top // 2, top - top // 2), (left // 2, left - left // 2), (0, 0)]
        return np.pad(image, sizes, constant_values=1.0)

    return np.vstack([np.hstack([pad(image) for image in row]) for row in rows])


def main() -> None:
    run = Path(sys.argv[1])
    config, model = load_config(run / "config.toml"), gptjax.load(run)
    tokens_per_step = config.data.batch_size * config.model.context_length
    loss = loss_figure(read_events(run / "metrics.jsonl"), tokens_per_step)
    tokens = token_loss_figure(model, TEXT, load_step(run, model, 400))
    attention = attention_figure(model, "The class body is then executed.", 1)
    mask = loss_mask_figure(preview_rows("instructions"), 2)
    images = [[render(loss), render(tokens)], [render(attention), render(mask)]]
    matplotlib.image.imsave(PICTURE, tile(images))
    print(PICTURE, PICTURE.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
