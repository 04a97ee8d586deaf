"""The folder of one run: what it was asked to do, and on what it was done.

config.toml  meta.json  metrics.jsonl  loss.png  lr.png  report.md
data/  checkpoints/  model/  compiled/
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w

from gptjax.changes import ON_SPIKE, check_allowed, class_of, settled_changes
from gptjax.config import RunConfig, read_config
from gptjax.errors import ConfigError, ModelError
from gptjax.fingerprint import read_meta
from gptjax.spikes import POLICIES, Policy

PACKAGES = (
    *("gptjax", "jax", "jaxlib", "flax", "optax"),
    *("orbax-checkpoint", "grain", "numpy", "tiktoken"),
)


def open_folder(folder: Path) -> None:
    """Makes the run folder and shows that it can be written.

    Raises:
        ModelError: it cannot.
    """
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)  # unless another process of the run has done it
    except OSError as error:
        raise ModelError(
            f"cannot write the run folder {folder}: {error.strerror}. Name another "
            "with --run DIR."
        ) from error


def settle_config(
    folder: Path, config: RunConfig, allowed: Sequence[str] = ()
) -> list[str]:
    """Writes config.toml, or checks that the run there may go on with this one.

    What changes of the steps to come is written, too; what changes only where and how
    the work is done is not.

    Args:
        folder: of the run.
        config: asked for.
        allowed: options that may change though they decide what is computed.

    Returns:
        Lines `section.option: old -> new` of what changes.

    Raises:
        ConfigError: one of the allowed ones cannot change.
        ModelError: the folder holds a run of another config.
    """
    path = folder / "config.toml"
    changes: list[str] = []
    if path.is_file():
        before = read_config(path)
        changes = settled_changes(str(folder), before, config, allowed)
        if not any(
            class_of(line.partition(":")[0]) == "trajectory" for line in changes
        ):
            return changes
    else:
        check_allowed(allowed)
    write_whole(path, tomli_w.dumps(dataclasses.asdict(config)))
    return changes


def settle_policy(folder: Path, asked: str, allowed: Sequence[str] = ()) -> Policy:
    """What is to be done about spikes: as asked, or as before, or no more than said.

    Args:
        folder: of the run.
        asked: `--on-spike`; "" is as before.
        allowed: what may change; "on-spike" may be among it.

    Raises:
        ConfigError: there is no such policy.
        ModelError: the run there has another one.
    """
    if asked and asked not in POLICIES:
        raise ConfigError(
            f"--on-spike {asked} is not one of {', '.join(POLICIES)}. Choose one."
        )
    meta = read_meta(folder)
    before: Any = meta.get("on_spike")
    chosen: Any = asked or before or "log"
    if before and chosen != before:
        if ON_SPIKE not in allowed:
            raise ModelError(
                f"the run in {folder} was started with --on-spike {before}, which "
                "decides what it computes. Leave the flag out, or let it change with "
                f"--allow-change {ON_SPIKE}."
            )
        path = folder / "meta.json"
        write_whole(path, json.dumps({**meta, "on_spike": chosen}, indent=2) + "\n")
    return chosen


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that it is there in whole, or as it was."""
    new = path.with_suffix(".partial")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def write_meta(folder: Path, command: list[str], facts: dict[str, Any]) -> None:
    """Writes meta.json: command, versions, devices, and the `facts` given."""
    import jax

    devices = jax.devices()
    meta = {
        "command": command,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {"python": platform.python_version(), **versions()},
        "platform": platform.platform(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "devices": {
            "kind": devices[0].device_kind,
            "count": len(devices),
            "processes": jax.process_count(),
        },
        **facts,
    }
    write_whole(folder / "meta.json", json.dumps(meta, indent=2) + "\n")


def versions() -> dict[str, str]:
    """Installed versions of what decides the numbers; "missing" where there is none."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def command_line() -> list[str]:
    """How this process was called, for meta.json and for messages."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
