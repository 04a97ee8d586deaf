"""Metrics of a run: the event log metrics.jsonl, and the logger of the trainer.

The log is append-only, and training never reads it: a resumed run gets what it needs
from the `History` of its checkpoint.
"""

import json
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gptjax.errors import DivergenceError, ModelError
from gptjax.fileio.atomic import atomic_path, open_append
from gptjax.runtime.timing import StepTimer, format_duration
from gptjax.training import anomalies, estimate
from gptjax.training.optimizer import learning_rates
from gptjax.training.task import EvalResult, RunContext
from gptjax.training.train_step import Metrics

Event = dict[str, Any]  # "event", "step" and values

INVALID_EVENT = (
    "{path}:{number} is not a valid event. Delete the line or restore the file from a backup."
)
DIVERGENCE_ADVICE = "Lower optim.peak_lr, raise optim.warmup_steps or set optim.grad_clip"
# Types of the values of an event that gptjax reads itself; each may be missing.
VALUE_TYPES: dict[str, Any] = {"split": str, "text": str} | dict.fromkeys(
    ("time", "loss", "response_loss", "accuracy", "lr", "grad_norm", "tokens_per_s", "temporaries"),
    int | float,
)
# Units that the loss of a `train.task` is averaged over, if not tokens.
LOSS_UNITS = {"classify": "example", "dpo": "pair"}
WRITE_LOCK = threading.Lock()  # the checkpoint thread also writes events


def log_event(path: Path, kind: str, step: int, **values: Any) -> None:
    """Appends one event to metrics.jsonl; floats keep full precision.

    Its "time" is in seconds since 1970.
    """
    event = {"event": kind, "step": step, "time": round(time.time(), 3), **values}
    line = json.dumps(event, ensure_ascii=False)
    with WRITE_LOCK, open_append(path) as file:
        file.write(line + "\n")


def drop_open_line(path: Path) -> None:
    """Removes an incomplete last line, left by a killed process or a full disk.

    A link is replaced by its content.
    """
    if not os.path.lexists(path):
        return
    data = path.read_bytes() if path.is_file() else b""
    if path.is_symlink() or not data.endswith(b"\n"):
        with atomic_path(path) as new:
            new.write_bytes(data[: data.rfind(b"\n") + 1])


def read_events(path: Path) -> list[Event]:
    """Events of a run, oldest first, without those that were superseded.

    A "resume" event supersedes earlier events of later steps; at step 0, all of them.
    Of two evaluations of the same step and split, the second counts. A line may be
    incomplete if it is the last one or a "resume" event follows; any other that is no
    event is a ModelError.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    lines = lines[:-1] if lines[-1] == "" else lines
    events: dict[Any, Event] = {}
    incomplete = 0  # number of the line
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            incomplete = incomplete or number
            continue
        if not is_event(event):
            raise ModelError(INVALID_EVENT.format(path=path, number=number))
        kind, step = event["event"], event["step"]
        if kind == "resume":
            incomplete = 0
            events = {key: e for key, e in events.items() if 0 < step >= e["step"]}
        key = (step, event.get("split")) if kind == "eval" else number
        events[key] = event
    if 0 < incomplete < len(lines):
        raise ModelError(INVALID_EVENT.format(path=path, number=incomplete))
    return list(events.values())


def is_event(value: Any) -> bool:
    """True for an event; its values have the types that gptjax reads."""
    match value:
        case {"event": str(), "step": int()}:
            known = [(value.get(name), types) for name, types in VALUE_TYPES.items()]
            return all(x is None or isinstance(x, types) for x, types in known)
    return False


def metric_series(
    events: Sequence[Event], kind: str, name: str, split: str | None = None
) -> tuple[list, list]:
    """Steps and values of one metric.

    Only events of `split`, if given; an event without a split counts as "validation".
    """
    matching = [e for e in events if e["event"] == kind and e.get(name) is not None]
    if split is not None:
        matching = [e for e in matching if e.get("split", "validation") == split]
    return [e["step"] for e in matching], [e[name] for e in matching]


def best_validation(events: Sequence[Event]) -> tuple[int, float] | None:
    """Step and value of the lowest finite validation loss; the first of equal ones."""
    points = zip(*metric_series(events, "eval", "loss", "validation"), strict=True)
    finite = [(step, loss) for step, loss in points if math.isfinite(loss)]
    return min(finite, key=lambda point: point[1], default=None)


def format_number(value: int | float) -> str:
    """Count with three significant digits and an SI suffix.

    >>> format_number(124_439_808), format_number(950.0), format_number(0)
    ('124M', '950', '0')
    """
    for unit in ("", "k", "M", "G", "T"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}P"


class History(NamedTuple):
    """Values of earlier steps that a resumed run needs; saved with each checkpoint."""

    best_score: tuple[float, ...] | None = None  # of the evaluations so far
    best_step: int = -1  # step of that evaluation
    evaluated_step: int = -1  # last step that was evaluated
    consecutive_skips: int = 0
    last_good_step: int = 0  # last step that was not skipped
    nonfinite_step: int = -1  # first of the latest evaluations with a non-finite loss
    logged: tuple[anomalies.LoggedStep, ...] = ()  # for the spike threshold

    def to_metadata(self) -> dict[str, Any]:
        """JSON values; non-finite numbers become None."""
        logged = [
            [step, *(value if math.isfinite(value) else None for value in values)]
            for step, *values in self.logged
        ]
        return self._asdict() | {"logged": logged}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "History":
        """Inverse of `to_metadata`."""
        score = metadata["best_score"]
        logged = (
            anomalies.LoggedStep(step, *(math.nan if x is None else x for x in values))
            for step, *values in metadata["logged"]
        )
        history = cls(**metadata)
        return history._replace(best_score=score and tuple(score), logged=tuple(logged))


class MetricsLogger:
    """Logs the metrics of a run and detects anomalies.

    Metrics are read one step later, so that the device is not blocked.
    """

    def __init__(
        self, run: RunContext, tokens_per_step: int | float, step: int, history: History
    ) -> None:
        """Starts after `step` steps, with the history of those steps."""
        self.run, self.tokens_per_step, self.history = run, tokens_per_step, history
        self.timer = StepTimer()
        self.step = self.logged_step = step
        self.pending: tuple[int, Metrics] | None = None
        self.applied: list[Any] = []  # of the steps not yet logged, on the device
        self.learning_rates = learning_rates(run.config.optim, run.config.train.steps)

    def log_step(self, metrics: Metrics, should_log: bool) -> None:
        """Records a dispatched step; its metrics are read later if they are logged."""
        self.step += 1
        self.applied.append(metrics.applied)
        if should_log:
            self.pending = self.step, metrics

    def flush_step(self) -> Event | None:
        """Logs and returns the pending metrics; detects spikes and skipped steps."""
        if self.pending is None:
            return None
        (step, metrics), self.pending = self.pending, None
        jax.block_until_ready(metrics)  # dispatch is asynchronous
        seconds, wait_seconds = self.timer.end_step()
        num_steps, self.logged_step = step - self.logged_step, step
        lr, rate = self.learning_rates[step - 1], num_steps * self.tokens_per_step / seconds
        event = log_train_metrics(self.run, step, metrics, lr, rate, wait_seconds / seconds)
        self.count_skips(step - num_steps + 1, num_steps)
        if step % self.run.config.train.log_every == 0:
            self.detect_spike(event)
        return event

    def count_skips(self, first_step: int, num_steps: int) -> None:
        """Counts consecutive skipped steps; too many are a DivergenceError."""
        applied, self.applied = self.applied[:num_steps], self.applied[num_steps:]
        skips, last_good = self.history.consecutive_skips, self.history.last_good_step
        for step, was_applied in enumerate(jax.device_get(applied), first_step):
            skips = 0 if was_applied else skips + 1
            last_good = step if was_applied else last_good
            if skips >= anomalies.MAX_CONSECUTIVE_SKIPS:
                reason = "non-finite gradients"
                if self.run.on_spike == "skip":
                    reason += ", or gradients above the threshold of --on-spike skip"
                raise DivergenceError(
                    f"{skips} consecutive steps were skipped ({reason}), the last of them "
                    f"step {step}. The last good step is {last_good}. {DIVERGENCE_ADVICE}: "
                    "resume with --allow-change for each, or start a new run with another "
                    "--run DIR."
                )
        self.history = self.history._replace(consecutive_skips=skips, last_good_step=last_good)

    def detect_spike(self, event: Event) -> None:
        """Adds a logged step to the history; logs a spike."""
        logged = anomalies.LoggedStep(event["step"], event["loss"], event["grad_norm"])
        steps = (*self.history.logged, logged)[-anomalies.MAX_LOGGED_STEPS :]
        self.history = self.history._replace(logged=steps)
        if spike := anomalies.detect_spike(steps):
            numbers = {"value": spike.value, "limit": spike.threshold}
            log_event(self.run.metrics_path, "spike", spike.step, name=spike.name, **numbers)
            self.run.log(
                f"spike    step {spike.step}: {spike.name} {spike.value:.4g} exceeds the "
                f"spike threshold {spike.threshold:.4g}"
            )

    def grad_norm_threshold(self) -> float:
        """Gradient norm above which the next step is skipped."""
        return anomalies.grad_norm_threshold(self.history.logged, self.step + 1)

    def log_evaluation(self, step: int, result: EvalResult, sample: str | None) -> bool:
        """Logs an evaluation and a sample; returns True if the score is the best.

        Ties go to the earlier step; a score that is not finite is never the best.
        """
        for kind, values in result.events:
            log_event(self.run.metrics_path, kind, step, **values)
        for line in result.log_lines:
            self.run.log(line)
        if sample is not None:
            log_event(self.run.metrics_path, "sample", step, text=sample)
        losses = [values["loss"] for kind, values in result.events if kind == "eval"]
        first = self.history.nonfinite_step if self.history.nonfinite_step >= 0 else step
        first = -1 if all(map(math.isfinite, losses)) else first
        best, score = self.history.best_score, result.score
        is_finite = score is not None and all(map(math.isfinite, score))
        is_best = is_finite and (best is None or score > best)
        self.history = self.history._replace(evaluated_step=step, nonfinite_step=first)
        if is_best:
            self.history = self.history._replace(best_score=score, best_step=step)
        return is_best

    def check_finite(self) -> None:
        """DivergenceError if the last loss is non-finite or no update was applied."""
        history = self.history
        steps = [history.nonfinite_step] * (history.nonfinite_step >= 0)
        if history.consecutive_skips and (steps or not history.last_good_step):
            steps.append(history.last_good_step + 1)
        if steps:
            raise DivergenceError(
                f"the loss or its gradient became non-finite at step {min(steps)}, so the run has "
                f"no valid model. {DIVERGENCE_ADVICE} in a new run with another --run DIR."
            )

    def print_progress(self, event: Event | None, eval_text: str = "") -> None:
        """Prints the progress line of a step, with its evaluation if there is one."""
        steps, step = self.run.config.train.steps, event["step"] if event else 0
        parts = [f"step {step:>{len(str(steps))}}/{steps}", *([eval_text] if eval_text else [])]
        if event is not None:  # else before the first step
            seconds_left = (steps - step) * self.tokens_per_step / event["tokens_per_s"]
            parts.insert(1, f"loss {event['loss']:.4f}")
            parts += [
                f"lr {event['lr']:.2e}",
                f"|g| {event['grad_norm']:.2f}",
                f"{format_number(event['tokens_per_s'])} tok/s",
                *([f"mfu {event['mfu']:.1%}"] if "mfu" in event else []),
                f"eta {format_duration(seconds_left)}",
                *([f"{event['skipped']}: step skipped"] if "skipped" in event else []),
            ]
        if len(parts) > 1:
            self.run.log(" | ".join(parts))


def log_train_metrics(
    run: RunContext, step: int, metrics: Metrics, lr: float, tokens_per_s: float, input_wait: float
) -> Event:
    """Logs the metrics of a finished step as a "train" event.

    It has the loss in nats per token, the gradient norm before clipping, the tokens per
    second since the previous event, and the fraction of that time spent waiting for the
    next batch (`input_wait`).
    """
    values: Event = {
        "loss": float(metrics.loss),
        "lr": lr,
        "grad_norm": float(metrics.grad_norm),
        "tokens_per_s": tokens_per_s,
        "input_wait": input_wait,
    }
    if peak := estimate.total_peak_flops():
        values["mfu"] = tokens_per_s * estimate.flops_per_token(run.config.model) / peak
    if not metrics.applied:
        finite = math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])
        values["skipped"] = "spike" if finite else "not finite"
    log_event(run.metrics_path, "train", step, **values)
    return {"step": step, **values}
