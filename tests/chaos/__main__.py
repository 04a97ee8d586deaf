"""Runs a campaign of faults, or one case of it again.

    python -m tests.chaos kill              as many cases as a full campaign has
    python -m tests.chaos kill --n 50       fewer
    python -m tests.chaos kill --case 17    the one that failed

A campaign is a module beside this one with `FULL` and `SLICE` (cases of a full campaign
and of the slice that the tests run) and `run(seed, cases, folder)`, which yields what
went wrong with a case, or "" where nothing did. What happens in a case follows from the
seed and the case's number alone.
"""

import argparse
import importlib
import pkgutil
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


def campaign(name: str) -> ModuleType:
    """The module of a campaign."""
    return importlib.import_module(f"tests.chaos.{name}")


def failures(name: str, seed: int, cases: Sequence[int]) -> Iterator[str]:
    """How each case that went wrong did, and the command that replays it."""
    with tempfile.TemporaryDirectory(prefix="gptjax-chaos-") as folder:
        found = campaign(name).run(seed, cases, Path(folder))
        for case, fault in zip(cases, found, strict=True):
            if fault:
                again = f"python -m tests.chaos {name} --seed {seed} --case {case}"
                yield f"{again}: {fault}"


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if nothing went wrong, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("campaign", choices=CAMPAIGNS)
    parser.add_argument("--n", type=int, help="cases; default: the full campaign")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="only this one")
    given = parser.parse_args(arguments)
    count = campaign(given.campaign).FULL if given.n is None else given.n
    cases = range(count) if given.case is None else [given.case]
    started, faults = time.monotonic(), 0
    for fault in failures(given.campaign, given.seed, cases):
        faults += 1
        print(fault, flush=True)
    seconds = time.monotonic() - started
    print(
        f"{given.campaign}: {len(cases)} cases from seed {given.seed}, "
        f"{faults} went wrong, {seconds:.0f} s"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
