"""Startup benchmarks: commands timed as whole processes."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from gptjax.bench.torch_workloads import import_peer, transformers_model
from gptjax.bench.workloads import WorkFn, bench_config, make_temp_dir, random_model
from gptjax.errors import GptjaxError
from gptjax.tokenizer import tokenizer
from gptjax.weights.model_folder import save

STARTUP_PROMPT = "Every effort moves you"
TRANSFORMERS_SCRIPT = """
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


def run_python(arguments: Sequence[str], gptjax_home: Path | None = None) -> int:
    """Runs Python in a subprocess; its output is discarded, its errors shown.

    Raises:
        GptjaxError: the process failed.
    """
    env = os.environ | ({"GPTJAX_HOME": str(gptjax_home)} if gptjax_home else {})
    process = subprocess.run(
        [sys.executable, *arguments], env=env, stdout=subprocess.DEVNULL, check=False
    )
    if process.returncode:
        raise GptjaxError(f"{arguments} exited with code {process.returncode}; see above.")
    return 1


def make_import_work(preset: str) -> WorkFn:
    """Runs `import gptjax` and `gptjax --help`; one unit is both together."""
    del preset  # no model is loaded

    def work() -> int:
        run_python(["-c", "import gptjax"])
        return run_python(["-m", "gptjax", "--help"])

    return work


def make_startup_work(preset: str) -> WorkFn:
    """Runs `gptjax generate` to the first token, with a warm compilation cache."""
    temp_dir = make_temp_dir()
    save(random_model(bench_config(preset)), temp_dir / "model")
    command = ["-m", "gptjax", "generate", str(temp_dir / "model"), STARTUP_PROMPT]
    command += ["--max-new-tokens", "1", "--temperature", "0"]
    return lambda: run_python(command, gptjax_home=temp_dir)


def make_transformers_startup_work(preset: str) -> WorkFn:
    """Generates the first token with transformers, from a Hugging Face folder."""
    import_peer("torch")
    temp_dir = make_temp_dir()
    transformers_model(preset).save_pretrained(temp_dir)
    tokenizer.load_tokenizer("gpt2").save(temp_dir)
    return lambda: run_python(["-c", TRANSFORMERS_SCRIPT, str(temp_dir), STARTUP_PROMPT])


COMMAND_WORKLOADS = {
    "import": make_import_work,
    "start": make_startup_work,
    "transformers_start": make_transformers_startup_work,
}
