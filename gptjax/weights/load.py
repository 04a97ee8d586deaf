"""Loads models: finds the files, detects their layout, reads config and parameters.

A model is a folder or file in one of these layouts, or a name on the hub:

gptjax  written by `gptjax.save`; for a run that has not finished, the parameters come
        from its newest valid checkpoint; RUN/checkpoints/STEP is an earlier step
hf      Hugging Face GPT-2: config.json, *.safetensors, with or without an index
llama   Hugging Face Llama, SmolLM2 or Qwen 3: the same files
openai  OpenAI's TensorFlow checkpoint: hparams.json, model.ckpt.*
book    safetensors with the names of the book's PyTorch GPTModel, with a
        config.json that sets "n_heads" if the head dim is not 64
gguf    file of llama.cpp with a GPT-2 or Llama-family model
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.checkpoint.retention import list_steps
from gptjax.config import GPTConfig, from_dict, load_toml
from gptjax.errors import ConfigError, DataError, ModelError
from gptjax.fileio import strict_json
from gptjax.fileio.download import sha256_of_files
from gptjax.fileio.paths import user_path
from gptjax.model.gpt import apply, init
from gptjax.model.quantization import fake_quantize
from gptjax.renamed_options import RENAMED_VALUES
from gptjax.runtime.terminal import logger
from gptjax.tokenizer.chat_template import CHAT_TEMPLATE_FILE as TEMPLATE
from gptjax.tokenizer.chat_template import compile_template, load_chat_template
from gptjax.tokenizer.tokenizer import Tokenizer, is_tokenizer_dir, load_tokenizer
from gptjax.tokenizer.vocab_files import (
    ADDED_TOKENS,
    GENERATION_CONFIG,
    SPECIAL_TOKENS_MAP,
    TOKENIZER_CONFIG,
    read_end_ids,
)
from gptjax.tree import flatten_with_names, num_params
from gptjax.weights import foreign_config, hub
from gptjax.weights.gguf import is_gguf, open_gguf
from gptjax.weights.gguf_model import gguf_config, gguf_tokenizer, pairs_to_halves
from gptjax.weights.model_folder import MAX_MODEL_JSON_BYTES, MODEL_FORMAT, Model, save
from gptjax.weights.param_map import (
    EMBEDDING_TABLES,
    HF_PREFIXES,
    IGNORED_BUFFERS,
    UNEMBEDDING_TENSORS,
    ParamSlot,
    hf_layout,
    param_slots,
    source_shape,
    unpack_tensor,
)
from gptjax.weights.safetensors import TensorReader, open_safetensors, read_finite
from gptjax.weights.tf_checkpoint import open_tf_checkpoint

GPT2_HEAD_DIM = 64  # in all sizes of GPT-2 and in the book
# Read from folders of all layouts.
MODEL_FILES = (
    *(hub.CONFIG, "hparams.json", "*.safetensors", hub.INDEX, "*.ckpt.*", hub.VOCAB, hub.MERGES),
    *(hub.TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, ADDED_TOKENS, TEMPLATE),
    GENERATION_CONFIG,
)
BUFFER_ALIGNMENT = 64  # bytes; JAX on CPU uses arrays of this alignment without copying
REFERENCE_PROMPT = "Every effort moves you"


class ReferenceValues(NamedTuple):
    """Published values of a public model, to verify an import without its original."""

    num_params: int
    embedding: tuple[float, ...] = ()  # of token 0, the first values; the very last value


# Parameter counts: computed from the shapes in Radford et al. 2019. Values of 124M:
# Raschka, "Build a Large Language Model (From Scratch)", chapter 5.
REFERENCE_VALUES = {
    "gpt2": ReferenceValues(124_439_808, (-0.11010301, -0.03926672, 0.03310751, 0.12067825)),
    "gpt2-medium": ReferenceValues(354_823_168),
    "gpt2-large": ReferenceValues(774_030_080),
    "gpt2-xl": ReferenceValues(1_557_611_200),
    "smollm2-135m-instruct": ReferenceValues(134_515_008),  # sum of the file's shapes
}


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Model files of a known layout, before the parameters are read."""

    layout: str
    location: Path  # for messages
    config: GPTConfig
    tokenizer: Tokenizer
    reader: TensorReader
    num_rows: int  # in the file's token embedding, at least vocab_size
    labels: tuple[str, ...] = ()  # class names of a classifier
    chat_template: str = ""  # of an assistant; "" if none
    columns: tuple[str, ...] = ()  # of text and label in the table of a classifier


def load(name: str | Path, *, int8: bool = False) -> Model:
    """Loads a model from a run, a folder of any layout, or the hub.

    Args:
        name: a run folder, a model folder, a Hugging Face, OpenAI or book folder, a
            .safetensors or GGUF file, a public model such as "gpt2", or
            "owner/repository".
        int8: quantize the weights to 8 bits, which reduces the memory traffic of
            decoding to a quarter; see `gptjax.model.quantization`.
    """
    return read_model(open_model_source(resolve_model(name)), int8=int8)


def resolve_model(name: str | Path) -> Path:
    """Returns the path of a model's files, downloading them from the hub if needed."""
    if not (path := user_path(name)).exists() and (file := hub.find_packaged_file(str(name))):
        logger.info(f"file     {file}, of an installed package")
        return file
    if (path / "model" / "config.json").exists():
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
    return hub.fetch_repo(str(name))


def open_model_source(path: Path) -> ModelSource:
    """Detects the layout and config of the model at `path`; reads no parameters."""
    try:
        return _open_layout(path)
    except (ConfigError, DataError) as error:
        raise ModelError(f"cannot use the model {path}: {error}") from error


def _open_layout(path: Path) -> ModelSource:
    """Opens a model in the layout that its files show."""
    if is_gguf(path):
        return with_chat_template(from_gguf(path))
    if (path / "hparams.json").exists():
        return with_chat_template(from_tf_checkpoint(path))
    if path.name.isdecimal() and path.parent.name == "checkpoints":
        return open_checkpoint(path.parent, int(path.name))
    files = list_safetensors(path) if path.is_dir() else []
    if path.suffix == ".safetensors" and path.exists() and not files:
        files, path = [path], path.parent
    config_path = path / "config.json"
    metadata = read_json_object(config_path) if config_path.exists() else {}
    run_files = [path.parent / name for name in ("config.toml", "meta.json")]
    if "format" in metadata and path.name == "model" and all(file.exists() for file in run_files):
        reader = open_run_params(path.parent, files, metadata.get("step"))
    elif files:
        reader = open_safetensors(files)
    else:
        raise ModelError(explain_unreadable(path))
    if "format" in metadata:
        return with_template_of_folder(from_gptjax(path, reader, metadata), path)
    from_layout = from_book if "tok_emb.weight" in reader.tensors else from_hf
    return with_chat_template(from_layout(path, reader, metadata))


def open_checkpoint(checkpoint_dir: Path, step: int) -> ModelSource:
    """Opens the parameters of one step of a run."""
    # Orbax, which other layouts do not need, takes long to import.
    from gptjax.checkpoint.checkpoint import CorruptCheckpointError, read_params

    try:
        arrays = read_params(checkpoint_dir, step)
    except CorruptCheckpointError as error:
        raise ModelError(
            f"cannot use checkpoint {step} in {checkpoint_dir}: {error}. It has those of the "
            f"steps {', '.join(map(str, list_steps(checkpoint_dir))) or 'none'}."
        ) from error
    if EMBEDDING_TABLES[0] not in arrays:
        raise ModelError(
            f"checkpoint {step} in {checkpoint_dir} has only the trained part of the parameters. "
            "Use the model of the run."
        )
    folder = checkpoint_dir.parent / "model"
    reader = TensorReader(arrays, arrays.__getitem__)
    source = from_gptjax(folder, reader, read_json_object(folder / "config.json"))
    return with_template_of_folder(source, folder)


def with_chat_template(source: ModelSource) -> ModelSource:
    """Checks or finds the chat template of a foreign model; logs why it is not used."""
    template, tokens = source.chat_template, source.tokenizer.template_tokens
    try:
        if template:
            compile_template(template, *tokens)
        else:
            template = read_chat_template(source.location, *tokens)
    except ConfigError as error:  # the model can still be used for completion
        logger.info(f"chat template not used: {error}")
        template = ""
    return dataclasses.replace(source, chat_template=template)


def open_run_params(run_dir: Path, files: list[Path], best_step: Any) -> TensorReader:
    """Opens the weights of a finished run, else the newest checkpoint; logs its step.

    `files` are the weights in model/: those of the end, or of the best step so far.
    They are also used if a checkpoint has only the trained part of the parameters.
    """
    steps = list_steps(run_dir / "checkpoints")
    if files and is_last_step(run_dir, steps[-1] if steps else best_step):
        return open_safetensors(files)
    if steps or not files:
        # Orbax, which other layouts do not need, takes long to import.
        from gptjax.checkpoint.checkpoint import read_latest_params

        step, arrays = read_latest_params(run_dir / "checkpoints")
        if EMBEDDING_TABLES[0] in arrays:
            logger.info(f"step     {step} of the unfinished run {run_dir}")
            return TensorReader(arrays, arrays.__getitem__)
        if not files:
            raise ModelError(
                f"checkpoint {step} of the unfinished run {run_dir} has only the trained part "
                "of the parameters. Wait for the first evaluation with a finite loss."
            )
    logger.info(f"step     {best_step}, the best evaluated one of the run {run_dir}")
    return open_safetensors(files)


def is_last_step(run_dir: Path, step: Any) -> bool:
    """True unless the config.toml of a run has more steps."""
    match load_toml(run_dir / "config.toml"):
        case {"train": {"steps": int(num_steps)}} if isinstance(step, int):
            return step >= num_steps
    return True


def with_template_of_folder(source: ModelSource, folder: Path) -> ModelSource:
    """Adds the chat template of a model folder, if it has one."""
    template = read_chat_template(folder, *source.tokenizer.template_tokens)
    return dataclasses.replace(source, chat_template=template)


def read_chat_template(path: Path, *tokens: str) -> str:
    """Returns the chat template in a folder after a test rendering; "" if none."""
    if (path / TEMPLATE).exists():
        return load_chat_template(str(path / TEMPLATE), *tokens).source
    config_path = path / TOKENIZER_CONFIG  # earlier versions of transformers wrote it there
    config = read_json_object(config_path) if config_path.exists() else {}
    sources = config.get("chat_template") or []
    for named in sources if isinstance(sources, list) else [{"template": sources}]:
        match named:
            case {"template": str(source), **rest}:
                if rest.get("name", "default") == "default":
                    return compile_template(source, *tokens).source
            case _:
                raise ConfigError(
                    f"chat_template={sources!r:.60} of {config_path} is no template. Correct it "
                    "or copy the file again."
                )
    return ""


def explain_unreadable(path: Path) -> str:
    """Returns an error message for a path that cannot be read as a model."""
    candidates = [path] if path.is_file() else sorted(path.glob("*"))
    for pickle in candidates:
        if pickle.suffix in (".pth", ".pt", ".bin", ".ckpt"):
            return (
                f"{pickle} is a pickle, which can run code when it is opened, so gptjax does "
                "not open it. If you trust it, convert it to safetensors with PyTorch:\n"
                "  import torch, safetensors.torch as st\n"
                f"  st.save_file({{k: v.clone() for k, v in torch.load({pickle.name!r}, "
                f'map_location="cpu").items()}}, {pickle.with_suffix(".safetensors").name!r})'
            )
    problem = "neither *.safetensors nor hparams.json" if path.exists() else "no such folder"
    for file in candidates:
        if file.suffix == ".gguf":
            problem = f"to use its GGUF file, write {str(file)!r}"
    return (
        f"no model {str(path)!r}: {problem}. Give a run folder, a model folder, a Hugging Face, "
        f"OpenAI or book folder, a GGUF file, or one of {', '.join(hub.PINNED_REPOS)}."
    )


def list_safetensors(folder: Path) -> list[Path]:
    """Returns the safetensors files of a folder: those of the index if it has one."""
    if (folder / hub.INDEX).exists():
        return [folder / name for name in hub.read_shards(folder / hub.INDEX)]
    single = folder / hub.WEIGHTS
    return [single] if single.exists() else sorted(folder.glob("*.safetensors"))


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a small JSON file that contains an object."""
    try:
        data = strict_json.read_json(path, MAX_MODEL_JSON_BYTES)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}. Copy it again.") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} is not a JSON object. Copy it again.")
    return data


def from_gptjax(path: Path, reader: TensorReader, metadata: Mapping[str, Any]) -> ModelSource:
    """Opens a model folder written by `gptjax.save`."""
    if metadata["format"] != MODEL_FORMAT:
        raise ConfigError(
            f"it has the format {metadata['format']!r}, but this version reads "
            f"{MODEL_FORMAT!r}. Use a folder written by gptjax.save or gptjax train."
        )
    match {"labels": [], "columns": [], **metadata}:
        case {
            "model": dict(model),
            "tokenizer": {"name": str(name), "hash": str(expected_hash)},
            "labels": [*labels],
            "columns": [] | [str(), str()] as columns,
        }:
            pass
        case _:
            raise ConfigError("config.json lacks model, tokenizer or labels. Copy it again.")
    # Folders written by earlier versions have other names of attention backends.
    renamed = RENAMED_VALUES["model.attention"]
    if (attention := str(model.get("attention"))) in renamed:
        model = {**model, "attention": renamed[attention]}
    config = from_dict(GPTConfig, model, "model.")
    tokenizer = load_tokenizer(path)
    if tokenizer.hash != expected_hash:
        raise ConfigError(
            f"its tokenizer has the hash {tokenizer.hash[:12]}, but the model was trained "
            f"with {expected_hash[:12]}. Restore its tokenizer files."
        )
    if len(labels) != config.n_classes or not all(isinstance(label, str) for label in labels):
        raise ConfigError(f"labels={labels} for {config.n_classes} classes. Copy it again.")
    tokenizer = dataclasses.replace(tokenizer, name=name)
    num_rows = config.padded_vocab_size
    names = {"labels": tuple(labels), "columns": tuple(columns)}
    return ModelSource("gptjax", path, config, tokenizer, reader, num_rows, **names)


def from_hf(path: Path, reader: TensorReader, metadata: Mapping[str, Any]) -> ModelSource:
    """Opens a folder written by transformers."""
    if not metadata:
        raise ModelError(f"{path} has no config.json. Copy or download it as well.")
    config = foreign_config.hf_config(metadata)
    source = with_tokenizer(hf_layout(config), path, config, reader)
    foreign_config.check_end_ids(read_end_ids(path), source.tokenizer)
    if "score.weight" not in reader.tensors:
        return source
    labels = foreign_config.class_labels(metadata, source.tokenizer)
    config = dataclasses.replace(source.config, n_classes=len(labels), tie_embeddings=True)
    return dataclasses.replace(source, config=config, labels=labels)


def from_gguf(path: Path) -> ModelSource:
    """Opens a GGUF file."""
    metadata, reader = open_gguf(path)
    config = gguf_config(metadata, reader)
    architecture = metadata["general.architecture"]
    if architecture == "llama":
        reader = pairs_to_halves(reader, config)
    tokenizer = gguf_tokenizer(metadata, path.name)
    layout = "gpt2-gguf" if architecture == "gpt2" else "gguf"
    source = with_tokenizer(layout, path, config, reader, tokenizer)
    template = str(metadata.get("tokenizer.chat_template", ""))
    return dataclasses.replace(source, chat_template=template)


def from_tf_checkpoint(path: Path) -> ModelSource:
    """Opens a folder published by OpenAI."""
    config = foreign_config.openai_config(read_json_object(path / "hparams.json"))
    return with_tokenizer("openai", path, config, open_tf_checkpoint(path))


def from_book(path: Path, reader: TensorReader, metadata: Mapping[str, Any]) -> ModelSource:
    """Opens a state dict of the book's GPTModel; derives the config from shapes."""
    shapes = {name: tuple(tensor.shape) for name, tensor in reader.tensors.items()}
    embedding_name, head_name = "tok_emb.weight", "out_head.weight"
    n_layers = sum(name.endswith(".att.W_query.weight") for name in shapes)
    match shapes[embedding_name], shapes.get("pos_emb.weight"):
        case (vocab_size, d_model), (context_length, _) if n_layers:
            pass
        case _:
            raise ConfigError(
                "tok_emb.weight, pos_emb.weight or trf_blocks.0 is missing or not a matrix. "
                "Write the file again."
            )
    if "n_heads" not in metadata:
        if d_model % GPT2_HEAD_DIM:
            fix = 'Add a config.json to the folder: {"n_heads": 12}.'
            raise ConfigError(f"the number of heads for a width of {d_model} is unknown. {fix}")
        metadata = {**metadata, "n_heads": d_model // GPT2_HEAD_DIM}
        logger.info(f"heads    {metadata['n_heads']}, from GPT-2's head dim of {GPT2_HEAD_DIM}")
    # The book copies the weights instead of tying them.
    is_tied = head_name not in shapes or np.array_equal(
        reader.read(head_name), reader.read(embedding_name)
    )
    config = GPTConfig(
        vocab_size=vocab_size,
        context_length=context_length,
        n_layers=n_layers,
        n_heads=foreign_config.get_positive_int(metadata, "n_heads"),
        d_model=d_model,
        qkv_bias="trf_blocks.0.att.W_query.bias" in shapes,
        tie_embeddings=is_tied,
    )
    foreign_config.check_book_config(metadata, config)
    return with_tokenizer("book", path, config, reader)


def with_tokenizer(
    layout: str,
    path: Path,
    config: GPTConfig,
    reader: TensorReader,
    tokenizer: Tokenizer | None = None,
) -> ModelSource:
    """Adds the tokenizer, by default that of the folder; it determines `vocab_size`."""
    tokenizer, num_rows = tokenizer or find_tokenizer(path, config), config.vocab_size
    # transformers lets a tokenizer have more special tokens than the model.
    if num_cut := sum(n >= num_rows for n in tokenizer.added_tokens.values()):
        logger.info(f"cut      {num_cut} special tokens without a row")
        tokenizer = tokenizer.truncate(num_rows)
    if tokenizer.vocab_size > num_rows:
        raise ConfigError(
            f"its tokenizer has {tokenizer.vocab_size} tokens, but the model has only "
            f"{num_rows}. Use the tokenizer files of the model."
        )
    if tokenizer.vocab_size < num_rows:
        logger.info(f"cut      {num_rows - tokenizer.vocab_size} rows without a token")
        config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    return ModelSource(layout, path, config, tokenizer, reader, num_rows)


def find_tokenizer(path: Path, config: GPTConfig) -> Tokenizer:
    """Loads the tokenizer in the folder, else the built-in one of that size."""
    if is_tokenizer_dir(path):
        return load_tokenizer(path)
    for name in ("gpt2", "bytes"):
        if (known := load_tokenizer(name)).vocab_size == config.vocab_size:
            return known
    raise ConfigError(
        f"it has no tokenizer, and no built-in one has {config.vocab_size} tokens. Copy "
        "the model's tokenizer.json, or vocab.json and merges.txt, there."
    )


def read_model(source: ModelSource, *, int8: bool = False) -> Model:
    """Reads the parameters of a source in float32."""
    config, reader = source.config, source.reader
    check_config_sizes(source)
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    leaves = flatten_with_names(shapes)
    slots_by_name = param_slots(config, source.layout, leaves)
    full_names = match_names(source, slots_by_name)
    arrays = {name: aligned_empty(leaf.shape) for name, leaf in leaves.items()}
    for name, slots in slots_by_name.items():
        tensor = read_finite(reader, full_names[name], source.location)
        if slots[0].leaf in EMBEDDING_TABLES:
            tensor = tensor[: leaves[slots[0].leaf].shape[0]]
        for leaf, layer, values in unpack_tensor(tensor, slots):
            target = arrays[leaf] if layer is None else arrays[leaf][layer]
            target.reshape(values.shape)[...] = values
    ordered = [jax.device_put(arrays.pop(name)) for name in leaves]
    params = jax.tree.unflatten(jax.tree.structure(shapes), ordered)
    params = fake_quantize(params) if int8 else params
    metadata = (source.tokenizer, source.labels, source.chat_template, int8, source.columns)
    return Model(config, params, *metadata)


def check_config_sizes(source: ModelSource) -> None:
    """Rejects configs larger than the file, before any memory is allocated."""
    tensors = source.reader.tensors
    shapes = {name: x.shape for name, x in tensors.items() if min(x.shape, default=0)}
    # Each layer has tensors of its own or a row of a stacked tensor.
    max_layers = max([len(tensors), *(s[0] for n, s in shapes.items() if n.startswith("blocks/"))])
    max_axis = max([len(tensors), *(axis for shape in shapes.values() for axis in shape)])
    c = source.config
    sizes = {name: getattr(c, name) for name in foreign_config.GPT2_NAMES}
    if c.position == "rope":  # which has no table
        del sizes["context_length"]
    sizes |= {"mlp_dim": c.actual_mlp_dim, "n_kv_heads": c.actual_kv_heads}
    sizes |= {"head_dim": c.actual_head_dim, "vocab_multiple": c.padded_vocab_size}
    for name, size in sizes.items():
        limit = max_layers if name == "n_layers" else max_axis
        if size > limit:
            raise ModelError(
                f"{source.location}: {name}={size} is more than the {limit} that its tensors "
                "allow. Correct the config or copy the files again."
            )


def match_names(
    source: ModelSource, slots_by_name: Mapping[str, list[ParamSlot]]
) -> dict[str, str]:
    """Maps each expected name to its name in the file; checks shapes and dtypes."""

    def error(problem: str) -> ModelError:
        return ModelError(f"{source.location} {problem}. Copy the files again or fix the config.")

    full_names: dict[str, str] = {}
    for full in source.reader.tensors:
        short = full.removeprefix(HF_PREFIXES.get(source.layout, ""))
        if short in full_names:
            raise error(f"has both {full_names[short][:80]!r} and {full[:80]!r}")
        full_names[short] = full
    tied = UNEMBEDDING_TENSORS if source.config.tie_embeddings else set()
    if missing := sorted(set(slots_by_name) - set(full_names)):
        raise error(f"lacks {len(missing)} tensors that its config requires, such as {missing[0]}")
    unexpected = sorted(set(full_names) - set(slots_by_name) - tied)
    unexpected = [name for name in unexpected if not IGNORED_BUFFERS.fullmatch(name)]
    if unexpected:
        raise error(f"has {len(unexpected)} unexpected tensors, such as {unexpected[0][:80]!r}")
    for name, slots in slots_by_name.items():
        info, expected = source.reader.tensors[full_names[name]], source_shape(slots)
        if slots[0].leaf in EMBEDDING_TABLES:
            expected = (source.num_rows, *expected[1:])
        found = tuple(info.shape)
        if source.layout == "openai" and found[:1] == (1,) and len(found) == 3:
            found = found[1:]  # OpenAI stores matrices as width-1 convolutions
        # NumPy has no kind for bfloat16.
        if found != expected or not (info.dtype.kind == "f" or info.dtype.name == "bfloat16"):
            raise error(
                f"has {full_names[name]} as {info.dtype} {found}, but its config requires "
                f"floating point {expected}"
            )
    return full_names


def aligned_empty(shape: tuple[int, ...]) -> np.ndarray:
    """Returns an empty float32 array that JAX can use on CPU without copying."""
    size = int(np.prod(shape)) * 4
    buffer = np.empty(size + BUFFER_ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % BUFFER_ALIGNMENT
    return buffer[start : start + size].view(np.float32).reshape(shape)


def convert_model(name: str, output_dir: Path) -> Model:
    """Reads a model in any supported layout, checks it and writes a model folder."""
    if output_dir.exists():
        raise ModelError(f"{output_dir} already exists. Choose another folder with --out.")
    path = resolve_model(name)
    source = open_model_source(path)
    model = read_model(source)
    logger.info(
        f"read     {source.location} ({source.layout}): {len(source.reader.tensors)} "
        f"tensors, {num_params(model.params):,} parameters"
    )
    others = [p.name for p in source.location.glob("*") if not any(map(p.match, MODEL_FILES))]
    if others and path.is_dir():
        logger.info(f"not kept {', '.join(sorted(others)[:9])}" + " ..." * (len(others) > 9))
    logger.info(f"check    {check_reference_values(model, REFERENCE_VALUES.get(name))}")
    save(model, output_dir)
    digest = sha256_of_files([output_dir / "model.safetensors"])
    logger.info(f"wrote    {output_dir}, model.safetensors has sha256 {digest}")
    return model


def check_reference_values(model: Model, reference: ReferenceValues | None) -> str:
    """Checks imported parameters; returns a summary of the comparison."""
    ids = model.tokenizer.encode_prompt(REFERENCE_PROMPT)[: model.config.context_length]
    logits = np.asarray(apply(model.config, model.params, jnp.array([ids])))[0, -1]
    if not np.isfinite(logits).all():
        raise ModelError("the logits are not finite: the file is damaged. Copy it again.")
    if reference is None:
        return "logits are finite; no published values to compare with"
    embedding_VD = np.asarray(model.params["token_embedding"]["embedding"])
    actual, expected = [num_params(model.params)], [reference.num_params]
    if reference.embedding:
        *first, last = reference.embedding
        actual += [*embedding_VD[0, : len(first)], embedding_VD[-1, -1]]
        expected += [*first, last]
    compared = "number of parameters" + " and published values" * bool(reference.embedding)
    if not np.allclose(actual, expected, rtol=0, atol=1e-7):
        raise ModelError(f"not the public model: found {actual}, expected {expected}.")
    return f"logits are finite; {compared} agree"
