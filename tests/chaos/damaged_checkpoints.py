"""A damaged checkpoint is never loaded as if it were intact.

Each case alters the newer of two steps. Either the values of the newer step come back
bit for bit, as when two equal files were swapped, or the step is set aside, with a
complaint, for the older one. Where the manifest was forged to fit the files, the
checksums of the arrays detect it.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from gptjax.checkpoint import manifest
from gptjax.checkpoint.checkpoint import latest_step, write_step
from tests.chaos._damage import damage_bytes, flip_bit_of
from tests.chaos._small_states import resume_fault, state_at

FULL, SLICE = 10_000, 1_000
RESTORE_EVERY = 50  # cases; the older step is restored in one of so many


def list_files(step: Path) -> list[Path]:
    return sorted(path for path in step.rglob("*") if path.is_file())


def damage_file(step: Path, rng: random.Random) -> None:
    path = rng.choice([path for path in list_files(step) if path.stat().st_size])
    path.write_bytes(damage_bytes(rng, path.read_bytes()))


def flip_bit(step: Path, rng: random.Random) -> None:
    path = rng.choice([path for path in list_files(step) if path.stat().st_size])
    path.write_bytes(flip_bit_of(path.read_bytes(), rng))


def resize_file(step: Path, rng: random.Random) -> None:
    path = rng.choice(list_files(step))
    match rng.randrange(3):
        case 0:
            path.unlink()
        case 1:
            path.write_bytes(b"")
        case 2:
            path.write_bytes(path.read_bytes() + rng.randbytes(9))


def swap_files(step: Path, rng: random.Random) -> None:
    one, other = rng.sample(list_files(step), 2)
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def replace_by_link(step: Path, rng: random.Random) -> None:
    path = rng.choice([step, *step.rglob("*")])
    elsewhere = step.parent.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def create(path: Path, source: Path, rng: random.Random) -> None:
    """Creates a folder, a copy of the source, a link to it, or a file."""
    match rng.randrange(5):
        case 0:
            path.mkdir()
        case 1:
            shutil.copytree(source, path)
        case 2:
            path.symlink_to(source)
        case 3:
            os.mkfifo(path)
        case 4:
            path.write_bytes(rng.randbytes(rng.randrange(9)))


def add_entry(step: Path, rng: random.Random) -> None:
    folder = rng.choice([step, *(path for path in step.rglob("*") if path.is_dir())])
    name = rng.choice(["more", ".hidden", "\udcff", "0" * 200])
    create(folder / name, step.parent / "1", rng)


def replace_by_later_step(step: Path, rng: random.Random) -> None:
    create(step.with_name(rng.choice(["3", "999999", "9" * 18])), step, rng)
    shutil.rmtree(step)


def other_value(value: object, rng: random.Random) -> object:
    """A JSON value that differs somewhere."""
    if isinstance(value, dict) and value:
        key = rng.choice(sorted(value))
        match rng.randrange(3):
            case 0:
                return {name: one for name, one in value.items() if name != key}
            case 1:
                return {name + "x" * (name == key): one for name, one in value.items()}
        return {**value, key: other_value(value[key], rng)}
    if isinstance(value, list) and value:
        at = rng.randrange(len(value))
        return [*value[:at], other_value(value[at], rng), *value[at + 1 :]]
    if isinstance(value, str):
        return value[::-1] if value != value[::-1] else f"{value}0"
    return rng.choice([None, [], {}, -1, 10**400, 0.5, "", True])


def edit_manifest(step: Path, rng: random.Random) -> None:
    path = step / manifest.MANIFEST
    path.write_text(json.dumps(other_value(json.loads(path.read_text()), rng)))


def forge(step: Path, rng: random.Random) -> None:
    """Flips a bit of an array and rewrites the manifest to fit the files."""
    content = manifest.read_manifest(step)
    (step / manifest.MANIFEST).unlink()
    kernel = state_at(2)["params"]["kernel"].tobytes()  # too large to be among others
    (path,) = [path for path in list_files(step) if kernel in path.read_bytes()]
    path.write_bytes(path.read_bytes().replace(kernel, flip_bit_of(kernel, rng)))
    manifest.write_manifest(step, content)


ALTERATIONS = [
    *(damage_file, flip_bit, resize_file, swap_files, replace_by_link, add_entry),
    *(replace_by_later_step, edit_manifest, forge),
]


def prepare(folder: Path) -> Callable[[int, random.Random], str]:
    good, run = folder / "good", folder / "run"
    for step in (1, 2):
        write_step(good, step, state_at(step), keep=2)

    def check(case: int, rng: random.Random) -> str:
        shutil.rmtree(run, ignore_errors=True)
        steps = run / "checkpoints"
        shutil.copytree(good, steps)
        alter = ALTERATIONS[case % len(ALTERATIONS)]
        alter(steps / "2", rng)
        fault = resume_fault(steps, {1}) if alter is forge else latest_fault(steps, case)
        return fault and f"{alter.__name__}: {fault}"

    return check


def latest_fault(steps: Path, case: int) -> str:
    """Returns the fault in the chosen step and the warnings, or ""."""
    step, complaints = latest_step(steps)
    if step != 1:
        return resume_fault(steps, {2})
    set_aside = [path for path in steps.iterdir() if path.name.endswith(".damaged")]
    if not set_aside or b"damaged" not in " ".join(complaints).encode():
        return "the older step is used without a complaint"
    return "" if case % RESTORE_EVERY else resume_fault(steps, {1})
