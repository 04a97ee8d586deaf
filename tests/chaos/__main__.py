"""Runs a campaign of faults, or replays one case of it.

    python -m tests.chaos kill              the full campaign
    python -m tests.chaos kill --n 50       fewer cases
    python -m tests.chaos kill --case 17    one case

A campaign is a module in this folder with `FULL` and `SLICE` (the number of cases of a
full campaign, and of the slice in the tests). It has either `prepare(folder)`, which
returns a function from (case, rng) to what went wrong, "" for nothing, or
`run(seed, cases, folder)`, which yields that for each case. A case depends on the seed
and its number only.
"""

import argparse
import importlib
import pkgutil
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

CAMPAIGNS = sorted(
    module.name
    for module in pkgutil.iter_modules([str(Path(__file__).parent)])
    if not module.name.startswith(("_", "test_"))
)


def load_campaign(name: str) -> ModuleType:
    return importlib.import_module(f"tests.chaos.{name}")


def run_cases(campaign: ModuleType, seed: int, cases: Sequence[int], folder: Path) -> Iterator[str]:
    """Yields what went wrong in each case."""
    if hasattr(campaign, "run"):
        yield from campaign.run(seed, cases, folder)
        return
    check = campaign.prepare(folder)
    for case in cases:
        try:
            yield check(case, random.Random(f"{seed} {case}"))
        except Exception as error:
            yield f"{type(error).__name__}: {error}"


def failures(name: str, seed: int, cases: Sequence[int]) -> Iterator[str]:
    """Yields what went wrong in each failed case, with the command that replays it."""
    with tempfile.TemporaryDirectory(prefix="gptjax-chaos-") as folder:
        faults = run_cases(load_campaign(name), seed, cases, Path(folder))
        for case, fault in zip(cases, faults, strict=True):
            if fault:
                yield f"python -m tests.chaos {name} --seed {seed} --case {case}: {fault}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("campaign", choices=CAMPAIGNS)
    parser.add_argument("--n", type=int, help="cases; default: the full campaign")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="only this one")
    options = parser.parse_args(arguments)
    count = load_campaign(options.campaign).FULL if options.n is None else options.n
    cases = range(count) if options.case is None else [options.case]
    start, num_faults = time.monotonic(), 0
    for fault in failures(options.campaign, options.seed, cases):
        num_faults += 1
        print(fault, flush=True)
    print(
        f"{options.campaign}: {len(cases)} cases from seed {options.seed}, "
        f"{num_faults} failed, {time.monotonic() - start:.0f} s"
    )
    return 1 if num_faults else 0


if __name__ == "__main__":
    sys.exit(main())
