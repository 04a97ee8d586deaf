"""A run config is the same as TOML, Python and a table; invalid ones are rejected."""

import dataclasses
import tomllib
from typing import get_args

import jax
import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

import gptjax
from gptjax.config import (
    ExpectConfig,
    GPTConfig,
    RunConfig,
    TrainConfig,
    config_diff,
    config_options,
    from_dict,
    load_config,
)
from gptjax.errors import ConfigError
from gptjax.presets import PRESETS
from gptjax.renamed_options import RENAMED_OPTIONS, RENAMED_VALUES
from gptjax.tree import num_params


@st.composite
def tables(draw):
    """A valid nested dict with a value of every option."""
    table = {}
    for name, field in config_options().items():
        section, _, key = name.partition(".")
        choices, valid_range = get_args(field.type), field.metadata["range"] or (0, 0)
        strategies = {
            bool: st.booleans(),
            int: st.integers(max(valid_range[0], 1), min(valid_range[1], 2**5)),
            float: st.floats(valid_range[0], valid_range[1], exclude_max=True),
            str: st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
        }
        values = st.sampled_from(choices) if choices else strategies[field.type]
        table.setdefault(section, {})[key] = draw(values)
    table["model"]["n_heads"] *= table["model"]["n_kv_heads"]
    table["model"]["d_model"] *= table["model"]["n_heads"]
    table["model"]["head_dim"] *= 2  # rope rotates pairs
    table["data"]["batch_size"] *= table["train"]["accumulate"]
    return table


@settings(max_examples=20)
@given(tables())
def test_every_config_is_the_same_as_a_table_and_as_toml(table):
    config = from_dict(RunConfig, table)

    assert dataclasses.asdict(config) == table | {"expect": dataclasses.asdict(ExpectConfig())}
    assert from_dict(RunConfig, tomllib.loads(tomli_w.dumps(table))) == config
    assert config_diff(config, config) == []


def test_a_config_file_changes_the_options_that_it_names(tmp_path):
    path = tmp_path / "run.toml"
    lines = ["optim.peak_lr = 1", "train.accumulate = 0", "[model]", "n_layers = 3"]
    path.write_text("\n".join(lines))

    config = load_config(path)

    assert config_diff(RunConfig(), config) == [
        *("model.n_layers: 12 -> 3", "optim.peak_lr: 0.0006 -> 1.0", "train.accumulate: 1 -> 0")
    ]
    assert config.train == TrainConfig(accumulate=0)  # chosen later: divides any batch
    path.write_text("\ufefftrain.steps = 3", encoding="utf-8")  # a byte-order mark
    assert load_config(path).train.steps == 3
    path.write_text("# " + "x" * 1_000_000)
    with pytest.raises(ConfigError, match=r"run\.toml: "):
        load_config(path)


def test_every_option_has_a_range_and_a_resume_policy():
    for name, field in config_options().items():
        section = type(getattr(RunConfig(), name.partition(".")[0]))
        assert field.metadata["resume"] in ("identity", "trajectory", "operational")
        if field.type not in (int, float):
            continue
        minimum, maximum, ends = field.metadata["range"]
        outside = [minimum - 1, maximum + 1, *([maximum] if ends == "[)" else [])]
        for value in [*outside, *([float("nan")] * (field.type is float))]:
            with pytest.raises(ConfigError, match=f"{name}="):
                section(**{field.name: field.type(value)})
        if minimum >= 0 and name != "model.d_model":  # must be divisible by n_heads
            section(**{field.name: field.type(minimum)})


def test_old_names_and_values_are_rejected_with_the_new_ones():
    for old, new in RENAMED_OPTIONS.items():
        section, _, key = old.partition(".")
        with pytest.raises(ConfigError, match=f"`{old}` is now `{new}`"):
            from_dict(RunConfig, {section: {key: 1} if key else {}})
    for name, values in RENAMED_VALUES.items():
        section, _, key = name.partition(".")
        for old, new in values.items():
            with pytest.raises(ConfigError, match=f"{name} = {old!r} is now {new!r}"):
                from_dict(RunConfig, {section: {key: old}})
            from_dict(RunConfig, {section: {key: new}})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"modle": {}}, "unknown option modle. Did you mean model?"),
        ({"model": {"n_layers": True}}, "n_layers=True .*bool.* int"),
        ({"model": {"dtype": "float16"}}, "'float16' .* mean bfloat16?"),
        ({"model": {"d_model": 10, "n_heads": 3}}, r"d_model=10 .*n_heads=3"),
        ({"data": {"batch_size": 8}, "train": {"accumulate": 3}}, "=8 .*accumulate=3"),
        ({"mesh": {"data": -1, "tensor": -1}}, "mesh.tensor=-1"),
        ({"optim": {"peak_lr": 16**5000}}, "optim.peak_lr"),
        ({"data": {"source": "a\0b"}}, "data.source=.*NUL"),
        ({"data": {"source": "a\udcff"}}, r"data.source='a\\udcff' .*UTF-8"),
        (tomllib.loads("train.steps" + ".a" * 20_000 + "=1"), "train.steps=.*dict"),
        (tomllib.loads("a" + ".a" * 20_000 + "=1"), "unknown option a"),
    ],
)
def test_an_invalid_table_is_rejected(table, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(RunConfig, table)


def test_presets_have_exactly_the_published_numbers_of_parameters():
    def count_params(name, **changes):
        config = GPTConfig.preset(name, **changes)
        return num_params(jax.eval_shape(lambda: gptjax.init(config, jax.random.key(0))))

    # Radford et al. 2019; the sizes of the files of the others.
    counts = [124_439_808, 354_823_168, 774_030_080, 1_557_611_200]
    counts += [134_515_008, 1_235_814_400, 596_049_920]
    assert [count_params(name) for name in PRESETS] == counts
    assert count_params("gpt2", tie_embeddings=False, qkv_bias=False) == 163_009_536
    assert GPTConfig(vocab_size=50_257) == GPTConfig.preset("gpt2")
