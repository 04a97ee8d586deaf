"""Run directory: config, metadata and the files of a run.

config.toml  meta.json  metrics.jsonl  loss.png  lr.png  report.md
data/  checkpoints/  model/  compiled/
"""

import dataclasses
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w

from gptjax.changes import (
    ON_SPIKE,
    check_allow_change,
    check_config_changes,
    resume_policy,
)
from gptjax.config import RunConfig, load_config
from gptjax.device import package_versions
from gptjax.errors import ConfigError, ModelError
from gptjax.fingerprint import read_run_metadata
from gptjax.spikes import SPIKE_POLICIES, SpikePolicy


def create_run_dir(run_dir: Path) -> None:
    """Creates the run folder and checks that it is writable.

    Raises:
        ModelError: the folder is not writable.
    """
    probe = run_dir / ".writable"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)  # another process of the run may have done it
    except OSError as error:
        raise ModelError(
            f"cannot write the run folder {run_dir}: {error.strerror}. Choose "
            "another one with --run DIR."
        ) from error


def reconcile_config(
    run_dir: Path, config: RunConfig, allowed: Sequence[str] = ()
) -> list[str]:
    """Writes config.toml, or checks that the existing run can resume with `config`.

    An existing config.toml is rewritten only if a "trajectory" option changes, which
    must be in `allowed`.

    Returns:
        Changed options, as lines `section.option: old -> new`.

    Raises:
        ConfigError: one of the allowed options can never change.
        ModelError: the folder has a run with an incompatible config.
    """
    path = run_dir / "config.toml"
    changes: list[str] = []
    if path.is_file():
        before = load_config(path)
        changes = check_config_changes(str(run_dir), before, config, allowed)
        if not any(
            resume_policy(line.partition(":")[0]) == "trajectory" for line in changes
        ):
            return changes
    else:
        check_allow_change(allowed)
    write_atomic(path, tomli_w.dumps(dataclasses.asdict(config)))
    return changes


def reconcile_spike_policy(
    run_dir: Path, requested: str, allowed: Sequence[str] = ()
) -> SpikePolicy:
    """Chooses the spike policy: the requested one, else the run's, else "log".

    Raises:
        ConfigError: unknown policy.
        ModelError: the run has another policy, which may not change.
    """
    if requested and requested not in SPIKE_POLICIES:
        raise ConfigError(
            f"--on-spike {requested} must be one of {', '.join(SPIKE_POLICIES)}."
        )
    metadata = read_run_metadata(run_dir)
    before: Any = metadata.get("on_spike")
    chosen: Any = requested or before or "log"
    if before and chosen != before:
        if ON_SPIKE not in allowed:
            raise ModelError(
                f"the run in {run_dir} was started with --on-spike {before}; another "
                "policy changes its results. Omit the option, or allow the change with "
                f"--allow-change {ON_SPIKE}."
            )
        path = run_dir / "meta.json"
        write_atomic(
            path, json.dumps({**metadata, "on_spike": chosen}, indent=2) + "\n"
        )
    return chosen


def write_atomic(path: Path, text: str) -> None:
    """Writes a file atomically."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_run_metadata(
    run_dir: Path, command: list[str], provenance: dict[str, Any]
) -> None:
    """Writes meta.json: command, versions, devices and provenance."""
    import jax

    devices = jax.devices()
    metadata = {
        "command": command,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {"python": platform.python_version(), **package_versions()},
        "platform": platform.platform(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "devices": {
            "kind": devices[0].device_kind,
            "count": len(devices),
            "processes": jax.process_count(),
        },
        **provenance,
    }
    write_atomic(run_dir / "meta.json", json.dumps(metadata, indent=2) + "\n")


def command_line() -> list[str]:
    """Command line of this process, for meta.json and messages."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
