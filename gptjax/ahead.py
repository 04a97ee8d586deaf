"""A train step compiled for devices that are only described, which tells its memory.

TPUs need the package libtpu, from the extra [tpu-plan]; CPUs have to be emulated.
"""

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gptjax.chips import Topology
from gptjax.collectives import Collective, collectives
from gptjax.config import RunConfig
from gptjax.loss import next_token_loss
from gptjax.model import init
from gptjax.optim import make_optimizer
from gptjax.sharding import AXES, BATCH, check_layout, layout, mesh_sizes, on
from gptjax.train import init_state, make_train_step

SHORT_OF_MEMORY = re.compile(r"[Uu]sed ([\d.]+)([KMG]) of ([\d.]+)([KMG])")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


class Compiled(NamedTuple):
    """What the compiler says of one device's part of a step."""

    arguments: int  # bytes of parameters, optimiser state and batch
    temporaries: int  # bytes of all else, at the worst moment
    fits: bool
    collectives: list[Collective]  # nothing, where it does not fit

    @property
    def memory(self) -> int:
        """Bytes of a device that are in use at the worst moment."""
        return self.arguments + self.temporaries


def can_compile(topology: Topology) -> bool:
    """Whether this machine has the compiler for such devices."""
    if topology.chip.platform == "tpu":
        return importlib.util.find_spec("libtpu") is not None
    return topology.chip.platform == "cpu" and jax.device_count() >= topology.devices


def describe(topology: Topology) -> list[Any]:
    """The devices, as JAX's compiler takes them."""
    if topology.chip.platform == "cpu":
        return jax.devices()[: topology.devices]
    from jax.experimental.topologies import get_topology_desc

    # Only the compiler is wanted: it is not to look for a TPU, nor to keep others out.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    name, _, _ = topology.name.partition(":")
    one = {"chips_per_host_bounds": [1, 1, 1]} if topology.devices == 1 else {}
    described = get_topology_desc(
        platform="tpu", topology_name=f"{name}:{topology.shape}", **one
    )
    return list(described.devices)


def compile_step(c: RunConfig, topology: Topology) -> Compiled:
    """One pretraining step, all parameters trained, as that many devices run it.

    Args:
        c: of the run, settled by `gptjax.budget`.
        topology: that `can_compile` takes.

    Raises:
        ConfigError: the model does not split over the mesh.
    """
    devices = describe(topology)
    sizes = mesh_sizes(c.mesh, len(devices))
    devices = devices[: math.prod(sizes)]
    mesh = Mesh(np.array(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 3)
    optimizer = make_optimizer(c.optim, c.train.steps)
    state = jax.eval_shape(
        lambda key: init_state(init(c.model, key), optimizer, key), jax.random.key(0)
    )
    check_layout(state.params, mesh)
    where = layout(state, mesh)

    def described(leaf: Any, sharding: NamedSharding) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    rows = NamedSharding(mesh, PartitionSpec(BATCH))
    shape = c.data.batch_size, c.model.context_length
    whole = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
    batch = dict.fromkeys(("tokens", "targets", "segments", "positions"), whole)
    batch["weights"] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows)
    loss = next_token_loss(c.model, c.train.loss_chunk)
    step = make_train_step(loss, optimizer, c.train.accumulate)
    options: dict[str, Any] = {"donate_argnums": 0}
    options["out_shardings"] = where, NamedSharding(mesh, PartitionSpec())
    with on(mesh):
        lowered = jax.jit(step, **options).lower(
            jax.tree.map(described, state, where), batch
        )
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if found := SHORT_OF_MEMORY.search(str(error)):
            used = float(found[1]) * UNITS[found[2]]
            return Compiled(0, round(used), False, [])
        raise
    memory: Any = program.memory_analysis()
    kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes + kept,
        True,  # or else the compiler would have refused
        collectives(program.as_text() or ""),
    )
