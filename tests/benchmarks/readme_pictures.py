"""Draws the README's picture from a run of `gptjax quickstart`.

    python tests/benchmarks/readme_pictures.py runs/quickstart

Needs the book's instructions too, which are downloaded unless they are cached.
"""

import io
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

import gptjax
from gptjax.config import load_config
from gptjax.plots.curves import loss_figure
from gptjax.plots.figures import attention_figure, loss_mask_figure, token_loss_figure
from gptjax.plots.preview import preview_rows
from gptjax.training.metrics import read_events

PICTURE = Path(__file__).resolve().parents[2] / "colab" / "pictures" / "overview.png"
TEXT = """\
The "for" statement is used to iterate over the elements of a sequence (such
as a string, tuple or list) or other iterable object. It returns a new list
whose items are the names of all modules. The class body is then executed.
"""


def render(figure: Figure) -> Image.Image:
    file = io.BytesIO()
    figure.savefig(file, dpi=100)
    return Image.open(file)


def main() -> None:
    run = Path(sys.argv[1])
    config, model = load_config(run / "config.toml"), gptjax.load(run)
    early_model = gptjax.load(run / "checkpoints" / "400")
    tokens_per_step = config.data.batch_size * config.model.context_length
    loss = loss_figure(read_events(run / "metrics.jsonl"), tokens_per_step)
    tokens = token_loss_figure(model, TEXT, early_model, ("step 800", "step 400"))
    attention = attention_figure(model, "The class body is then executed.", 1)
    mask = loss_mask_figure(preview_rows("instructions"), 2)
    images = [render(figure) for figure in (loss, tokens, attention, mask)]
    width, height = np.max([image.size for image in images], axis=0).tolist()
    picture = Image.new("RGB", (2 * width, 2 * height), "white")
    for n, image in enumerate(images):
        left, top = n % 2 * width, n // 2 * height
        at = left + (width - image.width) // 2, top + (height - image.height) // 2
        picture.paste(image, at)
    picture.save(PICTURE)
    print(PICTURE, PICTURE.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
