"""Training throughput of gptjax beside that of transformers' GPT-2, on this machine.

    python tests/benchmarks/train_throughput.py --rows 4 --context 256 --pairs 5

Both sides live at the same time, each in its own process, and take turns: one step
of one, then one step of the other, so that a machine that slows down slows both.
Both train GPT-2 124M in float32 with AdamW and clipping at 1. Needs [peers].
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

SIDES = ("gptjax", "transformers")


def batch(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """The same random tokens and targets for both sides."""
    rng = np.random.default_rng(0)
    row_BT = rng.integers(50_257, size=(args.rows, args.context + 1))
    return row_BT[:, :-1], row_BT[:, 1:]


def gptjax_step(args: argparse.Namespace) -> tuple[Callable[[], float], str]:
    """A function that trains one step and returns its loss, and versions."""
    import jax
    import jax.numpy as jnp

    from gptjax.config import GPTConfig, OptimConfig
    from gptjax.loss import next_token_loss
    from gptjax.model import init
    from gptjax.optim import make_optimizer
    from gptjax.train import init_state, make_train_step

    config = GPTConfig.preset("gpt2", dtype="float32")
    token_BT, target_BT = (x.astype(np.int32) for x in batch(args))
    example = {
        "tokens": token_BT,
        "targets": target_BT,
        "weights": np.ones(token_BT.shape, np.float32),
        "positions": np.arange(args.context, dtype=np.int32)[None].repeat(args.rows, 0),
        "segments": np.zeros_like(token_BT),
    }
    optimizer = make_optimizer(OptimConfig(warmup_steps=0, schedule="constant"), 100)
    loss_fn = next_token_loss(config, args.loss_chunk)
    step_fn = jax.jit(make_train_step(loss_fn, optimizer), donate_argnums=0)
    key = jax.random.key(0)
    params = jax.jit(lambda key: init(config, key))(key)
    state = init_state(params, optimizer, key)
    del params

    def step() -> float:
        nonlocal state
        state, metrics = step_fn(state, jax.tree.map(jnp.asarray, example))
        jax.block_until_ready(state)
        return float(metrics.loss)

    return step, f"jax {jax.__version__} on {jax.devices()[0].device_kind}"


def transformers_step(args: argparse.Namespace) -> tuple[Callable[[], float], str]:
    """A function that trains one step and returns its loss, and versions."""
    import torch
    import transformers

    config = transformers.GPT2Config.from_dict(
        {
            **{"n_layer": 12, "n_head": 12, "n_embd": 768},
            **dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0),
        }
    )
    model = transformers.GPT2LMHeadModel(config).train()
    model.set_attn_implementation("sdpa")
    decaying = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": decaying, "weight_decay": 0.1},
        {"params": others, "weight_decay": 0.0},
    ]
    fused = {"fused": True} if args.fused else {}
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), **fused)
    token_BT, target_BT = map(torch.tensor, batch(args))

    def step() -> float:
        logit_BTV = model(token_BT, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logit_BTV.flatten(0, 1), target_BT.flatten()
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return step, f"{versions}, {torch.get_num_threads()} threads"


def serve(args: argparse.Namespace) -> None:
    """Trains one step for each line that comes in, and answers with its numbers."""
    step, versions = {"gptjax": gptjax_step, "transformers": transformers_step}[
        args.side
    ](args)
    for _ in range(2):  # compiles, and allocates what every later step uses again
        step()
    print(json.dumps({"versions": versions}), flush=True)
    for _ in sys.stdin:
        started, worked = time.perf_counter(), time.process_time()
        loss = step()
        seconds = time.perf_counter() - started
        worked = time.process_time() - worked
        answer = {"seconds": seconds, "core_seconds": worked, "loss": loss}
        print(json.dumps(answer), flush=True)


def start(args: argparse.Namespace, side: str) -> subprocess.Popen[str]:
    """The process of one side, which begins to load at once."""
    flags = os.environ.get("XLA_FLAGS", "") + " " + args.xla_flags
    return subprocess.Popen(
        [sys.executable, __file__, *sys.argv[1:], f"--side={side}"],
        env=os.environ
        | {"XLA_FLAGS": flags.strip(), "TOKENIZERS_PARALLELISM": "false"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def compare(args: argparse.Namespace) -> None:
    """Lets both sides step in turn and prints what came out."""
    chosen = args.only or SIDES
    children = {}
    for side in chosen:  # one after the other: loading would disturb the other's start
        child = children[side] = start(args, side)
        print(f"{side:12} {json.loads(child.stdout.readline())['versions']}")
    answers = {side: [] for side in chosen}
    for pair in range(args.pairs):
        for side in chosen if pair % 2 == 0 else reversed(chosen):
            children[side].stdin.write("step\n")
            children[side].stdin.flush()
            answers[side].append(json.loads(children[side].stdout.readline()))
    for child in children.values():
        child.stdin.close()
        child.wait()

    print(f"machine      {platform.machine()}, {os.cpu_count()} cores")
    print(f"flags        XLA_FLAGS={args.xla_flags!r}, fused={args.fused}")
    for kind in ("seconds", "core_seconds"):
        per_side = [
            [args.rows * args.context / answer[kind] for answer in answers[side]]
            for side in chosen
        ]
        for side, rates in zip(chosen, per_side, strict=True):
            middle, low, high = statistics.median(rates), min(rates), max(rates)
            unit = f"tokens per {kind.removesuffix('s').replace('_', ' ')}"
            print(f"{side:12} {middle:7.1f} {unit} ({low:.1f} to {high:.1f})")
        if len(chosen) == 2:
            ratio = statistics.median(a / b for a, b in zip(*per_side, strict=True))
            print(f"ratio        {ratio:.3f} (median of pairs)")


def main() -> None:
    """Reads the options; a child serves, the parent compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--loss-chunk", type=int, default=256)
    parser.add_argument("--xla-flags", default="", help="for the JAX side")
    parser.add_argument("--fused", action="store_true", help="PyTorch's fused AdamW")
    parser.add_argument("--only", choices=SIDES, action="append", help="one side alone")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    serve(args) if args.side else compare(args)


if __name__ == "__main__":
    main()
