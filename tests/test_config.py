"""A run is the same as TOML, as Python and as a table; what cannot run is refused."""

import dataclasses
import tomllib

import jax
import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

import gptjax
from gptjax.config import (
    PRESETS,
    RENAMED_OPTIONS,
    RENAMED_VALUES,
    CheckpointConfig,
    DataConfig,
    FinetuneConfig,
    GPTConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    config_diff,
    config_options,
    from_dict,
    load_config,
)
from gptjax.errors import ConfigError
from gptjax.tree import num_params

WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
POSITIVE = st.integers(1, 10**6)
FRACTION = st.floats(0, 1, exclude_max=True)
RATE = st.floats(0, 1e3)


@st.composite
def models(draw):
    heads, width = draw(st.integers(1, 32)), draw(st.integers(1, 256))
    return GPTConfig(
        vocab_size=draw(st.integers(0, 10**6)),
        context_length=draw(POSITIVE),
        n_layers=draw(POSITIVE),
        n_heads=heads,
        d_model=heads * width,
        dropout=draw(FRACTION),
        qkv_bias=draw(st.booleans()),
        tie_embeddings=draw(st.booleans()),
        vocab_multiple=draw(POSITIVE),
        dtype=draw(st.sampled_from(["auto", "float32", "bfloat16"])),
        attention=draw(st.sampled_from(["auto", "reference", "chunked", "xla"])),
        remat=draw(st.sampled_from(["none", "dots", "full"])),
    )


@st.composite
def runs(draw):
    groups = draw(st.integers(1, 64))
    optim = st.builds(
        OptimConfig,
        peak_lr=RATE,
        schedule=st.sampled_from(["cosine", "constant", "wsd", "book"]),
        warmup_steps=st.integers(0, 10**6),
        final_lr_fraction=RATE,
        weight_decay=RATE,
        beta1=FRACTION,
        beta2=FRACTION,
        grad_clip=RATE,
        decay_norms_and_biases=st.booleans(),
    )
    tune = st.builds(
        FinetuneConfig,
        **dict.fromkeys(["init_from", "lora_targets"], WORDS),
        **dict.fromkeys(["lora_alpha", "lm_loss_weight", "dpo_beta"], RATE),
        trainable=st.sampled_from(["all", "head", "lora"]),
        lora_rank=POSITIVE,
    )
    train = st.builds(
        TrainConfig,
        **dict.fromkeys(["steps", "loss_chunk_size", "log_every", "eval_every"], POSITIVE),
        eval_batches=POSITIVE,
        seed=st.integers(0, 10**6),
        task=st.sampled_from(["pretrain", "classify", "sft", "dpo"]),
        accumulate=st.just(groups),
        sample_prompt=WORDS,
    )
    data = st.builds(
        DataConfig,
        **dict.fromkeys(["source", "tokenizer", "text_column", "label_column"], WORDS),
        **dict.fromkeys(["val_fraction", "test_fraction"], FRACTION),
        **dict.fromkeys(["balance_classes", "deduplicate", "completion_only_loss"], st.booleans()),
        split_strategy=st.sampled_from(["stratified", "book"]),
        batch_size=st.integers(1, 64).map(lambda rows: rows * groups),
        batching=st.sampled_from(["auto", "packed", "concat", "padded", "book"]),
        chat_template=WORDS,
    )
    return RunConfig(
        model=draw(models()),
        data=draw(data),
        optim=draw(optim),
        train=draw(train),
        finetune=draw(tune),
        checkpoint=draw(st.builds(CheckpointConfig, every=POSITIVE, keep=POSITIVE)),
    )


@settings(deadline=None)
@given(runs())
def test_a_run_written_as_toml_reads_back_equal(run):
    text = tomli_w.dumps(dataclasses.asdict(run))

    assert from_dict(RunConfig, tomllib.loads(text)) == run


@pytest.mark.fast
def test_a_config_file_reads_as_the_run_it_describes(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('optim.peak_lr = 1\n[model]\ndtype = "float32"\nn_layers = 3\n')

    run = load_config(path)

    assert run.model == GPTConfig(dtype="float32", n_layers=3)
    assert run.optim.peak_lr == 1.0
    assert isinstance(run.optim.peak_lr, float)
    assert run.train == TrainConfig()


def test_an_empty_table_is_the_default_run():
    assert from_dict(RunConfig, {}) == RunConfig()


def test_a_run_has_at_most_sixty_options():
    assert len(config_options()) <= 60


@given(st.data())
def test_an_option_with_a_letter_missing_is_answered_with_its_name(data):
    name = data.draw(st.sampled_from(list(config_options())))
    *sections, option = name.split(".")
    cut = data.draw(st.integers(0, len(option) - 1))
    typo = option[:cut] + option[cut + 1 :]
    table = {typo: 1}
    for section in reversed(sections):
        table = {section: table}

    with pytest.raises(ConfigError, match=rf"unknown option .*{typo}\. Did you mean"):
        from_dict(RunConfig, table)


@pytest.mark.parametrize("name", config_options())
def test_every_option_has_a_description_a_range_and_a_resume_policy(name):
    field = config_options()[name]
    section = getattr(RunConfig(), name.partition(".")[0])

    assert len(field.metadata["description"]) > 10
    assert not field.metadata["description"].endswith(".")
    assert field.metadata["resume"] in ("identity", "trajectory", "operational")
    minimum, unit_interval = field.metadata["minimum"], field.metadata["unit_interval"]
    if name.startswith("mesh."):  # -1 or at least 1
        assert (minimum, unit_interval) == (None, False)
    elif field.type in (int, float):
        low = 0 if unit_interval else minimum
        assert (minimum is None) == unit_interval
        for value in [low - 1, *([1] * unit_interval)]:
            with pytest.raises(ConfigError, match=f"{name}="):
                type(section)(**{field.name: field.type(value)})
        if name != "model.d_model":  # must be divisible by n_heads
            edge = type(section)(**{field.name: field.type(low)})
            assert getattr(edge, field.name) == low
    else:
        assert (minimum, unit_interval) == (None, False)


def nested(name, value):
    """A config table with one option."""
    section, _, key = name.partition(".")
    return {section: {key: value}}


@pytest.mark.parametrize("old", [name for name in RENAMED_OPTIONS if "." in name])
def test_an_old_option_is_rejected_with_its_new_name(old, tmp_path):
    new = RENAMED_OPTIONS[old]
    path = tmp_path / "old.toml"
    path.write_text(tomli_w.dumps(nested(old, 1)))

    assert new in config_options()
    assert old not in config_options()
    with pytest.raises(ConfigError, match=f"`{old}` is now `{new}`"):
        load_config(path)


@pytest.mark.parametrize(
    ("name", "old"), [(name, old) for name in RENAMED_VALUES for old in RENAMED_VALUES[name]]
)
def test_an_old_value_is_rejected_with_the_new_one(name, old):
    new = RENAMED_VALUES[name][old]

    with pytest.raises(ConfigError, match=f"{name} = {old!r} is now {new!r}"):
        from_dict(RunConfig, nested(name, old))
    assert from_dict(RunConfig, nested(name, new))


def test_all_old_names_of_a_config_are_reported_at_once():
    table = {"tune": {"start": "gpt2", "beta": 0.1}, "data": {"mask_prompt": True}}

    with pytest.raises(ConfigError) as error:
        from_dict(RunConfig, table)

    assert str(error.value) == (
        "`tune.start` is now `finetune.init_from`; `tune.beta` is now "
        "`finetune.dpo_beta`; `data.mask_prompt` is now `data.completion_only_loss`. "
        "Use the new names."
    )


@pytest.mark.parametrize("table", [{"tune": {}}, {"tune": 3}])
def test_an_old_section_is_rejected_with_its_new_name(table):
    with pytest.raises(ConfigError, match="`tune` is now `finetune`"):
        from_dict(RunConfig, table)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"modle": {}}, "unknown option modle. Did you mean model?"),
        ({"optim": {"peak_rl": 1.0}}, "option optim.peak_rl. Did you mean peak_lr?"),
        ({"optim": {"qqq": 1.0}}, "unknown option optim.qqq. Known: peak_lr"),
        ({"model": 3}, r"model=3 .* \[model\]"),
        ({"model": {"n_layers": "3"}}, "n_layers='3' .*str.* int"),
        ({"model": {"n_layers": 3.0}}, "n_layers=3.0 .*float.* int"),
        ({"model": {"n_layers": True}}, "n_layers=True .*bool.* int"),
        ({"data": {"deduplicate": 1}}, "data.deduplicate=1 .*int.* bool, .*true or"),
        ({"data": {"source": 1}}, 'source=1 .*int.* str, .*"text"'),
        ({"optim": {"peak_lr": "1e-3"}}, "str.* must be float, .*0.1"),
        ({"optim": {"peak_lr": True}}, "bool.* must be float"),
        ({"model": {"dtype": "float16"}}, "'float16' .* mean bfloat16?"),
        ({"model": {"attention": 3}}, "model.attention=3 .* auto, "),
    ],
)
def test_a_table_that_names_no_run_is_refused(table, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(RunConfig, table)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        (GPTConfig, {"d_model": 10, "n_heads": 3}, r"=10 .*n_heads=3 \(remainder 1"),
        (GPTConfig, {"dropout": 1.0}, r"model.dropout=1.0 .*\[0, 1\)"),
        (GPTConfig, {"dropout": -0.1}, "model.dropout=-0.1 must be in"),
        (GPTConfig, {"dropout": float("nan")}, "model.dropout=nan must be in"),
        (GPTConfig, {"vocab_size": -1}, "model.vocab_size=-1 must be at least"),
        (GPTConfig, {"context_length": 0}, "model.context_length=0 .* at least 1"),
        (GPTConfig, {"n_layers": 0}, "model.n_layers=0 must be at least"),
        (GPTConfig, {"n_heads": 0}, "model.n_heads=0 must be at least"),
        (GPTConfig, {"d_model": 0}, "model.d_model=0 must be at least"),
        (GPTConfig, {"vocab_multiple": 0}, "model.vocab_multiple=0 must be at least"),
        (DataConfig, {"batch_size": 0}, "data.batch_size=0 must be at least"),
        (DataConfig, {"val_fraction": 1.0}, "data.val_fraction=1.0 must be in"),
        (OptimConfig, {"peak_lr": float("nan")}, "optim.peak_lr=nan must be at least"),
        (OptimConfig, {"warmup_steps": -1}, "optim.warmup_steps=-1 must be at least"),
        (OptimConfig, {"weight_decay": -0.1}, "optim.weight_decay=-0.1 must be at least"),
        (OptimConfig, {"grad_clip": -1.0}, "optim.grad_clip=-1.0 must be at least"),
        (OptimConfig, {"beta2": 1.0}, "optim.beta2=1.0 must be in .* default 0.95"),
        (TrainConfig, {"steps": 0}, "train.steps=0 must be at least"),
        (TrainConfig, {"accumulate": -1}, "train.accumulate=-1 must be at least"),
        (TrainConfig, {"seed": -1}, "train.seed=-1 must be at least"),
        (CheckpointConfig, {"every": 0}, "checkpoint.every=0 must be at least"),
        (CheckpointConfig, {"keep": 0}, "checkpoint.keep=0 must be at least"),
    ],
)
def test_values_that_cannot_run_are_refused_at_construction(section, changes, message):
    with pytest.raises(ConfigError, match=message):
        section(**changes)


def test_a_batch_that_does_not_split_into_micro_batches_is_refused():
    with pytest.raises(ConfigError, match=r"=8 must be divisible .*accumulate=3"):
        RunConfig(data=DataConfig(batch_size=8), train=TrainConfig(accumulate=3))


@pytest.mark.parametrize("text", ["a = ", "a = 1\na = 2", b"\xff"])
def test_a_file_that_is_not_toml_is_refused(tmp_path, text):
    path = tmp_path / "bad.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())

    with pytest.raises(ConfigError, match=r"cannot read the config .*bad\.toml: "):
        load_config(path)


def test_a_missing_config_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the config .*none\.toml: .*No"):
        load_config(tmp_path / "none.toml")


def test_the_difference_of_two_runs_names_exactly_the_options_that_differ():
    old = RunConfig()
    new = dataclasses.replace(
        old, model=GPTConfig(n_layers=3), train=TrainConfig(sample_prompt="a")
    )

    assert config_diff(old, old) == []
    assert config_diff(old, new) == ["model.n_layers: 12 -> 3", r"train.sample_prompt: '\n' -> 'a'"]


def test_an_unknown_preset_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match=r"'gpt2-lage'\. Did you mean gpt2-large\?"):
        GPTConfig.preset("gpt2-lage")


COUNTS = {  # tied or not, with qkv bias or not; Radford et al.'s own is the first
    "gpt2": (124_439_808, 163_037_184, 124_412_160, 163_009_536),
    "gpt2-medium": (354_823_168, 406_286_336, 354_749_440, 406_212_608),
    "gpt2-large": (774_030_080, 838_359_040, 773_891_840, 838_220_800),
    "gpt2-xl": (1_557_611_200, 1_638_022_400, 1_557_380_800, 1_637_792_000),
}
SWITCHES = (
    {},
    {"tie_embeddings": False},
    {"qkv_bias": False},
    {"tie_embeddings": False, "qkv_bias": False},
)


@pytest.mark.fast
@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_exactly_the_published_numbers_of_parameters(name):
    counts = []
    for switches in SWITCHES:
        config = GPTConfig.preset(name, **switches)
        shapes = jax.eval_shape(lambda c=config: gptjax.init(c, jax.random.key(0)))
        counts.append(num_params(shapes))

    assert tuple(counts) == COUNTS[name]


@given(size=st.integers(0, 10**6), multiple=st.integers(1, 1000))
def test_the_padded_vocabulary_is_the_next_multiple(size, multiple):
    config = GPTConfig(vocab_size=size, vocab_multiple=multiple)

    assert config.padded_vocab_size % multiple == 0
    assert 0 <= config.padded_vocab_size - size < multiple
