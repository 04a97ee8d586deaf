"""What is known of the public models, and a look at every import whether it fits."""

from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from gptjax.download import sha256
from gptjax.errors import ModelError
from gptjax.model import apply
from gptjax.tree import count
from gptjax.weights.folder import Model, save
from gptjax.weights.importing import Say, find, open_source
from gptjax.weights.streaming import read_params

PROMPT = "Every effort moves you"


class Published(NamedTuple):
    """Facts about one public model that need no other copy of it to be checked."""

    parameters: int
    first: tuple[float, ...] = ()  # token embedding of token 0, first numbers
    last: float | None = None  # token embedding of the last token, last number
    logits: tuple[float, ...] = ()  # after PROMPT, of the first tokens


# Parameters: Radford et al. 2019 by arithmetic. Values of 124M: Raschka, "Build a
# Large Language Model (From Scratch)", chapter 5. Logits are absent until somebody
# has run the real files.
PUBLISHED = {
    "gpt2": Published(124_439_808, (-0.11010301, -0.03926672, 0.03310751), 0.12067825),
    "gpt2-medium": Published(354_823_168),
    "gpt2-large": Published(774_030_080),
    "gpt2-xl": Published(1_557_611_200),
}
TOLERANCE = 1e-3  # of a logit: float32 sums in another order differ by 2e-4


def import_model(name: str, out: Path, say: Say) -> Model:
    """Reads a model of any layout, looks at it, and writes it as a model folder.

    Args:
        name: as `gptjax.load` takes it.
        out: must not be there yet.
        say: gets a line each about the source, the check, and the result.

    Raises:
        ModelError: it cannot be read or written, or is not what its name says.
    """
    if out.exists():
        raise ModelError(f"{out} is there already. Name another with --out.")
    source = open_source(find(name, say), say)
    params = read_params(source)
    model = Model(source.config, params, source.tokenizer, source.labels)
    say(
        f"read     {source.place} ({source.layout}): {len(source.files.tensors)} "
        f"tensors, {count(model.params):,} parameters"
    )
    say(f"check    {check(model, PUBLISHED.get(name))}")
    save(model, out)
    digest = sha256([out / "model.safetensors"])
    say(f"wrote    {out}, model.safetensors has sha256 {digest}")
    return model


def check(model: Model, known: Published | None) -> str:
    """Looks at the numbers of an import; says what was compared and what was not.

    Raises:
        ModelError: they are not those of the public model, or no numbers at all.
    """
    ids = model.tokenizer.encode(PROMPT)[: model.config.context_length]
    logits = np.asarray(apply(model.config, model.params, jnp.array([ids])))[0, -1]
    if not np.isfinite(logits).all():
        raise ModelError(
            "the model answers with numbers that are not finite. Its file is damaged "
            "or of another kind of model."
        )
    if known is None:
        return "logits are finite; there is nothing published to compare them with"
    table = np.asarray(model.params["token_embedding"]["embedding"])
    found = [count(model.params), *table[0, : len(known.first)]]
    due = [known.parameters, *known.first]
    if known.last is not None:
        found, due = [*found, table[-1, -1]], [*due, known.last]
    if not np.allclose(found, due, rtol=0, atol=1e-7):
        raise ModelError(f"this is not the public model: {found}, but it has {due}.")
    facts = "parameters and published values agree"
    if not known.first:
        facts = "the number of parameters agrees"
    if not known.logits:
        return f"{facts}; logits are finite, and not compared: none are recorded yet"
    away = np.abs(logits[: len(known.logits)] - known.logits).max()
    if not away <= TOLERANCE:
        raise ModelError(f"its logits are {away:.3g} away from the recorded ones.")
    return f"{facts}; logits agree within {away:.1e}"
