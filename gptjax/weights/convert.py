"""Conversion of public weights to a model folder, checked against published values."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from gptjax.errors import ModelError
from gptjax.fileio.download import sha256_of_files
from gptjax.model.gpt import apply
from gptjax.tree import num_params
from gptjax.weights.load import open_model_source, read_model, resolve_model
from gptjax.weights.model_folder import Model, save

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
}


def convert_model(name: str, output_dir: Path, log: Callable[[str], None]) -> Model:
    """Reads a model in any supported layout, checks it and writes a model folder.

    `log` receives one line each about the source, the check and the result.
    """
    if output_dir.exists():
        raise ModelError(f"{output_dir} already exists. Choose another folder with --out.")
    source = open_model_source(resolve_model(name, log), log)
    model = read_model(source)
    log(
        f"read     {source.location} ({source.layout}): {len(source.reader.tensors)} "
        f"tensors, {num_params(model.params):,} parameters"
    )
    log(f"check    {check_reference_values(model, REFERENCE_VALUES.get(name))}")
    save(model, output_dir)
    digest = sha256_of_files([output_dir / "model.safetensors"])
    log(f"wrote    {output_dir}, model.safetensors has sha256 {digest}")
    return model


def check_reference_values(model: Model, reference: ReferenceValues | None) -> str:
    """Checks imported parameters; returns a summary of the comparison."""
    ids = model.tokenizer.encode(REFERENCE_PROMPT)[: model.config.context_length]
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
    if not np.allclose(actual, expected, rtol=0, atol=1e-7):
        raise ModelError(f"not the public model: found {actual}, expected {expected}.")
    return "logits are finite; number of parameters and published values agree"
