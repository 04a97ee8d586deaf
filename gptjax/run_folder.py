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
from pathlib import Path
from typing import Any

import tomli_w

from gptjax.config import RunConfig, difference, read_config
from gptjax.errors import ModelError

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


def settle_config(folder: Path, config: RunConfig) -> None:
    """Writes config.toml, or checks that the run there was asked the same.

    Only `[mesh]` may be another one: it says where the work is done, not what.

    Raises:
        ModelError: the folder holds a run of another config.
    """
    path = folder / "config.toml"
    if path.is_file():
        before = dataclasses.replace(read_config(path), mesh=config.mesh)
        if changes := difference(before, config):
            raise ModelError(
                f"the run in {folder} was started with another config: "
                f"{'; '.join(changes)}. Use its config to resume it, or another "
                "--run DIR to start anew."
            )
        return
    new = path.with_suffix(".partial")
    new.write_text(tomli_w.dumps(dataclasses.asdict(config)), encoding="utf-8")
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
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


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
