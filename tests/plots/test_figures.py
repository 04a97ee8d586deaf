"""Figures show what the model computed, and nothing in them is cut off or covered."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.colors import to_hex

import gptjax
from gptjax.config import MeshConfig, OptimConfig
from gptjax.errors import ConfigError, DataError
from gptjax.evaluation import perplexity
from gptjax.evaluation.perplexity import token_losses
from gptjax.parallel.sharding import make_mesh, shard_batch, shard_tree
from gptjax.plots import figures, token_boxes
from gptjax.plots.figures import (
    attention_figure,
    loss_mask_figure,
    next_token_figure,
    next_token_probs,
    schedule_figure,
    sharding_figure,
    token_loss_figure,
    tokenization_figure,
)
from gptjax.plots.preview import preview_rows, token_segments
from gptjax.tokenizer.tokenizer import load_tokenizer, train_tokenizer
from gptjax.training.optimizer import learning_rates
from gptjax.weights.model_folder import Model
from tests.pictures import (
    assert_boxes_hold_their_texts,
    assert_nothing_is_cut_off,
    drawn,
    faces,
    written,
)
from tests.small_models import make_model

BYTES = load_tokenizer("bytes")
HARD = "$x$ é漢👩\u200d👧😀\tnaïve\r\n\n\x1b[2J\u202e _{^\\frac $ <|endoftext|>"


@pytest.fixture(scope="module")
def model():
    return make_model(context_length=128)


@pytest.fixture(scope="module")
def other():
    """A model of the same tokenizer that was made otherwise."""
    return make_model(context_length=80, n_layers=1, n_heads=4)


@pytest.fixture(scope="module")
def preview(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [
        {"instruction": "Add $1.", "output": "é 😀"},
        {"instruction": "long " * 40, "output": "yes"},
        {"instruction": "q", "output": "long " * 80},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return preview_rows(path, tokenizer="bytes", context=250)


@pytest.mark.parametrize("heads", [1, 8])
def test_each_panel_is_the_weights_of_its_head(heads):
    model = make_model(n_heads=heads, context_length=16)
    token_BT = jnp.array([BYTES.encode("to be, é")], jnp.int32)
    _, kept = gptjax.apply(model.config, model.params, token_BT, capture=("attention",))

    figure = attention_figure(model, "to be, é", 1)

    panels = figure.axes[:heads]
    assert len(figure.axes) == heads + 1  # and the colour bar
    for head, axes in enumerate(panels):
        (image,) = axes.images
        np.testing.assert_array_equal(image.get_array(), kept["attention"][1, 0, head])
        assert not np.triu(image.get_array(), 1).any()
        assert image.get_clim() == (0, 1)
        assert axes.get_title() == f"head {head}"


@pytest.mark.parametrize(
    ("heads", "columns", "size"), [(8, 4, 8), (6, 3, 8), (12, 2, 32), (3, 2, 32)]
)
def test_only_the_outer_panels_are_labelled_with_tokens(heads, columns, size):
    labels = [f"␣token {n}…" for n in range(size)]

    figure = drawn(figures.attention_panels(np.zeros((heads, size, size)), labels, "title"))

    for head, axes in enumerate(figure.axes[:heads]):
        left = [label.get_text() for label in axes.get_yticklabels()]
        low = [label.get_text() for label in axes.get_xticklabels()]
        assert left == (labels if head % columns == 0 else [""] * size)
        assert low == (labels if head + columns >= heads else [""] * size)
    assert_nothing_is_cut_off(figure)
    assert figure.get_figwidth() <= 7


def test_a_token_of_a_label_shows_its_blanks_and_its_bytes(model):
    figure = attention_figure(model, "a \n😀$", 0)

    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["a", "␣", "↵", *("\\xf0", "\\x9f", "\\x98", "\\x80"), "$"]


@pytest.mark.fast
@pytest.mark.parametrize("text", ["a", "to be or not to be", "é漢😀", "x" * 128])
def test_nats_of_tokens_are_those_of_a_plain_pass_and_of_score(model, text):
    read = [model.tokenizer.eot_token, *model.tokenizer.encode(text)]
    logit_BTV = gptjax.apply(model.config, model.params, jnp.array([read[:-1]]))
    chance_LV = jax.nn.log_softmax(logit_BTV[0])

    ids, nat_L = token_losses(model, text)

    assert ids == read[1:]
    assert nat_L.shape == (len(ids),)
    np.testing.assert_allclose(
        nat_L, -chance_LV[jnp.arange(len(ids)), jnp.array(ids)], rtol=1e-5, atol=1e-5
    )
    # Both add the same float32 numbers, in programs of another number of rows.
    loss = gptjax.score(model, text).loss
    assert nat_L.mean(dtype=np.float64) == pytest.approx(loss, rel=1e-6)


def test_texts_of_all_lengths_are_read_by_one_program(model, monkeypatch):
    shapes = set()

    def scorer(params, batch):
        shapes.add(batch["tokens"].shape)
        return np.zeros(batch["tokens"].shape)

    monkeypatch.setattr(perplexity, "eval_step_for", lambda config: scorer)
    for text in ("a", "to be", "x" * 128):
        token_losses(model, text)

    assert shapes == {(1, 128)}


def test_a_text_without_tokens_or_with_too_many_has_no_nats(model):
    with pytest.raises(DataError, match="no token to score"):
        token_losses(model, "")
    with pytest.raises(ConfigError, match=r"129 tokens, more than .* 128. Shorten it"):
        token_losses(model, "x" * 129)


def test_a_box_is_the_darker_the_more_nats_its_token_has(model):
    text = "To be, or not to be: that is"
    _, nat_L = token_losses(model, text)

    figure = token_loss_figure(model, text)

    light = np.array(faces(figure)).sum(axis=1)
    order = np.argsort(nat_L)
    assert len(light) == len(nat_L)
    assert (np.diff(light[order]) <= 0).all()
    assert light[order[0]] > light[order[-1]]
    title, *_ = written(figure)
    assert title == f"mean {nat_L.mean():.3f} nats per token"
    low, high = figure.axes[1].get_xlim()
    assert (low, high) == (0, pytest.approx(math.log(257)))


def test_tokens_that_share_a_character_share_a_box_and_add_their_nats(model, other):
    bounds = [(0, 1), (1, 5), (5, 6)]
    (_, nat_L), (_, other_L) = (token_losses(m, "a😀b") for m in (model, other))
    values = np.array([(other_L - nat_L)[a:b].sum() for a, b in bounds])
    most = max(1.0, abs(values).max())

    figure = token_loss_figure(model, "a😀b", other)

    expected = figures.DIVERGING_CMAP((values + most) / (2 * most))[:, :3]
    np.testing.assert_allclose(faces(figure), expected, atol=0.01)
    assert written(figure)[1:] == ["a", "😀", "b"]


def test_a_comparison_is_blue_where_the_model_is_better_and_orange_elsewhere(model, other):
    text = "To be, or not to be: that is"
    (_, nat_L), (_, other_L) = token_losses(model, text), token_losses(other, text)

    figure = token_loss_figure(model, text, other)

    better = other_L > nat_L
    assert 0 < better.sum() < len(better)
    for (red, _, blue), better_here in zip(faces(figure), better, strict=True):
        assert blue >= red if better_here else red >= blue
    title = written(figure)[0]
    assert title == (f"mean nats per token: model {nat_L.mean():.3f}, other {other_L.mean():.3f}")
    assert to_hex(figures.DIVERGING_CMAP(1.0)) == figures.BLUE.lower()


def test_swapping_the_models_mirrors_the_colours(model, other):
    table = figures.DIVERGING_CMAP(np.linspace(0, 1, 256))[:, None, :3]

    def places(*models):
        found = np.array(faces(token_loss_figure(models[0], "to be é", models[1])))
        return np.abs(table - found).sum(axis=-1).argmin(axis=0)

    one, swapped = places(model, other), places(other, model)

    assert np.abs(one + swapped - 255).max() <= 1  # of 256 colours
    assert len(set(one)) > 3


def test_a_model_compared_with_itself_is_white(model):
    figure = token_loss_figure(model, "to be", model)

    # 256 colours have none in their middle.
    np.testing.assert_allclose(faces(figure), 1, atol=0.01)


def test_losses_of_other_tokenizers_and_of_too_much_text_are_not_drawn(model, other):
    letters = Model(model.config, model.params, train_tokenizer(["abab"], 258))

    with pytest.raises(ConfigError, match=r"'bytes' and 'bpe:258', .* bits_per_byte"):
        token_loss_figure(model, "ab", letters)
    with pytest.raises(ConfigError, match="text is empty"):
        token_loss_figure(model, "")
    with pytest.raises(ConfigError, match=r"81 tokens, more than .* 80. Shorten it"):
        token_loss_figure(model, "x" * 81, other)


@pytest.mark.fast
@pytest.mark.parametrize("vocab_multiple", [1, 8])
def test_next_tokens_are_the_softmax_of_the_last_scores(vocab_multiple):
    model = make_model(vocab_multiple=vocab_multiple)
    token_BT = jnp.array([BYTES.encode("to be")])
    logit_BTV = gptjax.apply(model.config, model.params, token_BT)

    for temperature in (0.5, 1.0, 2.0):
        found = next_token_probs(model, "to be", 1000, temperature)

        chance_V = jax.nn.softmax(logit_BTV[0, -1, :257] / temperature)
        best_V = np.argsort(-chance_V, kind="stable")
        names = [token_boxes.visible_text(BYTES.decode_bytes([i])) for i in best_V]
        assert [text for text, _ in found] == names
        chances = [chance for _, chance in found]
        np.testing.assert_allclose(chances, chance_V[best_V], rtol=1e-4)


def test_a_lower_temperature_gives_the_likeliest_more_and_keeps_the_order(model):
    cold, warm, hot = (next_token_probs(model, "é", 257, t) for t in (0.1, 1.0, 9.0))

    assert cold[0][1] > warm[0][1] > hot[0][1]
    assert cold[-1][1] < warm[-1][1] < hot[-1][1]
    assert [x for x, _ in cold] == [x for x, _ in warm] == [x for x, _ in hot]


def test_of_a_long_prompt_the_end_is_read():
    model = make_model(context_length=8)

    found = next_token_probs(model, "something else 12345678")

    assert found == next_token_probs(model, "12345678")
    assert found != next_token_probs(model, "12345677")


@pytest.mark.parametrize("temperatures", [(1.0,), (0.5, 1.0), (0.1, 0.5, 1.0, 2.0)])
def test_bars_are_the_probabilities_at_each_temperature(model, temperatures):
    figure = next_token_figure(model, "to $be$", 5, temperatures)

    (axes,) = figure.axes
    assert_nothing_is_cut_off(figure)
    assert len(axes.containers) == len(temperatures)
    for bars, t in zip(axes.containers, temperatures, strict=True):
        chances = [chance for _, chance in next_token_probs(model, "to $be$", 5, t)]
        assert [bar.get_width() for bar in bars] == chances
    assert len({bars[0].get_facecolor() for bars in axes.containers}) == len(temperatures)
    legend = [x.get_text() for found in figure.legends for x in found.get_texts()]
    assert legend == [f"temperature {t:g}" for t in temperatures] * (len(legend) > 0)
    assert bool(legend) == (len(temperatures) > 1)
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the likeliest on top


def test_probabilities_that_cannot_be_asked_for_are_refused(model):
    with pytest.raises(ConfigError, match=r"temperature=0\.0 "):
        next_token_figure(model, "a", 3, (1.0, 0.0))
    with pytest.raises(ConfigError, match="temperature=nan "):
        next_token_probs(model, "a", 3, math.nan)
    with pytest.raises(ConfigError, match="count=0 "):
        next_token_figure(model, "a", 0)
    with pytest.raises(ConfigError, match=r"count=31 at 2 .* 62 bars, not 1 to 60"):
        next_token_figure(model, "a", 31, (1.0, 2.0))
    with pytest.raises(ConfigError, match=r"count=10 at 0 .* 0 bars"):
        next_token_figure(model, "a", temperatures=())
    with pytest.raises(ConfigError, match="prompt is empty"):
        next_token_probs(model, "")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("row", "title"),
    [
        (0, "8 of 155 tokens are trained"),
        (1, "4 of 344 tokens are trained; the first 93 are truncated"),
        (2, "0 of 542 tokens are trained; skipped, as the last answer"),
    ],
)
def test_exactly_what_is_learned_is_marked_as_such(preview, row, title):
    one, blue = preview.rows[row], to_hex(figures.PALE_BLUE)

    figure = loss_mask_figure(preview, row)

    # A box in the order of the text; then those of the legend.
    shown = [to_hex(face) for face in faces(figure)]
    *states, end = [part.state for part in token_segments(preview.tokenizer, one)]
    assert [face == blue for face in shown[: len(states)]] == [
        state == "trained" for state in states
    ]
    assert shown.count(blue) == states.count("trained") + 1
    assert len(shown) == len(states) + 1 + 4
    ruled = [state for state in [*states, end, "trained", "truncated"] if state != "context"]
    assert len(figure.axes[0].lines) == len(ruled)
    assert written(figure)[0].replace("\n", " ").startswith(title)
    assert written(figure)[-4:] == ["trained", "context", "truncated", "end token"]
    assert_boxes_hold_their_texts(figure)
    assert_nothing_is_cut_off(figure)


def test_the_end_is_inverted_and_tells_whether_it_is_learned(preview):
    learned, given = loss_mask_figure(preview, 0), loss_mask_figure(preview, 2)

    for figure, ink in ((learned, "#00405f"), (given, "#333333")):
        *_, end = [text for text in figure.axes[0].texts if "endof" in text.get_text()]
        patch = figure.axes[0].patches[-5]
        assert (to_hex(patch.get_facecolor()), end.get_color()) == (ink, "white")


def test_a_row_that_is_not_there_is_refused(preview):
    for row in (-1, 3):
        with pytest.raises(ConfigError, match=rf"row={row} is not .* 3 .* 0 to 2\."):
            loss_mask_figure(preview, row)


@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (0, 50), (10, 50), (50, 50)])
def test_the_line_is_the_learning_rate_of_each_step(schedule, warmup, steps):
    optim = OptimConfig(schedule=schedule, warmup_steps=warmup)
    rates = learning_rates(optim, steps)

    figure = schedule_figure(optim, steps)

    line, peak = figure.axes[0].lines
    assert list(line.get_xdata()) == list(range(steps))
    assert list(line.get_ydata()) == rates
    assert peak.get_ydata() == [max(rates)]
    (note,) = written(figure)
    assert note == f"peak {max(rates):.3g} at step {rates.index(max(rates))}"
    assert_nothing_is_cut_off(figure)
    (text,) = figure.axes[0].texts
    assert text.get_window_extent().y1 < figure.axes[0].get_window_extent().y1


def test_a_run_of_no_step_or_of_too_long_a_warm_up_has_no_picture():
    with pytest.raises(ConfigError, match="steps=0 "):
        schedule_figure(OptimConfig(warmup_steps=0), 0)
    with pytest.raises(ConfigError, match="warmup_steps=100"):
        schedule_figure(OptimConfig(), 50)


def test_layers_and_texts_that_have_no_attention_to_show_are_refused(model):
    for layer in (-1, 2):
        with pytest.raises(ConfigError, match=rf"layer={layer} is not .* 0 to 1\."):
            attention_figure(model, "a", layer)
    with pytest.raises(ConfigError, match=r"has 33 tokens, .* 32\. Shorten"):
        attention_figure(model, "x" * 33, 0)
    for draw in (attention_figure, lambda *_: tokenization_figure(BYTES, "")):
        with pytest.raises(ConfigError, match="text is empty"):
            draw(model, "", 0)


@pytest.mark.parametrize("text", ["a", HARD, "W" * 128, "g\n" * 60])
def test_no_picture_of_a_text_has_anything_cut_off_or_covered(model, other, text):
    short = text[:60] if len(text) > 80 else text
    boxes_of = [
        token_loss_figure(model, text),
        token_loss_figure(other, short, model),
        tokenization_figure(BYTES, text),
        tokenization_figure(load_tokenizer("gpt2"), text),
    ]

    for figure in boxes_of:
        assert_boxes_hold_their_texts(figure)
    for figure in [*boxes_of, next_token_figure(model, text, 9)]:
        assert_nothing_is_cut_off(figure)


def test_a_certain_token_leaves_room_for_its_label(model):
    figure = next_token_figure(model, "a" * 99, 3, (1e-9,))

    assert written(figure) == ["100.0%", "<0.1%", "<0.1%"]
    assert_nothing_is_cut_off(figure)
    assert figure.get_suptitle() == "after …" + "a" * 40


@pytest.fixture(scope="module")
def placed():
    """A batch and parameters on two by two by two devices."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shape = {"context_length": 8, "n_layers": 2, "n_heads": 2, "d_model": 16}
    params = gptjax.init(gptjax.GPTConfig(vocab_size=64, **shape), jax.random.key(0))
    mlp = shard_tree(params, mesh)["blocks"]["mlp"]
    batch = shard_batch({"tokens": np.zeros((8, 8), np.int32)}, mesh, 8)
    return {"tokens": batch["tokens"], "up": mlp["up"]["kernel"], "b": mlp["up"]["bias"]}


def test_every_shard_names_the_devices_that_hold_it_and_those_of_one_are_blue(placed):
    figure = sharding_figure(placed, device=5)

    for axes, x in zip(figure.axes, placed.values(), strict=False):
        held = {text.get_text() for text in axes.texts}
        (blue,) = [
            text.get_text()
            for text, patch in zip(axes.texts, axes.patches, strict=True)
            if to_hex(patch.get_facecolor()) == figures.PALE_BLUE.lower()
        ]
        assert held == {
            " ".join(
                str(shard.device.id)
                for shard in sorted(x.addressable_shards, key=lambda s: s.device.id)
                if shard.index == other.index
            )
            for other in x.addressable_shards
        }
        assert "5" in blue.split()
    assert [axes.get_ylabel() for axes in figure.axes[:3]] == [
        "8 over data x fsdp",
        "16 over fsdp",
        "2",
    ]
    assert [axes.get_xlabel() for axes in figure.axes[:3]] == [
        "8",
        "64 over tensor",
        "64 over tensor",
    ]
    assert_nothing_is_cut_off(figure)


def test_cells_lie_where_their_shards_lie(placed):
    figure = sharding_figure({"up": placed["up"]})

    for text, patch in zip(figure.axes[0].texts, figure.axes[0].patches, strict=True):
        column, row = patch.get_xy()
        device = int(text.get_text().split()[0])
        (shard,) = [s for s in placed["up"].addressable_shards if s.device.id == device]
        starts = [part.indices(64)[0] for part in shard.index]
        assert starts == [0, 8 * row, 32 * column]


@pytest.mark.parametrize("x", [jnp.float32(1), jnp.ones(3), jnp.ones((2, 3, 4))])
def test_an_array_on_one_device_is_one_cell(x):
    figure = sharding_figure({"x": x})

    assert written(figure) == ["0"]
    assert_nothing_is_cut_off(figure)


def test_too_many_sharded_axes_and_no_array_are_refused():
    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"))
    spec = jax.sharding.PartitionSpec("a", "b", "c")
    x = jax.device_put(jnp.ones((2, 2, 2)), jax.sharding.NamedSharding(mesh, spec))

    with pytest.raises(ConfigError, match="3 axes"):
        sharding_figure({"x": x})
    with pytest.raises(ConfigError, match="no arrays"):
        sharding_figure({})
