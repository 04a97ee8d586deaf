"""The folders of saved steps, of which only those that verify count.

    checkpoints/<step>/             whole, unless something changed it later
    checkpoints/<step>.partial/     being built, or being deleted
    checkpoints/<step>.replaced/    until another one of the same step is in its place
    checkpoints/<step>.damaged/     set aside for people: it did not verify

Each gets its name by renaming it, so that a process may be killed anywhere in between.
"""

import re
import shutil
from pathlib import Path

from gptjax.errors import ModelError
from gptjax.manifest import DamagedError, flush, verified

LEAST = 2  # steps that verify which are never deleted
STEP = re.compile(r"(0|[1-9]\d{0,17})", re.ASCII)
LEFT = re.compile(rf"{STEP.pattern}\.(partial|replaced)", re.ASCII)


def saved_steps(folder: Path) -> list[int]:
    """Steps that have a folder, oldest first; whether they are whole is not known."""
    return sorted(int(name) for name in names(folder) if STEP.fullmatch(name))


def names(folder: Path) -> list[str]:
    """What is in the folder, if it is there."""
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def tidy(folder: Path) -> None:
    """Deletes what a killed process left half built or half deleted."""
    for name in names(folder):
        if match := LEFT.fullmatch(name):
            final = folder / match[1]
            if match[2] == "replaced" and not final.exists():
                (folder / name).rename(final)
            else:
                remove(folder / name)


def newest(folder: Path) -> tuple[int | None, list[str]]:
    """The newest step that verifies (None: nothing was ever saved), and complaints.

    Only the one writer of a run may ask: steps that do not verify are set aside.

    Raises:
        ModelError: there is something, but no step that verifies.
    """
    complaints: list[str] = []
    try:
        tidy(folder)
        for step in reversed(saved_steps(folder)):
            if (fault := damage(folder, step)) is None:
                return step, complaints
            complaints.append(set_aside(folder, step, fault))
        left = sorted(names(folder))
    except OSError as error:
        raise ModelError(
            f"cannot read the checkpoints in {folder}: {error}. Mend it, or start "
            "again with another --run."
        ) from error
    if left:
        said = " ".join(complaints) or f"It holds {', '.join(map(repr, left[:3]))}."
        raise ModelError(
            f"no checkpoint in {folder} can be trusted. {said} "
            "Restore the folder from a copy, or start again with another --run."
        )
    return None, complaints


def damage(folder: Path, step: int) -> str | None:
    """What is wrong with one saved step, or None."""
    try:
        about = verified(folder / str(step))
    except DamagedError as error:
        return str(error)
    return None if about["step"] == step else f"it is a copy of step {about['step']}"


def set_aside(folder: Path, step: int, fault: str) -> str:
    """Renames a step so that it no longer counts; returns what to say of it."""
    aside = folder / f"{step}.damaged"
    remove(aside)
    (folder / str(step)).rename(aside)
    flush(folder)
    return f"checkpoint {step} is damaged: {fault}. It is set aside as {aside}."


def begin(folder: Path, step: int) -> Path:
    """The path to build a step at, where nothing is."""
    building = folder / f"{step}.partial"
    folder.mkdir(parents=True, exist_ok=True)
    remove(building)
    return building


def finish(folder: Path, step: int) -> None:
    """Gives a step that is sealed its name; one that had it is deleted after that."""
    final, before = folder / str(step), folder / f"{step}.replaced"
    if final.exists():
        remove(before)
        final.rename(before)
    (folder / f"{step}.partial").rename(final)
    flush(folder)
    remove(before)


def retire(folder: Path, step: int, keep: int) -> None:
    """Deletes all but the newest steps, of which `step` was sealed just now.

    Before anything goes, another one has to verify, as it may have been altered since
    it was saved; that one stays too, even if it is older.

    Args:
        folder: of the steps.
        step: newest of those that count.
        keep: number of steps, but never fewer than `LEAST`.
    """
    older = [n for n in saved_steps(folder) if n < step]
    surplus = older[: max(len(older) + 1 - max(keep, LEAST), 0)]
    if not surplus:
        return
    whole = (n for n in reversed(older) if damage(folder, n) is None)
    if (spared := next(whole, None)) is not None:
        for old in surplus:
            if old != spared:
                discard(folder, old)


def forget_after(folder: Path, step: int) -> None:
    """Deletes all later steps, as a run does that goes back to this one."""
    for later in reversed(saved_steps(folder)):
        if later > step:
            discard(folder, later)


def discard(folder: Path, step: int) -> None:
    """Deletes a step; it stops to count before its first file is gone."""
    going = folder / f"{step}.partial"
    remove(going)
    (folder / str(step)).rename(going)
    remove(going)


def remove(path: Path) -> None:
    """Deletes a folder, a file or a link, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
