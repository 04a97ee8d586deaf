"""Coverage of 95 % intervals for a ratio of sums over documents.

    python -m tests.benchmarks.interval_coverage [RUN RUN]

draws 1,000 samples of documents from populations with a known difference: artificial
ones, and the losses of the models of two runs on the help topics of Python. It compares
`paired_interval` with Student's interval of the cluster-robust variance (CR1) and with
the percentile bootstrap.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import stats

from gptjax.data.datasets import read_python_help
from gptjax.evaluation.comparison import paired_interval, score_documents, sum_clusters
from gptjax.weights.load import load

SAMPLES, RESAMPLES, POPULATION = 1_000, 400, 100_000
SAMPLE_SIZES = (15, 50, 200)
Bounds = tuple[float, float]


def student(difference: np.ndarray, size: np.ndarray) -> Bounds:
    mean, n = difference.sum() / size.sum(), len(size)
    residual = difference - mean * size
    error = np.sqrt(n / (n - 1) * np.sum(residual**2)) / size.sum()
    half_width = stats.t.ppf(0.975, n - 1) * error
    return mean - half_width, mean + half_width


def bootstrap(difference: np.ndarray, size: np.ndarray) -> Bounds:
    drawn = np.random.default_rng(0).integers(len(size), size=(RESAMPLES, len(size)))
    low, high = np.percentile(difference[drawn].sum(1) / size[drawn].sum(1), [2.5, 97.5])
    return low, high


def jackknife(difference: np.ndarray, size: np.ndarray) -> Bounds:
    interval = paired_interval(difference, size)
    return interval.low, interval.high


METHODS: dict[str, Callable[[np.ndarray, np.ndarray], Bounds]] = {
    "paired_interval": jackknife,
    "CR1, n - 1": student,
    "bootstrap": bootstrap,
}


def artificial(rng: np.random.Generator, log_deviation: float) -> tuple[np.ndarray, np.ndarray]:
    """Summed differences and sizes of documents with log-normal lengths."""
    size = np.exp(rng.normal(5, log_deviation, POPULATION)).round() + 1
    mean = 0.01 * (np.log(size) - 5) - 0.02 + 0.05 * rng.standard_t(4, POPULATION)
    return size * mean + np.sqrt(size) * rng.normal(0, 0.3, POPULATION), size


def of_runs(first: Path, second: Path) -> tuple[np.ndarray, np.ndarray]:
    documents = list(read_python_help())
    sums = [
        sum_clusters(score_documents(load(x), documents), len(documents)) for x in (first, second)
    ]
    return sums[1].nats - sums[0].nats, sums[0].tokens.astype(float)


def main(run_dirs: list[Path]) -> None:
    rng = np.random.default_rng(0)
    names = {"equal lengths": 0.0, "log-normal, 1": 1.0, "log-normal, 1.6": 1.6}
    populations = {name: artificial(rng, deviation) for name, deviation in names.items()}
    if run_dirs:
        populations["help topics"] = of_runs(*run_dirs)
    print(f"{'lengths':<18}{'documents':>10}", *(f"{name:>16}" for name in METHODS))
    for name, (difference, size) in populations.items():
        truth = difference.sum() / size.sum()
        for count in SAMPLE_SIZES:
            covered = dict.fromkeys(METHODS, 0)
            for _ in range(SAMPLES):
                drawn = rng.integers(len(size), size=count)
                for method, interval in METHODS.items():
                    low, high = interval(difference[drawn], size[drawn])
                    covered[method] += bool(low <= truth <= high)
            print(f"{name:<18}{count:>10}", *(f"{x / SAMPLES:>16.1%}" for x in covered.values()))


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
