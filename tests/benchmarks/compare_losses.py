"""Compares the logged losses of two checkouts on five short training runs.

    python tests/benchmarks/compare_losses.py BEFORE [AFTER] [--work DIR]

Each run trains in a process of its own, with the package and the configs of its
checkout. Prints the losses side by side; exits with 1 if any differs in a single bit.
Runs in the work folder are kept and reused, so that one side is computed only once.
Needs GPTJAX_DATA for all tasks but `tiny`.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SMALL = "--model.n_layers 2 --model.n_heads 4 --model.d_model 64"
RUNS = {  # run: its command line, short enough that a laptop needs seconds
    "tiny": "tiny --train.steps 60 --train.eval_every 20",
    "sms_small": "classify/sms_small --train.steps 40 --train.eval_every 20 "
    "--optim.warmup_steps 10 --train.log_every 5",
    "small": "instruct/small --train.steps 30 --train.eval_every 15 "
    "--train.log_every 5 --model.n_layers 2",
    "dpo_small": "instruct/dpo_small --train.steps 20 --train.eval_every 10 "
    "--train.log_every 5",  # starts from runs/small
    "ch05": f"book/ch05 --train.steps 20 --train.eval_every 5 {SMALL}",
}


def losses(checkout: Path, run: str, work: Path) -> list[str]:
    """Event, step, split and loss of every loss that a run logs."""
    metrics = work / "runs" / run / "metrics.jsonl"
    if not metrics.is_file():
        work.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "gptjax", "train", *RUNS[run].split()]
        command += ["--run", f"runs/{run}"]
        env = os.environ | {"PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu"}
        subprocess.run(command, cwd=work, env=env, check=True, stdout=sys.stderr)
    events = [json.loads(x) for x in metrics.read_text(encoding="utf-8").splitlines()]
    return [
        f"{event['event']} {event['step']} {event.get('split', '')} {event['loss']!r}"
        for event in events
        if "loss" in event
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, help="a checkout")
    parser.add_argument("after", type=Path, nargs="?", default=ROOT, help="another")
    parser.add_argument("--work", type=Path, default=Path("compare_losses"))
    args = parser.parse_args()
    differing = 0
    for run in RUNS:
        before = losses(args.before.resolve(), run, args.work.resolve() / "before")
        after = losses(args.after.resolve(), run, args.work.resolve() / "after")
        print(f"{run}: {len(before)} losses before, {len(after)} after")
        for old, new in itertools.zip_longest(before, after, fillvalue="none"):
            differing += old != new
            print(f"  {old:<40} {new:<40} {'' if old == new else '!='}")
    print(f"{differing} of the losses differ")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
