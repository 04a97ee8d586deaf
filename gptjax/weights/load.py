"""Loads models: finds the files, detects their layout, reads config and parameters.

A model is a folder or file in one of these layouts, or a name on the hub:

gptjax  written by `gptjax.save`; for a pretraining run that has not finished, the
        parameters come from its newest checkpoint
hf      Hugging Face GPT-2: config.json, *.safetensors, with or without an index
openai  OpenAI's TensorFlow checkpoint: hparams.json, model.ckpt.*
book    safetensors with the names of the book's PyTorch GPTModel, with a
        config.json that sets "n_heads" if the head dim is not 64
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from gptjax.config import RENAMED_VALUES, GPTConfig, from_dict
from gptjax.errors import ConfigError, DataError, ModelError
from gptjax.fileio import strict_json
from gptjax.model.gpt import init
from gptjax.model.quantization import fake_quantize
from gptjax.tokenizer.chat_template import CHAT_TEMPLATE_FILE as TEMPLATE
from gptjax.tokenizer.chat_template import load_chat_template
from gptjax.tokenizer.tokenizer import Tokenizer, is_tokenizer_dir, load_tokenizer
from gptjax.tree import Params, flatten_with_names
from gptjax.weights import hub
from gptjax.weights.model_folder import MODEL_FORMAT, Model
from gptjax.weights.param_map import (
    EMBEDDING_TABLES,
    IGNORED_BUFFERS,
    ParamSlot,
    param_slots,
    source_shape,
    unpack_tensor,
)
from gptjax.weights.safetensors import open_safetensors
from gptjax.weights.tf_checkpoint import open_tf_checkpoint, read_hparams

_LogFn = Callable[[str], None]

# Properties of our model; files with other values belong to other architectures.
REQUIRED_HF_VALUES = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
GPT2_HEAD_DIM = 64  # in all sizes of GPT-2 and in the book
MAX_MODEL_JSON_BYTES = 10_000_000
BUFFER_ALIGNMENT = 64  # bytes; JAX on CPU uses arrays of this alignment without copying


@runtime_checkable  # for the type checks of the tests
class TensorReader(Protocol):
    """Reads tensors by name, one at a time."""

    @property
    def tensors(self) -> Mapping[str, Any]:
        """Values with `.shape` and `.dtype`, by name."""
        ...

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor."""
        ...


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Model files of a known layout, before the parameters are read."""

    layout: str
    location: str  # for messages
    config: GPTConfig
    tokenizer: Tokenizer
    reader: TensorReader
    num_rows: int  # in the file's token embedding, at least vocab_size
    labels: tuple[str, ...] = ()  # class names of a classifier
    chat_template: str = ""  # of an assistant; "" if none


def load(name: str | Path, log: _LogFn = lambda line: None, *, int8: bool = False) -> Model:
    """Loads a model from a run, a folder of any layout, or the hub.

    Args:
        name: a run folder, a model folder, a Hugging Face, OpenAI or book folder, a
            .safetensors file, a public size such as "gpt2", or "owner/repository".
        log: receives messages for the user, one line each.
        int8: quantize the weights to 8 bits, which reduces the memory traffic of
            decoding to a quarter; see `gptjax.model.quantization`.

    Raises:
        ModelError: there is no such model, or its files are corrupt or inconsistent.
    """
    source = open_model_source(resolve_model(name, log), log)
    params = read_params(source)
    return Model(
        source.config,
        fake_quantize(params) if int8 else params,
        source.tokenizer,
        source.labels,
        source.chat_template,
        int8,
    )


def resolve_model(name: str | Path, log: _LogFn) -> Path:
    """Returns the path of a model's files, downloading them from the hub if needed.

    Raises:
        ModelError: the run has not started training, or the download failed.
    """
    path = Path(name)
    if (path / "model" / "config.json").is_file():
        return path / "model"
    if (path / "checkpoints").is_dir():
        raise ModelError(
            f"the run {path} has no model/. Resume it, which writes one: gptjax train "
            f"{path / 'config.toml'} --run {path}"
        )
    # "runs/typo" looks like "owner/name", but the folder runs/ exists.
    is_local = path.exists() or (len(path.parts) > 1 and path.parent.is_dir())
    if is_local or not hub.is_repo_id(str(name)):
        return path
    return hub.fetch_repo(str(name), log)


def open_model_source(path: Path, log: _LogFn = lambda line: None) -> ModelSource:
    """Detects the layout and config of the model at `path`; reads no parameters.

    Raises:
        ModelError: the layout is unknown, or the model is not a GPT-2.
    """
    if (path / "hparams.json").is_file():
        return from_tf_checkpoint(path, log)
    if path.is_dir():
        files = list_safetensors(path)
    elif path.suffix == ".safetensors" and path.is_file():
        files, path = [path], path.parent
    else:
        raise ModelError(explain_unreadable(path))
    config_path, run_dir = path / "config.json", path.parent
    reader: TensorReader
    if files:
        reader = open_safetensors(files)
    elif config_path.is_file() and (run_dir / "config.toml").is_file():
        reader = open_latest_checkpoint(run_dir / "checkpoints", log)
    else:
        raise ModelError(explain_unreadable(path))
    metadata = read_json_object(config_path) if config_path.is_file() else {}
    if "format" in metadata:
        source = from_gptjax(path, reader, metadata)
        return dataclasses.replace(source, chat_template=_read_folder_template(path))
    if "tok_emb.weight" in reader.tensors:
        return from_book(path, reader, metadata, log)
    source = from_hf(path, reader, metadata, log)
    try:
        return dataclasses.replace(source, chat_template=_read_folder_template(path))
    except ModelError as error:  # the model can still be used for completion
        log(f"chat template not used: {error}")
        return source


class ArrayReader(NamedTuple):
    """Tensors that are in memory already."""

    tensors: Mapping[str, np.ndarray]

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor."""
        return self.tensors[name]


def open_latest_checkpoint(checkpoint_dir: Path, log: _LogFn) -> ArrayReader:
    """Reads the parameters of an unfinished run, which may be training.

    Raises:
        ModelError: there is no valid checkpoint.
    """
    # Orbax, which other layouts do not need, takes as long to import as all else here.
    from gptjax.checkpoint.checkpoint import read_latest_params

    step, arrays = read_latest_params(checkpoint_dir)
    log(f"step     {step} of the unfinished run {checkpoint_dir.parent}")
    return ArrayReader(arrays)


def _read_folder_template(path: Path) -> str:
    """Returns the chat template in a folder after a test rendering; "" if none.

    Raises:
        ModelError: the template is invalid.
    """
    template_path = path / TEMPLATE
    if not template_path.is_file():
        return ""
    try:
        return load_chat_template(str(template_path)).source
    except ConfigError as error:
        raise ModelError(f"{template_path}: {error}") from error


def explain_unreadable(path: Path) -> str:
    """Returns an error message for a path that cannot be read as a model."""
    pickles = [path] if path.is_file() else sorted(path.glob("*"))
    pickles = [p for p in pickles if p.suffix in (".pth", ".pt", ".bin", ".ckpt")]
    if pickles:
        safetensors_name = pickles[0].with_suffix(".safetensors").name
        return (
            f"{pickles[0]} is a pickle, which can run arbitrary code when it is "
            "opened, so gptjax does not open it. If you trust the file, convert it to "
            "safetensors with PyTorch:\n"
            "  import torch, safetensors.torch as st\n"
            f"  st.save_file({{k: v.clone() for k, v in torch.load("
            f'{pickles[0].name!r}, map_location="cpu").items()}}, {safetensors_name!r})'
        )
    if not path.exists():
        return (
            f"no model {str(path)!r}: no such file or folder. Give a run folder "
            "(gptjax train ... --run DIR), a model folder, a Hugging Face GPT-2, or "
            f"one of {', '.join(hub.PINNED_REPOS)}."
        )
    return (
        f"no model in {path}: it has neither *.safetensors nor hparams.json. Give a "
        "run folder, a model folder, or a Hugging Face, OpenAI or book folder."
    )


def list_safetensors(folder: Path) -> list[Path]:
    """Returns the safetensors files of a folder: those of the index if it has one."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = folder / "model.safetensors"
        return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    names = read_json_object(index).get("weight_map")
    if not isinstance(names, dict) or not all(
        isinstance(n, str) and Path(n).name == n for n in names.values()
    ):
        raise ModelError(f"{index} refers to files outside its folder. Download the folder again.")
    return [folder / name for name in sorted(set(names.values()))]


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a small JSON file that contains an object."""
    try:
        data = strict_json.read_json(path, MAX_MODEL_JSON_BYTES)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}. Copy it again.") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} does not contain a JSON object. Copy it again.")
    return data


def get_positive_int(path: Path, metadata: Mapping[str, Any], *names: str) -> int:
    """Returns the value of the first of `names` that is present; must be positive."""
    for name in names:
        if name in metadata:
            if type(metadata[name]) is int and metadata[name] > 0:
                return metadata[name]
            raise ModelError(
                f"{path}: {name}={metadata[name]!r} is not a positive integer. Correct "
                "it or copy the file again."
            )
    raise ModelError(f"{path} has no {names[0]}. Copy the file again.")


def from_gptjax(path: Path, reader: TensorReader, metadata: Mapping[str, Any]) -> ModelSource:
    """Opens a model folder written by `gptjax.save`."""
    config_path = path / "config.json"
    if metadata["format"] != MODEL_FORMAT:
        raise ModelError(
            f"{config_path} has the format {metadata['format']!r}, but this version "
            f"reads {MODEL_FORMAT!r}. Use a folder written by gptjax.save or gptjax "
            "train."
        )
    match metadata:
        case {"model": dict(model), "tokenizer": {"name": str(name), "hash": str(due)}}:
            pass
        case _:
            raise ModelError(f"{config_path} lacks model or tokenizer. Copy it again.")
    try:
        # Folders written by earlier versions have other names of attention backends.
        renamed = RENAMED_VALUES["model.attention"]
        if (attention := str(model.get("attention"))) in renamed:
            model = {**model, "attention": renamed[attention]}
        config = from_dict(GPTConfig, model, "model.")
        tokenizer = load_tokenizer(path)
    except (ConfigError, DataError) as error:
        raise ModelError(f"cannot use the model folder {path}: {error}") from error
    if tokenizer.hash != due:
        raise ModelError(
            f"the tokenizer in {path} has the hash {tokenizer.hash[:12]}, but the "
            f"model was trained with {due[:12]}. Restore its tokenizer files."
        )
    tokenizer = dataclasses.replace(tokenizer, name=name)
    labels = metadata.get("labels", [])
    if not (isinstance(labels, list) and all(isinstance(x, str) for x in labels)):
        raise ModelError(f"{config_path}: labels={labels!r} is not a list of strings.")
    if len(labels) != config.n_classes:
        raise ModelError(
            f"{config_path} has {len(labels)} labels for {config.n_classes} classes. Copy it again."
        )
    num_rows = config.padded_vocab_size
    return ModelSource("gptjax", str(path), config, tokenizer, reader, num_rows, tuple(labels))


def from_hf(path: Path, reader: Any, hf_config: Mapping[str, Any], log: _LogFn) -> ModelSource:
    """Opens a folder written by transformers."""
    config_path = path / "config.json"
    if not hf_config:
        raise ModelError(f"{path} has no config.json. Copy or download it as well.")
    for name, required in REQUIRED_HF_VALUES.items():
        if hf_config.get(name, required) != required:
            raise ModelError(
                f"{config_path}: {name}={hf_config[name]!r}, but GPT-2 requires "
                f"{required!r}. gptjax does not support this architecture."
            )
    config = config_from_shape(
        config_path,
        vocab_size=get_positive_int(config_path, hf_config, "vocab_size"),
        context_length=get_positive_int(config_path, hf_config, "n_positions", "n_ctx"),
        n_layers=get_positive_int(config_path, hf_config, "n_layer"),
        n_heads=get_positive_int(config_path, hf_config, "n_head"),
        d_model=get_positive_int(config_path, hf_config, "n_embd"),
        tie_embeddings=hf_config.get("tie_word_embeddings", True) is not False,
    )
    if hf_config.get("n_inner") not in (None, config.mlp_dim):
        raise ModelError(
            f"{config_path}: n_inner={hf_config['n_inner']!r}, but gptjax only "
            f"supports 4 * n_embd = {config.mlp_dim}."
        )
    source = with_tokenizer("hf", path, config, reader, log)
    if "score.weight" not in reader.tensors:
        return source
    labels = label_names(config_path, hf_config)
    config = dataclasses.replace(source.config, n_classes=len(labels), tie_embeddings=True)
    return dataclasses.replace(source, config=config, labels=labels)


def label_names(config_path: Path, hf_config: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the class names of a transformers classifier."""
    id2label = hf_config.get("id2label")
    if isinstance(id2label, dict) and id2label:
        labels = [id2label.get(str(n)) for n in range(len(id2label))]
        names = tuple(label for label in labels if isinstance(label, str))
        if len(names) == len(labels):
            return names
    raise ModelError(
        f"{config_path}: id2label={id2label!r} does not name the classes 0, 1, ... of "
        "the model. Correct it or copy the file again."
    )


def from_tf_checkpoint(path: Path, log: _LogFn) -> ModelSource:
    """Opens a folder published by OpenAI."""
    hparams = read_hparams(path)
    config = config_from_shape(
        path / "hparams.json",
        vocab_size=hparams["n_vocab"],
        context_length=hparams["n_ctx"],
        n_layers=hparams["n_layer"],
        n_heads=hparams["n_head"],
        d_model=hparams["n_embd"],
    )
    return with_tokenizer("openai", path, config, open_tf_checkpoint(path), log)


def from_book(path: Path, reader: Any, metadata: Mapping[str, Any], log: _LogFn) -> ModelSource:
    """Opens a state dict of the book's GPTModel; derives the config from shapes."""

    def shape(name: str) -> tuple[int, ...]:
        if len(found := reader.tensors[name].shape) == 2:
            return found
        raise ModelError(f"{name} in {path} is not a matrix. Write the file again.")

    width, n_layers = shape("tok_emb.weight")[1], 0
    while f"trf_blocks.{n_layers}.att.W_query.weight" in reader.tensors:
        n_layers += 1
    if "n_heads" not in metadata:
        log(f"heads    {width // GPT2_HEAD_DIM}, from GPT-2's head dim of {GPT2_HEAD_DIM}")
        if width % GPT2_HEAD_DIM:
            raise ModelError(
                f"{path} does not specify the number of heads for a width of {width}. "
                'Add a config.json to the folder: {"n_heads": 12}.'
            )
        metadata = {"n_heads": width // GPT2_HEAD_DIM}
    if "pos_emb.weight" not in reader.tensors or not n_layers:
        raise ModelError(f"{path} lacks pos_emb.weight or trf_blocks.0. Write it again.")
    config = config_from_shape(
        path,
        vocab_size=shape("tok_emb.weight")[0],
        context_length=shape("pos_emb.weight")[0],
        n_layers=n_layers,
        n_heads=get_positive_int(path / "config.json", metadata, "n_heads"),
        d_model=width,
        qkv_bias="trf_blocks.0.att.W_query.bias" in reader.tensors,
        tie_embeddings=False,
    )
    head_name, embedding_name = "out_head.weight", "tok_emb.weight"
    if head_name not in reader.tensors or np.array_equal(
        reader.read(head_name), reader.read(embedding_name)
    ):
        # The book copies the weights instead of tying them.
        config = dataclasses.replace(config, tie_embeddings=True)
    return with_tokenizer("book", path, config, reader, log)


def config_from_shape(path: Path, **shape: Any) -> GPTConfig:
    """Builds the config of a file; errors refer to the file."""
    try:
        return GPTConfig(**shape)
    except ConfigError as error:
        raise ModelError(f"{path} does not describe a valid GPT: {error}") from error


def with_tokenizer(
    layout: str, path: Path, config: GPTConfig, reader: TensorReader, log: _LogFn
) -> ModelSource:
    """Adds the tokenizer; its size determines `vocab_size`."""
    tokenizer, num_rows = find_tokenizer(path, config), config.vocab_size
    if tokenizer.vocab_size > num_rows:
        raise ModelError(
            f"the tokenizer in {path} has {tokenizer.vocab_size} tokens, but the model "
            f"has only {num_rows}. Use the tokenizer files of the model."
        )
    if tokenizer.vocab_size < num_rows:
        log(f"cut      {num_rows - tokenizer.vocab_size} rows without a token")
        config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    return ModelSource(layout, str(path), config, tokenizer, reader, num_rows)


def find_tokenizer(path: Path, config: GPTConfig) -> Tokenizer:
    """Loads the tokenizer in the folder, else the built-in one of that size."""
    if is_tokenizer_dir(path):
        try:
            return load_tokenizer(path)
        except DataError as error:
            raise ModelError(str(error)) from error
    for name in ("gpt2", "bytes"):
        if (known := load_tokenizer(name)).vocab_size == config.vocab_size:
            return known
    raise ModelError(
        f"{path} has no tokenizer, and no built-in one has {config.vocab_size} tokens. "
        "Copy vocab.json and merges.txt of the model there."
    )


def read_params(source: ModelSource) -> Params:
    """Reads the parameters in float32.

    Raises:
        ModelError: a tensor is missing, unexpected, of the wrong shape or dtype, or
            not finite.
    """
    config, reader = source.config, source.reader
    check_config_sizes(source)
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    leaves = flatten_with_names(shapes)
    slots_by_name = param_slots(config, source.layout, leaves)
    full_names = match_names(source, slots_by_name)
    arrays = {name: aligned_empty(leaf.shape) for name, leaf in leaves.items()}
    for name, slots in slots_by_name.items():
        tensor = reader.read(full_names[name])
        # Tests all values without allocating a mask: min and max propagate nan.
        if not np.isfinite([tensor.min(), tensor.max()]).all():
            raise ModelError(
                f"{source.location}: {full_names[name]} contains non-finite values. "
                "Copy the file again, or retrain the model."
            )
        if slots[0].leaf in EMBEDDING_TABLES:
            tensor = tensor[: leaves[slots[0].leaf].shape[0]]
        for leaf, layer, values in unpack_tensor(tensor, slots):
            target = arrays[leaf] if layer is None else arrays[leaf][layer]
            target.reshape(values.shape)[...] = values
    ordered = [jax.device_put(arrays.pop(name)) for name in leaves]
    return jax.tree.unflatten(jax.tree.structure(shapes), ordered)


def check_config_sizes(source: ModelSource) -> None:
    """Rejects configs larger than the file, before any memory is allocated."""
    c, tensors = source.config, source.reader.tensors
    max_axis = max([len(tensors), *(n for entry in tensors.values() for n in entry.shape)])
    stack_lengths = [e.shape[0] for n, e in tensors.items() if n[:7] == "blocks/" and e.shape]
    # Each layer has tensors of its own or a row of a stacked tensor.
    max_layers = max([len(tensors), *stack_lengths])
    for name in ("vocab_size", "context_length", "n_layers", "n_heads", "d_model"):
        if getattr(c, name) > (max_layers if name == "n_layers" else max_axis):
            raise ModelError(
                f"{source.location}: {name}={getattr(c, name)} is too large for "
                f"{len(tensors)} tensors with axes of up to {max_axis}. Correct the "
                "config or copy the files again."
            )


def match_names(
    source: ModelSource, slots_by_name: Mapping[str, list[ParamSlot]]
) -> dict[str, str]:
    """Maps each expected name to its name in the file; checks shapes and dtypes."""
    full_names: dict[str, str] = {}
    for full in source.reader.tensors:
        short = full.removeprefix("transformer.") if source.layout == "hf" else full
        if short in full_names:
            raise ModelError(
                f"{source.location} has both {full_names[short]} and {full}. Remove one."
            )
        full_names[short] = full
    tied = {"lm_head.weight", "out_head.weight"} if source.config.tie_embeddings else {}
    unexpected = [
        n for n in full_names if n not in slots_by_name and not IGNORED_BUFFERS.fullmatch(n)
    ]
    unexpected = sorted(set(unexpected) - set(tied))
    if missing := sorted(set(slots_by_name) - set(full_names)):
        raise ModelError(
            f"{source.location} lacks {len(missing)} tensors that its config requires, "
            f"such as {missing[0]}. Copy the files again or correct the config."
        )
    if unexpected:
        raise ModelError(
            f"{source.location} has {len(unexpected)} unexpected tensors, such as "
            f"{unexpected[0][:80]}. Remove them or correct the config."
        )
    for name, slots in slots_by_name.items():
        info, expected = source.reader.tensors[full_names[name]], source_shape(slots)
        if slots[0].leaf in EMBEDDING_TABLES:
            expected = (source.num_rows, *expected[1:])
        found = tuple(info.shape)
        if source.layout == "openai" and found[:1] == (1,) and len(found) == 3:
            found = found[1:]  # OpenAI stores matrices as width-1 convolutions
        if found != expected or not is_float(info.dtype):
            raise ModelError(
                f"{source.location}: {full_names[name]} is {info.dtype} {found}, but "
                f"the config requires floating point {expected}. Copy the files again "
                "or correct the config."
            )
    return full_names


def is_float(dtype: np.dtype) -> bool:
    """True for floating point, including bfloat16, which is of NumPy kind "V"."""
    return dtype.kind == "f" or dtype.name == "bfloat16"


def aligned_empty(shape: tuple[int, ...]) -> np.ndarray:
    """Returns an empty float32 array that JAX can use on CPU without copying."""
    size = int(np.prod(shape)) * 4
    buffer = np.empty(size + BUFFER_ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % BUFFER_ALIGNMENT
    return buffer[start : start + size].view(np.float32).reshape(shape)
