"""Commands that are timed from their start to their end, as whole processes."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from gptjax import tokenizer
from gptjax.bench.ours import Work, config_of, model_of, scratch
from gptjax.bench.peers import needed, transformers_model
from gptjax.errors import GptjaxError
from gptjax.weights.folder import save

PROMPT = "Every effort moves you"
TRANSFORMERS = """
import sys
import transformers
from transformers import GPT2LMHeadModel, GPT2Tokenizer
folder, prompt = sys.argv[1:]
transformers.logging.set_verbosity_error()
tokenizer = GPT2Tokenizer.from_pretrained(folder)
model = GPT2LMHeadModel.from_pretrained(folder)
text = model.generate(
    **tokenizer(prompt, return_tensors="pt"),
    max_new_tokens=1, do_sample=False, pad_token_id=0,
)
print(tokenizer.decode(text[0]))
"""


def python(arguments: Sequence[str], home: Path | None = None) -> int:
    """Lets another Python do something.

    Raises:
        GptjaxError: it failed; it says why on stderr.
    """
    env = os.environ | ({"GPTJAX_HOME": str(home)} if home else {})
    done = subprocess.run(
        [sys.executable, *arguments], env=env, stdout=subprocess.DEVNULL, check=False
    )
    if done.returncode:
        raise GptjaxError(f"{arguments} ended with {done.returncode}; see above.")
    return 1


def importing(preset: str) -> Work:
    """`import gptjax` and `gptjax --help`; units are both together."""
    del preset  # they read no model

    def work() -> int:
        python(["-c", "import gptjax"])
        return python(["-m", "gptjax", "--help"])

    return work


def start(preset: str) -> Work:
    """From the command to the first token, programs compiled before; in commands."""
    folder = scratch()
    save(model_of(config_of(preset)), folder / "model")
    command = ["-m", "gptjax", "generate", str(folder / "model"), PROMPT]
    command += ["--max-new-tokens", "1", "--temperature", "0"]
    return lambda: python(command, home=folder)


def transformers_start(preset: str) -> Work:
    """The same with transformers, from a folder of its own kind."""
    needed("torch")
    folder = scratch()
    transformers_model(preset).save_pretrained(folder)
    tokenizer.load("gpt2").save(folder)
    return lambda: python(["-c", TRANSFORMERS, str(folder), PROMPT])


COMMANDS = {
    "import": importing,
    "start": start,
    "transformers_start": transformers_start,
}
