"""Ahead-of-time compilation of the train step, for its memory and collectives.

The devices need not be present: TPU topologies need libtpu, from the extra [tpu-plan];
CPU devices are emulated.
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

from gptjax.config import RunConfig
from gptjax.model.gpt import init
from gptjax.parallel.sharding import (
    BATCH_AXES,
    MESH_AXES,
    check_divisible,
    param_shardings,
    resolve_mesh_shape,
    use_mesh,
)
from gptjax.planning.collectives import Collective, parse_collectives
from gptjax.training.hardware import Topology
from gptjax.training.loss import make_lm_loss_fn
from gptjax.training.optimizer import make_optimizer
from gptjax.training.train_step import init_state, make_train_step

OOM_PATTERN = re.compile(r"[Uu]sed ([\d.]+)([KMG]) of [\d.]+[KMG]")
BYTES_PER_UNIT = {"K": 2**10, "M": 2**20, "G": 2**30}


class CompileReport(NamedTuple):
    """Memory per device and collectives of a compiled step."""

    argument_bytes: int  # of parameters, optimizer state and batch
    temp_bytes: int  # at peak, of everything else
    fits: bool
    collectives: list[Collective]  # empty if it does not fit

    @property
    def peak_bytes(self) -> int:
        """Peak bytes in use per device."""
        return self.argument_bytes + self.temp_bytes


def can_compile(topology: Topology) -> bool:
    """Returns True if this machine can compile for the topology."""
    if topology.chip.platform == "tpu":
        return importlib.util.find_spec("libtpu") is not None
    return topology.chip.platform == "cpu" and jax.device_count() >= topology.devices


def get_target_devices(topology: Topology) -> list[Any]:
    """Returns JAX device descriptions for a topology."""
    if topology.chip.platform == "cpu":
        return jax.devices()[: topology.devices]
    from jax.experimental.topologies import get_topology_desc

    # Only compile: do not search for a TPU, and do not lock libtpu.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    name, _, _ = topology.name.partition(":")
    options = {"chips_per_host_bounds": [1, 1, 1]} if topology.devices == 1 else {}
    return list(get_topology_desc(f"{name}:{topology.shape}", "tpu", **options).devices)


def compile_step(config: RunConfig, topology: Topology) -> CompileReport:
    """Compiles one pretraining step, of a config from `estimate.resolve_config`."""
    devices = get_target_devices(topology)
    mesh_shape = resolve_mesh_shape(config.mesh, len(devices))
    devices = devices[: math.prod(mesh_shape)]
    mesh = Mesh(np.array(devices).reshape(mesh_shape), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    optimizer = make_optimizer(config.optim, config.train.steps)
    state = jax.eval_shape(
        lambda key: init_state(init(config.model, key), optimizer, key), jax.random.key(0)
    )
    check_divisible(state.params, mesh)
    state_shardings = param_shardings(state, mesh)
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        *(state, state_shardings),
    )
    row_sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    shape = config.data.batch_size, config.model.context_length
    token_struct = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=row_sharding)
    batch = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), token_struct)
    batch["loss_weights"] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=row_sharding)
    loss = make_lm_loss_fn(config.model, config.train.loss_chunk_size)
    step = make_train_step(loss, optimizer, config.train.accumulate)
    out_shardings = state_shardings, NamedSharding(mesh, PartitionSpec())
    with use_mesh(mesh):
        lowered = jax.jit(step, donate_argnums=0, out_shardings=out_shardings).lower(state, batch)
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not (found := OOM_PATTERN.search(str(error))):
            raise
        used = float(found[1]) * BYTES_PER_UNIT[found[2]]
        return CompileReport(0, round(used), False, [])
    memory: Any = program.memory_analysis()
    output_bytes = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return CompileReport(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes + output_bytes,
        True,  # otherwise compilation would have failed
        parse_collectives(program.as_text() or ""),
    )
