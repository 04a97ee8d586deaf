"""From the files of others to a model: which layout, which shape, then the numbers.

SOURCE is a folder or file in one of these layouts, or the name of one on the hub:

gptjax  what `gptjax.save` writes
hf      Hugging Face's GPT-2: config.json, *.safetensors, with or without an index
openai  OpenAI's TensorFlow checkpoint: hparams.json, model.ckpt.*
book    safetensors with the names of the book's PyTorch GPTModel; beside it, a
        config.json with "n_heads", where the heads are not 64 wide
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptjax import strict_json
from gptjax import template as templates
from gptjax import tokenizer as tokenizers
from gptjax.config import GPTConfig, build
from gptjax.errors import ConfigError, DataError, ModelError
from gptjax.packing import rounded
from gptjax.template import FILE as TEMPLATE
from gptjax.tokenizer import Tokenizer
from gptjax.weights import hub
from gptjax.weights.folder import FORMAT, Model
from gptjax.weights.openai import open_checkpoint, read_hparams
from gptjax.weights.streaming import Source, Tensors, read_params
from gptjax.weights.tensors import open_safetensors

Say = Callable[[str], None]
HEAD_WIDTH = 64  # of all GPT-2 sizes, and of the book's
JSON_BYTES = 10_000_000


def load(
    name: str | Path, say: Say = lambda line: None, *, int8: bool = False
) -> Model:
    """The model that MODEL names: a run, a folder of any layout, or one of the hub.

    Args:
        name: a run folder, a model folder, a Hugging Face, OpenAI or book folder, a
            .safetensors file, a public size such as "gpt2", or "owner/repository".
        say: gets what a person should know, a line at a time.
        int8: whether weights are rounded to 8 bits, as `gptjax.packing` does, for
            writing that reads a quarter of the bytes.

    Raises:
        ModelError: nothing of that name, or files that are damaged or do not agree.
    """
    source = open_source(find(name, say), say)
    params = read_params(source)
    return Model(
        source.config,
        rounded(params) if int8 else params,
        source.tokenizer,
        source.labels,
        source.template,
        int8,
    )


def find(name: str | Path, say: Say) -> Path:
    """Where the files of MODEL are; those of the hub are downloaded once.

    Raises:
        ModelError: the run has no model yet, or the download failed.
    """
    path = Path(name)
    if (path / "model" / "config.json").is_file():
        return path / "model"
    if (path / "checkpoints").is_dir():
        raise ModelError(
            f"the run {path} has no model/ yet, it is written when the run ends. "
            f"Finish it: gptjax train {path / 'config.toml'} --run {path}"
        )
    # "runs/typo" looks like "owner/name", but there is a folder runs/.
    local = path.exists() or (len(path.parts) > 1 and path.parent.is_dir())
    return (
        path if local or not hub.is_repository(str(name)) else hub.fetch(str(name), say)
    )


def open_source(path: Path, say: Say = lambda line: None) -> Source:
    """Finds out what lies at `path`, and in which shape; reads no parameter yet.

    Raises:
        ModelError: it is in no known layout, or not a GPT-2.
    """
    if (path / "hparams.json").is_file():
        return openai_source(path, say)
    if path.is_dir():
        files = safetensors_files(path)
    elif path.suffix == ".safetensors" and path.is_file():
        files, path = [path], path.parent
    else:
        raise ModelError(unreadable(path))
    if not files:
        raise ModelError(unreadable(path))
    found = open_safetensors(files)
    about = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if "format" in about:
        source = own_source(path, found, about)
        return dataclasses.replace(source, template=read_template(path))
    if "tok_emb.weight" in found.tensors:
        return book_source(path, found, about, say)
    source = hf_source(path, found, about, say)
    try:
        return dataclasses.replace(source, template=read_template(path))
    except ModelError as error:  # the model can still complete
        say(f"template not used: {error}")
        return source


def read_template(path: Path) -> str:
    """The chat template in a folder, tried out; "" where there is none.

    Raises:
        ModelError: it cannot be used.
    """
    place = path / TEMPLATE
    if not place.is_file():
        return ""
    try:
        return templates.read_template(str(place)).source
    except ConfigError as error:
        raise ModelError(f"{place}: {error}") from error


def unreadable(path: Path) -> str:
    """Why nothing can be imported from `path`, and what helps."""
    pickles = [path] if path.is_file() else sorted(path.glob("*"))
    pickles = [p for p in pickles if p.suffix in (".pth", ".pt", ".bin", ".ckpt")]
    if pickles:
        new = pickles[0].with_suffix(".safetensors").name
        return (
            f"{pickles[0]} is a pickle, which can run anything when it is opened, so "
            "gptjax never does. Where you trust it and have PyTorch, turn it into "
            "safetensors:\n"
            "  import torch, safetensors.torch as st\n"
            f"  st.save_file({{k: v.clone() for k, v in torch.load("
            f'{pickles[0].name!r}, map_location="cpu").items()}}, {new!r})'
        )
    if not path.exists():
        return (
            f"no model {str(path)!r}: there is no such file or folder. Name a run "
            "folder (gptjax train ... --run DIR), a model folder, a Hugging Face "
            f"GPT-2, or one of {', '.join(hub.KNOWN)}."
        )
    return (
        f"there is no model in {path}: it has no *.safetensors, and no hparams.json. "
        "Name a run folder, a model folder, or a Hugging Face, OpenAI or book folder."
    )


def safetensors_files(folder: Path) -> list[Path]:
    """The files of a folder that hold its tensors."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = folder / "model.safetensors"
        return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(
        isinstance(n, str) and Path(n).name == n for n in names.values()
    ):
        raise ModelError(
            f"{index} does not name the files beside it. Download the folder again."
        )
    return [folder / name for name in sorted(set(names.values()))]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a small JSON file."""
    try:
        data = strict_json.read_json(path, JSON_BYTES)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}. Copy it again.") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} holds no JSON object. Copy it again.")
    return data


def whole(path: Path, about: Mapping[str, Any], *names: str) -> int:
    """The first of the named positive integers that there is."""
    for name in names:
        if name in about:
            if type(about[name]) is int and about[name] > 0:
                return about[name]
            raise ModelError(
                f"{path}: {name}={about[name]!r} is not a positive whole number. "
                "Correct it, or copy the file again."
            )
    raise ModelError(f"{path} has no {names[0]}. Copy the file again.")


def own_source(path: Path, files: Tensors, about: Mapping[str, Any]) -> Source:
    """A folder that `gptjax.save` wrote."""
    place = path / "config.json"
    if about["format"] != FORMAT:
        raise ModelError(
            f"{place} has the format {about['format']!r}, but this version reads "
            f"{FORMAT!r}. Name a folder that gptjax.save or gptjax train wrote."
        )
    match about:
        case {"model": dict(model), "tokenizer": {"name": str(name), "hash": str(due)}}:
            pass
        case _:
            raise ModelError(f"{place} has no model or no tokenizer. Copy it again.")
    try:
        config, tokenizer = build(GPTConfig, model, "model."), tokenizers.load(path)
    except (ConfigError, DataError) as error:
        raise ModelError(f"cannot use the model folder {path}: {error}") from error
    if tokenizer.hash != due:
        raise ModelError(
            f"the tokenizer in {path} has the hash {tokenizer.hash[:12]}, but the "
            f"model was trained with {due[:12]}. Put its own tokenizer files back."
        )
    tokenizer = dataclasses.replace(tokenizer, name=name)
    labels = about.get("labels", [])
    if not (isinstance(labels, list) and all(isinstance(x, str) for x in labels)):
        raise ModelError(f"{place}: labels={labels!r} is no list of names.")
    if len(labels) != config.n_classes:
        raise ModelError(
            f"{place} has {len(labels)} labels for {config.n_classes} classes. Copy it "
            "again."
        )
    rows = config.padded_vocab_size
    return Source("gptjax", str(path), config, tokenizer, files, rows, tuple(labels))


# What our model computes; a file that says otherwise is of another model.
FIXED = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


def hf_source(path: Path, files: Any, about: Mapping[str, Any], say: Say) -> Source:
    """A folder of transformers."""
    place = path / "config.json"
    if not about:
        raise ModelError(f"{path} has no config.json. Copy or download it too.")
    for name, need in FIXED.items():
        if about.get(name, need) != need:
            raise ModelError(
                f"{place}: {name}={about[name]!r}, but GPT-2 needs {need!r}. This is "
                "a model of another kind, which gptjax cannot compute."
            )
    config = shaped(
        place,
        vocab_size=whole(place, about, "vocab_size"),
        context_length=whole(place, about, "n_positions", "n_ctx"),
        n_layers=whole(place, about, "n_layer"),
        n_heads=whole(place, about, "n_head"),
        d_model=whole(place, about, "n_embd"),
        tie_embeddings=about.get("tie_word_embeddings", True) is not False,
    )
    if about.get("n_inner") not in (None, config.mlp_width):
        raise ModelError(
            f"{place}: n_inner={about['n_inner']!r}, but gptjax's MLP is 4 times the "
            f"width, {config.mlp_width}. This shape cannot be imported."
        )
    source = settled("hf", path, config, files, say)
    if "score.weight" not in files.tensors:
        return source
    labels = labels_of(place, about)
    config = dataclasses.replace(
        source.config, n_classes=len(labels), tie_embeddings=True
    )
    return dataclasses.replace(source, config=config, labels=labels)


def labels_of(place: Path, about: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes of a classifier of transformers."""
    table = about.get("id2label")
    if isinstance(table, dict) and table:
        labels = [table.get(str(n)) for n in range(len(table))]
        names = tuple(label for label in labels if isinstance(label, str))
        if len(names) == len(labels):
            return names
    raise ModelError(
        f"{place}: id2label={table!r} does not name the classes 0, 1, ... of the "
        "model. Correct it, or copy the file again."
    )


def openai_source(path: Path, say: Say) -> Source:
    """OpenAI's folder."""
    about = read_hparams(path)
    config = shaped(
        path / "hparams.json",
        vocab_size=about["n_vocab"],
        context_length=about["n_ctx"],
        n_layers=about["n_layer"],
        n_heads=about["n_head"],
        d_model=about["n_embd"],
    )
    return settled("openai", path, config, open_checkpoint(path), say)


def book_source(path: Path, files: Any, about: Mapping[str, Any], say: Say) -> Source:
    """The state dict of the book's GPTModel, whose shape is that of its tensors."""

    def shape(name: str) -> tuple[int, ...]:
        if len(found := files.tensors[name].shape) == 2:
            return found
        raise ModelError(f"{name} in {path} is no matrix. Write the file again.")

    width, layers = shape("tok_emb.weight")[1], 0
    while f"trf_blocks.{layers}.att.W_query.weight" in files.tensors:
        layers += 1
    if "n_heads" not in about:
        say(f"heads    {width // HEAD_WIDTH}, as {HEAD_WIDTH} wide as those of GPT-2")
        if width % HEAD_WIDTH:
            raise ModelError(
                f"{path} does not say how many heads a width of {width} has. Put a "
                'config.json beside it: {"n_heads": 12}.'
            )
        about = {"n_heads": width // HEAD_WIDTH}
    if "pos_emb.weight" not in files.tensors or not layers:
        raise ModelError(
            f"{path} lacks pos_emb.weight or trf_blocks.0. Write it again."
        )
    config = shaped(
        path,
        vocab_size=shape("tok_emb.weight")[0],
        context_length=shape("pos_emb.weight")[0],
        n_layers=layers,
        n_heads=whole(path / "config.json", about, "n_heads"),
        d_model=width,
        qkv_bias="trf_blocks.0.att.W_query.bias" in files.tensors,
        tie_embeddings=False,
    )
    head, table = "out_head.weight", "tok_emb.weight"
    if head not in files.tensors or np.array_equal(files.read(head), files.read(table)):
        config = dataclasses.replace(config, tie_embeddings=True)  # as the book does
    return settled("book", path, config, files, say)


def shaped(path: Path, **shape: Any) -> GPTConfig:
    """The config of a file, whose mistakes are the file's."""
    try:
        return GPTConfig(**shape)
    except ConfigError as error:
        raise ModelError(f"{path} describes no GPT: {error}") from error


def settled(
    layout: str, path: Path, config: GPTConfig, files: Tensors, say: Say
) -> Source:
    """The source with its tokenizer, whose size decides that of the vocabulary."""
    tokenizer, rows = tokenizer_of(path, config), config.vocab_size
    if tokenizer.vocab_size > rows:
        raise ModelError(
            f"the tokenizer in {path} has {tokenizer.vocab_size} tokens, but the model "
            f"knows {rows}. Put the model's own tokenizer files there."
        )
    if tokenizer.vocab_size < rows:
        say(f"cut      {rows - tokenizer.vocab_size} rows that no token has")
        config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    return Source(layout, str(path), config, tokenizer, files, rows)


def tokenizer_of(path: Path, config: GPTConfig) -> Tokenizer:
    """The tokenizer in the folder, or the known one of that size."""
    if tokenizers.is_folder(path):
        try:
            return tokenizers.load(path)
        except DataError as error:
            raise ModelError(str(error)) from error
    for name in ("gpt2", "bytes"):
        if (known := tokenizers.load(name)).vocab_size == config.vocab_size:
            return known
    raise ModelError(
        f"{path} has no tokenizer, and {config.vocab_size} tokens are not GPT-2's. "
        "Put its vocab.json and merges.txt there."
    )
