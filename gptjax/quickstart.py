"""The whole road in miniature, on text that every Python carries."""

import gzip
import lzma
from pathlib import Path
from typing import Any

from gptjax.config import config_path, read_config
from gptjax.data.named import python_help
from gptjax.data.prepare import open_dataset
from gptjax.evaluate import Evaluation, score_tokens
from gptjax.pretrain import pretrain
from gptjax.run_loop import Say


def quickstart(folder: Path, say: Say = print) -> Evaluation:
    """Trains `configs/quickstart.toml` in `folder` and scores the held-out topics.

    The number of steps is fixed, so the result does not depend on how fast the
    machine is; the same call again shows it without training.

    Raises:
        GptjaxError: the folder cannot be used.
        Stopped: a signal came; the same call goes on later.
    """
    say("gptjax quickstart: text -> tokens -> a GPT -> text, on this machine alone")
    say("text     the help topics of Python itself, one tenth of them held out")
    config = read_config(config_path("quickstart"))
    model = pretrain(config, folder, say)
    tokens: Any = open_dataset(config.data, folder / "data").validation
    held_out = tokens.read(0, len(tokens))
    stride = config.model.context_length // 4
    result = score_tokens(model, held_out, stride, model.tokenizer.eot)
    text = "\n".join(python_help()).encode()
    gzip_bits = 8 * len(gzip.compress(text, 9)) / len(text)
    xz_bits = 8 * len(lzma.compress(text, preset=9)) / len(text)
    say(
        f"result   {result.bits_per_byte:.3f} bits per byte on the held-out topics "
        f"(of all the text, gzip -9 needs {gzip_bits:.2f} and xz {xz_bits:.2f})"
    )
    say("next")
    say(f"  gptjax generate {folder} 'The \"for\" statement'")
    say(f"  gptjax eval {folder} --text README.md --stride {stride}")
    say("  gptjax train tinyshakespeare")
    return result
