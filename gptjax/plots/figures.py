"""Figures for notebooks: attention, losses, tokens, loss masks, device placement.

Each function returns a new Figure, which a notebook displays as the result of a cell.
Figures are legible at widths of 700 pixels (desktop) and 360 pixels (phone).
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from gptjax.config import OptimConfig
from gptjax.errors import ConfigError
from gptjax.evaluation.perplexity import token_losses
from gptjax.inference.engine import pad_prompts
from gptjax.inference.generate import tokenize_prompts
from gptjax.model.gpt import apply, hidden_states, lm_logits, unembedding_matrix
from gptjax.plots.curves import BLUE, ORANGE, new_figure
from gptjax.plots.preview import Preview, TokenSegment, TokenState, token_segments
from gptjax.plots.token_boxes import (
    FIGURE_WIDTH,
    TEXT_STYLE,
    Box,
    to_drawable,
    token_box_figure,
    token_label,
)
from gptjax.tokenizer.tokenizer import Tokenizer
from gptjax.training.optimizer import learning_rates
from gptjax.weights.model_folder import Model

MAX_ATTENTION_TOKENS = 32  # more labels are illegible
LABEL_SIZE = 7.5  # points, of tokens beside attention weights
MAX_BARS = 60
MAX_TITLE_CHARS = 40  # of the prompt in a title
COLORBAR_HEIGHT = 46.0  # points

PALE_BLUE, PALE_ORANGE, PALE_GREY = "#C3DFF0", "#F8DCC8", "#EFEFEF"
DIVERGING_CMAP = LinearSegmentedColormap.from_list("", [ORANGE, "white", BLUE])
# Fill, text color, position of the line across the box.
SEGMENT_STYLES: dict[TokenState, tuple[str, str, float]] = {
    "trained": (PALE_BLUE, "#00405F", 0.94),
    "context": (PALE_GREY, "#333333", 0.0),
    "truncated": ("#FAFAFA", "#777777", 0.5),
}


def attention_figure(model: Model, text: str, layer: int) -> Figure:
    """Plots the attention weights of one layer as a heat map per head.

    The text has 1 to `MAX_ATTENTION_TOKENS` tokens; layers are counted from 0.
    """
    config, ids = model.config, model.tokenizer.encode_prompt(text)
    if not 0 <= layer < config.n_layers:
        raise ConfigError(
            f"layer={layer} is not one of the model's {config.n_layers} layers. Choose "
            f"0 to {config.n_layers - 1}."
        )
    if not 1 <= len(ids) <= MAX_ATTENTION_TOKENS:
        raise ConfigError(
            f"the text has {len(ids)} tokens, not 1 to {MAX_ATTENTION_TOKENS}. Choose another."
        )
    token_BT = jnp.array([ids], jnp.int32)
    jit_apply = jax.jit(apply, static_argnums=0, static_argnames="capture")
    _, activations = jit_apply(config, model.params, token_BT, capture=("attention",))
    weight_HTS = np.asarray(activations["attention"][layer, 0], np.float32)
    labels = [token_label(model.tokenizer.decode_bytes([i])) for i in ids]
    heads, min_size = len(weight_HTS), len(ids) * (LABEL_SIZE - 1)  # points; labels stay apart
    columns = min(heads, 4, max(2, int(300 / min_size)))
    rows = -(-heads // columns)
    columns = -(-heads // rows)
    width = max(FIGURE_WIDTH, 60 + columns * (min_size + 8))
    height = rows * ((width - 60) / columns + 18) + 80 + 5 * max(map(len, labels))
    figure = Figure((width / 72, height / 72), dpi=144, layout="compressed")
    figure.suptitle(f"layer {layer}: queries in rows, keys in columns", fontsize=10)
    text_style = TEXT_STYLE | {"fontsize": LABEL_SIZE}
    panels = [figure.add_subplot(rows, columns, head + 1) for head in range(heads)]
    for head, axes in enumerate(panels):
        axes.imshow(weight_HTS[head], cmap="Blues", vmin=0, vmax=1)
        axes.set_title(f"head {head}", fontsize=9, pad=3)
        below, left = head + columns >= heads, head % columns == 0
        axes.set_xticks(range(len(ids)), labels if below else [], rotation=90, **text_style)
        axes.set_yticks(range(len(ids)), labels if left else [], **text_style)
        axes.tick_params(length=0, pad=2)
    colors = ScalarMappable(Normalize(0, 1), "Blues")
    bar = figure.colorbar(colors, ax=panels, location="bottom", aspect=40, pad=0.02)
    bar.set_label("attention weight", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure


def token_loss_figure(
    model: Model,
    text: str,
    other: Model | None = None,
    names: Sequence[str] = ("first model", "second model"),
) -> Figure:
    """Plots the tokens of a text, colored by their loss.

    The darkest color is the loss of a uniform prediction or more. With a second model,
    tokens are blue if `model` has the lower loss, and orange if `other` has, and the
    picture has their `names`. Tokens that share a character share a box with the sum
    of their losses. The text has 1 to `context_length` tokens.
    """
    if other is not None and other.tokenizer.hash != model.tokenizer.hash:
        raise ConfigError(
            f"the models have the tokenizers {model.tokenizer.name!r} and "
            f"{other.tokenizer.name!r}, so losses per token are not comparable. Use "
            "models with one tokenizer, or compare bits_per_byte of gptjax.score."
        )
    ids, loss_L = token_losses(model, text)
    segments = list(model.tokenizer.iter_characters(ids))
    start_L = np.cumsum([0, *(len(part_ids) for _, part_ids in segments[:-1])])
    value_L, mean = np.add.reduceat(loss_L, start_L), loss_L.mean(dtype=np.float64)
    if other is None:
        max_loss = math.log(model.config.vocab_size)
        colors = ScalarMappable(Normalize(0, max_loss), "Blues")
        title = f"mean {mean:.3f} nats per token"
        label = f"nats (uniform prediction: {max_loss:.2f})"
    else:
        _, other_L = token_losses(other, text)
        value_L = np.add.reduceat(other_L, start_L) - value_L
        max_loss = max(1.0, float(np.abs(value_L).max()))  # small differences stay pale
        colors = ScalarMappable(Normalize(-max_loss, max_loss), DIVERGING_CMAP)
        other_mean = other_L.mean(dtype=np.float64)
        means = f"{mean:.3f} ({names[0]}), {other_mean:.3f} ({names[1]})"
        title = f"mean nats per token: {means}"
        label = f"← {names[1]} is better      nats      {names[0]} is better →"
    fills = colors.to_rgba(value_L)
    # Relative luminance as in WCAG 2.2; 0.18 has equal contrast to black and white.
    light_L = np.power(fills[:, :3], 2.2) @ (0.2126, 0.7152, 0.0722)
    boxes = [
        Box(part_text, fill, "white" if light < 0.18 else "black")
        for (part_text, _), fill, light in zip(segments, fills, light_L, strict=True)
    ]
    figure = token_box_figure(boxes, title, bottom_space=COLORBAR_HEIGHT)
    point = 1 / 72 / figure.get_figheight()
    axes = figure.add_axes((0.06, 30 * point, 0.88, 9 * point))
    extend = "neither" if other else "max"
    bar = figure.colorbar(colors, axes, orientation="horizontal", extend=extend)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure


def next_token_figure(
    model: Model, prompt: str, count: int = 10, temperatures: Sequence[float] = (1.0,)
) -> Figure:
    """Plots the probabilities of the most likely next tokens, one bar per temperature.

    Only the last `context_length` tokens of the prompt are used. The logits are divided
    by the temperature.
    """
    groups = len(temperatures)
    if not 1 <= count * groups <= MAX_BARS or not all(t > 0 for t in temperatures):
        raise ConfigError(
            f"count={count} and temperatures={list(temperatures)} are invalid. Choose 1 to "
            f"{MAX_BARS} bars, and temperatures above 0."
        )
    config, (ids,) = model.config, tokenize_prompts(model, [prompt], 1)[0]
    token_BT, _ = pad_prompts([ids], config.context_length)
    x_BTD, _ = jax.jit(hidden_states, static_argnums=0)(config, model.params, token_BT)
    logit_BV = lm_logits(config, unembedding_matrix(config, model.params), x_BTD[:, len(ids) - 1])
    logit_V = np.asarray(logit_BV, np.float64)[0, : config.vocab_size]
    best = np.argsort(-logit_V, kind="stable")[:count]
    labels = [token_label(model.tokenizer.decode_bytes([i])) for i in best]
    pitch = 18.0 if groups == 1 else 12.0 * groups + 6  # points
    height = (len(labels) * pitch + 42 + 18 * -(-groups // 3)) / 72
    figure = Figure((FIGURE_WIDTH / 72, height), dpi=144, layout="constrained")
    axes = figure.subplots()
    colors = colormaps["cividis"](np.linspace(0, 0.9, groups)) if groups > 1 else [BLUE]
    bar_height = 0.8 / groups
    for n, temperature in enumerate(temperatures):
        weight_V = np.exp((logit_V - logit_V.max()) / max(temperature, 1e-6))
        probs = weight_V[best] / weight_V.sum()
        positions = np.arange(len(probs)) + (n - (groups - 1) / 2) * bar_height
        label = f"temperature {temperature:g}"
        bars = axes.barh(positions, probs, bar_height, color=colors[n], label=label)
        bar_labels = [f"{prob:.1%}" if prob >= 5e-4 else "<0.1%" for prob in probs]
        axes.bar_label(bars, bar_labels, padding=3, fontsize=9 if groups == 1 else 8)
    axes.set_yticks(range(len(labels)), labels, fontsize=10, **TEXT_STYLE)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.xaxis.set_visible(False)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    ellipsis = "…" * (len(prompt) > MAX_TITLE_CHARS)
    title = f"after {ellipsis}{to_drawable(prompt[-MAX_TITLE_CHARS:])}"
    figure.suptitle(title, fontsize=10, **TEXT_STYLE)
    if groups > 1:
        figure.legend(loc="outside lower center", ncols=min(groups, 3), frameon=False, fontsize=9)
    return figure


def loss_mask_figure(preview: Preview, row: int = 0) -> Figure:
    """Plots the tokens of a row (from 0): trained, context and truncated ones."""
    if not 0 <= row < len(preview.rows):
        raise ConfigError(
            f"row={row} is not one of the {len(preview.rows)} rows. Choose 0 to "
            f"{len(preview.rows) - 1}."
        )
    example = preview.rows[row]
    title = f"{sum(example.loss_mask):,} of {len(example.ids):,} tokens are trained"
    if example.num_truncated:
        title += f"; the first {example.num_truncated:,} are truncated"
    if example.dropped:
        title += f"; skipped, as the last answer does not fit {preview.context + 1:,}"

    def make_box(segment: TokenSegment) -> Box:
        fill, text_color, rule_position = SEGMENT_STYLES[segment.state]
        if segment.is_eot:
            fill, text_color = text_color, "white"
        return Box(segment.text, fill, text_color, rule_position=rule_position)

    legend = [TokenSegment(state, [], state, False) for state in SEGMENT_STYLES]
    legend.append(TokenSegment("end token", [], "context", True))
    segments = token_segments(preview.tokenizer, example)
    return token_box_figure(list(map(make_box, segments)), title, list(map(make_box, legend)))


def tokenization_figure(tokenizer: Tokenizer, text: str) -> Figure:
    """Plots the tokens of a text with their ids."""
    if not text:
        raise ConfigError("the text is empty. Pass at least one character.")
    ids = tokenizer.encode(text)
    boxes = [
        Box(part_text, (PALE_BLUE, PALE_ORANGE)[n % 2], note=" ".join(map(str, token_ids)))
        for n, (part_text, token_ids) in enumerate(tokenizer.iter_characters(ids))
    ]
    return token_box_figure(boxes, f"{len(ids):,} tokens, {len(text.encode()):,} bytes")


def schedule_figure(optim: OptimConfig, steps: int) -> Figure:
    """Plots the learning rate schedule."""
    if steps < 1:
        raise ConfigError(f"steps={steps} is below the minimum of 1. Choose 1 or more.")
    rates = learning_rates(optim, steps)
    peak_step = int(np.argmax(rates))
    figure, axes = new_figure("step", "learning rate")
    axes.plot(range(steps), rates, color=BLUE)
    axes.plot(peak_step, rates[peak_step], color=ORANGE, marker="o", markersize=5)
    axes.set_title(f"peak {rates[peak_step]:.3g} at step {peak_step:,}", fontsize=10)
    return figure


def sharding_figure(arrays: Mapping[str, Array], device: int = 0) -> Figure:
    """Plots the shards of arrays and the ids of the devices that hold each of them.

    `arrays` maps titles to arrays, each sharded along at most two axes. A shard with
    more than one id is replicated; those of the device with the id `device` are blue.
    """
    if not arrays:
        raise ConfigError("there are no arrays to plot. Pass {title: array}.")
    columns = min(len(arrays), 2)
    rows = -(-len(arrays) // columns)
    figure = Figure((FIGURE_WIDTH / 72, 1.9 * rows + 0.4), dpi=144, layout="constrained")
    for n, (title, x) in enumerate(arrays.items(), 1):
        axes = figure.add_subplot(rows, columns, n)
        plot_shards(axes, x, device)
        axes.set_title(f"{title}\n{list(x.shape)}", fontsize=9, parse_math=False)
    figure.suptitle(f"ids of the devices of each shard; blue: device {device}", fontsize=10)
    return figure


def plot_shards(axes: Any, x: Array, device: int) -> None:
    """Plots the shards of an array as cells with device ids, rows and columns."""
    devices_by_start: dict[tuple[int, ...], list[int]] = {}
    padding = (0,) * (2 - x.ndim)  # an array of less than two axes is one row
    for holder, index in x.sharding.devices_indices_map(x.shape).items():
        start = tuple(part.start or 0 for part in index)
        devices_by_start.setdefault(padding + start, []).append(holder.id)
    starts = [sorted(set(axis)) for axis in zip(*devices_by_start, strict=True)]
    sharded = [axis for axis, values in enumerate(starts) if len(values) > 1]
    if len(sharded) > 2:
        raise ConfigError(f"array sharded along {len(sharded)} axes. Pass arrays with at most two.")
    # Rows, then columns; unsharded axes fill up, the last ones first.
    unsharded = [axis for axis in reversed(range(len(starts))) if axis not in sharded]
    shown = sorted([*sharded, *unsharded][:2])
    rows, columns = (len(starts[axis]) for axis in shown)
    for start, ids in devices_by_start.items():
        row, column = (starts[axis].index(start[axis]) for axis in shown)
        fill = PALE_BLUE if device in ids else PALE_GREY
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor=fill, edgecolor="white"))
        lines = textwrap.wrap(" ".join(map(str, sorted(ids))), max(3, 24 // columns))
        axes.text(column + 0.5, row + 0.5, "\n".join(lines), ha="center", va="center")
    axes.set(xlim=(0, columns), ylim=(rows, 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    labels = [axis_label(x, axis - len(padding)) for axis in shown]
    axes.set_ylabel(labels[0], fontsize=8)
    axes.set_xlabel(labels[1], fontsize=8)


def axis_label(x: Array, axis: int) -> str:
    """Size of an axis and the mesh axes that shard it; "" for a padded axis."""
    if axis < 0:
        return ""
    spec = [*getattr(x.sharding, "spec", ()), *(None,) * x.ndim][axis]
    names = " x ".join((spec,) if isinstance(spec, str) else spec or ())
    return f"{x.shape[axis]}{' over ' * bool(names)}{names}"
