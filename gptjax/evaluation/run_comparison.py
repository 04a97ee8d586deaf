"""Comparison of runs: their records, and their models on held-out text."""

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from gptjax.config import RunConfig, config_options, load_config, result_options
from gptjax.data.prepare import open_prepared
from gptjax.data.text import VALIDATION_SPLIT, find_sources, iter_chunks
from gptjax.data.token_files import TokenDataset, is_prepared_dir, read_token_metadata
from gptjax.errors import DataError, ModelError
from gptjax.evaluation.comparison import (
    MIN_DOCUMENTS,
    Interval,
    effective_count,
    paired_interval,
    score_documents,
    sum_clusters,
    welch_interval,
)
from gptjax.fileio.paths import user_path
from gptjax.training.estimate import flops_per_token
from gptjax.training.metrics import LOSS_UNITS, Event, metric_series, read_events
from gptjax.training.run_dir import read_run_metadata
from gptjax.weights.model_folder import Model

CurveAxis = Literal["steps", "tokens", "seconds", "flops"]
READ_TOKENS = 1 << 20  # at a time


@dataclasses.dataclass(frozen=True, eq=False)
class RunRecord:
    """Config, events and metadata of a run."""

    name: str  # unique among the compared runs
    run_dir: Path
    config: RunConfig  # resolved
    events: Sequence[Event]
    metadata: dict[str, Any]  # meta.json

    @property
    def step(self) -> int:
        """Last trained step."""
        return max((e["step"] for e in self.events if e["event"] in ("train", "eval")), default=0)

    @property
    def is_finished(self) -> bool:
        """True if all steps are done and the final evaluation is logged."""
        return self.step >= self.config.train.steps and self.final_evaluation["step"] == self.step

    @property
    def final_evaluation(self) -> Event:
        """Newest evaluation on the validation split; step -1 if there is none."""
        evals = [e for e in self.events if e["event"] == "eval"]
        validation = [e for e in evals if e.get("split", VALIDATION_SPLIT) == VALIDATION_SPLIT]
        return validation[-1] if validation else {"step": -1}

    @property
    def tokens_per_step(self) -> float | None:
        """Tokens of a batch; None for a fine-tuning run of an earlier version."""
        if (recorded := self.metadata.get("tokens_per_step")) is not None:
            return float(recorded)
        size = self.config.data.batch_size * self.config.model.context_length
        return float(size) if self.config.train.task == "pretrain" else None

    def seconds_at(self, steps: Sequence[int]) -> Float[np.ndarray, " n"]:
        """Training time up to each step, without compilation and evaluation."""
        train_steps, rates = metric_series(self.events, "train", "tokens_per_s")
        if not train_steps or self.tokens_per_step is None:
            return np.full(len(steps), np.nan)
        durations = np.diff([0, *train_steps]) * self.tokens_per_step / np.maximum(rates, 1e-9)
        return np.interp(steps, [0, *train_steps], [0.0, *np.cumsum(durations)])

    def along(self, axis: CurveAxis, steps: Sequence[int]) -> Float[np.ndarray, " n"]:
        """Positions of steps on an axis; nan if the run does not say."""
        if axis == "steps":
            return np.asarray(steps, np.float64)
        if axis == "seconds":
            return self.seconds_at(steps)
        tokens = np.asarray(steps, np.float64) * (self.tokens_per_step or math.nan)
        return tokens * flops_per_token(self.config.model) if axis == "flops" else tokens


def read_run_records(run_dirs: Sequence[Path]) -> list[RunRecord]:
    """Reads the folders of runs."""
    records = []
    for run_dir, name in zip(run_dirs, unique_names(run_dirs), strict=True):
        if not (run_dir / "config.toml").is_file():
            raise ModelError(
                f"{run_dir} is not a run folder: it has no config.toml. Give folders of "
                "`gptjax train --run DIR`."
            )
        config, events = (
            load_config(run_dir / "config.toml"),
            read_events(run_dir / "metrics.jsonl"),
        )
        records.append(RunRecord(name, run_dir, config, events, read_run_metadata(run_dir)))
    return records


def unique_names(run_dirs: Sequence[Path]) -> list[str]:
    """Last parts of paths, as many as tell them apart.

    >>> unique_names([Path("runs/a"), Path("runs/b"), Path("old/b")])
    ['runs/a', 'runs/b', 'old/b']
    """
    paths = [path.resolve() for path in run_dirs]
    for path in paths:
        if paths.count(path) > 1:
            raise ModelError(f"{path} is given twice. Give different runs.")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def changed_options(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """Options whose values differ, with their values by run."""
    values = {
        name: [operator.attrgetter(name)(run.config) for run in runs] for name in config_options()
    }
    return {name: found for name, found in values.items() if any(x != found[0] for x in found)}


def group_seeds(runs: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Groups runs whose configs differ only in train.seed.

    Options that do not change the results may differ as well.
    """
    names = [name for name in result_options() if name != "train.seed"]
    groups: dict[Any, list[RunRecord]] = {}
    for run in runs:
        key = tuple(operator.attrgetter(name)(run.config) for name in names)
        groups.setdefault(key, []).append(run)
    return list(groups.values())


class LossUnit(NamedTuple):
    """Unit that losses of two runs are compared in."""

    metric: str  # of an "eval" event
    name: str


PER_TOKEN = LossUnit("loss", "nats per token")
PER_BYTE = LossUnit("bits_per_byte", "bits per byte")


def common_unit(first: RunRecord, second: RunRecord) -> LossUnit:
    """Unit for two runs: losses per token need the same tokenizer."""
    if unit := LOSS_UNITS.get(first.config.train.task):
        return LossUnit("loss", f"nats per {unit}")
    tokenizers = [run.metadata.get("tokenizer") for run in (first, second)]
    return PER_TOKEN if tokenizers[0] == tokenizers[1] else PER_BYTE


def compare_configs(first: Sequence[RunRecord], second: Sequence[RunRecord]) -> Interval:
    """Interval of the difference of two configs, in `common_unit`, from their seeds.

    It compares the validation losses after the last step.
    """
    metric = common_unit(first[0], second[0]).metric
    losses = [[run.final_evaluation[metric] for run in runs] for runs in (first, second)]
    return welch_interval(*losses)


def has_same_validation(first: RunRecord, second: RunRecord) -> bool:
    """True if both runs were validated on the same text or rows."""
    keys = [validation_key(run) for run in (first, second)]
    return keys[0] is not None and keys[0] == keys[1]


def validation_key(run: RunRecord) -> Any:
    """Identifies the held-out text or rows of a run; None if it has none."""
    if folder := prepared_folder(run):
        meta = read_token_metadata(folder)
        recipe = meta.get("recipe", {})  # how the text was split does not depend on the tokenizer
        if VALIDATION_SPLIT in meta["splits"] and isinstance(recipe, dict):
            return [recipe.get(name) for name in ("sources", "val_fraction", "seed")]
    data = run.metadata.get("data")
    return data.get(VALIDATION_SPLIT) if isinstance(data, dict) else None


def prepared_folder(run: RunRecord) -> Path | None:
    """Folder with the tokens of a pretraining run, if it still exists."""
    if run.config.train.task != "pretrain":
        return None
    folders = user_path(run.config.data.source), run.run_dir / "data"
    return next(filter(is_prepared_dir, folders), None)


def held_out_documents(run: RunRecord, max_bytes: int) -> list[str] | None:
    """Validation documents of a pretraining run, evenly spaced; None if it has none."""
    folder = prepared_folder(run)
    if folder is None:
        return None
    _, tokens, tokenizer = open_prepared(folder)
    if tokens is None:
        return None
    entry = read_token_metadata(folder)["splits"][VALIDATION_SPLIT]
    boundaries = find_boundaries(tokens)
    starts, ends = boundaries[:-1] + 1 + len(tokenizer.prefix_ids), boundaries[1:]
    bytes_per_token = entry["bytes"] / entry["tokens"]

    def read(n: int) -> str:
        length = min(int(ends[n] - starts[n]), math.ceil(max_bytes / bytes_per_token))
        return tokenizer.decode(tokens.read(int(starts[n]), length))

    chosen = choose_documents((ends - starts) * bytes_per_token, max_bytes)
    return cut_text([read(n) for n in chosen], max_bytes)


def find_boundaries(tokens: TokenDataset) -> np.ndarray:
    """Positions of the tokens that separate documents, at the start and end as well."""
    parts = []
    for start in range(0, len(tokens), READ_TOKENS):
        chunk = tokens.read(start, min(READ_TOKENS, len(tokens) - start))
        parts.append(start + np.flatnonzero(chunk == tokens.eot))
    return np.concatenate(parts)


def read_text_documents(path: Path, max_bytes: int) -> list[str]:
    """Documents of a text file, table or folder, evenly spaced."""
    documents, parts = [], []
    for source in find_sources([path]):
        for chunk in iter_chunks(source):
            parts.append(chunk.text)
            if chunk.is_last:
                documents.append("".join(parts))
                parts = []
    sizes = np.array([len(text.encode(errors="replace")) for text in documents])
    return cut_text([documents[n] for n in choose_documents(sizes, max_bytes)], max_bytes)


def choose_documents(sizes: np.ndarray, max_bytes: int) -> list[int]:
    """Numbers of the documents to score: all, or evenly spaced ones of about that size.

    >>> choose_documents(np.array([10, 10, 10, 10, 10, 10]), 30)
    [0, 2, 4]
    """
    if not len(sizes):
        raise DataError("the text has no document. Give another --text.")
    count = len(sizes)
    if sizes.sum() > max_bytes:
        count = max(int(count * max_bytes / sizes.sum()), 1)
    return [n * len(sizes) // count for n in range(count)]


def cut_text(documents: Sequence[str], max_bytes: int) -> list[str]:
    """Truncates documents to a total number of bytes.

    >>> cut_text(["abc", "def", "ghi"], 5)
    ['abc', 'de']
    """
    kept = []
    for text in documents:
        part = text.encode(errors="replace")[:max_bytes].decode(errors="ignore")
        max_bytes -= len(part.encode())
        kept += [part] if part else []
    return kept


class ModelComparison(NamedTuple):
    """Difference of the losses of two models on the same documents."""

    interval: Interval  # second - first
    unit: LossUnit
    losses: tuple[float, float]  # of both models
    num_documents: int
    num_tokens: int  # of the first model's tokenizer
    num_clusters: int
    effective_count: float  # of clusters
    is_by_document: bool  # else clusters are blocks of text


def compare_models(
    first: Model, others: Sequence[Callable[[], Model]], documents: Sequence[str]
) -> list[ModelComparison]:
    """Compares each of `others`, loaded one at a time, with the first model."""
    baseline = sum_clusters(score_documents(first, documents), len(documents))
    comparisons = []
    for load_model in others:
        model = load_model()
        other = sum_clusters(score_documents(model, documents), len(documents))
        is_per_token = model.tokenizer.hash == first.tokenizer.hash
        unit = PER_TOKEN if is_per_token else PER_BYTE
        size = baseline.tokens if is_per_token else baseline.num_bytes * math.log(2)
        used = size > 0
        comparisons.append(
            ModelComparison(
                paired_interval((other.nats - baseline.nats)[used], size[used]),
                unit,
                (float(baseline.nats.sum() / size.sum()), float(other.nats.sum() / size.sum())),
                len(documents),
                int(baseline.tokens.sum()),
                int(used.sum()),
                effective_count(size[used]),
                len(documents) >= MIN_DOCUMENTS,
            )
        )
    return comparisons
