"""Chapter 5's run in wall time: gptjax, and the book's own loop in PyTorch.

    pip install -e ".[peers]" && pip install --no-deps llms-from-scratch
    python -m tests.benchmarks.book_ch05 [--fast-cpu]

Both train 124M for ten epochs, evaluate every five steps, and write 50 tokens after
every epoch. Each is a whole process, with imports and compiling, one after the other.
"""

import subprocess
import sys
import tempfile
import time

from gptjax.book.ch02 import split_text
from gptjax.config import GPTConfig
from gptjax.data import datasets
from gptjax.tokenizer import tokenizer
from tests.benchmarks import torch_workloads


def run_book() -> None:
    import tiktoken
    import torch
    from llms_from_scratch.ch02 import create_dataloader_v1
    from llms_from_scratch.ch05 import train_model_simple

    gpt2 = tokenizer.load_tokenizer("gpt2").encoding  # tiktoken would download it
    tiktoken.get_encoding = lambda name: gpt2
    text = datasets.fetch_dataset("verdict").read_text(encoding="utf-8")
    train_text, validation_text = split_text(text)
    torch.manual_seed(123)
    train = create_dataloader_v1(train_text, 2, 256, 256)
    validation = create_dataloader_v1(validation_text, 2, 256, 256, False, False)
    torch.manual_seed(123)
    shape = {"context_length": 256, "dropout": 0.1, "qkv_bias": False}
    model = torch_workloads.book_model(GPTConfig.preset("gpt2", **shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0004, weight_decay=0.1)
    device, start = torch.device("cpu"), "Every effort moves you"
    train_model_simple(model, train, validation, optimizer, device, 10, 5, 5, start, gpt2)


def seconds(*words: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", *words], check=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    if "--book" in sys.argv:
        sys.exit(run_book())
    with tempfile.TemporaryDirectory() as folder:
        ours = seconds("gptjax", "train", "book/ch05", "--run", f"{folder}/run", *sys.argv[1:])
    theirs = seconds("tests.benchmarks.book_ch05", "--book")
    print(f"gptjax {ours:.0f} s, the book's loop {theirs:.0f} s: {theirs / ours:.2f} times as fast")
