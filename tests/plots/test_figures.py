"""Figures show what the model computed, and nothing in them is cut off or covered."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.colors import to_hex

import gptjax
from gptjax.config import OptimConfig
from gptjax.errors import ConfigError, DataError
from gptjax.evaluation.perplexity import token_losses
from gptjax.plots import figures
from gptjax.plots.preview import preview_rows, token_segments
from gptjax.plots.token_boxes import MAX_LINES, NOTE_FONT_SIZE, to_drawable, visible_text
from gptjax.tokenizer.tokenizer import load_tokenizer, train_tokenizer
from gptjax.training.optimizer import learning_rates
from gptjax.weights.model_folder import Model
from tests.pictures import (
    assert_boxes_contain_their_texts,
    assert_nothing_is_cut_off,
    box_colors,
    box_texts,
)
from tests.small_models import make_model

BYTES = load_tokenizer("bytes")
jit_apply = jax.jit(gptjax.apply, static_argnums=0, static_argnames="capture")
HARD = "$x$ é漢👩\u200d👧😀\tnaïve\r\n\n\x1b[2J\u202e _{^\\frac $ <|endoftext|>"


@pytest.fixture(scope="module")
def model():
    return make_model(context_length=128, vocab_multiple=8)


@pytest.fixture(scope="module")
def other():
    return make_model(context_length=80, n_layers=1, n_heads=1)


@pytest.mark.parametrize(("heads", "text"), [(1, "a \n😀$"), (12, "W " * 16)])
def test_attention_figure_shows_the_weights_of_each_head(heads, text):
    model = make_model(n_heads=heads, d_model=24, context_length=32)
    token_BT = jnp.array([BYTES.encode(text)], jnp.int32)
    _, activations = jit_apply(model.config, model.params, token_BT, capture=("attention",))

    figure = figures.attention_figure(model, text, 1)

    assert_nothing_is_cut_off(figure)
    for head, axes in enumerate(figure.axes[:heads]):
        (image,) = axes.images
        np.testing.assert_array_equal(image.get_array(), activations["attention"][1, 0, head])
        assert (axes.get_title(), image.get_clim()) == (f"head {head}", (0, 1))
    found = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    escaped = ["\\xf0", "\\x9f", "\\x98", "\\x80"]
    assert found == (["W", "␣"] * 16 if heads > 1 else ["a", "␣", "↵", *escaped, "$"])
    assert figure.get_figwidth() <= 7.5


@pytest.mark.fast
@pytest.mark.parametrize("text", ["to be or not", "x" * 128])
def test_token_losses_equal_a_plain_forward_pass_and_average_to_the_score(model, text):
    ids = [model.tokenizer.eot_token, *model.tokenizer.encode(text)]
    logit_BTV = jit_apply(model.config, model.params, jnp.array([ids[:-1]]))
    logprob_LV = jax.nn.log_softmax(logit_BTV[0, :, :257])

    found, loss_L = token_losses(model, text)

    assert found == ids[1:]
    expected_L = -logprob_LV[jnp.arange(len(found)), jnp.array(found)]
    np.testing.assert_allclose(loss_L, expected_L, rtol=1e-5, atol=1e-5)
    assert loss_L.mean(dtype=np.float64) == pytest.approx(gptjax.score(model, text).loss, rel=1e-6)


def test_token_loss_figure_is_darker_where_the_loss_is_higher(model):
    text = "To be, or not to be: that is"
    _, loss_L = token_losses(model, text)

    figure = figures.token_loss_figure(model, text)

    light_L = np.array(box_colors(figure)).sum(axis=1)[np.argsort(loss_L)]
    assert (np.diff(light_L) <= 0).all()
    assert light_L[0] > light_L[-1]
    assert box_texts(figure)[0] == f"mean {loss_L.mean():.3f} nats per token"
    assert figure.axes[1].get_xlim() == (0, pytest.approx(math.log(257)))


def test_token_loss_figure_of_two_models_shows_the_difference_per_character(model, other):
    bounds = [(0, 1), (1, 5), (5, 6)]  # tokens of "a", "😀" and "b"
    (_, loss_L), (_, other_L) = (token_losses(m, "a😀b") for m in (model, other))
    values = np.array([(other_L - loss_L)[a:b].sum() for a, b in bounds])
    limit = max(1.0, abs(values).max())

    figure = figures.token_loss_figure(model, "a😀b", other)

    expected = figures.DIVERGING_CMAP((values + limit) / (2 * limit))[:, :3]
    np.testing.assert_allclose(box_colors(figure), expected, atol=0.01)
    means = f"model {loss_L.mean():.3f}, other {other_L.mean():.3f}"
    assert box_texts(figure) == [f"mean nats per token: {means}", "a", "😀", "b"]
    # Blue where the first model is better.
    assert to_hex(figures.DIVERGING_CMAP(1.0)) == figures.BLUE.lower()


@pytest.mark.fast
def test_next_token_probs_are_the_softmax_of_the_last_logits(model):
    prompt = "something else " * 9 + "to be"  # longer than the context
    token_BT = jnp.array([BYTES.encode(prompt)[-128:]])
    logit_BTV = jit_apply(model.config, model.params, token_BT)

    for temperature in (0.5, 2.0):
        found = figures.next_token_probs(model, prompt, 1000, temperature)

        prob_V = jax.nn.softmax(logit_BTV[0, -1, :257] / temperature)
        best_V = np.argsort(-prob_V, kind="stable")
        names = [visible_text(BYTES.decode_bytes([i])) for i in best_V]
        assert [text for text, _ in found] == names
        np.testing.assert_allclose([prob for _, prob in found], prob_V[best_V], rtol=1e-4)


@pytest.mark.parametrize("temperatures", [(1.0,), (1e-9, 0.5, 1.0, 2.0)])
def test_next_token_figure_has_a_bar_per_token_and_temperature(model, temperatures):
    figure = figures.next_token_figure(model, "to $be$" * 9, 5, temperatures)

    (axes,) = figure.axes
    assert_nothing_is_cut_off(figure)
    for bars, t in zip(axes.containers, temperatures, strict=True):
        probs = [prob for _, prob in figures.next_token_probs(model, "to $be$" * 9, 5, t)]
        assert [bar.get_width() for bar in bars] == probs
    legend = [x.get_text() for found in figure.legends for x in found.get_texts()]
    assert legend == [f"temperature {t:g}" for t in temperatures] * (len(temperatures) > 1)
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the most likely on top
    assert figure.get_suptitle() == "after …" + ("to $be$" * 9)[-40:]
    if len(temperatures) > 1:
        assert box_texts(figure)[:2] == ["100.0%", "<0.1%"]


@pytest.fixture(scope="module")
def preview(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    pairs = [("Add $1.", "é 😀"), ("long " * 40, "yes"), ("q", "long " * 80)]
    rows = [{"instruction": question, "output": answer} for question, answer in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return preview_rows(path, tokenizer="bytes", context=250)


@pytest.mark.parametrize(
    ("row", "title"),
    [
        (0, "8 of 155 tokens are trained"),
        (1, "4 of 344 tokens are trained; the first 93 are truncated"),
        (2, "0 of 542 tokens are trained; skipped, as the last answer"),
    ],
)
def test_loss_mask_figure_colors_each_token_by_its_state(preview, row, title):
    figure = figures.loss_mask_figure(preview, row)

    *states, _ = [part.state for part in token_segments(preview.tokenizer, preview.rows[row])]
    fills = {state: style[0] for state, style in figures.SEGMENT_STYLES.items()}
    colors = [to_hex(color, keep_alpha=False).upper() for color in box_colors(figure)]
    assert colors[: len(states)] == [fills[state] for state in states]
    end_color = figures.SEGMENT_STYLES["context" if row == 2 else "trained"][1]  # inverted
    assert colors[len(states) :] == [end_color, *fills.values(), "#333333"]
    assert box_texts(figure)[0].replace("\n", " ").startswith(title)
    assert box_texts(figure)[-4:] == ["trained", "context", "truncated", "end token"]
    assert_boxes_contain_their_texts(figure)
    assert_nothing_is_cut_off(figure)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (10, 50), (50, 50)])
def test_schedule_figure_shows_the_learning_rate_of_each_step(warmup, steps):
    optim = OptimConfig(schedule="wsd", warmup_steps=warmup)
    rates = learning_rates(optim, steps)

    figure = figures.schedule_figure(optim, steps)

    line, peak = figure.axes[0].lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == (list(range(steps)), rates)
    assert list(peak.get_ydata()) == [max(rates)]
    assert box_texts(figure) == [f"peak {max(rates):.3g} at step {rates.index(max(rates))}"]
    assert_nothing_is_cut_off(figure)


def shard(shape, *spec):
    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    return jax.device_put(jnp.zeros(shape), sharding)


def test_sharding_figure_shows_the_devices_of_each_shard():
    arrays = {
        "rows": shard((8, 6), ("a", "b")),
        "kernel": shard((2, 16, 64), None, "b", "c"),
        "bias": shard((4,), "c"),
    }

    figure = figures.sharding_figure(arrays, device=5)

    assert_nothing_is_cut_off(figure)
    sizes = {"rows": (2, 6), "kernel": (8, 32), "bias": (1, 2)}  # of a cell
    assert not figure.axes[3].axison  # unused
    for axes, (title, x) in zip(figure.axes, arrays.items(), strict=False):
        cells = zip(axes.patches, axes.texts, strict=True)
        for patch, text in cells:
            column, row = patch.get_xy()
            height, width = sizes[title]
            start = (0,) * (x.ndim - 2) + (row * height, column * width)
            expected = [
                s.device.id
                for s in x.addressable_shards
                if tuple(part.start or 0 for part in s.index) == start[len(start) - x.ndim :]
            ]
            assert sorted(map(int, text.get_text().split())) == sorted(expected)
            is_blue = to_hex(patch.get_facecolor()) == figures.PALE_BLUE.lower()
            assert is_blue == (5 in expected)
    labels = [(axes.get_ylabel(), axes.get_xlabel()) for axes in figure.axes[:3]]
    assert labels == [("8 over a x b", "6"), ("16 over b", "64 over c"), ("", "4 over c")]


def test_invalid_arguments_are_rejected(model, other, preview):
    letters = Model(model.config, model.params, train_tokenizer(["abab"], 258))
    cases = [
        (ConfigError, "layer=-1 ", lambda: figures.attention_figure(model, "a", -1)),
        (ConfigError, "layer=2 ", lambda: figures.attention_figure(model, "a", 2)),
        (ConfigError, " 33 tokens", lambda: figures.attention_figure(model, "x" * 33, 0)),
        (ConfigError, "empty", lambda: figures.attention_figure(model, "", 0)),
        (ConfigError, "empty", lambda: figures.tokenization_figure(BYTES, "")),
        (DataError, "no token", lambda: figures.token_loss_figure(model, "")),
        (ConfigError, " 81 tokens", lambda: figures.token_loss_figure(model, "x" * 81, other)),
        (ConfigError, "'bpe:258'", lambda: figures.token_loss_figure(model, "ab", letters)),
        (
            ConfigError,
            "temperature=nan ",
            lambda: figures.next_token_probs(model, "a", 3, math.nan),
        ),
        (ConfigError, "temperature=0.0 ", lambda: figures.next_token_figure(model, "a", 3, (0.0,))),
        (ConfigError, "count=0 ", lambda: figures.next_token_figure(model, "a", 0)),
        (ConfigError, " 62 bars", lambda: figures.next_token_figure(model, "a", 31, (1.0, 2.0))),
        (ConfigError, " 0 bars", lambda: figures.next_token_figure(model, "a", temperatures=())),
        (ConfigError, "prompt", lambda: figures.next_token_probs(model, "")),
        (ConfigError, "row=-1 ", lambda: figures.loss_mask_figure(preview, -1)),
        (ConfigError, "row=3 ", lambda: figures.loss_mask_figure(preview, 3)),
        (ConfigError, "steps=0 ", lambda: figures.schedule_figure(OptimConfig(), 0)),
        (ConfigError, "warmup_steps", lambda: figures.schedule_figure(OptimConfig(), 50)),
        (ConfigError, "3 axes", lambda: figures.sharding_figure({"x": shard([2] * 3, *"abc")})),
        (ConfigError, "no arrays", lambda: figures.sharding_figure({})),
    ]
    for error, match, call in cases:
        with pytest.raises(error, match=match):
            call()


@pytest.mark.parametrize("text", ["a", HARD, "W" * 128, "g\n" * 60])
def test_token_boxes_contain_the_whole_text_and_its_ids(model, other, text):
    short, gpt2 = text[:60], load_tokenizer("gpt2")

    loss = figures.token_loss_figure(model, text)
    difference = figures.token_loss_figure(other, short, model)
    tokens = figures.tokenization_figure(gpt2, text)

    for figure in (loss, difference, tokens):
        assert_boxes_contain_their_texts(figure)
        assert_nothing_is_cut_off(figure)
    assert "".join(box_texts(difference)[1:]) == "".join(map(to_drawable, short))
    title, *_ = box_texts(tokens)
    ids = gpt2.encode(text)
    assert title.startswith(f"{len(ids)} tokens, {len(text.encode())} bytes")
    notes = [x.get_text() for x in tokens.axes[0].texts if x.get_fontsize() == NOTE_FONT_SIZE]
    if text == "g\n" * 60:  # more lines than are shown
        assert len(notes) == 2 * MAX_LINES
        assert title.endswith(f" the last {len(ids) - 2 * MAX_LINES} boxes are not shown")
    else:
        assert " ".join(notes) == " ".join(map(str, ids))
