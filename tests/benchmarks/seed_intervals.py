"""False alarms and power of `gptjax compare` for configs, with three seeds per side.

    python -m tests.benchmarks.seed_intervals runs/seeds

trains 63 runs of seconds: for ten comparisons of a config with itself, which at a level
of 5 % should raise about half an alarm, and for one with a tenth of the learning rate.
Runs that exist are not trained again.
"""

import dataclasses
import sys
from pathlib import Path

from gptjax.config import RunConfig, find_config, load_config
from gptjax.data.prepare import prepare_dataset
from gptjax.evaluation.run_comparison import RunRecord, compare_configs, read_run_records
from gptjax.runtime.compilation_cache import enable_cache
from gptjax.tasks.train import train

STEPS, COMPARISONS, SEEDS = 60, 10, 3


def make_config(data: Path, seed: int, peak_lr: float) -> RunConfig:
    config = load_config(find_config("tiny"))
    options = {"steps": STEPS, "eval_every": STEPS, "seed": seed, "sample_prompt": ""}
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, source=str(data), tokenizer=""),
        optim=dataclasses.replace(config.optim, peak_lr=peak_lr),
        train=dataclasses.replace(config.train, **options),
    )


def train_seeds(folder: Path, seeds: range, peak_lr: float) -> list[RunRecord]:
    run_dirs = [folder / f"lr{peak_lr}-seed{seed}" for seed in seeds]
    for seed, run_dir in zip(seeds, run_dirs, strict=True):
        if not (run_dir / "report.md").is_file():
            train(make_config(folder / "data", seed, peak_lr), run_dir)
    return read_run_records(run_dirs)


def main(folder: Path) -> None:
    prepare_dataset(["python-help"], "bytes", folder / "data")
    alarms = 0
    with enable_cache(folder / "compiled"):
        for number in range(COMPARISONS):
            first_seed = 2 * SEEDS * number
            first = train_seeds(folder, range(first_seed, first_seed + SEEDS), 1e-2)
            second = train_seeds(folder, range(first_seed + SEEDS, first_seed + 2 * SEEDS), 1e-2)
            interval = compare_configs(first, second)
            alarms += interval.excludes_zero
            print(f"same config {number}: {interval}", flush=True)
        print(f"{alarms} alarms in {COMPARISONS} comparisons of a config with itself")
        lower = compare_configs(first, train_seeds(folder, range(SEEDS), 1e-3))
        print(f"learning rate 0.001 - 0.01: {lower}; told apart: {lower.excludes_zero}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
