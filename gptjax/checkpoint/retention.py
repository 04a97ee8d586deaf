"""Step folders: commit, selection of the newest valid step, retention.

A step is written under a temporary name and renamed when complete, so a folder named by
a number is complete unless it was modified later. Invalid steps are quarantined.
"""

import re
from pathlib import Path

from gptjax.checkpoint.manifest import CorruptCheckpointError, verify_manifest
from gptjax.errors import ModelError
from gptjax.fileio.atomic import fsync, remove_path

STEP_PATTERN = re.compile(r"(0|[1-9]\d{0,17})", re.ASCII)
PARTIAL_PATTERN = re.compile(rf"{STEP_PATTERN.pattern}\.partial", re.ASCII)


def list_steps(checkpoint_dir: Path) -> list[int]:
    """Steps that have a folder, in ascending order, without verifying."""
    return sorted(
        int(name) for name in _entry_names(checkpoint_dir) if STEP_PATTERN.fullmatch(name)
    )


def _entry_names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def latest_valid_step(checkpoint_dir: Path) -> tuple[int | None, list[str]]:
    """Returns the newest valid step (None if no step was ever saved) and warnings.

    Quarantines invalid steps, so only the process that writes the run may call it.
    """
    warnings: list[str] = []
    try:
        for name in _entry_names(checkpoint_dir):
            if PARTIAL_PATTERN.fullmatch(name):  # left by a killed process
                remove_path(checkpoint_dir / name)
        for step in reversed(list_steps(checkpoint_dir)):
            if (problem := check_step(checkpoint_dir, step)) is None:
                return step, warnings
            warnings.append(quarantine(checkpoint_dir, step, problem))
        leftover_names = sorted(_entry_names(checkpoint_dir))
    except OSError as error:
        raise ModelError(
            f"cannot read the checkpoints in {checkpoint_dir}: {error}. Repair the "
            "folder, or choose another --run."
        ) from error
    if leftover_names:
        details = " ".join(warnings) or f"It contains {', '.join(map(repr, leftover_names[:3]))}."
        raise ModelError(
            f"no valid checkpoint in {checkpoint_dir}. {details} "
            "Restore the folder from a backup, or choose another --run."
        )
    return None, warnings


def check_step(checkpoint_dir: Path, step: int) -> str | None:
    """Verifies one step; returns the problem, or None if it is valid."""
    try:
        contents = verify_manifest(checkpoint_dir / str(step))
    except CorruptCheckpointError as error:
        return str(error)
    return None if contents["step"] == step else f"it is a copy of step {contents['step']}"


def quarantine(checkpoint_dir: Path, step: int, problem: str) -> str:
    """Renames an invalid step to `<step>.damaged` and returns a warning."""
    quarantine_dir = checkpoint_dir / f"{step}.damaged"
    remove_path(quarantine_dir)
    (checkpoint_dir / str(step)).rename(quarantine_dir)
    fsync(checkpoint_dir)
    return f"checkpoint {step} is damaged: {problem}. It was moved to {quarantine_dir}."


def begin_step(checkpoint_dir: Path, step: int) -> Path:
    """Returns an unused path for writing a step."""
    partial_dir = checkpoint_dir / f"{step}.partial"
    checkpoint_dir.mkdir(exist_ok=True)  # not the run folder, which may have been renamed
    remove_path(partial_dir)
    return partial_dir


def commit_step(checkpoint_dir: Path, step: int) -> None:
    """Renames a complete step to its final name."""
    (checkpoint_dir / f"{step}.partial").rename(checkpoint_dir / str(step))
    fsync(checkpoint_dir)


def apply_retention(checkpoint_dir: Path, step: int, keep: int) -> None:
    """Deletes all but the newest `keep` steps, after `step` was committed.

    Nothing is deleted unless another step verifies; the newest such step is kept too,
    even if it is older.
    """
    older = [n for n in list_steps(checkpoint_dir) if n < step]
    surplus = older[: max(len(older) + 1 - keep, 0)]
    if not surplus:
        return
    valid_steps = (n for n in reversed(older) if check_step(checkpoint_dir, n) is None)
    if (fallback := next(valid_steps, None)) is not None:
        for surplus_step in surplus:
            if surplus_step != fallback:
                delete_step(checkpoint_dir, surplus_step)


def delete_step(checkpoint_dir: Path, step: int) -> None:
    """Deletes a step; it is renamed first, so that it is never partly valid."""
    (checkpoint_dir / str(step)).rename(begin_step(checkpoint_dir, step))
    remove_path(checkpoint_dir / f"{step}.partial")
