"""Run directory: config, metadata and the files of a run.

config.toml  meta.json  metrics.jsonl  loss.png  lr.png  report.md  .lock
data/  checkpoints/  model/  tracking/
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tomli_w

from gptjax.config import (
    MAX_CONFIG_BYTES,
    RunConfig,
    config_diff,
    config_options,
    did_you_mean,
    load_config,
)
from gptjax.errors import ConfigError, GptjaxError, ModelError, short_message
from gptjax.fileio.atomic import lock_file, remove_path, write_atomic
from gptjax.fileio.strict_json import read_json
from gptjax.parallel.distributed import process_dir
from gptjax.parallel.sharding import check_batch_divisible, make_mesh
from gptjax.runtime.device import package_versions
from gptjax.runtime.preemption import Interrupted, handle_signals, set_signal_mode
from gptjax.runtime.terminal import redact_secrets
from gptjax.training.anomalies import SPIKE_POLICIES, SpikePolicy
from gptjax.training.metrics import read_events
from gptjax.training.resource_errors import (
    check_estimated_memory,
    choose_accumulation,
    translate_resource_errors,
)
from gptjax.training.task import RunContext
from gptjax.tree import flatten_with_names

MAX_RUN_METADATA_BYTES = 1 << 26
RUN_LOCK_FILE = ".lock"
LOCK_ATTEMPTS, LOCK_RETRY_SECONDS = 5, 0.02
UTC_FORMAT = "%Y-%m-%d %H:%M:%S UTC"
RUN_FILES = (RUN_LOCK_FILE, "config.toml", "meta.json", "metrics.jsonl", "report.md")
RUN_FILES += ("loss.png", "lr.png", "accuracy.png", "confusion.png")
RUN_FILES += ("responses.jsonl", "adapters.safetensors")
RUN_FOLDERS = ("checkpoints", "model", "tracking")
ON_SPIKE = "on-spike"  # a flag, not a config option, but affects the steps too
TRACKED_INPUTS = {  # key in meta.json: (description, config option)
    "data": ("data", "data.source"),
    "tokenizer": ("tokenizer", "data.tokenizer"),
    "start": ("initial model", "finetune.init_from"),
    "template": ("chat template", "data.chat_template"),
}


@contextlib.contextmanager
def open_run(
    config: RunConfig, run_dir: Path, *, allow_change: Sequence[str] = (), on_spike: str = ""
) -> Iterator[RunContext]:
    """Opens a run folder for training: lock, signal handlers, mesh, resolved config.

    The arguments are those of `gptjax.train`.
    """
    folder = create_run_dir(run_dir)
    with folder, handle_signals() as is_interrupted, translate_resource_errors():
        set_signal_mode("collective" if jax.process_count() > 1 else "immediate")
        own_dir = process_dir(run_dir)
        read_events(own_dir / "metrics.jsonl")  # an invalid one fails before any work
        run = RunContext(
            config=config,
            run_dir=own_dir,
            mesh=make_mesh(config.mesh),
            shared_run_dir=run_dir,
            on_spike=reconcile_spike_policy(own_dir, on_spike, allow_change),
            allow_change=tuple(allow_change),
            is_interrupted=is_interrupted,
        )
        run = choose_accumulation(run)
        find_changes(own_dir, run.config, allow_change, resolved=["model"])  # before any work
        if run.mesh is not None:
            rows, accumulate = run.config.data.batch_size, run.config.train.accumulate
            check_batch_divisible(rows, accumulate, [*run.mesh.shape.values()])
        check_estimated_memory(run)
        yield run


@contextlib.contextmanager
def create_run_dir(run_dir: Path) -> Iterator[None]:
    """Creates and locks the run folder; removes the files of a failed start.

    A start has failed if an error that a user can fix precedes the first logged step.
    """
    missing = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    try:
        str(run_dir.absolute()).encode()  # as Orbax does
    except UnicodeEncodeError as error:
        raise ModelError(
            f"the path of the run folder {run_dir} is not valid UTF-8. Choose another one with "
            "--run DIR."
        ) from error
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        names = os.listdir(run_dir)
    except OSError as error:
        raise ModelError(
            f"cannot write the run folder {run_dir}: {error.strerror}. Choose "
            "another one with --run DIR."
        ) from error
    if jax.process_index() > 0:
        yield
        return
    with run_lock(run_dir):
        try:
            yield
        except GptjaxError:
            if not has_logged_step(run_dir):
                for name in {*os.listdir(run_dir)}.difference(names):
                    remove_path(run_dir / name)
                with contextlib.suppress(OSError):  # a folder with content stays
                    for folder in missing:
                        folder.rmdir()
            raise


def has_logged_step(run_dir: Path) -> bool:
    """True if metrics.jsonl has a training step."""
    return any(event["event"] == "train" for event in read_events(run_dir / "metrics.jsonl"))


@contextlib.contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Locks the run folder while the block runs, if its file system has locks.

    The kernel releases the lock when its process ends, for whatever reason. The file
    has a line with the process, and one with the outcome unless the process was killed;
    `gptjax.training.run_status` reads them.
    """
    for name in (*RUN_FILES, *RUN_FOLDERS):  # before any work; and opening a pipe would block
        path, kind = run_dir / name, "folder" if name in RUN_FOLDERS else "file"
        if path.exists() and not (path.is_dir() if kind == "folder" else path.is_file()):
            raise ModelError(f"{path} is not a {kind}. Remove it, or choose another --run DIR.")
    path = run_dir / RUN_LOCK_FILE
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise ModelError(
            f"cannot write {path}: {error.strerror}. Choose another folder with --run DIR."
        ) from error
    try:
        try:
            lock_run(descriptor)
        except BlockingIOError as error:
            owner = os.pread(descriptor, 200, 0).decode(errors="replace")
            raise ModelError(
                f"another process trains in {run_dir}: {owner or 'owner not recorded'}. Wait "
                "for it, stop it, or choose another folder with --run DIR."
            ) from error
        os.ftruncate(descriptor, 0)
        owner = f"pid {os.getpid()} on {socket.gethostname()}, started {utc_time()}"
        os.pwrite(descriptor, owner.encode(), 0)
        outcome = "completed"
        try:
            yield
        except BaseException as error:
            is_interrupted = isinstance(error, Interrupted | KeyboardInterrupt)
            outcome = "interrupted" if is_interrupted else redact_secrets(short_message(error))
            raise
        finally:  # a process that is killed leaves no such line
            with contextlib.suppress(OSError):  # such as a full disk
                end = f"\nended {utc_time()}: {outcome}"
                os.pwrite(descriptor, end.encode(errors="replace"), len(owner.encode()))
    finally:
        os.close(descriptor)


def lock_run(descriptor: int) -> None:
    """Locks the file of a run; retries, since `is_locked` locks it for an instant."""
    for _ in range(LOCK_ATTEMPTS - 1):
        with contextlib.suppress(BlockingIOError):
            lock_file(descriptor)
            return
        time.sleep(LOCK_RETRY_SECONDS)
    lock_file(descriptor)


def is_locked(run_dir: Path) -> bool | None:
    """True while a process trains in the folder; None if its lock cannot be read."""
    try:
        descriptor = os.open(run_dir / RUN_LOCK_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # no such file, or it belongs to another user
        return None
    try:
        return False if lock_file(descriptor, shared=True) else None
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def utc_time() -> str:
    """Current time, such as "2026-11-30 09:00:00 UTC"."""
    return time.strftime(UTC_FORMAT, time.gmtime())


def reconcile_config(run_dir: Path, config: RunConfig, allowed: Sequence[str] = ()) -> list[str]:
    """Writes config.toml, or checks that the existing run can resume with `config`.

    Returns the changed options, as lines `section.option: old -> new`. An existing
    config.toml is rewritten only if a "trajectory" option changes, which must be in
    `allowed`.
    """
    path = run_dir / "config.toml"
    changes = find_changes(run_dir, config, allowed)
    if not path.is_file() or "trajectory" in map(resume_policy, changes):
        write_atomic(path, tomli_w.dumps(dataclasses.asdict(config)), MAX_CONFIG_BYTES)
    return list(changes.values())


def find_changes(
    run_dir: Path, config: RunConfig, allowed: Sequence[str], resolved: Sequence[str] = ()
) -> dict[str, str]:
    """Changed options of an existing run; raises if one may not change.

    Sections in `resolved` are not compared. The values are lines as in `config_diff`.
    """
    for name in allowed:
        if resume_policy(name) == "identity":
            raise ConfigError(
                f"--allow-change {name}: {name} is fixed for a run. Start a new run with --run DIR."
            )
    path, changes = run_dir / "config.toml", {}
    if path.is_file():
        lines = config_diff(load_config(path), config)
        changes = {line.partition(":")[0]: line for line in lines}
    changes = {n: line for n, line in changes.items() if n.partition(".")[0] not in resolved}
    policies = {name: resume_policy(name) for name in changes}
    denied = [name for name, policy in policies.items() if policy == "identity"]
    fix = "start a new run with another --run DIR, since these options are fixed for a run"
    if not denied:
        denied = [
            n for n, policy in policies.items() if policy == "trajectory" and n not in allowed
        ]
        fix = f"allow the change with {' '.join(f'--allow-change {name}' for name in denied)}"
    if denied:
        raise ModelError(
            f"the run in {run_dir} was started with another config: "
            f"{'; '.join(changes[name] for name in denied)}. Resume it with its own config, "
            f"or {fix}."
        )
    return changes


def resume_policy(name: str) -> str:
    """Resume policy of an option, `section.option`."""
    known = {name: field.metadata["resume"] for name, field in config_options().items()}
    known[ON_SPIKE] = "trajectory"
    if name not in known:
        raise ConfigError(
            f"--allow-change {name}: unknown option.{did_you_mean(name, known)} Write "
            "it as --allow-change section.option."
        )
    return known[name]


def reconcile_spike_policy(
    run_dir: Path, requested: str, allowed: Sequence[str] = ()
) -> SpikePolicy:
    """Chooses the spike policy: the requested one, else the run's, else "log"."""
    metadata = read_run_metadata(run_dir)
    before: Any = metadata.get("on_spike")
    chosen: Any = requested or before or "log"
    if chosen not in SPIKE_POLICIES:
        raise ConfigError(f"--on-spike {chosen} must be one of {', '.join(SPIKE_POLICIES)}.")
    if before and chosen != before:
        if ON_SPIKE not in allowed:
            raise ModelError(
                f"the run in {run_dir} was started with --on-spike {before}; another "
                "policy changes its results. Omit the option, or allow the change with "
                f"--allow-change {ON_SPIKE}."
            )
        write_json(run_dir / "meta.json", {**metadata, "on_spike": chosen})
    return chosen


def write_run_metadata(run_dir: Path, provenance: dict[str, Any]) -> None:
    """Writes meta.json: command, versions, devices and provenance."""
    devices = jax.devices()
    metadata = {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
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
    write_json(run_dir / "meta.json", metadata)


def read_run_metadata(run_dir: Path) -> dict[str, Any]:
    """Reads meta.json of a run; empty if there is none."""
    path = run_dir / "meta.json"
    if not path.is_file():
        return {}
    try:
        metadata = read_json(path, MAX_RUN_METADATA_BYTES)
        if not isinstance(metadata, dict):
            raise ValueError("it is not a JSON object")
        return metadata
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot read {path}, which records the inputs of the run: {error}. "
            "Restore it from a copy, or start a new run with another --run DIR."
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically."""
    write_atomic(path, json.dumps(value, indent=2) + "\n", MAX_RUN_METADATA_BYTES)


def hash_rows(rows: Iterable[Any]) -> dict[str, Any]:
    """Number of rows and a hash of all; a row is any JSON value."""
    digest, count = hashlib.sha256(), 0
    for row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
        count += 1
    return {"rows": count, "sha256": digest.hexdigest()}


def hash_pytree(tree: Any) -> str:
    """Hashes the names, shapes, dtypes and values of all leaves."""
    digest = hashlib.sha256()
    for name, leaf in flatten_with_names(tree).items():
        array = np.ascontiguousarray(leaf)
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def check_provenance(run_dir: Path, provenance: Mapping[str, Any]) -> None:
    """Compares the inputs of a resumed run with those recorded in meta.json."""
    before = read_run_metadata(run_dir)
    for name, (description, option) in TRACKED_INPUTS.items():
        now = json.loads(json.dumps(provenance.get(name)))
        if name in before and before[name] != now:
            raise ModelError(
                f"the {description} of the run in {run_dir} has changed since it was "
                f"started ({option}): {describe_mismatch(before[name], now)}. Restore "
                "the original or start a new run with another --run DIR."
            )


def describe_mismatch(before: Any, now: Any, name: str = "") -> str:
    """Describes the first value that differs, by its first digits if it is a hash.

    >>> describe_mismatch({"a": {"rows": 3}}, {"a": {"rows": 4}})
    'a rows was 3, now 4'
    """
    if isinstance(before, dict) and isinstance(now, dict):
        key = next(key for key in before | now if before.get(key, ...) != now.get(key, ...))
        return describe_mismatch(before.get(key), now.get(key), f"{name} {key}")
    old, new = ("none" if value is None else str(value)[:16] for value in (before, now))
    return f"{name} was {old}, now {new}".strip()
