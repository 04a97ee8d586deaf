"""Step folders: commit, selection of the newest valid step, retention.

A step is written under a temporary name and renamed when complete. Before it is used it
is verified by its manifest; invalid steps are quarantined, old ones deleted.
"""

import re
import shutil
from pathlib import Path

from gptjax.checkpoint.manifest import CorruptCheckpointError, verify_manifest
from gptjax.errors import ModelError
from gptjax.fileio.atomic import fsync

MIN_KEEP = 2  # valid steps that are always kept
STEP_PATTERN = re.compile(r"(0|[1-9]\d{0,17})", re.ASCII)
LEFTOVER_PATTERN = re.compile(rf"{STEP_PATTERN.pattern}\.(partial|replaced)", re.ASCII)


def list_steps(checkpoint_dir: Path) -> list[int]:
    """Returns the steps that have a folder, in ascending order, without verifying."""
    return sorted(
        int(name) for name in _entry_names(checkpoint_dir) if STEP_PATTERN.fullmatch(name)
    )


def _entry_names(folder: Path) -> list[str]:
    """Returns the names of all entries; none if there is no such folder."""
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def clean_partial(checkpoint_dir: Path) -> None:
    """Removes partial and replaced steps left by a killed process."""
    for name in _entry_names(checkpoint_dir):
        if match := LEFTOVER_PATTERN.fullmatch(name):
            step_dir = checkpoint_dir / match[1]
            if match[2] == "replaced" and not step_dir.exists():
                (checkpoint_dir / name).rename(step_dir)
            else:
                remove_path(checkpoint_dir / name)


def latest_valid_step(checkpoint_dir: Path) -> tuple[int | None, list[str]]:
    """Returns the newest valid step (None if no step was ever saved) and warnings.

    Quarantines invalid steps, so only the process that writes the run may call it.

    Raises:
        ModelError: the folder is not empty but has no valid step.
    """
    warnings: list[str] = []
    try:
        clean_partial(checkpoint_dir)
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
        metadata = verify_manifest(checkpoint_dir / str(step))
    except CorruptCheckpointError as error:
        return str(error)
    return None if metadata["step"] == step else f"it is a copy of step {metadata['step']}"


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
    checkpoint_dir.mkdir(parents=True, exist_ok=True)
    remove_path(partial_dir)
    return partial_dir


def commit_step(checkpoint_dir: Path, step: int) -> None:
    """Renames a complete step to its final name, then deletes any old version."""
    step_dir = checkpoint_dir / str(step)
    replaced_dir = checkpoint_dir / f"{step}.replaced"
    if step_dir.exists():
        remove_path(replaced_dir)
        step_dir.rename(replaced_dir)
    (checkpoint_dir / f"{step}.partial").rename(step_dir)
    fsync(checkpoint_dir)
    remove_path(replaced_dir)


def apply_retention(checkpoint_dir: Path, step: int, keep: int) -> None:
    """Deletes all but the newest `keep` steps, after `step` was committed.

    Nothing is deleted unless another step verifies, since steps may have been modified
    after saving. The newest such step is kept too, even if it is older.

    Args:
        checkpoint_dir: checkpoint folder of the run.
        step: newest step, just committed.
        keep: number of steps to keep, at least `MIN_KEEP`.
    """
    older = [n for n in list_steps(checkpoint_dir) if n < step]
    surplus = older[: max(len(older) + 1 - max(keep, MIN_KEEP), 0)]
    if not surplus:
        return
    valid_steps = (n for n in reversed(older) if check_step(checkpoint_dir, n) is None)
    if (fallback := next(valid_steps, None)) is not None:
        for surplus_step in surplus:
            if surplus_step != fallback:
                delete_step(checkpoint_dir, surplus_step)


def delete_step(checkpoint_dir: Path, step: int) -> None:
    """Deletes a step; it is renamed first, so that it is never partly valid."""
    partial_dir = checkpoint_dir / f"{step}.partial"
    remove_path(partial_dir)
    (checkpoint_dir / str(step)).rename(partial_dir)
    remove_path(partial_dir)


def remove_path(path: Path) -> None:
    """Deletes a folder, file or link if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
