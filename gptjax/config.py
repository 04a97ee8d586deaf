"""Run configuration: one tree of dataclasses defines TOML, flags and Python API."""

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from gptjax.errors import ConfigError

MAX_CONFIG_CHARACTERS = 1_000_000  # maximum size of a config file


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Shape of a GPT-2 decoder; [X] is the dimension letter of `gptjax.model.gpt.gpt`."""

    vocab_size: int = 0  # tokens; 0 in a run config = size of its tokenizer
    context_length: int = 1024  # [T] maximum sequence length
    n_layers: int = 12  # [N]
    n_heads: int = 12  # [H]
    d_model: int = 768  # [D] residual stream width; the MLP width is 4 * D
    dropout: float = 0.0  # probability of zeroing an activation in training
    qkv_bias: bool = True  # biases of the query, key and value projections
    tie_embeddings: bool = True  # output head shares the token embedding
    vocab_multiple: int = 1  # [V] vocab_size is padded to a multiple of this
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # activation dtype
    causal: bool = True  # causal attention mask
    n_classes: int = 0  # [C] classes of the classifier head; 0 = no head
    head_bias: bool = False  # bias of the classifier head
    pool: Literal["last", "first", "mean", "position"] = "last"  # head input
    # Attention backend; "auto" = the fastest supported one, see
    # `gptjax.model.gpt.attention.dispatch`.
    attention: Literal[
        "auto", "reference", "chunked", "xla", "flash", "cudnn", "splash"
    ] = "auto"
    # Activations recomputed in the backward pass: all, all but matmul results, or none.
    # "none" is fastest on one CPU or GPU but compiles longer and needs more memory.
    remat: Literal["full", "dots", "none"] = "dots"

    def __post_init__(self) -> None:
        """Rejects impossible shapes."""
        check_min("model", self, 0, "vocab_size n_classes")
        check_min(
            "model", self, 1, "context_length n_layers n_heads d_model vocab_multiple"
        )
        if self.d_model % self.n_heads:
            raise ConfigError(
                f"model.d_model={self.d_model} must be divisible by "
                f"model.n_heads={self.n_heads} (remainder "
                f"{self.d_model % self.n_heads}). Change model.n_heads or "
                "model.d_model."
            )
        check_unit_interval("model", self, "dropout")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "GPTConfig":
        """Config of one of the four public GPT-2 sizes (Radford et al. 2019, table 2).

        >>> GPTConfig.preset("gpt2-medium").d_model
        1024
        """
        if name not in PRESETS:
            raise ConfigError(
                f"unknown preset {name!r}.{did_you_mean(name, PRESETS)} "
                f"Known: {', '.join(PRESETS)}."
            )
        layers, heads, width = PRESETS[name]
        shape: dict[str, Any] = {"vocab_size": 50_257, "context_length": 1024}
        shape |= {"n_layers": layers, "n_heads": heads, "d_model": width}
        return cls(**{**shape, **changes})

    @property
    def head_dim(self) -> int:
        """[K] dimension of one attention head."""
        return self.d_model // self.n_heads

    @property
    def mlp_dim(self) -> int:
        """[F] width of the hidden layer of the MLP."""
        return 4 * self.d_model

    @property
    def padded_vocab_size(self) -> int:
        """[V] rows of the token embedding; padding rows are never predicted."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


PRESETS = {  # name: layers, heads, width
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data source, tokenizer, splits and batching."""

    source: str = "python-help"  # named data set, prepared folder, files or glob
    # gpt2, bytes, bpe:SIZE or a folder; "" = that of finetune.init_from, else gpt2
    tokenizer: str = ""
    text_column: str = ""  # text column of JSON and CSV files; "" = detect
    label_column: str = ""  # label column; "" = detect
    split_strategy: Literal["stratified", "book"] = "stratified"  # for fine-tuning
    balance_classes: bool = False  # downsample all classes to the size of the smallest
    deduplicate: bool = False  # drop repeated labeled texts
    test_fraction: float = 0.2  # of fine-tuning examples, evaluated at the end
    val_fraction: float = 0.1  # of documents or examples, for validation
    split_seed: int = 0  # seed of the validation and test splits
    batch_size: int = 8  # [B] rows per step, over all devices and micro-batches
    # "packed": several documents or conversations per row, isolated from each other;
    # "concat": documents in one stream, attention across their boundaries; "padded":
    # one per row, padded to a bucket length; "book": as in the book.
    # "auto" = packed for pretraining, else padded.
    batching: Literal["auto", "packed", "concat", "padded", "book"] = "auto"
    # alpaca, phi3, chatml, qa, single or a Jinja file; "" = that of
    # finetune.init_from, else alpaca
    chat_template: str = ""
    completion_only_loss: bool = True  # loss on the completion only, not on the prompt

    def __post_init__(self) -> None:
        """Rejects invalid batch sizes, seeds and split fractions."""
        check_min("data", self, 1, "batch_size")
        check_min("data", self, 0, "split_seed")
        check_unit_interval("data", self, "val_fraction test_fraction")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and learning rate schedule."""

    peak_lr: float = 6e-4
    schedule: Literal["cosine", "constant", "wsd", "book"] = "cosine"  # after warmup
    warmup_steps: int = 100  # linear increase from 0
    final_lr_fraction: float = 0.1  # final learning rate, as a fraction of peak_lr
    weight_decay: float = 0.1  # for matrices and embeddings
    decay_norms_and_biases: bool = False  # as PyTorch does by default
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0  # maximum global norm; 0 = no clipping

    def __post_init__(self) -> None:
        """Rejects invalid learning rates and coefficients."""
        check_min(
            "optim", self, 0, "peak_lr warmup_steps final_lr_fraction weight_decay"
        )
        check_min("optim", self, 0, "grad_clip")
        check_unit_interval("optim", self, "beta1 beta2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Task, length, seed, logging and evaluation."""

    task: Literal["pretrain", "classify", "sft", "dpo", "book"] = "pretrain"
    steps: int = 1000  # optimizer updates
    seed: int = 0  # for parameters, batches and dropout
    accumulate: int = 1  # [G] micro-batches per step; 0 = fewest that fit in memory
    loss_chunk_size: int = 256  # positions whose logits are in memory at a time
    log_every: int = 10  # steps between log lines
    eval_every: int = 100  # steps between evaluations; the last step is evaluated
    eval_batches: int = 20  # batches per evaluation; the last one uses all
    sample_prompt: str = "\n"  # completed at each evaluation; "" = no sample

    def __post_init__(self) -> None:
        """Rejects empty runs and intervals."""
        names = "steps loss_chunk_size log_every eval_every eval_batches"
        check_min("train", self, 1, names)
        check_min("train", self, 0, "seed accumulate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Initial model of fine-tuning and its trainable parameters."""

    init_from: str = ""  # MODEL, overrides the shape in [model]; "" = random init
    trainable: Literal["all", "head", "last-block", "last-two-blocks", "lora"] = "all"
    lora_rank: int = 16
    lora_alpha: float = 16.0  # adapters are scaled by lora_alpha / lora_rank
    lora_targets: str = "attention/* mlp/*"  # name patterns inside a block
    lm_loss_weight: float = 0.0  # weight of the next-token loss in classification
    dpo_beta: float = 0.1  # DPO beta: strength of the KL penalty

    def __post_init__(self) -> None:
        """Rejects invalid adapters and loss weights."""
        check_min("finetune", self, 1, "lora_rank")
        check_min("finetune", self, 0, "lora_alpha lm_loss_weight dpo_beta")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Device mesh; the product of the axis sizes is the number of devices."""

    data: int = -1  # data-parallel replicas; -1 = all remaining devices
    fsdp: int = 1  # shards of parameters and optimizer state
    tensor: int = 1  # shards of heads, MLP and vocabulary

    def __post_init__(self) -> None:
        """Rejects invalid axis sizes."""
        for name in ("data", "fsdp", "tensor"):
            size = getattr(self, name)
            if size < 1 and size != -1:
                raise ConfigError(
                    f"mesh.{name}={size} must be at least 1, or -1 for all remaining "
                    "devices."
                )
        if (self.data, self.fsdp, self.tensor).count(-1) > 1:
            raise ConfigError(
                f"mesh.data={self.data}, mesh.fsdp={self.fsdp} and mesh.tensor="
                f"{self.tensor}: at most one axis can be -1 (all remaining devices). "
                "Set the others to a number of devices."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoint interval and retention."""

    every: int = 500  # steps between checkpoints; the last step is saved
    keep: int = 2  # number of newest checkpoints to keep

    def __post_init__(self) -> None:
        """Rejects values that would leave no checkpoint."""
        check_min("checkpoint", self, 1, "every keep")


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

    def __post_init__(self) -> None:
        """Rejects contradictions between sections."""
        if self.data.batch_size % max(self.train.accumulate, 1):
            raise ConfigError(
                f"data.batch_size={self.data.batch_size} must be divisible by "
                f"train.accumulate={self.train.accumulate}, the number of "
                "micro-batches. Change one of them."
            )


def check_min(section: str, config: Any, minimum: int, names: str) -> None:
    """Raises for the first field in `names` whose value is less than `minimum`."""
    for name in names.split():
        value = getattr(config, name)
        if not value >= minimum:  # also rejects nan
            raise ConfigError(
                f"{section}.{name}={value} must be at least {minimum}. Increase it."
            )


def check_unit_interval(section: str, config: Any, names: str) -> None:
    """Raises for the first field in `names` whose value is not in [0, 1)."""
    for name in names.split():
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise ConfigError(
                f"{section}.{name}={value} must be in [0, 1), for example the default "
                f"{getattr(type(config), name)}."
            )


def did_you_mean(word: str, known: Any) -> str:
    """Returns ' Did you mean X?' for the most similar known word, or ''."""
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {matches[0]}?" if matches else ""


def from_dict(cls: Any, table: Mapping[str, Any], prefix: str = "") -> Any:
    """Builds dataclass `cls` from a nested dict; unknown keys and types are errors."""
    hints = get_type_hints(cls)
    values = {}
    for key, value in table.items():
        if key not in hints:
            raise ConfigError(
                f"unknown option {prefix}{key}.{did_you_mean(key, hints)} "
                f"Known: {', '.join(hints)}."
            )
        name = f"{prefix}{key}"
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise ConfigError(
                    f"{name}={value!r} must be a section. Write it as [{name}]."
                )
            values[key] = from_dict(hints[key], value, f"{name}.")
        else:
            values[key] = _check_type(name, value, hints[key])
    return cls(**values)


def _check_type(name: str, value: Any, kind: Any) -> Any:
    """Returns the value as a `kind`; raises if it has another type."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ConfigError(
                f"{name}={value!r} must be one of {', '.join(get_args(kind))}."
                f"{did_you_mean(str(value), get_args(kind))}"
            )
        return value
    if kind is float and type(value) is int:
        return float(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name}={value} must be finite, for example 0.1.")
    if type(value) is not kind:
        raise ConfigError(
            f"{name}={value!r} is of type {type(value).__name__}, but must be "
            f"{kind.__name__}, for example {EXAMPLE_VALUES[kind]}."
        )
    return value


EXAMPLE_VALUES = {
    int: "3",
    float: "0.1",
    str: '"text" in quotes',
    bool: "true or false",
}


def load_config(path: Path) -> RunConfig:
    """Loads the run config of a TOML file.

    Raises:
        ConfigError: the file is missing or not TOML, or an option is invalid.
    """
    return from_dict(RunConfig, load_toml(path))


def load_toml(path: Path) -> dict[str, Any]:
    """Loads a TOML file as a nested dict."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CONFIG_CHARACTERS + 1)
        if len(text) > MAX_CONFIG_CHARACTERS:
            raise ValueError(f"it has more than {MAX_CONFIG_CHARACTERS:,} characters")
        return tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read the config {path}: {error}.") from error


def find_config(name: str) -> Path:
    """Finds a config file by its path or by the name of a built-in config."""
    if Path(name).is_file():
        return Path(name)
    config_dir = builtin_config_dir()
    file_name = name.removeprefix("configs/").removesuffix(".toml") + ".toml"
    if (config_dir / file_name).is_file():
        return config_dir / file_name
    known = [
        p.relative_to(config_dir).as_posix() for p in sorted(config_dir.rglob("*.toml"))
    ]
    raise ConfigError(
        f"config {name} not found.{did_you_mean(file_name, known)} Give the path of a TOML "
        f"file or one of {', '.join(known)}."
    )


def builtin_config_dir() -> Path:
    """Folder of built-in configs, in the wheel or next to the package in a clone."""
    wheel_dir = Path(__file__).parent / "_configs"
    return wheel_dir if wheel_dir.is_dir() else Path(__file__).parent.parent / "configs"


def config_diff(old: RunConfig, new: RunConfig) -> list[str]:
    """Lists each option that differs as `section.option: old -> new`."""
    lines = []
    for section in dataclasses.fields(old):
        old_section, new_section = (
            getattr(old, section.name),
            getattr(new, section.name),
        )
        for field in dataclasses.fields(old_section):
            old_value, new_value = (
                getattr(old_section, field.name),
                getattr(new_section, field.name),
            )
            if old_value != new_value:
                lines.append(
                    f"{section.name}.{field.name}: {old_value!r} -> {new_value!r}"
                )
    return lines
