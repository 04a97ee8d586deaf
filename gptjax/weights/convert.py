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
LOGIT_TOLERANCE = 1e-3  # the order of float32 sums alone changes logits by up to 2e-4


class ReferenceValues(NamedTuple):
    """Published values of a public model, to verify an import without its original."""

    num_params: int
    first_embedding: tuple[float, ...] = ()  # first values of the embedding of token 0
    last_embedding: float | None = None  # last value of the embedding of the last token
    logits: tuple[float, ...] = ()  # of the first token ids, after REFERENCE_PROMPT


# Parameter counts: computed from the shapes in Radford et al. 2019. Values of 124M:
# Raschka, "Build a Large Language Model (From Scratch)", chapter 5. Logits have to be
# recorded from the original files.
REFERENCE_VALUES = {
    "gpt2": ReferenceValues(124_439_808, (-0.11010301, -0.03926672, 0.03310751), 0.12067825),
    "gpt2-medium": ReferenceValues(354_823_168),
    "gpt2-large": ReferenceValues(774_030_080),
    "gpt2-xl": ReferenceValues(1_557_611_200),
}


def convert_model(name: str, output_dir: Path, log: Callable[[str], None]) -> Model:
    """Reads a model in any supported layout, checks it and writes a model folder.

    Args:
        name: as in `gptjax.load`.
        output_dir: must not exist yet.
        log: receives one line each about the source, the check and the result.

    Raises:
        ModelError: the model cannot be read or written, or differs from the public
            model of that name.
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
    """Checks imported parameters; returns a summary of the comparison.

    Raises:
        ModelError: the logits are not finite, or the values differ from those of the
            public model.
    """
    ids = model.tokenizer.encode(REFERENCE_PROMPT)[: model.config.context_length]
    logits = np.asarray(apply(model.config, model.params, jnp.array([ids])))[0, -1]
    if not np.isfinite(logits).all():
        raise ModelError(
            "the logits of the model are not finite. Its file is damaged or belongs to "
            "a different architecture."
        )
    if reference is None:
        return "logits are finite; no published values to compare with"
    embedding_VD = np.asarray(model.params["token_embedding"]["embedding"])
    actual = [num_params(model.params), *embedding_VD[0, : len(reference.first_embedding)]]
    expected = [reference.num_params, *reference.first_embedding]
    if reference.last_embedding is not None:
        actual = [*actual, embedding_VD[-1, -1]]
        expected = [*expected, reference.last_embedding]
    if not np.allclose(actual, expected, rtol=0, atol=1e-7):
        raise ModelError(f"not the public model: found {actual}, expected {expected}.")
    result = "parameters and published values agree"
    if not reference.first_embedding:
        result = "the number of parameters agrees"
    if not reference.logits:
        return f"{result}; logits are finite; not compared, since none are recorded yet"
    difference = np.abs(logits[: len(reference.logits)] - reference.logits).max()
    if not difference <= LOGIT_TOLERANCE:
        raise ModelError(f"the logits differ from the recorded ones by {difference:.3g}.")
    return f"{result}; logits agree within {difference:.1e}"
