"""Expected results: the section `[expect]` of a config, compared with a run."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gptjax.config import RunConfig, config_diff, find_config, load_config, result_options
from gptjax.errors import ConfigError, ModelError
from gptjax.training.metrics import Event, metric_series
from gptjax.training.run_status import read_run_status


class ResultCheck(NamedTuple):
    """Result of a run, beside the expected one."""

    name: str  # as in [expect]
    lowest: float
    highest: float
    found: float | None  # None if the run did not measure it

    @property
    def is_met(self) -> bool:
        """True if the result is in the interval."""
        return self.found is not None and self.lowest <= self.found <= self.highest


def record_changes(config: RunConfig) -> RunConfig:
    """Records the options that differ from the config of the expected results.

    Options that do not change the results are left out: operational ones, and those in
    `expect.may_differ`.
    """
    if not config.expect.config:
        return config
    try:
        original = load_config(find_config(config.expect.config))
    except ConfigError:
        changes = [f"config {config.expect.config} not found"]
    else:
        lines = {line.partition(":")[0]: line for line in config_diff(original, config)}
        names = set(result_options()).difference(config.expect.may_differ)
        changes = [line for name, line in lines.items() if name in names]
    return dataclasses.replace(
        config, expect=dataclasses.replace(config.expect, changes=tuple(changes))
    )


def check_results(run_dir: Path) -> tuple[RunConfig, list[ResultCheck]]:
    """Compares the results of a finished run with the expected ones of its config."""
    status = read_run_status(run_dir)
    if status.config is None or not status.config.expect.results():
        raise ModelError(
            f"the run in {run_dir} has no expected results: its config has no [expect] with "
            "results. Add for example validation_loss = [1.74, 1.79], and train again."
        )
    if status.state != "finished":
        raise ModelError(
            f"the run in {run_dir} is not finished but {status.state}, after step {status.step}. "
            "Finish it with the command that started it."
        )
    results = status.config.expect.results()
    return status.config, [
        ResultCheck(name, lowest, highest, find_result(status.events, name))
        for name, (lowest, highest) in results.items()
    ]


def find_result(events: Sequence[Event], name: str) -> float | None:
    """Value of a result: of the last evaluation, or the lowest for "best_".

    >>> event = {"event": "eval", "split": "test", "step": 1}
    >>> events = [event | {"loss": 3.0}, event | {"loss": 4.0}]
    >>> find_result(events, "test_loss"), find_result(events, "best_test_loss")
    (4.0, 3.0)
    """
    split, metric = name.removeprefix("best_").split("_", 1)
    _, values = metric_series(events, "eval", metric, split)
    if not values:
        return None
    return min(values) if name.startswith("best_") else values[-1]
