"""Figures show what the model computed, and nothing in them is cut off or covered."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

import gptjax
from gptjax.errors import ConfigError
from gptjax.evaluation.perplexity import token_losses
from gptjax.plots import figures
from gptjax.plots.token_boxes import NOTE_FONT_SIZE, to_drawable, token_label
from gptjax.tokenizer.tokenizer import load_tokenizer, train_tokenizer
from gptjax.weights.model_folder import Model
from tests.small_models import make_model

BYTES = load_tokenizer("bytes")
jit_apply = jax.jit(gptjax.apply, static_argnums=0, static_argnames="capture")
HARD = "$x$ é漢👩\u200d👧😀\tnaïve\r\n\n\x1b[2J\u202e _{^\\frac $ <|endoftext|>"


def assert_nothing_is_cut_off(figure):
    FigureCanvasAgg(figure).draw()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    pixel = 1 / figure.dpi  # text is placed on whole pixels
    assert -pixel <= box.x0 <= box.x1 <= width + pixel
    assert -pixel <= box.y0 <= box.y1 <= height + pixel


def box_colors(figure):
    """Colors of the boxes of a token figure, in the order of the text."""
    return [patch.get_facecolor()[:3] for patch in figure.axes[0].patches]


def box_texts(figure):
    """Texts of a token figure, its title first."""
    return [text.get_text() for text in figure.axes[0].texts]


@pytest.fixture(scope="module")
def model():
    return make_model(context_length=32, n_heads=4, d_model=8, vocab_multiple=8)


def test_attention_figure_shows_the_weights_of_each_head(model):
    text = "W " * 12 + "\n😀$"
    token_BT = jnp.array([BYTES.encode(text)], jnp.int32)
    _, activations = jit_apply(model.config, model.params, token_BT, capture=("attention",))

    figure = figures.attention_figure(model, text, 1)

    assert_nothing_is_cut_off(figure)
    for head, axes in enumerate(figure.axes[:4]):
        (image,) = axes.images
        np.testing.assert_array_equal(image.get_array(), activations["attention"][1, 0, head])
        assert (axes.get_title(), image.get_clim()) == (f"head {head}", (0, 1))


def test_token_loss_figures_are_colored_by_the_loss_of_each_character(model):
    text, bounds = "To be a😀b", [*range(8), 11]  # first token of each character
    other = Model(model.config, jax.tree.map(lambda x: x * 1.1, model.params), BYTES)
    (_, loss_L), (_, other_L) = (token_losses(m, text) for m in (model, other))
    loss, difference = (np.add.reduceat(x, bounds) for x in (loss_L, other_L - loss_L))

    one = figures.token_loss_figure(model, text)
    two = figures.token_loss_figure(model, text, other, names=("small", "big"))

    light_L = np.array(box_colors(one)).sum(axis=1)[np.argsort(loss)]
    assert (np.diff(light_L) <= 0).all()  # darker where the loss is higher
    assert light_L[0] > light_L[-1]
    limit = max(1.0, abs(difference).max())
    expected = figures.DIVERGING_CMAP((difference + limit) / (2 * limit))[:, :3]
    np.testing.assert_allclose(box_colors(two), expected, atol=0.01)
    assert box_texts(one) == [f"mean {loss_L.mean():.3f} nats per token", *text]
    assert f"{loss_L.mean():.3f} (small), {other_L.mean():.3f} (big)" in box_texts(two)[0]
    assert re.fullmatch("← big .* nats .* small .* →", two.axes[-1].get_xlabel())
    assert_nothing_is_cut_off(one)
    assert_nothing_is_cut_off(two)


def test_next_tokens_are_the_softmax_of_the_last_logits(model):
    prompt, temperatures = "something else " * 9 + "to $be$", (1e-9, 0.5, 1.0, 2.0)
    token_BT = jnp.array([BYTES.encode(prompt)[-32:]])  # longer than the context
    logit_BTV = jit_apply(model.config, model.params, token_BT)

    figure = figures.next_token_figure(model, prompt, 5, temperatures)

    best = np.argsort(-logit_BTV[0, -1, :257], kind="stable")[:5]
    for bars, t in zip(figure.axes[0].containers, temperatures, strict=True):
        prob_V = jax.nn.softmax(logit_BTV[0, -1, :257] / t)
        widths = [bar.get_width() for bar in bars]
        np.testing.assert_allclose(widths, prob_V[best], rtol=1e-4, atol=1e-30)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == [token_label(BYTES.decode_bytes([i])) for i in best]
    assert_nothing_is_cut_off(figure)


def shard(shape, *spec):
    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    return jax.device_put(np.zeros(shape), sharding)


def test_sharding_figure_shows_the_devices_of_each_shard():
    arrays = {
        "rows": shard((8, 6), ("a", "b")),
        "kernel": shard((2, 16, 64), None, "b", "c"),
        "bias": shard((4,), "c"),
    }

    figure = figures.sharding_figure(arrays, device=5)

    assert_nothing_is_cut_off(figure)
    expected = {  # device ids of each cell (row, column)
        "rows": {(n, 0): {2 * n, 2 * n + 1} for n in range(4)},
        "kernel": {(b, c): {2 * b + c, 4 + 2 * b + c} for b in range(2) for c in range(2)},
        "bias": {(0, c): {c, 2 + c, 4 + c, 6 + c} for c in range(2)},
    }
    for axes, cells in zip(figure.axes, expected.values(), strict=False):
        found = {}
        for patch, text in zip(axes.patches, axes.texts, strict=True):
            ids = found[patch.get_xy()[::-1]] = set(map(int, text.get_text().split()))
            assert (to_hex(patch.get_facecolor()) == figures.PALE_BLUE.lower()) == (5 in ids)
        assert found == cells


def test_invalid_arguments_are_rejected(model):
    letters = Model(model.config, model.params, train_tokenizer(["abab"], 258))
    for match, figure, *arguments in [
        ("layer=2 ", figures.attention_figure, model, "a", 2),
        (" 33 tokens", figures.attention_figure, model, "x" * 33, 0),
        ("'bpe:258'", figures.token_loss_figure, model, "ab", letters),
        ("count=31 ", figures.next_token_figure, model, "a", 31, (1.0, 2.0)),
    ]:
        with pytest.raises(ConfigError, match=match):
            figure(*arguments)


@pytest.mark.parametrize("text", [HARD, "W" * 90])
def test_token_boxes_contain_the_whole_text_and_its_ids(text):
    gpt2 = load_tokenizer("gpt2")
    ids = gpt2.encode(text)

    figure = figures.tokenization_figure(gpt2, text)

    assert_nothing_is_cut_off(figure)
    _, *texts = box_texts(figure)
    notes = [x.get_text() for x in figure.axes[0].texts if x.get_fontsize() == NOTE_FONT_SIZE]
    assert " ".join(notes) == " ".join(map(str, ids))
    assert "".join(x for x in texts if x not in notes) == "".join(map(to_drawable, text))
