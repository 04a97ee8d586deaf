"""Run configuration: one tree of dataclasses defines TOML, flags and Python API.

Every option carries its description, its range and its resume policy in the metadata of
its field, see `option`.
"""

import contextlib
import dataclasses
import difflib
import math
import operator
import re
import reprlib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from gptjax.errors import ConfigError
from gptjax.fileio.paths import user_path
from gptjax.fileio.strict_json import read_small_file
from gptjax.presets import PRESETS
from gptjax.renamed_options import find_renames

MAX_CONFIG_BYTES = 1_000_000  # maximum size of a config file

# Effect of an option on a run that is resumed. "identity": never changes, another value
# is another run. "trajectory": changes the following steps, needs --allow-change.
# "operational": does not change the results.
ResumePolicy = Literal["identity", "trajectory", "operational"]

# Values of options that a package of this name in gptjax implements, see `plugins`.
PluginValue = Literal["book"]
# Experiment trackers; the name is also that of the package and of the extra.
TrackerName = Literal["tensorboard", "wandb", "trackio"]


class Range(NamedTuple):
    """Interval of the valid values of an option; `str` is its form in help texts.

    >>> str(Range(0, 1, "[)"))
    '0<=x<1'
    """

    minimum: int | float
    maximum: int | float
    ends: str = "[]"  # a parenthesis excludes that end

    def __str__(self) -> str:
        above, below = ("<=" if end in "[]" else "<" for end in self.ends)
        return f"{self.minimum:,}{above}x{below}{self.maximum:,}"

    def includes(self, number: int | float) -> bool:
        """True if the number is in the interval; NaN is not."""
        is_above = number > self.minimum or (number == self.minimum and self.ends[0] == "[")
        is_below = number < self.maximum or (number == self.maximum and self.ends[1] == "]")
        return is_above and is_below


MAX_SEED = 2**63 - 1
MAX_COUNT = 10**9  # the optimizer counts steps in 32 bits
MAX_VOCAB_SIZE = MAX_CONTEXT_LENGTH = 2**24
SEED, COUNT = Range(0, MAX_SEED), Range(1, MAX_COUNT)
CONTEXT, WIDTH = Range(1, MAX_CONTEXT_LENGTH), Range(1, 2**17)
OPTIONAL_WIDTH = Range(0, 2**19)  # 0 = derived from other options
FRACTION, WEIGHT = Range(0, 1, "[)"), Range(0, 10**6)
AXIS_SIZE, BATCH_SIZE = Range(-1, 10**6), Range(1, 10**6)
# Numbers of `GenerationConfig`, and samples per prompt.
SAMPLING_RANGES = {
    "max_new_tokens": Range(1, 10**6),
    "temperature": Range(0, 10**6),
    "top_k": Range(0, 10**9),
    "top_p": Range(0, 1, "(]"),
    "min_p": Range(0, 1),
    "repetition_penalty": Range(0, 10**9, "(]"),
    "seed": SEED,
    "samples": Range(1, 10**5),
}


def option(
    resume: ResumePolicy, default: Any, description: str, valid_range: Range | None = None
) -> Any:
    """Field of a config section, with a help text and the range of a number."""
    metadata = {"description": description, "resume": resume, "range": valid_range}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """Section of a run config; checks the types and ranges of its options."""

    section = ""  # name of the section

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name = f"{self.section}.{field.name}"
            value = getattr(self, field.name)
            value = convert_option(name, value, field.type, field.metadata["range"])
            object.__setattr__(self, field.name, value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTConfig(Section):
    """Architecture of a decoder: GPT-2's by default, Llama's and Qwen's by its options.

    [X] in a description is the dimension letter of `gptjax.model.gpt`.
    """

    section = "model"
    vocab_size: int = option(
        "identity", 0, "number of tokens; 0 = size of the run's tokenizer", Range(0, MAX_VOCAB_SIZE)
    )
    context_length: int = option("identity", 1024, "maximum sequence length in tokens [T]", CONTEXT)
    n_layers: int = option("identity", 12, "number of transformer blocks [N]", Range(1, 10**4))
    n_heads: int = option(
        "identity", 12, "number of attention heads [H]; must divide d_model", WIDTH
    )
    n_kv_heads: int = option(
        "identity",
        0,
        "key and value heads [G], each for H / G query heads; 0 = n_heads",
        OPTIONAL_WIDTH,
    )
    head_dim: int = option(
        "identity", 0, "dimension of a head [K]; 0 = d_model / n_heads", OPTIONAL_WIDTH
    )
    d_model: int = option("identity", 768, "residual stream width [D]", WIDTH)
    mlp: Literal["gelu", "swiglu", "relu2"] = option(
        "identity",
        "gelu",
        "activation of the MLP; swiglu has a third matrix, relu2 is ReLU squared",
    )
    mlp_dim: int = option("identity", 0, "width of the MLP [F]; 0 = 4 d_model", OPTIONAL_WIDTH)
    norm: Literal["layer", "rms"] = option("identity", "layer", "LayerNorm or RMSNorm")
    norm_eps: float = option("identity", 1e-5, "epsilon of the norms", Range(1e-12, 1))
    qk_norm: bool = option("identity", False, "RMSNorm of each query and key")
    position: Literal["learned", "rope"] = option(
        "identity", "learned", "position embeddings, or rotation of queries and keys (RoPE)"
    )
    rope_theta: float = option("identity", 10_000.0, "base of RoPE's wavelengths", Range(1, 10**12))
    rope_factor: float = option(
        "identity", 1.0, "Llama 3's stretching of long RoPE wavelengths; 1 = none", Range(1, 10**4)
    )
    rope_original_context: int = option(
        "identity", 8192, "context length before stretching by rope_factor", CONTEXT
    )
    dropout: float = option("trajectory", 0.0, "dropout probability in training", FRACTION)
    qkv_bias: bool = option("identity", True, "biases in the query, key and value projections")
    bias: bool = option("identity", True, "biases in all other linear layers, and in norms")
    residual_init: Literal["gpt2", "zero"] = option(
        "identity",
        "gpt2",
        "initial output projections of attention and MLP: GPT-2's small normal, or zero",
    )
    tie_embeddings: bool = option("identity", True, "output head shares the token embedding")
    vocab_multiple: int = option(
        "identity", 1, "vocab_size is padded to a multiple of this", Range(1, 2**16)
    )
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "trajectory",
        "auto",
        "dtype of activations; auto = bfloat16 on accelerators, float32 on CPUs",
    )
    causal: bool = option("identity", True, "causal attention mask")
    n_classes: int = option(
        "identity", 0, "classes of the classifier head [C]; 0 = no head", Range(0, 10**6)
    )
    head_bias: bool = option("identity", False, "bias in the classifier head")
    pool: Literal["last", "first", "mean", "position"] = option(
        "identity",
        "last",
        "input of the classifier head: the last or first token, the mean of all, or "
        "the last position of the padded row",
    )
    attention: Literal["auto", "reference", "chunked", "xla", "flash", "cudnn", "splash"] = option(
        "trajectory", "auto", "attention backend; auto = fastest that supports the device"
    )
    remat: Literal["full", "dots", "none"] = option(
        "trajectory",
        "dots",
        "activations recomputed in the backward pass: all (full), all but matmul "
        "results (dots), or none, which is fastest on one CPU or GPU but compiles "
        "longer and needs more memory",
    )

    def __post_init__(self) -> None:
        """Rejects impossible shapes."""
        super().__post_init__()
        if not self.head_dim and self.d_model % self.n_heads:
            raise ConfigError(
                f"model.d_model={self.d_model} must be divisible by "
                f"model.n_heads={self.n_heads} (remainder "
                f"{self.d_model % self.n_heads}). Change model.n_heads or "
                "model.d_model, or set model.head_dim."
            )
        if self.n_heads % self.actual_kv_heads:
            raise ConfigError(
                f"model.n_heads={self.n_heads} must be divisible by "
                f"model.n_kv_heads={self.n_kv_heads}. Change one of them."
            )
        if self.position == "rope" and self.actual_head_dim % 2:
            raise ConfigError(
                f"model.position='rope' rotates pairs, but a head has {self.actual_head_dim} "
                "dimensions. Set model.head_dim to an even number."
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "GPTConfig":
        """Config of a public model, by name.

        >>> GPTConfig.preset("gpt2-medium").d_model
        1024
        >>> GPTConfig.preset("qwen3-0.6b").actual_head_dim
        128
        """
        if name not in PRESETS:
            raise ConfigError(
                f"unknown preset {name!r}.{did_you_mean(name, PRESETS)} "
                f"Known: {', '.join(PRESETS)}."
            )
        return cls(**(PRESETS[name] | changes))

    @property
    def actual_head_dim(self) -> int:
        """[K] dimension of one attention head."""
        return self.head_dim or self.d_model // self.n_heads

    @property
    def actual_kv_heads(self) -> int:
        """[G] number of key and value heads."""
        return self.n_kv_heads or self.n_heads

    @property
    def actual_mlp_dim(self) -> int:
        """[F] width of the hidden layer of the MLP."""
        return self.mlp_dim or 4 * self.d_model

    @property
    def padded_vocab_size(self) -> int:
        """[V] rows of the token embedding; padding rows are never predicted."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Data source, tokenizer, splits and batching."""

    section = "data"
    source: str = option("identity", "python-help", "named data set, prepared folder, file or glob")
    tokenizer: str = option(
        "identity",
        "",
        "gpt2, bytes, bpe:SIZE or a folder; empty = that of the prepared folder or "
        "finetune.init_from, else gpt2",
    )
    text_column: str = option("identity", "", "text column of JSON and CSV files; empty = detect")
    label_column: str = option("identity", "", "label column of labeled texts; empty = detect")
    split_strategy: Literal["stratified", PluginValue] = option(
        "identity",
        "stratified",
        "split of fine-tuning data: stratified by class, or as `import gptjax.book` does",
    )
    balance_classes: bool = option("identity", False, "downsample classes to the smallest one")
    deduplicate: bool = option("identity", False, "drop repeated labeled texts")
    test_fraction: float = option(
        "identity", 0.2, "fraction of fine-tuning data for testing", FRACTION
    )
    val_fraction: float = option("identity", 0.1, "fraction of data for validation", FRACTION)
    split_seed: int = option("identity", 0, "seed of the validation and test splits", SEED)
    batch_size: int = option(
        "trajectory", 8, "rows per step, all devices and micro-batches [B]", BATCH_SIZE
    )
    batching: Literal["auto", "packed", "concat", "padded", PluginValue] = option(
        "trajectory",
        "auto",
        "packed = several documents or conversations per row, isolated from each "
        "other; concat = one stream of documents, attention across their boundaries; "
        "padded = one per row, padded to a bucket length; auto = packed for "
        "pretraining, else padded; book = as `import gptjax.book` does",
    )
    chat_template: str = option(
        "identity",
        "",
        "alpaca, phi3, chatml, qa, single or a Jinja file; empty = that of "
        "finetune.init_from, else alpaca",
    )
    completion_only_loss: bool = option("identity", True, "loss on completions, not on prompts")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig(Section):
    """AdamW and learning rate schedule."""

    section = "optim"
    peak_lr: float = option("trajectory", 6e-4, "learning rate after the warmup", WEIGHT)
    schedule: Literal["cosine", "constant", "wsd", PluginValue] = option(
        "trajectory",
        "cosine",
        "learning rate after the warmup; wsd = constant, then decay in the last fifth; "
        "book = as `import gptjax.book` does",
    )
    warmup_steps: int = option("trajectory", 100, "steps of linear warmup", Range(0, MAX_COUNT))
    final_lr_fraction: float = option("trajectory", 0.1, "last learning rate / peak_lr", WEIGHT)
    weight_decay: float = option(
        "trajectory", 0.1, "weight decay of matrices and embeddings", WEIGHT
    )
    decay_norms_and_biases: bool = option(
        "trajectory", False, "weight decay of norms and biases too, the default of PyTorch"
    )
    beta1: float = option("trajectory", 0.9, "decay rate of AdamW's first moment", FRACTION)
    beta2: float = option("trajectory", 0.95, "decay rate of AdamW's second moment", FRACTION)
    grad_clip: float = option(
        "trajectory", 1.0, "maximum global gradient norm; 0 = no clipping", WEIGHT
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """Task, length, seed, logging and evaluation."""

    section = "train"
    task: Literal["pretrain", "classify", "sft", "dpo", PluginValue] = option(
        "identity", "pretrain", "kind of training; book = as `import gptjax.book` does"
    )
    steps: int = option("trajectory", 1000, "number of optimizer updates", COUNT)
    seed: int = option("identity", 0, "seed of parameters, batches and dropout", SEED)
    accumulate: int = option(
        "trajectory", 1, "micro-batches [G]; 0 = fewest that fit in memory", Range(0, 10**6)
    )
    loss_chunk_size: int = option(
        "trajectory", 256, "positions whose logits are held at a time", CONTEXT
    )
    # Spikes are detected in the logged steps.
    log_every: int = option("trajectory", 10, "steps between log lines", COUNT)
    # Evaluations choose the best model of fine-tuning.
    eval_every: int = option(
        "trajectory", 100, "steps between evaluations; one is at the end", COUNT
    )
    eval_batches: int = option(
        "trajectory", 20, "maximum batches of a split per evaluation, but for the last", COUNT
    )
    sample_prompt: str = option("operational", "\n", "prompt completed at evaluation; empty = none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Section):
    """Initial model of fine-tuning and its trainable parameters."""

    section = "finetune"
    init_from: str = option(
        "identity",
        "",
        "MODEL to start from, whose shape replaces [model]; empty = random initialization",
    )
    trainable: Literal["all", "head", "last-block", "last-two-blocks", "lora"] = option(
        "identity", "all", "parameters that are trained; lora = adapters on frozen parameters"
    )
    lora_rank: int = option("identity", 16, "rank of the LoRA adapters", WIDTH)
    lora_alpha: float = option(
        "trajectory", 16.0, "scale of adapters, divided by lora_rank", WEIGHT
    )
    lora_targets: str = option(
        "identity",
        "attention/* mlp/*",
        "parameters of a block that get adapters: name patterns, separated by blanks",
    )
    lm_loss_weight: float = option(
        "trajectory", 0.0, "next-token loss weight in classification", WEIGHT
    )
    dpo_beta: float = option("trajectory", 0.1, "DPO beta: strength of the KL penalty", WEIGHT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """Checkpoint interval and retention."""

    section = "checkpoint"
    # Where a run is resumed decides which steps are recomputed.
    every: int = option("trajectory", 500, "steps between checkpoints; one is at the end", COUNT)
    keep: int = option("operational", 2, "number of newest checkpoints to keep", COUNT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Section):
    """Device mesh; the product of the axis sizes is the number of devices."""

    section = "mesh"
    data: int = option(
        "operational", -1, "data-parallel replicas; -1 = all remaining devices", AXIS_SIZE
    )
    fsdp: int = option("operational", 1, "shards of parameters and optimizer state", AXIS_SIZE)
    tensor: int = option("operational", 1, "shards of heads, MLP and vocabulary", AXIS_SIZE)

    def __post_init__(self) -> None:
        """Rejects invalid axis sizes."""
        super().__post_init__()
        sizes = dataclasses.asdict(self)
        num_open = list(sizes.values()).count(-1)
        if num_open > 1 or any(size < 1 and size != -1 for size in sizes.values()):
            given = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
            raise ConfigError(
                f"{given}: each size must be at least 1, but one may be -1 (all remaining "
                "devices). Set the others to a number of devices."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackConfig(Section):
    """Experiment tracker."""

    section = "track"
    to: Literal["none", TrackerName] = option(
        "operational",
        "none",
        "tracker that gets the metrics, config, samples and pictures; needs the extra of this name",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpectConfig(Section):
    """Expected results of a config, which `gptjax check` compares with those of a run.

    They are not options: they do not change a run. A result has two bounds, or none if
    nothing is expected of it.
    """

    section = "expect"
    train_loss: tuple[float, ...] = option("operational", (), "last loss on training rows")
    validation_loss: tuple[float, ...] = option("operational", (), "last validation loss")
    best_validation_loss: tuple[float, ...] = option("operational", (), "lowest validation loss")
    test_loss: tuple[float, ...] = option("operational", (), "test loss")
    test_response_loss: tuple[float, ...] = option(
        "operational", (), "test loss of the responses alone"
    )
    train_accuracy: tuple[float, ...] = option("operational", (), "last accuracy on training rows")
    validation_accuracy: tuple[float, ...] = option("operational", (), "last validation accuracy")
    test_accuracy: tuple[float, ...] = option("operational", (), "test accuracy")
    test_exact_match: tuple[float, ...] = option(
        "operational", (), "exact match of the test answers"
    )
    source: Literal["measured", "published"] = option(
        "operational", "measured", "measured with gptjax, or published by others"
    )
    date: str = option("operational", "", "date of the measurement or publication")
    machine: str = option("operational", "", "machine of the measurement")
    commit: str = option("operational", "", "commit of gptjax, or the publication")
    may_differ: tuple[str, ...] = option(
        "operational", (), "options with which the results hold as well, such as train.seed"
    )
    config: str = option("operational", "", "name of the config; set when it is loaded")
    changes: tuple[str, ...] = option(
        "operational", (), "options of a run that differ from the config; set by training"
    )

    def __post_init__(self) -> None:
        """Rejects intervals without two bounds."""
        super().__post_init__()
        for name, bounds in self.results().items():
            if len(bounds) != 2 or bounds[0] > bounds[1]:
                raise ConfigError(
                    f"expect.{name}={list(bounds)} must be the lowest and the highest value, for "
                    "example [1.74, 1.79]."
                )

    def results(self) -> dict[str, tuple[float, ...]]:
        """Expected results by name."""
        names = [
            field.name for field in dataclasses.fields(self) if field.type == tuple[float, ...]
        ]
        return {name: value for name in names if (value := getattr(self, name))}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Complete configuration of a training run."""

    model: GPTConfig = dataclasses.field(default_factory=GPTConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    finetune: FinetuneConfig = dataclasses.field(default_factory=FinetuneConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    track: TrackConfig = dataclasses.field(default_factory=TrackConfig)
    expect: ExpectConfig = dataclasses.field(default_factory=ExpectConfig)

    def __post_init__(self) -> None:
        """Rejects contradictions between sections."""
        if self.data.batch_size % max(self.train.accumulate, 1):
            raise ConfigError(
                f"data.batch_size={self.data.batch_size} must be divisible by "
                f"train.accumulate={self.train.accumulate}, the number of "
                "micro-batches. Change one of them."
            )


def config_options() -> dict[str, "dataclasses.Field[Any]"]:
    """Fields of all options of a run config, by their names `section.option`."""
    hints = get_type_hints(RunConfig)
    return {
        f"{section}.{field.name}": field
        for section, cls in hints.items()
        if cls is not ExpectConfig
        for field in dataclasses.fields(cls)
    }


def did_you_mean(word: str, known: Any) -> str:
    """Returns ' Did you mean X?' for the most similar known word, or ''."""
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {matches[0]}?" if matches else ""


def from_dict(cls: Any, table: Mapping[str, Any], prefix: str = "") -> Any:
    """Builds dataclass `cls` from a nested dict; unknown keys and types are errors."""
    if renames := find_renames(table, prefix):
        raise ConfigError(f"{'; '.join(renames)}. Use the new names.")
    hints = get_type_hints(cls)
    values = {}
    for key, value in table.items():
        if key not in hints:
            raise ConfigError(
                f"unknown option {prefix}{key[:80]}.{did_you_mean(key[:80], hints)} "
                f"Known: {', '.join(hints)}."
            )
        name = f"{prefix}{key}"
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                shown = reprlib.repr(value)
                raise ConfigError(f"{name}={shown} must be a section. Write it as [{name}].")
            values[key] = from_dict(hints[key], value, f"{name}.")
        else:
            values[key] = convert_option(name, value, hints[key])
    return cls(**values)


def convert_option(name: str, value: Any, kind: Any, valid_range: Range | None = None) -> Any:
    """Returns a value as a `kind`; ConfigError for another type or out of range."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ConfigError(
                f"{name}={reprlib.repr(value)} must be one of {', '.join(get_args(kind))}."
                f"{did_you_mean(reprlib.repr(value), get_args(kind))}"
            )
        return value
    if get_origin(kind) is tuple:
        item_kind = get_args(kind)[0]
        if not isinstance(value, list | tuple):
            raise ConfigError(
                f"{name}={reprlib.repr(value)} must be a list, for example "
                f"[{EXAMPLE_VALUES[item_kind]}]."
            )
        return tuple(convert_option(name, item, item_kind) for item in value)
    if type(value) is int and not -(10**99) < value < 10**99:  # too many digits to print
        raise ConfigError(f"{name} must have fewer than 100 digits, for example 3.")
    if kind in (int, float) and not isinstance(value, str | bool):  # numbers of NumPy too
        with contextlib.suppress(TypeError, ValueError):
            value = operator.index(value) if kind is int else float(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name}={value} must be finite, for example 0.1.")
    if isinstance(value, str) and "\0" in value:
        raise ConfigError(f"{name}={reprlib.repr(value)} contains a NUL character. Remove it.")
    if isinstance(value, str) and re.search("[\ud800-\udfff]", value):  # as in a file name
        raise ConfigError(
            f"{name}={reprlib.repr(value)} is not valid UTF-8. Remove the invalid bytes, "
            "or rename the file."
        )
    if type(value) is not kind:
        raise ConfigError(
            f"{name}={reprlib.repr(value)} is of type {type(value).__name__}, but must be "
            f"{kind.__name__}, for example {EXAMPLE_VALUES[kind]}."
        )
    if valid_range and not valid_range.includes(value):
        raise ConfigError(f"{name}={value} must be in the range {valid_range}.")
    return value


EXAMPLE_VALUES = {int: "3", float: "0.1", str: '"text" in quotes', bool: "true or false"}


def load_config(path: str | Path) -> RunConfig:
    """Loads the run config of a TOML file; `find_config` finds one by name."""
    config = from_dict(RunConfig, load_toml(user_path(path)))
    if not config.expect.results() or config.expect.config:
        return config
    name = str(user_path(path).absolute())
    with contextlib.suppress(ValueError):  # not a built-in config
        relative = Path(name).relative_to(builtin_config_dir().absolute())
        name = relative.with_suffix("").as_posix()
    return dataclasses.replace(config, expect=dataclasses.replace(config.expect, config=name))


def load_toml(path: Path) -> dict[str, Any]:
    """Loads a TOML file as a nested dict."""
    try:
        return tomllib.loads(read_small_file(path, MAX_CONFIG_BYTES).decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read the config {path}: {error}.") from error


def find_config(name: str) -> Path:
    """Finds a config file by its path or by the name of a built-in config."""
    if user_path(name).is_file():
        return user_path(name)
    config_dir = builtin_config_dir()
    file_name = name.removeprefix("configs/").removesuffix(".toml") + ".toml"
    if (config_dir / file_name).is_file():
        return config_dir / file_name
    known = [p.relative_to(config_dir).as_posix() for p in sorted(config_dir.rglob("*.toml"))]
    raise ConfigError(
        f"config {name} not found.{did_you_mean(file_name, known)} Give the path of a "
        f"TOML file or one of {', '.join(known)}."
    )


def builtin_config_dir() -> Path:
    """Folder of built-in configs, in the wheel or next to the package in a clone."""
    wheel_dir = Path(__file__).parent / "_configs"
    return wheel_dir if wheel_dir.is_dir() else Path(__file__).parent.parent / "configs"


def result_options() -> list[str]:
    """Names of the options that a run's result depends on, `section.option`."""
    options = config_options().items()
    return [name for name, field in options if field.metadata["resume"] != "operational"]


def config_diff(old: RunConfig, new: RunConfig) -> list[str]:
    """Lists each option that differs as `section.option: old -> new`."""
    lines = []
    for name in config_options():
        old_value, new_value = (operator.attrgetter(name)(config) for config in (old, new))
        if old_value != new_value:
            lines.append(f"{name}: {old_value!r} -> {new_value!r}")
    return lines
