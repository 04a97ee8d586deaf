"""One tree of frozen dataclasses = the TOML file = the flags = the Python arguments."""

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from gptjax.errors import ConfigError

MOST_CHARACTERS = 1_000_000  # of a config file


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Shape of a GPT-2 decoder; [X] is the dimension letter of `gptjax.model`."""

    vocab_size: int = 0  # token types; 0 in a run's config: those of its tokenizer
    context_length: int = 1024  # [T] longest row that the position table covers
    n_layers: int = 12  # [N]
    n_heads: int = 12  # [H]
    d_model: int = 768  # [D] residual stream; the MLP is 4 times as wide
    dropout: float = 0.0  # probability of zeroing an activation in training
    qkv_bias: bool = True  # biases on query, key and value
    tie_embeddings: bool = True  # the output head is the token embedding
    vocab_multiple: int = 1  # [V] is vocab_size rounded up to a multiple of this
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations
    causal: bool = True  # whether later positions are hidden from earlier ones
    n_classes: int = 0  # [C] of a classifier's head; 0: there is none
    head_bias: bool = False  # of the classifier's head
    pool: Literal["last", "first", "mean", "position"] = "last"  # what the head reads
    # What computes attention; "auto" is what `gptjax.attention.choice` finds fastest.
    attention: Literal[
        "auto", "plain", "prefix", "xla", "blockwise", "cudnn", "splash"
    ] = "auto"
    # What backward computes again: all, all but the products, or nothing, which is
    # fastest on one CPU or GPU and compiles longer, where the memory suffices.
    remat: Literal["full", "dots", "none"] = "dots"

    def __post_init__(self) -> None:
        """Rejects shapes that cannot be built."""
        at_least("model", self, 0, "vocab_size n_classes")
        at_least(
            "model", self, 1, "context_length n_layers n_heads d_model vocab_multiple"
        )
        if self.d_model % self.n_heads:
            raise ConfigError(
                f"model.d_model={self.d_model} does not split over "
                f"model.n_heads={self.n_heads} (remainder "
                f"{self.d_model % self.n_heads}). Choose a number of heads that "
                "divides the width."
            )
        fractions("model", self, "dropout")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "GPTConfig":
        """One of the four public GPT-2 sizes (Radford et al. 2019, table 2).

        >>> GPTConfig.preset("gpt2-medium").d_model
        1024
        """
        if name not in PRESETS:
            raise ConfigError(
                f"unknown preset {name!r}.{suggestion(name, PRESETS)} "
                f"Known: {', '.join(PRESETS)}."
            )
        layers, heads, width = PRESETS[name]
        shape: dict[str, Any] = {"vocab_size": 50_257, "context_length": 1024}
        shape |= {"n_layers": layers, "n_heads": heads, "d_model": width}
        return cls(**{**shape, **changes})

    @property
    def head_width(self) -> int:
        """[K] width of one head."""
        return self.d_model // self.n_heads

    @property
    def mlp_width(self) -> int:
        """[F] width of the hidden layer of the MLP."""
        return 4 * self.d_model

    @property
    def padded_vocab_size(self) -> int:
        """[V] rows of the token embedding; the surplus ones are never predicted."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


PRESETS = {  # name: layers, heads, width
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text, in which tokens, in which batches."""

    source: str = "python-help"  # a named data set, a prepared folder, files, a glob
    tokenizer: str = ""  # gpt2, bytes, bpe:SIZE, a folder; "" = tune.start's, or gpt2
    text: str = ""  # field of JSON and CSV rows that holds the text; "" = guess
    label: str = ""  # and the one that holds the class
    split: Literal["stratified", "book"] = "stratified"  # of rows for fine-tuning
    balance: bool = False  # cut all classes down to the size of the smallest
    dedupe: bool = False  # leave out labelled texts that came before
    test_fraction: float = 0.2  # of such rows, looked at when all is done
    val_fraction: float = 0.1  # of the documents, held out
    val_seed: int = 0  # of the lot that picks them
    batch_size: int = 8  # [B] rows per step, all devices and micro-batches together
    # What shares a row: "packed" documents or conversations, which do not attend to
    # each other; "mixed" documents, which do; one "padded" to the next of a few
    # lengths; or as the "book" does it. "auto": packed for pretraining, else padded.
    batching: Literal["auto", "packed", "mixed", "padded", "book"] = "auto"
    # alpaca, phi3, chatml, qa, single, or a Jinja file; "" = the start's, or alpaca
    template: str = ""
    mask_prompt: bool = True  # whether only answers are learned

    def __post_init__(self) -> None:
        """Rejects what no batch can be made of."""
        at_least("data", self, 1, "batch_size")
        at_least("data", self, 0, "val_seed")
        fractions("data", self, "val_fraction test_fraction")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its learning rate over the run."""

    peak_lr: float = 6e-4
    schedule: Literal["cosine", "constant", "wsd", "book"] = "cosine"  # after warm-up
    warmup_steps: int = 100  # linear from 0
    final_lr: float = 0.1  # where the schedule ends, as a fraction of peak_lr
    weight_decay: float = 0.1  # of matrices and embeddings, not of biases and norms
    decay_all: bool = False  # of these too, as PyTorch does unless told otherwise
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0  # global norm; 0 = no clipping

    def __post_init__(self) -> None:
        """Rejects rates that cannot train."""
        at_least("optim", self, 0, "peak_lr warmup_steps final_lr weight_decay")
        at_least("optim", self, 0, "grad_clip")
        fractions("optim", self, "beta1 beta2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Which task, how long, from which seed, and what is looked at on the way."""

    task: Literal["pretrain", "classify", "instruct", "preference", "book"] = "pretrain"
    steps: int = 1000  # optimiser updates
    seed: int = 0  # of parameters, batches and dropout
    accumulate: int = 1  # [G] micro-batches of a step; 0 = the fewest that fit memory
    loss_chunk: int = 256  # positions whose logits exist at a time
    log_every: int = 10  # steps
    eval_every: int = 100  # steps; the last step is always evaluated
    eval_batches: int = 20  # validation batches on the way; the end sees them all
    sample_prompt: str = "\n"  # continued at each evaluation; "" = not

    def __post_init__(self) -> None:
        """Rejects intervals of no length."""
        names = "steps loss_chunk log_every eval_every eval_batches"
        at_least("train", self, 1, names)
        at_least("train", self, 0, "seed accumulate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Where fine-tuning starts, and what it may change."""

    start: str = ""  # MODEL; its shape wins over [model]. "" = random parameters
    trainable: Literal["all", "head", "last-block", "last-two-blocks", "lora"] = "all"
    lora_rank: int = 16
    lora_alpha: float = 16.0  # adapters count alpha / rank times
    lora_targets: str = "attention/* mlp/*"  # patterns of names, as in one block
    lm_weight: float = 0.0  # of the next-token loss, added to a classifier's
    beta: float = 0.1  # of preference tuning: how dear it is to leave the start

    def __post_init__(self) -> None:
        """Rejects adapters that cannot be made."""
        at_least("tune", self, 1, "lora_rank")
        at_least("tune", self, 0, "lora_alpha lm_weight beta")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How devices share the work; the axes multiply to their number."""

    data: int = -1  # copies of the model, each with rows of its own; -1 = what is left
    fsdp: int = 1  # parts of parameters and optimiser state, gathered layer by layer
    tensor: int = 1  # parts of heads, MLP and vocabulary

    def __post_init__(self) -> None:
        """Rejects axes of no length."""
        for name in ("data", "fsdp", "tensor"):
            size = getattr(self, name)
            if size < 1 and size != -1:
                raise ConfigError(
                    f"mesh.{name}={size} is no number of devices. Choose one from 1 "
                    "on, or -1 for what the other axes leave."
                )
        if (self.data, self.fsdp, self.tensor).count(-1) > 1:
            raise ConfigError(
                f"mesh.data={self.data}, mesh.fsdp={self.fsdp} and mesh.tensor="
                f"{self.tensor} leave open which axis takes the rest of the devices. "
                "Let one of them be -1."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How often the state is saved, and how many of the saved states are kept."""

    every: int = 500  # steps; the last step is always saved
    keep: int = 2  # newest ones

    def __post_init__(self) -> None:
        """Rejects a run that could not be resumed."""
        at_least("checkpoint", self, 1, "every keep")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides what a training run computes."""

    model: GPTConfig = dataclasses.field(default_factory=GPTConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    tune: TuneConfig = dataclasses.field(default_factory=TuneConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        """Rejects sections that contradict each other."""
        if self.data.batch_size % max(self.train.accumulate, 1):
            raise ConfigError(
                f"data.batch_size={self.data.batch_size} does not split into "
                f"train.accumulate={self.train.accumulate} micro-batches. Choose a "
                "batch size that is a multiple."
            )


def at_least(section: str, config: Any, least: int, names: str) -> None:
    """Raises for the first of the fields `names` whose value is below `least`."""
    for name in names.split():
        value = getattr(config, name)
        if not value >= least:  # also refuses nan
            raise ConfigError(
                f"{section}.{name}={value} is too small: it needs to be at least "
                f"{least}. Raise {section}.{name}."
            )


def fractions(section: str, config: Any, names: str) -> None:
    """Raises for the first of the fields `names` whose value is not in [0, 1)."""
    for name in names.split():
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise ConfigError(
                f"{section}.{name}={value} is not in [0, 1). Choose a fraction of 1, "
                f"such as the default {getattr(type(config), name)}."
            )


def suggestion(word: str, known: Any) -> str:
    """' Did you mean X?' for the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]}?" if near else ""


def build(cls: Any, table: Mapping[str, Any], prefix: str = "") -> Any:
    """Dataclass `cls` from a nested table; unknown keys and wrong types are errors."""
    hints = get_type_hints(cls)
    values = {}
    for key, value in table.items():
        if key not in hints:
            raise ConfigError(
                f"unknown option {prefix}{key}.{suggestion(key, hints)} "
                f"Known: {', '.join(hints)}."
            )
        name = f"{prefix}{key}"
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{name}={value!r} is not a section. Write [{name}].")
            values[key] = build(hints[key], value, f"{name}.")
        else:
            values[key] = checked(name, value, hints[key])
    return cls(**values)


def checked(name: str, value: Any, kind: Any) -> Any:
    """The value as a `kind`, or an error that says what the option takes."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ConfigError(
                f"{name}={value!r} is not one of {', '.join(get_args(kind))}."
                f"{suggestion(str(value), get_args(kind))}"
            )
        return value
    if kind is float and type(value) is int:
        return float(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name}={value} is not finite. Write 0.1, for example.")
    if type(value) is not kind:
        raise ConfigError(
            f"{name}={value!r} is a {type(value).__name__}, but the option takes a "
            f"{kind.__name__}. Write {EXAMPLES[kind]}, for example."
        )
    return value


EXAMPLES = {int: "3", float: "0.1", str: '"text" in quotes', bool: "true or false"}


def read_config(path: Path) -> RunConfig:
    """The run described by one TOML file.

    Raises:
        ConfigError: the file is missing, is not TOML, or holds an impossible option.
    """
    return build(RunConfig, read_table(path))


def read_table(path: Path) -> dict[str, Any]:
    """The nested table of one TOML file."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MOST_CHARACTERS + 1)
        if len(text) > MOST_CHARACTERS:
            raise ValueError(f"it has more than {MOST_CHARACTERS:,} characters")
        return tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read the config {path}: {error}.") from error


def config_path(name: str) -> Path:
    """A config file by path, or by its name among the shipped ones."""
    if Path(name).is_file():
        return Path(name)
    folder = shipped_configs()
    wanted = name.removeprefix("configs/").removesuffix(".toml") + ".toml"
    if (folder / wanted).is_file():
        return folder / wanted
    known = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*.toml"))]
    raise ConfigError(
        f"there is no config {name}.{suggestion(wanted, known)} Name a TOML file or "
        f"one of {', '.join(known)}."
    )


def shipped_configs() -> Path:
    """The folder of configs: inside the wheel, or beside the package in a clone."""
    inside = Path(__file__).parent / "_configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def difference(old: RunConfig, new: RunConfig) -> list[str]:
    """One line `section.option: old -> new` for each option that differs."""
    lines = []
    for section in dataclasses.fields(old):
        before, after = getattr(old, section.name), getattr(new, section.name)
        for field in dataclasses.fields(before):
            a, b = getattr(before, field.name), getattr(after, field.name)
            if a != b:
                lines.append(f"{section.name}.{field.name}: {a!r} -> {b!r}")
    return lines
