"""Figures for notebooks: attention, losses, tokens, loss masks, device placement.

Each function returns a new Figure, which a notebook displays as the result of a cell.
Figures are legible at widths of 700 pixels (desktop) and 360 pixels (phone).
"""

import functools
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from gptjax.config import GPTConfig, OptimConfig
from gptjax.errors import ConfigError
from gptjax.evaluation.perplexity import token_losses
from gptjax.inference.engine import pad_prompts
from gptjax.inference.generate import tokenize_prompts
from gptjax.model.gpt import apply, hidden_states, lm_logits, unembedding_matrix
from gptjax.plots.curves import BLUE, GREY, ORANGE, new_figure
from gptjax.plots.preview import Preview, TokenSegment, token_segments
from gptjax.plots.token_boxes import (
    FIGURE_WIDTH,
    FONT_FAMILIES,
    Box,
    needs_white_text,
    to_drawable,
    token_box_figure,
    token_label,
    visible_text,
    width_in_cells,
)
from gptjax.tokenizer.tokenizer import Tokenizer
from gptjax.training.optimizer import learning_rates
from gptjax.tree import Params
from gptjax.weights.model_folder import Model

MAX_ATTENTION_TOKENS = 32  # more labels are illegible
# Figure width in points, columns of panels.
PANEL_LAYOUTS = (
    *((FIGURE_WIDTH, 4), (FIGURE_WIDTH, 3), (FIGURE_WIDTH, 2)),
    (1.4 * FIGURE_WIDTH, 2),
)
MAX_BARS = 60
MAX_TITLE_CHARS = 40  # of the prompt in a title
COLORBAR_HEIGHT = 46.0  # points

PALE_BLUE, PALE_ORANGE, PALE_GREY = "#C3DFF0", "#F8DCC8", "#EFEFEF"
DIVERGING_CMAP = LinearSegmentedColormap.from_list("", [ORANGE, "white", BLUE])


def attention_figure(model: Model, text: str, layer: int) -> Figure:
    """Plots the attention weights of one layer as a heat map per head.

    Args:
        model: from `gptjax.load`.
        text: 1 to `MAX_ATTENTION_TOKENS` tokens.
        layer: index from 0.

    Raises:
        ConfigError: the layer does not exist, or the text is empty or too long.
    """
    config, ids = model.config, encode_nonempty(model.tokenizer, text)
    if not 0 <= layer < config.n_layers:
        raise ConfigError(
            f"layer={layer} is not one of the model's {config.n_layers} layers. Choose "
            f"0 to {config.n_layers - 1}."
        )
    if len(ids) > MAX_ATTENTION_TOKENS:
        raise ConfigError(
            f"the text has {len(ids)} tokens, more than the legible maximum of "
            f"{MAX_ATTENTION_TOKENS}. Shorten the text."
        )
    token_BT = jnp.array([ids], jnp.int32)
    _, activations = apply(config, model.params, token_BT, capture=("attention",))
    weight_HTS = np.asarray(activations["attention"][layer, 0], np.float32)
    labels = [token_label(model.tokenizer.decode_bytes([i])) for i in ids]
    title = f"layer {layer}: queries in rows, keys in columns"
    return attention_panels(weight_HTS, labels, title)


def attention_panels(weight_HTS: np.ndarray, labels: Sequence[str], title: str) -> Figure:
    """Plots a grid of heat maps with labels on the left and at the bottom."""
    heads, size, top, gap = len(weight_HTS), 7.5, 35.0, 18.0  # points
    margin = 0.602 * size * max(map(width_in_cells, labels)) + 6
    min_panel_size = len(labels) * (size - 1)  # points, so that labels do not overlap
    # The fewest columns that need no more rows than n columns do.
    shapes = [(w, -(-heads // -(-heads // n))) for w, n in PANEL_LAYOUTS]
    candidates = [((w - margin) / n - 8, w, n) for w, n in shapes]
    panel_size, width, columns = next(
        (x for x in candidates if x[0] >= min_panel_size), candidates[-1]
    )
    rows = -(-heads // columns)
    height = top + rows * (panel_size + gap) - gap + margin + COLORBAR_HEIGHT
    figure = Figure((width / 72, height / 72), dpi=144)
    figure.suptitle(title, fontsize=10, y=1 - 5 / height, va="top")
    text_style = {"parse_math": False, "fontsize": size, "fontfamily": FONT_FAMILIES}
    for head, weight_TS in enumerate(weight_HTS):
        row, column = divmod(head, columns)
        left = margin + column * (panel_size + 8)
        bottom = top + panel_size + row * (panel_size + gap)
        axes = figure.add_axes(
            (left / width, 1 - bottom / height, panel_size / width, panel_size / height)
        )
        axes.imshow(weight_TS, cmap="Blues", vmin=0, vmax=1)
        axes.set_title(f"head {head}", fontsize=9, pad=3)
        is_bottom_row, positions = head + columns >= heads, range(len(labels))
        axes.set_xticks(positions, labels if is_bottom_row else [], rotation=90, **text_style)
        axes.set_yticks(positions, [] if column else labels, **text_style)
        axes.tick_params(length=0, pad=2)
    add_colorbar(figure, ScalarMappable(Normalize(0, 1), "Blues"), "attention weight")
    return figure


def token_loss_figure(model: Model, text: str, other: Model | None = None) -> Figure:
    """Plots the tokens of a text, colored by their loss.

    The darkest color is the loss of a uniform prediction or more. With a second model,
    tokens are blue if `model` has the lower loss, and orange if `other` has.
    Tokens that share a character share a box with the sum of their losses.

    Args:
        model: from `gptjax.load`.
        text: 1 to `context_length` tokens.
        other: a model with the same tokenizer.

    Raises:
        ConfigError: the text is empty or too long, or the tokenizers differ.
    """
    if other is not None and other.tokenizer.hash != model.tokenizer.hash:
        raise ConfigError(
            f"the models have the tokenizers {model.tokenizer.name!r} and "
            f"{other.tokenizer.name!r}, so losses per token are not comparable. Use "
            "models with one tokenizer, or compare bits_per_byte of gptjax.score."
        )
    encode_nonempty(model.tokenizer, text)
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
        # Small differences stay pale.
        max_loss = max(1.0, float(np.abs(value_L).max()))
        colors = ScalarMappable(Normalize(-max_loss, max_loss), DIVERGING_CMAP)
        other_mean = other_L.mean(dtype=np.float64)
        title = f"mean nats per token: model {mean:.3f}, other {other_mean:.3f}"
        label = "← other is better      nats      model is better →"
    texts = [part_text for part_text, _ in segments]
    boxes = [
        Box(part_text, fill, "white" if needs_white_text(fill) else "black")
        for part_text, fill in zip(texts, colors.to_rgba(value_L), strict=True)
    ]
    figure = token_box_figure(boxes, title, bottom_space=COLORBAR_HEIGHT)
    add_colorbar(figure, colors, label, "neither" if other else "max")
    return figure


def add_colorbar(
    figure: Figure, colors: ScalarMappable, label: str, extend: Any = "neither"
) -> None:
    """Draws a color bar into the reserved space at the bottom of a figure."""
    point = 1 / 72 / figure.get_figheight()
    axes = figure.add_axes((0.06, 30 * point, 0.88, 9 * point))
    bar = figure.colorbar(colors, axes, orientation="horizontal", extend=extend)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)


def next_token_probs(
    model: Model, prompt: str, count: int = 10, temperature: float = 1.0
) -> list[tuple[str, float]]:
    r"""Returns the most likely next tokens and their probabilities, highest first.

    Args:
        model: from `gptjax.load`.
        prompt: not empty; only the last `context_length` tokens are used.
        count: number of tokens, limited by the vocabulary.
        temperature: divisor of the logits.

    Returns:
        Text and probability of each token; bytes that are not valid UTF-8 are escaped
        as in "\xe2".

    Raises:
        ConfigError: the prompt is empty, or `count` or `temperature` is not positive.
    """
    return top_tokens(model, next_logits(model, prompt), count, temperature)


def next_logits(model: Model, prompt: str) -> Float64[np.ndarray, " V"]:
    """Computes the logits of the token after a prompt."""
    rows, _ = tokenize_prompts(model, [prompt], 1)
    token_BT, length_B = pad_prompts(rows, model.config.context_length)
    logit_BV = last_token_logits(model.config, model.params, token_BT, length_B)
    return np.asarray(logit_BV, np.float64)[0, : model.config.vocab_size]


def top_tokens(
    model: Model, logit_V: Float64[np.ndarray, " V"], count: int, temperature: float
) -> list[tuple[str, float]]:
    """Returns the most likely tokens and their probabilities from logits."""
    if count < 1:
        raise ConfigError(f"count={count} is below the minimum of 1. Choose 1 or more.")
    if not temperature > 0:
        raise ConfigError(
            f"temperature={temperature} is not above 0. Choose 1 for the model's own "
            "probabilities, less for a sharper distribution."
        )
    weight_V = np.exp((logit_V - logit_V.max()) / max(temperature, 1e-6))
    prob_V = weight_V / weight_V.sum()
    return [
        (visible_text(model.tokenizer.decode_bytes([i])), float(prob_V[i]))
        for i in np.argsort(-logit_V, kind="stable")[:count]
    ]


@functools.partial(jax.jit, static_argnums=0)
def last_token_logits(
    config: GPTConfig, params: Params, token_BT: Int[Array, "B T"], length_B: Int[Array, " B"]
) -> Float[Array, "B V"]:
    """Computes the logits of the token after the first `length_B` of each row."""
    x_BTD, _ = hidden_states(config, params, token_BT)
    last_BD = x_BTD[jnp.arange(len(length_B)), length_B - 1]
    return lm_logits(config, unembedding_matrix(config, params), last_BD)


def next_token_figure(
    model: Model, prompt: str, count: int = 10, temperatures: Sequence[float] = (1.0,)
) -> Figure:
    """Plots the most likely next tokens as bars, one per temperature.

    Args:
        model: from `gptjax.load`.
        prompt: not empty.
        count: number of tokens.
        temperatures: divisors of the logits.

    Raises:
        ConfigError: as in `next_token_probs`, or there are no bars or too many.
    """
    groups = len(temperatures)
    if not 1 <= max(count, 1) * groups <= MAX_BARS:
        raise ConfigError(
            f"count={count} at {groups} temperatures gives {count * groups} bars, not "
            f"1 to {MAX_BARS}. Change count or temperatures."
        )
    logit_V = next_logits(model, prompt)
    tokens_by_temperature = [top_tokens(model, logit_V, count, t) for t in temperatures]
    labels = [token_label(text.encode()) for text, _ in tokens_by_temperature[0]]
    pitch = 18.0 if groups == 1 else 12.0 * groups + 6  # points
    height = (len(labels) * pitch + 42 + 18 * -(-groups // 3)) / 72
    figure = Figure((FIGURE_WIDTH / 72, height), dpi=144, layout="constrained")
    axes = figure.subplots()
    colors = [BLUE, ORANGE, GREY]
    if groups > len(colors):
        colors = colormaps["cividis"](np.linspace(0, 0.9, groups))
    bar_height = 0.8 / groups
    for n, (t, tokens) in enumerate(zip(temperatures, tokens_by_temperature, strict=True)):
        probs = [prob for _, prob in tokens]
        positions = np.arange(len(probs)) + (n - (groups - 1) / 2) * bar_height
        bars = axes.barh(positions, probs, bar_height, color=colors[n])
        bars.set_label(f"temperature {t:g}")
        bar_labels = [f"{prob:.1%}" if prob >= 5e-4 else "<0.1%" for prob in probs]
        axes.bar_label(bars, bar_labels, padding=3, fontsize=9 if groups == 1 else 8)
    axes.set_yticks(
        *(range(len(labels)), labels), parse_math=False, fontfamily=FONT_FAMILIES, fontsize=10
    )
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.xaxis.set_visible(False)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    ellipsis = "…" * (len(prompt) > MAX_TITLE_CHARS)
    title = f"after {ellipsis}{to_drawable(prompt[-MAX_TITLE_CHARS:])}"
    figure.suptitle(title, fontsize=10, parse_math=False, fontfamily=FONT_FAMILIES)
    if groups > 1:
        figure.legend(loc="outside lower center", ncols=min(groups, 3), frameon=False, fontsize=9)
    return figure


def loss_mask_figure(preview: Preview, row: int = 0) -> Figure:
    """Plots the loss mask of a row: trained, context and truncated tokens.

    Args:
        preview: from `preview_rows`.
        row: index from 0.

    Raises:
        ConfigError: the row does not exist.
    """
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
        title += f"; skipped, as the last answer does not fit {preview.max_length:,}"
    legend = [
        *(
            segment_box(TokenSegment(name, [], name, False))
            for name in ("trained", "context", "truncated")
        ),
        segment_box(TokenSegment("end token", [], "context", True)),
    ]
    boxes = [segment_box(segment) for segment in token_segments(preview.tokenizer, example)]
    return token_box_figure(boxes, title, legend)


def segment_box(segment: TokenSegment) -> Box:
    """Makes the box of a segment; color and underline encode its state."""
    fill, text_color, underline = {
        "trained": (PALE_BLUE, "#00405F", 0.94),
        "context": (PALE_GREY, "#333333", 0.0),
        "truncated": ("#FAFAFA", "#777777", 0.5),
    }[segment.state]
    if segment.is_eot:
        fill, text_color = text_color, "white"
    return Box(segment.text, fill, text_color, rule_position=underline)


def tokenization_figure(tokenizer: Tokenizer, text: str) -> Figure:
    """Plots the tokens of a text with their ids.

    Raises:
        ConfigError: the text is empty.
    """
    ids = encode_nonempty(tokenizer, text)
    boxes = [
        Box(part_text, (PALE_BLUE, PALE_ORANGE)[n % 2], note=" ".join(map(str, token_ids)))
        for n, (part_text, token_ids) in enumerate(tokenizer.iter_characters(ids))
    ]
    return token_box_figure(boxes, f"{len(ids):,} tokens, {len(text.encode()):,} bytes")


def schedule_figure(optim: OptimConfig, steps: int) -> Figure:
    """Plots the learning rate schedule.

    Raises:
        ConfigError: `steps` is below 1, or the warmup is longer than the run.
    """
    if steps < 1:
        raise ConfigError(f"steps={steps} is below the minimum of 1. Choose 1 or more.")
    rates = learning_rates(optim, steps)
    peak_step = int(np.argmax(rates))
    figure, axes = new_figure("step", "learning rate")
    axes.plot(range(steps), rates, color=BLUE, marker="o" if steps == 1 else None)
    axes.plot(peak_step, rates[peak_step], color=ORANGE, marker="o", markersize=5)
    axes.annotate(
        f"peak {rates[peak_step]:.3g} at step {peak_step:,}",
        (peak_step, rates[peak_step]),
        textcoords="offset points",
        xytext=(0, 7),
        ha="left" if peak_step < steps / 2 else "right",
        color=ORANGE,
    )
    axes.set_ylim(0, 1.18 * rates[peak_step] or 1)
    return figure


def sharding_figure(arrays: Mapping[str, Array], device: int = 0) -> Figure:
    """Plots the shards of arrays and the ids of the devices that hold each of them.

    A panel is one array, cut along its sharded axes; a shard with more than one id is
    replicated on these devices. `jax.debug.visualize_array_sharding` does this in text,
    for arrays of at most two axes.

    Args:
        arrays: title and array of each panel; with a `NamedSharding` the labels name
            the mesh axes.
        device: id of the device whose shards are blue.

    Raises:
        ConfigError: there is no array, or one is sharded along more than two axes.
    """
    if not arrays:
        raise ConfigError("there are no arrays to plot. Pass {title: array}.")
    columns = min(len(arrays), 2)
    rows = -(-len(arrays) // columns)
    figure = Figure((FIGURE_WIDTH / 72, 1.9 * rows + 0.4), dpi=144, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (title, x) in zip(panels, arrays.items(), strict=False):
        plot_shards(axes, x, device)
        axes.set_title(f"{title}\n{list(x.shape)}", fontsize=9, parse_math=False)
    for axes in list(panels)[len(arrays) :]:
        axes.set_axis_off()
    figure.suptitle(f"ids of the devices of each shard; blue: device {device}", fontsize=10)
    return figure


def plot_shards(axes: Any, x: Array, device: int) -> None:
    """Plots the shards of an array as cells with device ids, rows and columns."""
    devices_by_start: dict[tuple[int, ...], list[int]] = {}
    for holder, index in x.sharding.devices_indices_map(x.shape).items():
        start = tuple(part.indices(size)[0] for part, size in zip(index, x.shape, strict=True))
        devices_by_start.setdefault(start, []).append(holder.id)
    starts = [sorted(set(axis)) for axis in zip(*devices_by_start, strict=True)]
    sharded = [axis for axis, values in enumerate(starts) if len(values) > 1]
    if len(sharded) > 2:
        raise ConfigError(f"array sharded along {len(sharded)} axes. Pass arrays with at most two.")
    # Rows, then columns; unsharded axes fill up, the last ones first.
    unsharded = [axis for axis in reversed(range(x.ndim)) if axis not in sharded]
    shown = sorted([*sharded, *unsharded][:2])
    counts = [1] * (2 - len(shown)) + [len(starts[axis]) for axis in shown]
    for start, ids in devices_by_start.items():
        cell = [starts[axis].index(start[axis]) for axis in shown]
        row, column = [0] * (2 - len(cell)) + cell
        fill = PALE_BLUE if device in ids else PALE_GREY
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor=fill, edgecolor="white"))
        lines = textwrap.wrap(" ".join(map(str, sorted(ids))), max(3, 24 // counts[1]))
        axes.text(column + 0.5, row + 0.5, "\n".join(lines), ha="center", va="center")
    axes.set(xlim=(0, counts[1]), ylim=(counts[0], 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    labels = [""] * (2 - len(shown)) + [axis_label(x, axis) for axis in shown]
    axes.set_ylabel(labels[0], fontsize=8)
    axes.set_xlabel(labels[1], fontsize=8)


def axis_label(x: Array, axis: int) -> str:
    """Describes an axis of an array: its size and the mesh axes that shard it."""
    spec = getattr(x.sharding, "spec", ())
    names = spec[axis] if axis < len(spec) else None
    names = (names,) if isinstance(names, str) else names or ()
    return f"{x.shape[axis]} over {' x '.join(names)}" if names else f"{x.shape[axis]}"


def encode_nonempty(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokenizes a text.

    Raises:
        ConfigError: the text is empty.
    """
    if not text:
        raise ConfigError("the text is empty. Pass at least one character.")
    return tokenizer.encode(text)
