"""A checkpoint altered in any way is never loaded as if it were not.

Each case alters the newer of two steps. Either what comes back is the newer one to the
last bit, as where two equal files changed places, or it is set aside, with a complaint,
for the older one. Where the manifest was forged to fit the files, the checksums of the
arrays tell.
"""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from gptjax.checkpoint import manifest
from gptjax.checkpoint.checkpoint import latest_step, write_step
from tests.chaos._small_states import resume_fault, state_at

FULL, SLICE = 10_000, 1_000
READ_BACK = 50  # of so many cases, the older step is read in one


def files_of(step: Path) -> list[Path]:
    """All files of a step, in order."""
    return sorted(path for path in step.rglob("*") if path.is_file())


def changed(path: Path, change: Callable[[bytearray], object]) -> None:
    """Alters the bytes of a file in place."""
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def flip(step: Path, rng: random.Random) -> None:
    """One bit."""

    def turn(data: bytearray) -> None:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)

    changed(rng.choice([path for path in files_of(step) if path.stat().st_size]), turn)


def truncate(step: Path, rng: random.Random) -> None:
    """The end of a file is gone."""
    path = rng.choice([path for path in files_of(step) if path.stat().st_size])
    os.truncate(path, rng.randrange(path.stat().st_size))


def zero(step: Path, rng: random.Random) -> None:
    """64 bytes are zeros."""
    path = rng.choice([path for path in files_of(step) if path.stat().st_size])
    at = rng.randrange(path.stat().st_size)

    def clear(data: bytearray) -> None:
        data[at : at + 64] = bytes(len(data[at : at + 64]))

    changed(path, clear)


def delete(step: Path, rng: random.Random) -> None:
    """A file is gone."""
    rng.choice(files_of(step)).unlink()


def append(step: Path, rng: random.Random) -> None:
    """A file is longer."""
    changed(rng.choice(files_of(step)), lambda d: d.extend(rng.randbytes(9)))


def swap(step: Path, rng: random.Random) -> None:
    """Two files have changed places."""
    one, other = rng.sample(files_of(step), 2)
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def empty(step: Path, rng: random.Random) -> None:
    """A file has no bytes."""
    rng.choice(files_of(step)).write_bytes(b"")


def link(step: Path, rng: random.Random) -> None:
    """A file or a folder is a link to the same elsewhere."""
    path = rng.choice([step, *step.rglob("*")])
    elsewhere = step.parent.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def extra(step: Path, rng: random.Random) -> None:
    """Something else is there too."""
    folders = [step, *(path for path in step.rglob("*") if path.is_dir())]
    path = rng.choice(folders) / rng.choice(["more", ".hidden", "\udcff", "0" * 200])
    kind = rng.randrange(4)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to("/etc/passwd")
    else:
        path.write_bytes(rng.randbytes(rng.randrange(3)))


def alien(step: Path, rng: random.Random) -> None:
    """Something has the name of a later step."""
    later = step.with_name(rng.choice(["3", "999999", "9" * 18]))
    kind = rng.randrange(4)
    if kind == 0:
        later.mkdir()
    elif kind == 1:
        shutil.copytree(step, later)
    elif kind == 2:
        later.symlink_to(step)
    else:
        later.write_bytes(rng.randbytes(9))
    shutil.rmtree(step)


def other_value(value: object, rng: random.Random) -> object:
    """A JSON value that differs somewhere."""
    if isinstance(value, dict) and value:
        key = rng.choice(sorted(value))
        kind = rng.randrange(3)
        if kind == 0:
            return {name: one for name, one in value.items() if name != key}
        if kind == 1:
            return {name + "x" * (name == key): one for name, one in value.items()}
        return {**value, key: other_value(value[key], rng)}
    if isinstance(value, list) and value:
        at = rng.randrange(len(value))
        return [*value[:at], other_value(value[at], rng), *value[at + 1 :]]
    if isinstance(value, str):
        return value[::-1] if value != value[::-1] else f"{value}0"
    return rng.choice([None, [], {}, -1, 10**400, 0.5, "", True])


def edit(step: Path, rng: random.Random) -> None:
    """The manifest says something else, in right JSON."""
    path = step / manifest.MANIFEST
    path.write_text(json.dumps(other_value(json.loads(path.read_text()), rng)))


def forge(step: Path, rng: random.Random) -> None:
    """A bit of an array has flipped, and the manifest was made to fit the files."""
    about = manifest.read_manifest(step)
    (step / manifest.MANIFEST).unlink()
    kernel = state_at(2)["params"]["kernel"].tobytes()  # too large to be among others
    (path,) = [path for path in files_of(step) if kernel in path.read_bytes()]
    at = path.read_bytes().index(kernel) + rng.randrange(len(kernel))

    def turn(data: bytearray) -> None:
        data[at] ^= 1 << rng.randrange(8)

    changed(path, turn)
    manifest.write_manifest(step, about)


ALTERED = [*(flip, truncate, zero, delete, append, swap), *(empty, link, extra, alien, edit, forge)]


def run(seed: int, cases: Sequence[int], folder: Path) -> Iterator[str]:
    """What went wrong with each altered checkpoint, or ""."""
    good, steps = folder / "good", folder / "run" / "checkpoints"
    for step in (1, 2):
        write_step(good, step, state_at(step), keep=2)
    shutil.copytree(good / "1", steps / "1")
    for case in cases:
        rng = random.Random(f"{seed} {case}")
        shutil.copytree(good / "2", steps / "2")
        alter = ALTERED[case % len(ALTERED)]
        alter(steps / "2", rng)
        try:
            forged = alter is forge
            fault = resume_fault(steps, {1}) if forged else told(steps, case)
        except Exception as error:  # whatever it is, it should not have come
            fault = f"{type(error).__name__}: {error}"
        yield fault and f"{alter.__name__}: {fault}"
        for path in [*steps.iterdir(), folder / "run" / "elsewhere"]:
            if path.name != "1":
                remove(path)


def told(steps: Path, case: int) -> str:
    """What is wrong with what a start finds and says, or ""."""
    step, complaints = latest_step(steps)
    if step != 1:
        return resume_fault(steps, {2})
    aside = [path for path in steps.iterdir() if path.name.endswith(".damaged")]
    if not aside or "damaged" not in " ".join(complaints).encode().decode():
        return "the older step is used without a word"
    return "" if case % READ_BACK else resume_fault(steps, {1})


def remove(path: Path) -> None:
    """Whatever it is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
