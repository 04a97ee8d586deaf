"""Training state on disk: Orbax writes the arrays, a manifest makes them count.

    checkpoints/<step>/state/          what Orbax wrote
    checkpoints/<step>/manifest.json   hashes of every file and array, written last

A step is built under another name and renamed when it is complete, so a folder named
by a number is whole unless something changed it later. Orbax loads flipped bits without
a word, hence the hashes: only a step whose files all match counts, and after restoring,
on whatever mesh, each array has to have the checksum it was saved with.
"""

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental.multihost_utils import (
    broadcast_one_to_all,
    sync_global_devices,
)

from gptjax.checksums import checked
from gptjax.errors import ModelError
from gptjax.manifest import DamagedError, read_manifest, write_manifest
from gptjax.step_folders import begin, finish, newest, remove, retire, set_aside
from gptjax.step_folders import saved_steps as saved_steps  # for those who read
from gptjax.tree import named_leaves

FILE_BYTES = 1 << 28  # of one file of arrays, so that several are hashed at a time
SPARE_BYTES = 1 << 20  # that a save needs beside its arrays, at least
OS_ERROR = re.compile(r"os_error_code='?(\d+)")  # in what TensorStore says

Save = Callable[[int, Any], None]


@contextlib.contextmanager
def saver(
    folder: Path, keep: int, saved: Callable[[int], None] = lambda step: None
) -> Iterator[Save]:
    """Yields `save(step, tree)`, which returns long before the disk has it all.

    Meanwhile the caller may donate the arrays: on a CPU JAX copies what is donated
    while somebody still sees it, and from other devices all is fetched first. The end
    of the `with` waits for the last save. Many processes wait for one another in every
    save, which threads beside their training could not, so they save at once.

    Args:
        folder: of the steps.
        keep: newest steps that are not deleted.
        saved: called, maybe by another thread, when a step counts.

    Raises:
        ModelError: from a later `save` or from the end of the `with`, if a step could
            not be saved; earlier ones are kept.
    """

    def store_and_say(step: int, tree: Any) -> None:
        store(folder, step, tree, keep)
        saved(step)

    if jax.process_count() > 1:
        yield store_and_say
        return
    pending: list[Future[None]] = []

    def settle() -> None:
        while pending:
            wait(pending)  # a signal may raise here, and the result is still due
            pending.pop().result()

    def begin_save(step: int, tree: Any) -> None:
        settle()
        check_space(folder, tree)
        pending.append(thread.submit(store_and_say, step, on_host(tree)))

    try:
        with ThreadPoolExecutor(1, "checkpoint") as thread:
            yield begin_save
    finally:
        settle()


def on_host(tree: Any) -> Any:
    """The arrays in the memory of this machine, whatever happens to their originals.

    Where they lie there already none is copied.
    """
    host = jax.device_get(tree)
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return host
    return jax.device_put(host, cpu)


def save(folder: Path, step: int, tree: Any, keep: int) -> None:
    """Saves `tree` as `step`, then deletes all but the newest `keep` steps.

    Raises:
        ModelError: the folder cannot be written, or a value is not finite; earlier
            steps are untouched.
    """
    check_space(folder, tree)
    store(folder, step, tree, keep)


def store(folder: Path, step: int, tree: Any, keep: int) -> None:
    """`save`, where there is space."""
    main, building = jax.process_index() == 0, folder / f"{step}.partial"
    try:
        if main:
            begin(folder, step)
        sync_global_devices("checkpoint begun")
        sums = finite_checksums(step, tree)
        write_arrays(building / "state", tree)
        if main:
            known = described(tree)
            arrays = {name: [known[name], sums[name]] for name in known}
            write_manifest(building, {"step": step, "arrays": arrays})
            finish(folder, step)
        sync_global_devices("checkpoint sealed")
        if main:
            retire(folder, step, keep)
    except OSError as error:
        if main:  # what was written so far may be what fills the disk
            with contextlib.suppress(OSError):
                remove(building)
        raise ModelError(
            f"cannot save step {step} in {folder}: {error}. Free space or name "
            "another run folder; earlier checkpoints are kept."
        ) from error


def finite_checksums(step: int, tree: Any) -> dict[str, int]:
    """The checksum of each array.

    Raises:
        ModelError: a value is not finite.
    """
    sums, endless = checked(tree)
    if endless:
        more = f" and {len(endless) - 1} more" if endless[1:] else ""
        raise ModelError(
            f"step {step} is not saved: {endless[0]}{more} holds values that are not "
            "finite. Lower optim.peak_lr or optim.grad_clip, and start the same "
            "command again: it goes on from the last checkpoint."
        )
    return sums


def write_arrays(path: Path, tree: Any) -> None:
    """Lets Orbax write, without compression: random digits do not shrink.

    Raises:
        OSError: they cannot be written.
    """
    options = ocp.args.PyTreeSave(tree, ocdbt_target_data_file_size=FILE_BYTES)
    handler = ocp.PyTreeCheckpointHandler(use_compression=False)
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(path.absolute(), args=options)
    except Exception as error:  # Orbax names no type; a full disk is a ValueError
        if jax.process_count() > 1 or isinstance(error, OSError):
            raise  # the connection between processes broke: `distributed` says so
        number = [int(text) for text in OS_ERROR.findall(str(error))[:1]]
        raise OSError(*number, first_line(error)) from error


def first_line(error: Exception) -> str:
    """What an error of another library comes to."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def check_space(folder: Path, tree: Any) -> None:
    """Whether the disk has room for one more step.

    Raises:
        ModelError: it has not.
    """
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    needed = size + size // 10 + SPARE_BYTES
    if jax.process_index() > 0:
        return
    there = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise ModelError(
            f"a checkpoint in {folder} needs {needed / 1e6:,.0f} MB, and "
            f"{free / 1e6:,.0f} MB are free. Free space, or name another run folder; "
            "earlier checkpoints are kept."
        )


class Resumed(NamedTuple):
    """Where a run goes on."""

    step: int | None  # None: nothing was ever saved
    tree: Any
    complaints: list[str]  # of steps that were set aside


def resume(folder: Path, like: Any) -> Resumed:
    """The newest step that verifies and comes back as it was saved, else `like`.

    Of many processes, the first looks and tells the others; it alone has complaints.

    Raises:
        ModelError: there is something, but nothing that verifies; or it holds other
            arrays than `like`.
    """
    complaints: list[str] = []
    while True:
        step, found = latest(folder)
        complaints += found
        if step is None:
            return Resumed(None, like, complaints)
        try:
            return Resumed(step, restore(folder, step, like), complaints)
        except DamagedError as error:
            if jax.process_index() == 0:
                complaints.append(set_aside(folder, step, str(error)))


def latest(folder: Path) -> tuple[int | None, list[str]]:
    """The newest step that verifies (None: nothing was ever saved), and complaints.

    Of many processes, the first looks and tells the others.

    Raises:
        ModelError: there is something, but no step that verifies.
    """
    if jax.process_count() == 1:
        return newest(folder)
    step, complaints = newest(folder) if jax.process_index() == 0 else (None, [])
    told = int(broadcast_one_to_all(np.int32(-1 if step is None else step)))
    return (None if told < 0 else told), complaints


def restore(folder: Path, step: int, like: Any) -> Any:
    """The saved tree, with the structure, dtypes and sharding of `like`.

    Raises:
        DamagedError: what came back is not what was saved.
        ModelError: the saved arrays have other names, shapes or dtypes.
    """
    arrays = read_manifest(folder / str(step))["arrays"]
    saved = {name: text for name, (text, _) in arrays.items()}
    if saved != described(like):
        names = {name for name, _ in saved.items() ^ described(like).items()}
        raise ModelError(
            f"checkpoint {step} in {folder} holds other arrays than this model and "
            f"optimiser: {sorted(names)[:3]}. Use the config it was saved with, or "
            "another --run."
        )
    tree = read_arrays((folder / str(step)).absolute() / "state", like)
    sums, _ = checked(tree)
    if changed := [name for name in sums if sums[name] != arrays[name][1]]:
        raise DamagedError(
            f"{changed[0]!r} came back with other values than were saved"
        )
    return tree


def read_arrays(path: Path, like: Any) -> Any:
    """Lets Orbax read arrays with the structure, dtypes and sharding of `like`.

    Raises:
        ModelError: it cannot, although the files are those that it wrote.
    """
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path, abstract)
    except Exception as error:  # Orbax names no type
        if jax.process_count() > 1:
            raise  # the connection between processes broke: `distributed` says so
        raise ModelError(
            f"cannot restore {path}: {first_line(error)}. Its files are what was "
            "saved: is there enough memory, and is Orbax the version that saved it?"
        ) from error


def described(tree: Any) -> dict[str, str]:
    """Dtype and shape of every leaf by name."""
    leaves = named_leaves(tree)
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()}
