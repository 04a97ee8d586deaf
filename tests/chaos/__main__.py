"""Runs a campaign of faults, or replays one case of it.

    python -m tests.chaos kill              the full campaign
    python -m tests.chaos kill --n 50       fewer cases
    python -m tests.chaos kill --case 17    one case

A campaign is a module in this folder with `FULL` and `SLICE`, its number of cases and
that in the tests. `prepare(folder)` returns a function from (case, rng) to what went
wrong, or "". Or `run(seed, cases, folder)` yields that for each case.
"""

import argparse
import importlib
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

CAMPAIGNS = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
CAMPAIGNS.remove("test_slices")


def failures(name: str, seed: int, cases: Sequence[int]) -> Iterator[str]:
    """Yields what went wrong in each failed case, with the command that replays it."""
    campaign = importlib.import_module(f"tests.chaos.{name}")
    with tempfile.TemporaryDirectory(prefix="gptjax-chaos-") as folder:
        if hasattr(campaign, "run"):
            faults = campaign.run(seed, cases, Path(folder))
        else:
            check = campaign.prepare(Path(folder))
            faults = (find_fault(check, case, seed) for case in cases)
        for case, fault in zip(cases, faults, strict=True):
            if fault:
                yield f"python -m tests.chaos {name} --seed {seed} --case {case}: {fault}"


def find_fault(check: Callable[[int, random.Random], str], case: int, seed: int) -> str:
    try:
        return check(case, random.Random(f"{seed} {case}"))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("campaign", choices=CAMPAIGNS)
    parser.add_argument("--n", type=int, help="cases; default: the full campaign")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="only this one")
    options = parser.parse_args()
    count = options.n or importlib.import_module(f"tests.chaos.{options.campaign}").FULL
    cases = range(count) if options.case is None else [options.case]
    start, num_faults = time.monotonic(), 0
    for fault in failures(options.campaign, options.seed, cases):
        num_faults += 1
        print(fault, flush=True)
    seconds = time.monotonic() - start
    print(f"{options.campaign}: {len(cases)} cases, {num_faults} failed, {seconds:.0f} s")
    return 1 if num_faults else 0


if __name__ == "__main__":
    sys.exit(main())
