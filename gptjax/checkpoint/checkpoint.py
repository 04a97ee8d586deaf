"""Training checkpoints: arrays written by Orbax, verified by a manifest of hashes.

    checkpoints/<step>/state/          arrays, written by Orbax
    checkpoints/<step>/manifest.json   hashes of every file and array, written last

Orbax loads flipped bits silently, hence the hashes: a step is valid only if all its
files match, and after restoring, on any mesh, each array must have the checksum it was
saved with.
"""

import contextlib
import errno
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental.multihost_utils import broadcast_one_to_all, sync_global_devices
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32

from gptjax.checkpoint.manifest import CorruptCheckpointError, read_manifest, write_manifest
from gptjax.checkpoint.retention import (
    apply_retention,
    begin_step,
    check_step,
    commit_step,
    latest_valid_step,
    list_steps,
    quarantine,
)
from gptjax.errors import LIMIT_ADVICE, ModelError, ResourceError, short_message, to_os_error
from gptjax.fileio.atomic import remove_path
from gptjax.tree import flatten_with_names, unflatten_names

# Per array file, so that several are hashed in parallel.
MAX_CHECKPOINT_FILE_BYTES = 1 << 28
MIN_FREE_BYTES = 1 << 20  # free space needed in addition to the arrays
UINT_DTYPES = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by item size in bytes

SaveFn = Callable[..., None]  # (step, tree, metadata)


@contextlib.contextmanager
def async_saver(
    checkpoint_dir: Path, keep: int, on_saved: Callable[[int], None] = lambda step: None
) -> Iterator[SaveFn]:
    """Yields `save(step, tree, metadata)`, which writes in a background thread.

    The caller may donate the arrays while they are written: on CPU, JAX copies donated
    buffers that are still referenced, and arrays on other devices are fetched first.
    Several processes save synchronously: they cannot synchronize in a thread. An error
    is raised by the next `save` or at the end of the block, which waits for the last.
    """

    def write_and_notify(step: int, tree: Any, *metadata: Any) -> None:
        write_step(checkpoint_dir, step, tree, keep, *metadata)
        on_saved(step)

    if jax.process_count() > 1:
        yield write_and_notify
        return
    pending: list[Future[None]] = []

    def wait_for_pending() -> None:
        while pending:
            wait(pending)  # a signal may raise here; the result is still needed
            pending.pop().result()

    def begin_save(step: int, tree: Any, *metadata: Any) -> None:
        wait_for_pending()
        check_disk_space(checkpoint_dir, tree)
        pending.append(executor.submit(write_and_notify, step, copy_to_host(tree), *metadata))

    try:
        with ThreadPoolExecutor(1, "checkpoint") as executor:
            yield begin_save
    finally:
        wait_for_pending()


def copy_to_host(tree: Any) -> Any:
    """Moves the arrays to host memory; those that are there already are not copied."""
    host_tree = jax.device_get(tree)
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # excluded by JAX_PLATFORMS
        return host_tree
    return jax.device_put(host_tree, cpu)


def write_step(
    checkpoint_dir: Path, step: int, tree: Any, keep: int, metadata: dict[str, Any] | None = None
) -> None:
    """Saves `tree` as `step`, then deletes all but the newest `keep` steps.

    The metadata, JSON values, are stored in the manifest. Earlier steps are kept if the
    folder cannot be written or a value is not finite.
    """
    is_main, partial_dir = jax.process_index() == 0, checkpoint_dir / f"{step}.partial"
    try:
        if is_main:
            begin_step(checkpoint_dir, step)
        sync_global_devices("checkpoint begun")
        checksums, nonfinite = checksum_tree(tree)
        if nonfinite:
            raise ModelError(
                f"step {step} is not saved: {nonfinite[0]} contains non-finite "
                "values. Lower optim.peak_lr or optim.grad_clip and rerun the command to "
                "resume from the last checkpoint."
            )
        write_arrays(partial_dir / "state", tree)
        if is_main:
            arrays = {name: [spec, checksums[name]] for name, spec in tree_spec(tree).items()}
            contents = {"step": step, "arrays": arrays, "metadata": metadata or {}}
            write_manifest(partial_dir, contents)
            commit_step(checkpoint_dir, step)
        sync_global_devices("checkpoint committed")
        if is_main:
            apply_retention(checkpoint_dir, step, keep)
    except OSError as error:
        if is_main:  # frees the space taken by the partial step
            with contextlib.suppress(OSError):
                remove_path(partial_dir)
        raise ModelError(
            f"cannot save step {step} in {checkpoint_dir}: {error}. Check that the folder "
            "can be written; earlier checkpoints are kept."
        ) from error


def write_arrays(path: Path, tree: Any) -> None:
    """Writes the arrays with Orbax, uncompressed: weights do not compress well."""
    options = ocp.args.PyTreeSave(tree, ocdbt_target_data_file_size=MAX_CHECKPOINT_FILE_BYTES)
    handler = ocp.PyTreeCheckpointHandler(use_compression=False)
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(path.absolute(), args=options)
    except Exception as error:  # Orbax documents no type; a full disk is a ValueError
        if jax.process_count() > 1 or isinstance(error, OSError):
            raise  # connection lost between processes: handled in `distributed`
        raise to_os_error(error, path) from error


def check_disk_space(checkpoint_dir: Path, tree: Any) -> None:
    """Checks that the disk has space for one more step."""
    if jax.process_index() > 0:
        return
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    needed = num_bytes + num_bytes // 10 + MIN_FREE_BYTES
    folders = [checkpoint_dir, *checkpoint_dir.absolute().parents]
    free = shutil.disk_usage(next(path for path in folders if path.exists())).free
    if free < needed:
        raise ResourceError(
            f"a checkpoint in {checkpoint_dir} needs {needed / 1e6:,.0f} MB, but "
            f"{free / 1e6:,.0f} MB are free. {LIMIT_ADVICE[errno.ENOSPC]}. Then run the same "
            "command again."
        )


class Restored(NamedTuple):
    """Restored training state."""

    step: int | None  # None if no step was ever saved
    tree: Any
    warnings: list[str]  # about quarantined steps
    metadata: dict[str, Any]  # as saved with the step


def restore_latest(checkpoint_dir: Path, like: Any) -> Restored:
    """Restores the newest valid step, or returns `like` if no step was saved."""
    warnings: list[str] = []
    while True:
        step, new_warnings = latest_step(checkpoint_dir)
        warnings += new_warnings
        if step is None:
            return Restored(None, like, warnings, {})
        try:
            tree = restore(checkpoint_dir, step, like)
            metadata = read_manifest(checkpoint_dir / str(step)).get("metadata", {})
            return Restored(step, tree, warnings, metadata)
        except CorruptCheckpointError as error:
            if jax.process_index() == 0:
                warnings.append(quarantine(checkpoint_dir, step, str(error)))


def latest_step(checkpoint_dir: Path) -> tuple[int | None, list[str]]:
    """`latest_valid_step` of process 0; the others get the step without warnings."""
    if jax.process_count() == 1:
        return latest_valid_step(checkpoint_dir)
    step, warnings = latest_valid_step(checkpoint_dir) if jax.process_index() == 0 else (None, [])
    agreed_step = int(broadcast_one_to_all(np.int32(-1 if step is None else step)))
    return (None if agreed_step < 0 else agreed_step), warnings


def restore(checkpoint_dir: Path, step: int, like: Any) -> Any:
    """Restores a tree with the structure, dtypes and sharding of `like`.

    Raises CorruptCheckpointError if a restored array differs from the saved one, and
    ModelError if Orbax cannot restore arrays with these names, shapes and dtypes.
    """
    arrays = read_manifest(checkpoint_dir / str(step))["arrays"]
    saved = {name: text for name, (text, _) in arrays.items()}
    if saved != tree_spec(like):
        names = {name for name, _ in saved.items() ^ tree_spec(like).items()}
        raise ModelError(
            f"the arrays of checkpoint {step} in {checkpoint_dir} differ from those of "
            f"this model and optimizer: {sorted(names)[:3]}. Use the config it was "
            "saved with, or another --run."
        )
    path = (checkpoint_dir / str(step) / "state").absolute()
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
            tree = checkpointer.restore(path, abstract)
    except Exception as error:  # Orbax documents no type
        if jax.process_count() > 1:
            raise  # connection lost between processes: handled in `distributed`
        raise ModelError(
            f"cannot restore {path}: {short_message(error)}. The files are unchanged "
            "since they were saved: check the free memory and the version of Orbax."
        ) from error
    check_checksums(tree, arrays)
    return tree


def read_latest_params(checkpoint_dir: Path) -> tuple[int, dict[str, np.ndarray]]:
    """Reads the parameters of the newest valid step into host memory, by name.

    For other processes than the run's own, which may be training: changes no file.
    """
    problem = "its first one is not written yet"
    for step in reversed(list_steps(checkpoint_dir)):
        # A run deletes old steps, but never the newest ones, while they are read.
        try:
            return step, read_params(checkpoint_dir, step)
        except CorruptCheckpointError as error:
            problem = f"checkpoint {step} is damaged: {error}"
    raise ModelError(
        f"there is no valid checkpoint in {checkpoint_dir}: {problem}. Wait for the "
        "next one, or resume the run with its command."
    )


def read_params(checkpoint_dir: Path, step: int) -> dict[str, np.ndarray]:
    """Reads the parameters of one step; CorruptCheckpointError if it is invalid."""
    if invalid := check_step(checkpoint_dir, step):
        raise CorruptCheckpointError(invalid)
    step_dir = (checkpoint_dir / str(step)).absolute()
    arrays, empty = read_manifest(step_dir)["arrays"], {}
    for name, (spec, _) in arrays.items():
        dtype, _, shape = spec.partition("[")  # see `tree_spec`
        if name.startswith("params/"):
            empty[name] = np.empty(json.loads(f"[{shape}"), jnp.dtype(dtype))
    like = unflatten_names(empty)
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), like)
    options = ocp.args.PyTreeRestore(like, restore_args=restore_args, partial_restore=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.restore(step_dir / "state", args=options)
    check_checksums(tree, arrays)
    leaves = flatten_with_names(tree)
    return {name.removeprefix("params/"): leaf for name, leaf in leaves.items()}


def tree_spec(tree: Any) -> dict[str, str]:
    """Dtype and shape of every leaf by name, such as "float32[3, 4]"."""
    leaves = flatten_with_names(tree)
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()}


def check_checksums(tree: Any, arrays: dict[str, Any]) -> None:
    """Compares restored arrays with the (spec, checksum) of the saved ones."""
    for name, value in checksum_tree(tree)[0].items():
        if value != arrays[name][1]:
            raise CorruptCheckpointError(f"the values of {name!r} differ from the saved ones")


def checksum_tree(tree: Any) -> tuple[dict[str, int], list[str]]:
    """Checksum of each array by name, and the names of arrays with non-finite values.

    A collective operation: all processes must call it, and get the same result, which
    is equal on any mesh.
    """
    leaves = flatten_with_names(tree)
    sharding = getattr(next(iter(leaves.values())), "sharding", None)
    is_named = isinstance(sharding, NamedSharding)
    replicated = NamedSharding(sharding.mesh, PartitionSpec()) if is_named else None
    results = _jit_checksums(replicated)([*leaves.values()])
    sums, is_finite = (np.asarray(x).tolist() for x in results)
    nonfinite = [name for name, ok in zip(leaves, is_finite, strict=True) if not ok]
    return dict(zip(leaves, sums, strict=True)), nonfinite


@functools.cache
def _jit_checksums(out_sharding: NamedSharding | None) -> Any:
    """Checksum and finiteness of each leaf; one jitted function per sharding."""

    def checksums(leaves: list[Any]) -> tuple[Array, Array]:
        is_finite = [jnp.all(jnp.isfinite(x)) for x in leaves]
        return jnp.stack([checksum(x) for x in leaves]), jnp.stack(is_finite)

    return jax.jit(checksums, out_shardings=out_sharding)


def checksum(x: Any) -> UInt32[Array, ""]:
    """Sum of the bits of all elements, times their index weights.

    Elements of 8 bytes become two of 4 bytes on a new last axis.
    """
    x = jnp.asarray(x)
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    uint_dtype = UINT_DTYPES.get(x.dtype.itemsize, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, uint_dtype).astype(jnp.uint32)
    return jnp.sum(bits * index_weights(bits.shape), dtype=jnp.uint32)


def index_weights(shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """An odd pseudorandom weight for each row-major index.

    The mixing steps are those of the MurmurHash3 finalizer (Appleby, public domain).
    """
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        step = jnp.uint32(stride % 2**32)
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * step
        stride *= shape[axis]
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        index = (index ^ (index >> jnp.uint32(shift))) * jnp.uint32(factor)
    return (index ^ (index >> jnp.uint32(16))) | jnp.uint32(1)
