"""Chapter 5's run in wall time: gptjax, and the same loop in plain PyTorch.

    python tests/benchmarks/book_ch05.py

Both train 124M for ten epochs on the-verdict from the same parameters, evaluate every
five steps on five training batches and the validation batch, and write 50 tokens after
every epoch (PyTorch, as in the chapter, without a cache). Prints both times, from start
to end of the process's work, and the losses at the ends. Needs [peers].
"""

import argparse
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from gptjax.book import init_params
from gptjax.book.training import verdict_rows
from gptjax.config import GPTConfig
from gptjax.report import read_events
from gptjax.tree import named_leaves

STEPS, EVERY, ROWS, CONTEXT = 90, 5, 2, 256


def torch_model():
    """A GPT of PyTorch's modules, with attention written out as in the chapter."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self, width, heads):
            super().__init__()
            self.heads = heads
            self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])
            self.qkv = nn.ModuleList(
                [nn.Linear(width, width, bias=False) for _ in range(3)]
            )
            self.out = nn.Linear(width, width)
            self.up, self.down = (
                nn.Linear(width, 4 * width),
                nn.Linear(4 * width, width),
            )

        def forward(self, x):
            rows, length, width = x.shape
            normed = self.norms[0](x)
            query, key, value = (
                one(normed).view(rows, length, self.heads, -1).transpose(1, 2)
                for one in self.qkv
            )
            score = query @ key.transpose(2, 3) / math.sqrt(width / self.heads)
            future = torch.ones(length, length, dtype=torch.bool).triu(1)
            weight = score.masked_fill(future, -torch.inf).softmax(-1)
            weight = functional.dropout(weight, 0.1, self.training)
            mixed = (weight @ value).transpose(1, 2).reshape(rows, length, width)
            x = x + functional.dropout(self.out(mixed), 0.1, self.training)
            hidden = functional.gelu(self.up(self.norms[1](x)), approximate="tanh")
            return x + functional.dropout(self.down(hidden), 0.1, self.training)

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Embedding(50_257, 768)
            self.positions = nn.Embedding(CONTEXT, 768)
            self.blocks = nn.Sequential(*[Block(768, 12) for _ in range(12)])
            self.norm = nn.LayerNorm(768)
            self.head = nn.Linear(768, 50_257, bias=False)

        def forward(self, ids):
            x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
            x = functional.dropout(x, 0.1, self.training)
            return self.head(self.norm(self.blocks(x)))

    return GPT()


def load_start(model):
    """Gives PyTorch's model the parameters that gptjax starts from."""
    import torch

    config = GPTConfig.preset(
        "gpt2", context_length=CONTEXT, qkv_bias=False, tie_embeddings=False
    )
    leaves = named_leaves(init_params(config, 123))

    def put(parameter, name, layer=None):
        array = np.asarray(leaves[name] if layer is None else leaves[name][layer])
        if array.ndim > 1 and "embedding" not in name:
            inner = 3072 if "mlp/down" in name else 768
            array = array.reshape(inner, -1).T
        with torch.no_grad():
            parameter.copy_(torch.tensor(array.reshape(parameter.shape)))

    put(model.tokens.weight, "token_embedding/embedding")
    put(model.positions.weight, "position_embedding/embedding")
    put(model.head.weight, "output_embedding/embedding")
    for n, block in enumerate(model.blocks):
        for linear, name in zip(block.qkv, ("query", "key", "value"), strict=True):
            put(linear.weight, f"blocks/attention/{name}/kernel", n)
        for linear, name in (
            (block.out, "attention/out"),
            (block.up, "mlp/up"),
            (block.down, "mlp/down"),
        ):
            put(linear.weight, f"blocks/{name}/kernel", n)
            put(linear.bias, f"blocks/{name}/bias", n)


def run_torch():
    """Seconds of the loop, and (training, validation) losses after the last step."""
    import torch
    from torch.nn import functional

    torch.manual_seed(123)
    started = time.perf_counter()
    model = torch_model()
    load_start(model)
    rows = {
        split: torch.tensor(array).long()
        for split, array in verdict_rows(CONTEXT).items()
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1)

    def loss_of(batch):
        logits = model(batch[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def mean_loss(batches):
        model.eval()
        with torch.no_grad():
            found = [loss_of(batch).item() for batch in batches]
        model.train()
        return sum(found) / len(found)

    def shuffled():
        order = torch.randperm(len(rows["train"]))
        return rows["train"][order].split(ROWS)

    step, result = 0, (math.nan, math.nan)
    while step < STEPS:
        for batch in shuffled():
            optimizer.zero_grad()
            loss_of(batch).backward()
            optimizer.step()
            step += 1
            if step % EVERY == 1 or step == STEPS:
                held_out = rows["validation"].split(ROWS)
                result = mean_loss(shuffled()[:5]), mean_loss(held_out)
        ids = torch.tensor([[6109, 3626, 6100, 345]])
        model.eval()
        with torch.no_grad():
            for _ in range(50):
                best = model(ids)[:, -1].argmax(-1, keepdim=True)
                ids = torch.cat([ids, best], dim=1)
        model.train()
    return time.perf_counter() - started, result


def run_gptjax():
    """Seconds of `gptjax train book/ch05`, all included, and its evaluations."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "gptjax", "train", "book/ch05"]
        started = time.perf_counter()
        subprocess.run(
            [*command, "--run", f"{folder}/run"], check=True, stdout=subprocess.DEVNULL
        )
        seconds = time.perf_counter() - started
        events = read_events(Path(folder, "run", "metrics.jsonl"))
    looks = [e for e in events if e["event"] == "eval"]
    return seconds, [(e["step"], e["split"], round(e["loss"], 3)) for e in looks]


def main() -> None:
    """Runs both, one after the other, and prints."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    ours, looks = run_gptjax()
    print(f"gptjax   {ours:.0f} s; (steps, split, nats):", *looks, flush=True)
    theirs, (train, validation) = run_torch()
    print(f"PyTorch  {theirs:.0f} s, at the end {train:.3f} / {validation:.3f} nats")
    print(f"ratio    {theirs / ours:.2f} (above 1: gptjax takes less time)")


if __name__ == "__main__":
    main()
