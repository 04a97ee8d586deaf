"""Pictures for notebooks: what a model sees, expects and finds hard, and its tokens.

Each function returns a figure of its own, which a notebook shows when it ends a cell.
They are made to be read at 700 pixels on a desk and at 360 on a phone.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from gptjax.boxes import (
    FAMILY,
    WIDTH,
    Box,
    boxed,
    cells,
    dark,
    drawable,
    label_of,
    readable,
)
from gptjax.config import GPTConfig, OptimConfig
from gptjax.decoding import padded
from gptjax.errors import ConfigError
from gptjax.evaluate import token_nats
from gptjax.generation import prompt_rows
from gptjax.model import Params, apply, hidden, logits, output_table
from gptjax.optim import learning_rates
from gptjax.preview import Part, Preview, parts
from gptjax.report import BLUE, GREY, ORANGE, new_figure
from gptjax.tokenizer import Tokenizer
from gptjax.weights.folder import Model

MOST_ATTENTION_TOKENS = 32  # more labels cannot be read
SHAPES = ((WIDTH, 4), (WIDTH, 3), (WIDTH, 2), (1.4 * WIDTH, 2))  # width and columns
MOST_BARS = 60
PROMPT = 40  # characters of it in a title
BAR = 46.0  # points that a colour bar takes

PALE_BLUE, PALE_ORANGE, PALE_GREY = "#C3DFF0", "#F8DCC8", "#EFEFEF"
WORSE_BETTER = LinearSegmentedColormap.from_list("", [ORANGE, "white", BLUE])


def attention_figure(model: Model, text: str, layer: int) -> Figure:
    """The attention weights of one layer: a heat map per head, a row per query.

    Args:
        model: from `gptjax.load`.
        text: of 1 to `MOST_ATTENTION_TOKENS` tokens.
        layer: counted from 0.

    Raises:
        ConfigError: there is no such layer, or too much text or none.
    """
    config, ids = model.config, ids_of(model.tokenizer, text)
    if not 0 <= layer < config.n_layers:
        raise ConfigError(
            f"layer={layer} is not one of the model's {config.n_layers}, counted from "
            f"0. Choose 0 to {config.n_layers - 1}."
        )
    if len(ids) > MOST_ATTENTION_TOKENS:
        raise ConfigError(
            f"the text has {len(ids)} tokens, but labels can be read for "
            f"{MOST_ATTENTION_TOKENS} at most. Shorten the text."
        )
    token_BT = jnp.array([ids], jnp.int32)
    _, kept = apply(config, model.params, token_BT, capture=("attention",))
    weight_HTS = np.asarray(kept["attention"][layer, 0], np.float32)
    labels = [label_of(model.tokenizer.decode_bytes([i])) for i in ids]
    title = f"layer {layer}: queries in rows, keys in columns"
    return panels(weight_HTS, labels, title)


def panels(weight_HTS: np.ndarray, labels: Sequence[str], title: str) -> Figure:
    """A grid of heat maps, labelled at its left and at its bottom."""
    heads, size, top, gap = len(weight_HTS), 7.5, 35.0, 18.0  # points
    margin = 0.602 * size * max(map(cells, labels)) + 6
    need = len(labels) * (size - 1)  # points of a panel whose labels do not touch
    # As many columns as the shape allows, or fewer that need no more rows.
    shapes = [(w, -(-heads // -(-heads // n))) for w, n in SHAPES]
    rooms = [((w - margin) / n - 8, w, n) for w, n in shapes]
    room, width, columns = next((x for x in rooms if x[0] >= need), rooms[-1])
    rows = -(-heads // columns)
    height = top + rows * (room + gap) - gap + margin + BAR
    figure = Figure((width / 72, height / 72), dpi=144)
    figure.suptitle(title, fontsize=10, y=1 - 5 / height, va="top")
    plain = {"parse_math": False, "fontsize": size, "fontfamily": FAMILY}
    for head, weight_TS in enumerate(weight_HTS):
        row, column = divmod(head, columns)
        left, low = margin + column * (room + 8), top + room + row * (room + gap)
        axes = figure.add_axes(
            (left / width, 1 - low / height, room / width, room / height)
        )
        axes.imshow(weight_TS, cmap="Blues", vmin=0, vmax=1)
        axes.set_title(f"head {head}", fontsize=9, pad=3)
        lowest, places = head + columns >= heads, range(len(labels))
        axes.set_xticks(places, labels if lowest else [], rotation=90, **plain)
        axes.set_yticks(places, [] if column else labels, **plain)
        axes.tick_params(length=0, pad=2)
    add_bar(figure, ScalarMappable(Normalize(0, 1), "Blues"), "attention weight")
    return figure


def token_loss_figure(model: Model, text: str, other: Model | None = None) -> Figure:
    """The tokens of a text, coloured by the nats of each given all before it.

    The darkest is as bad as a blind guess among all tokens, or worse. With another
    model, blue is where `model` needs fewer nats than it, orange where it needs more.
    Tokens that share a character share a box, and their nats are added.

    Args:
        model: from `gptjax.load`.
        text: at most `context_length` tokens, not empty.
        other: of the same tokenizer.

    Raises:
        ConfigError: no text or too much, or the tokenizers differ.
    """
    if other is not None and other.tokenizer.hash != model.tokenizer.hash:
        raise ConfigError(
            f"the models have the tokenizers {model.tokenizer.name!r} and "
            f"{other.tokenizer.name!r}, so nats per token do not compare. Take models "
            "of one tokenizer, or compare bits_per_byte of gptjax.score."
        )
    ids_of(model.tokenizer, text)
    ids, nat_L = token_nats(model, text)
    found = list(model.tokenizer.characters(ids))
    start_L = np.cumsum([0, *(len(part_ids) for _, part_ids in found[:-1])])
    value_L, mean = np.add.reduceat(nat_L, start_L), nat_L.mean(dtype=np.float64)
    if other is None:
        most = math.log(model.config.vocab_size)
        colours = ScalarMappable(Normalize(0, most), "Blues")
        title = f"mean {mean:.3f} nats per token"
        label = f"nats (a blind guess: {most:.2f})"
    else:
        _, other_L = token_nats(other, text)
        value_L = np.add.reduceat(other_L, start_L) - value_L
        most = max(1.0, float(np.abs(value_L).max()))  # small differences stay pale
        colours = ScalarMappable(Normalize(-most, most), WORSE_BETTER)
        other_mean = other_L.mean(dtype=np.float64)
        title = f"mean nats per token: model {mean:.3f}, other {other_mean:.3f}"
        label = "← other is better      nats      model is better →"
    texts = [part_text for part_text, _ in found]
    boxes = [
        Box(part_text, face, "white" if dark(face) else "black")
        for part_text, face in zip(texts, colours.to_rgba(value_L), strict=True)
    ]
    figure = boxed(boxes, title, foot=BAR)
    add_bar(figure, colours, label, "neither" if other else "max")
    return figure


def add_bar(
    figure: Figure, colours: ScalarMappable, label: str, extend: Any = "neither"
) -> None:
    """Draws a colour bar at the foot of a figure, which left room for it."""
    point = 1 / 72 / figure.get_figheight()
    axes = figure.add_axes((0.06, 30 * point, 0.88, 9 * point))
    bar = figure.colorbar(colours, axes, orientation="horizontal", extend=extend)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)


def next_tokens(
    model: Model, prompt: str, count: int = 10, temperature: float = 1.0
) -> list[tuple[str, float]]:
    r"""The likeliest next tokens with their probabilities, likeliest first.

    Args:
        model: from `gptjax.load`.
        prompt: not empty; of one longer than the context, the last tokens are read.
        count: of tokens, or all where there are fewer.
        temperature: that the scores are divided by.

    Returns:
        Text and probability of each; bytes that are no characters are as in "\xe2".

    Raises:
        ConfigError: an empty prompt, no tokens, or a temperature that is not positive.
    """
    return likeliest(model, next_scores(model, prompt), count, temperature)


def next_scores(model: Model, prompt: str) -> Float64[np.ndarray, " V"]:
    """Scores of the token after a prompt."""
    rows, _ = prompt_rows(model, [prompt], 1)
    token_BT, length_B = padded(rows, model.config.context_length)
    scores = scores_after(model.config, model.params, token_BT, length_B)
    return np.asarray(scores, np.float64)[0, : model.config.vocab_size]


def likeliest(
    model: Model, score_V: Float64[np.ndarray, " V"], count: int, temperature: float
) -> list[tuple[str, float]]:
    """What `next_tokens` returns, from scores."""
    if count < 1:
        raise ConfigError(f"count={count} shows no token. Choose 1 or more.")
    if not temperature > 0:
        raise ConfigError(
            f"temperature={temperature} is not above 0. Choose 1 for the model's own "
            "probabilities, less to sharpen them."
        )
    weight_V = np.exp((score_V - score_V.max()) / max(temperature, 1e-6))
    chance_V = weight_V / weight_V.sum()
    return [
        (readable(model.tokenizer.decode_bytes([i])), float(chance_V[i]))
        for i in np.argsort(-score_V, kind="stable")[:count]
    ]


@functools.partial(jax.jit, static_argnums=0)
def scores_after(
    config: GPTConfig,
    params: Params,
    token_BT: Int[Array, "B T"],
    length_B: Int[Array, " B"],
) -> Float[Array, "B V"]:
    """Scores of the token after the first `length_B` of each row."""
    x_BTD, _ = hidden(config, params, token_BT)
    last_BD = x_BTD[jnp.arange(len(length_B)), length_B - 1]
    return logits(config, output_table(config, params), last_BD)


def next_token_figure(
    model: Model, prompt: str, count: int = 10, temperatures: Sequence[float] = (1.0,)
) -> Figure:
    """The likeliest next tokens as bars, one for each temperature.

    Args:
        model: from `gptjax.load`.
        prompt: not empty.
        count: of tokens.
        temperatures: that the scores are divided by.

    Raises:
        ConfigError: as `next_tokens`, or no bar to draw or too many.
    """
    groups = len(temperatures)
    if not 1 <= max(count, 1) * groups <= MOST_BARS:
        raise ConfigError(
            f"count={count} at {groups} temperatures makes {count * groups} bars, not "
            f"1 to {MOST_BARS}. Change count or temperatures."
        )
    score_V = next_scores(model, prompt)
    found = [likeliest(model, score_V, count, t) for t in temperatures]
    labels = [label_of(text.encode()) for text, _ in found[0]]
    pitch = 18.0 if groups == 1 else 12.0 * groups + 6  # points
    height = (len(labels) * pitch + 42 + 18 * -(-groups // 3)) / 72
    figure = Figure((WIDTH / 72, height), dpi=144, layout="constrained")
    axes = figure.subplots()
    colours = [BLUE, ORANGE, GREY]
    if groups > len(colours):
        colours = colormaps["cividis"](np.linspace(0, 0.9, groups))
    thick = 0.8 / groups
    for n, (t, chosen) in enumerate(zip(temperatures, found, strict=True)):
        chances = [chance for _, chance in chosen]
        places = np.arange(len(chances)) + (n - (groups - 1) / 2) * thick
        bars = axes.barh(places, chances, thick, color=colours[n])
        bars.set_label(f"temperature {t:g}")
        notes = [f"{chance:.1%}" if chance >= 5e-4 else "<0.1%" for chance in chances]
        axes.bar_label(bars, notes, padding=3, fontsize=9 if groups == 1 else 8)
    axes.set_yticks(
        *(range(len(labels)), labels), parse_math=False, fontfamily=FAMILY, fontsize=10
    )
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.xaxis.set_visible(False)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    title = "…" * (len(prompt) > PROMPT) + drawable(prompt[-PROMPT:])
    figure.suptitle(f"after {title}", fontsize=10, parse_math=False, fontfamily=FAMILY)
    if groups > 1:
        figure.legend(
            loc="outside lower center", ncols=min(groups, 3), frameon=False, fontsize=9
        )
    return figure


def mask_figure(preview: Preview, row: int = 0) -> Figure:
    """What training learns of a row: the tokens, told apart by what becomes of them.

    Args:
        preview: from `gptjax.preview.preview_rows`.
        row: counted from 0.

    Raises:
        ConfigError: there is no such row.
    """
    if not 0 <= row < len(preview.rows):
        raise ConfigError(
            f"row={row} is not one of the {len(preview.rows)} rows, counted from 0. "
            f"Choose 0 to {len(preview.rows) - 1}."
        )
    one = preview.rows[row]
    title = f"{sum(one.learned):,} of {len(one.ids):,} tokens are learned"
    if one.cut:
        title += f"; the first {one.cut:,} are cut off"
    if one.skipped:
        title += f"; its last answer does not fit {preview.most:,}, so it is skipped"
    legend = [
        *(
            mask_box(Part(name, [], name, False))
            for name in ("learned", "given", "cut")
        ),
        mask_box(Part("end token", [], "given", True)),
    ]
    boxes = [mask_box(part) for part in parts(preview.tokenizer, one)]
    return boxed(boxes, title, legend)


def mask_box(part: Part) -> Box:
    """The box of a part of a row: its state is told by colour and by a line."""
    face, ink, rule = {
        "learned": (PALE_BLUE, "#00405F", 0.94),
        "given": (PALE_GREY, "#333333", 0.0),
        "cut": ("#FAFAFA", "#777777", 0.5),
    }[part.state]
    if part.end:
        face, ink = ink, "white"
    return Box(part.text, face, ink, rule=rule)


def pieces_figure(tokenizer: Tokenizer, text: str) -> Figure:
    """How a tokenizer cuts a text: the tokens, and their ids below them.

    Raises:
        ConfigError: the text is empty.
    """
    ids = ids_of(tokenizer, text)
    boxes = [
        Box(part_text, (PALE_BLUE, PALE_ORANGE)[n % 2], note=" ".join(map(str, part)))
        for n, (part_text, part) in enumerate(tokenizer.characters(ids))
    ]
    return boxed(boxes, f"{len(ids):,} tokens, {len(text.encode()):,} bytes")


def schedule_figure(optim: OptimConfig, steps: int) -> Figure:
    """The learning rate of each step, before anything is trained.

    Raises:
        ConfigError: there is no step, or the warm-up is longer than the run.
    """
    if steps < 1:
        raise ConfigError(f"steps={steps} leaves nothing to draw. Choose 1 or more.")
    rates = learning_rates(optim, steps)
    best = int(np.argmax(rates))
    figure, axes = new_figure("step", "learning rate")
    axes.plot(range(steps), rates, color=BLUE, marker="o" if steps == 1 else None)
    axes.plot(best, rates[best], color=ORANGE, marker="o", markersize=5)
    axes.annotate(
        f"peak {rates[best]:.3g} at step {best:,}",
        (best, rates[best]),
        textcoords="offset points",
        xytext=(0, 7),
        ha="left" if best < steps / 2 else "right",
        color=ORANGE,
    )
    axes.set_ylim(0, 1.18 * rates[best] or 1)
    return figure


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text to draw.

    Raises:
        ConfigError: there are none.
    """
    if not text:
        raise ConfigError("the text is empty, so there is nothing to draw. Give some.")
    return tokenizer.encode(text)
