"""What programs send: read from their text, and equal to what arithmetic says."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import gptjax
from gptjax.config import DataConfig, GPTConfig, MeshConfig, OptimConfig, RunConfig, TrainConfig
from gptjax.parallel.sharding import BATCH_AXES, MESH_AXES, make_mesh, param_shardings, use_mesh
from gptjax.planning.collectives import (
    Collective,
    estimate_collective_bytes,
    group_size,
    parse_collectives,
    trip_counts,
)
from gptjax.training.loss import batch_loss
from gptjax.training.optimizer import make_optimizer
from gptjax.training.train_step import init_state, make_train_step

pytestmark = pytest.mark.mesh

T, ROWS = 16, 2  # positions, rows of each shard of the batch
SHAPE = {"context_length": T, "n_layers": 2, "n_heads": 8, "d_model": 64}
MODEL = GPTConfig(vocab_size=64, dtype="float32", attention="reference", **SHAPE)


def run_of(sizes, accumulate=1, **changes):
    """Work that grows with the devices."""
    rows = ROWS * accumulate * sizes[0] * sizes[1]
    return RunConfig(
        model=dataclasses.replace(MODEL, **changes),
        data=DataConfig(batch_size=rows),
        train=TrainConfig(accumulate=accumulate, loss_chunk_size=8),
        mesh=MeshConfig(**dict(zip(MESH_AXES, sizes, strict=True))),
    )


@functools.cache
def program(run, optimizer=None):
    """The compiled step of a run."""
    mesh, c = make_mesh(run.mesh), run.model
    optimizer = optimizer or optax.sgd(1.0)
    state = jax.eval_shape(
        lambda key: init_state(gptjax.init(c, key), optimizer, key), jax.random.key(0)
    )
    where = param_shardings(state, mesh)
    shape = (run.data.batch_size, T)

    def described(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def rows(dtype):
        sharding = NamedSharding(mesh, P(BATCH_AXES))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    batch = {n: rows("int32") for n in ("tokens", "targets", "segment_ids", "positions")}
    batch["loss_weights"] = rows("float32")
    step = make_train_step(
        lambda params, batch, key: batch_loss(c, params, batch, chunk_size=8),
        optimizer,
        run.train.accumulate,
    )
    step_fn = jax.jit(step, donate_argnums=0, out_shardings=(where, None))
    with use_mesh(mesh):
        return step_fn.lower(jax.tree.map(described, state, where), batch).compile()


def assert_sends_what_is_expected(run, optimizer=None):
    """To 5%: sums of single numbers, such as the norm, are left out of the formula.

    And XLA sometimes finds a cheaper way to look up a table that is split twice.
    """
    mesh = make_mesh(run.mesh)

    expected = estimate_collective_bytes(run, tuple(mesh.shape.values()), 4, is_emulated=True)

    found = parse_collectives(program(run, optimizer).as_text())
    gathered = sum(one.bytes_sent for one in found if one.kind == "all-gather")
    reduced = sum(one.bytes_sent for one in found if one.kind == "all-reduce")
    assert {one.kind for one in found} <= {"all-gather", "all-reduce"}
    assert gathered == pytest.approx(expected["weights"], rel=0.05)
    sums = expected["gradients"] + expected["activations"]
    assert reduced == pytest.approx(sums, rel=0.05)


@pytest.mark.fast
@pytest.mark.parametrize("axis", MESH_AXES)
@pytest.mark.parametrize("devices", [2, pytest.param(4, marks=pytest.mark.slow), 8], ids=str)
def test_a_step_sends_what_its_mesh_needs_as_rows_grow_with_devices(axis, devices):
    sizes = tuple(devices if name == axis else 1 for name in MESH_AXES)

    assert_sends_what_is_expected(run_of(sizes))


@pytest.mark.parametrize(
    ("accumulate", "changes"),
    [
        (2, {"tie_embeddings": False}),
        *[
            pytest.param(1, changes, marks=pytest.mark.slow)
            for changes in ({}, {"remat": "dots"}, {"remat": "full"}, {"n_layers": 3})
        ],
    ],
)
def test_a_mesh_of_all_axes_sends_what_each_of_them_needs(accumulate, changes):
    optimizer = make_optimizer(OptimConfig(), 100)

    assert_sends_what_is_expected(run_of((2, 2, 2), accumulate, **changes), optimizer)


def test_data_parallel_work_sends_every_gradient_twice_but_what_is_its_own():
    params = jax.eval_shape(lambda: gptjax.init(MODEL, jax.random.key(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))

    expected = estimate_collective_bytes(run_of((8, 1, 1)), (8, 1, 1), 4)

    gradients = pytest.approx(4 * count * 2 * 7 / 8)
    assert expected == {"weights": 0, "gradients": gradients, "activations": 0}


def test_accelerators_send_less_than_a_cpu_and_bfloat16_half_of_float32():
    fsdp, tensor = (run_of(sizes, n_layers=40) for sizes in ((1, 8, 1), (1, 1, 8)))

    def ratio(run, name, one, other):
        sizes = tuple(make_mesh(run.mesh).shape.values())
        first, second = (
            estimate_collective_bytes(run, sizes, *args)[name] for args in (one, other)
        )
        return first / second

    assert ratio(fsdp, "gradients", (4,), (4, True)) == pytest.approx(1 / 2, abs=0.01)
    assert ratio(tensor, "activations", (4,), (4, True)) == pytest.approx(4 / 6, abs=0.01)
    for run, name in ((fsdp, "gradients"), (fsdp, "weights"), (tensor, "activations")):
        assert ratio(run, name, (2,), (4,)) == pytest.approx(1 / 2, abs=0.01)


@pytest.mark.fast
def test_no_more_than_a_layer_is_gathered_at_a_time_and_none_is_kept():
    """What ten more layers need is less than the half of their gathered matrices.

    Wide layers: that half is then more than what they keep of a few positions.
    """
    layer, programs = 4 * 12 * 256**2, {}
    for depth in (2, 12):
        programs[depth] = program(run_of((1, 8, 1), n_layers=depth, d_model=256))

    found = parse_collectives(programs[12].as_text())
    gathers = [one for one in found if one.kind == "all-gather"]
    assert max(one.bytes for one in gathers) <= layer
    of_layers = sum(one.bytes * one.trip_count for one in gathers if one.trip_count == 12)
    assert of_layers == 2 * 12 * layer
    needed = {n: p.memory_analysis().temp_size_in_bytes for n, p in programs.items()}
    assert needed[12] - needed[2] < 10 * layer / 2


LOOPS = """HloModule step, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%inner (x: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %g = f32[32,8]{1,0} all-gather(%v), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
}

%inner_condition (x: (s32[], f32[4,8])) -> pred[] {
  %n = s32[] constant(7)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%outer.2 (x: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %w = (s32[], f32[4,8]) while(%t), condition=%inner_condition, body=%inner
  %r = f32[10]{0} all-reduce(%y), channel_id=2, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
}

%outer_condition.2 (x: (s32[], f32[4,8])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%shared (x: f32[]) -> bf16[6] {
  %p = bf16[6]{0} collective-permute(%h), channel_id=3, source_target_pairs={{0,1},{1,0}}
}

ENTRY %main (a: f32[4,8]) -> f32[4,8] {
  %l = (s32[], f32[4,8]) while(%s), condition=%outer_condition.2, body=%outer.2, backend_config={"known_trip_count":{"n":"3"}}
  %c = bf16[6] call(%z), to_apply=%shared
  %d = bf16[6] call(%z), to_apply=%shared
}
"""  # noqa: E501


@pytest.mark.fast
def test_what_a_loop_sends_counts_as_often_as_it_turns():
    """Three turns, known, of seven, read from the condition as TPUs write it."""
    gather, reduce, permute = parse_collectives(LOOPS)

    assert gather == Collective("all-gather", 4 * 32 * 8, 8, 21)
    assert reduce == Collective("all-reduce", 40, 2, 3)
    assert permute == Collective("collective-permute", 12, 2, 2)
    assert gather.bytes_sent == 21 * 1024 * 7 / 8
    assert reduce.bytes_sent == 3 * 40
    assert permute.bytes_sent == 24


def test_a_sum_that_is_split_in_the_same_computation_is_scattered():
    """TPU's compiler gives different ones one channel, too; pieces are as long."""
    text = """
%all-reduce-scatter.1 (x: f32[8,4]) -> f32[1,4] {
  %a = f32[8,4] all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3}}
  ROOT %s = f32[2,4] dynamic-slice(%a, %i), dynamic_slice_sizes={2,4}
}
%all-reduce-scatter.2 (x: f32[8]) -> f32[1] {
  %a = f32[8] all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3}}
  ROOT %s = f32[2] dynamic-slice(%a, %i), dynamic_slice_sizes={2}
}
%piece (x: f32[8]) -> f32[8] {
  %a = f32[8] all-reduce(%x), channel_id=2, replica_groups={{0,1,2,3}}
}
ENTRY %main (a: f32[8,4]) -> f32[1,4] {
  %a = f32[1,4] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %b = f32[1] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.2
  %c = f32[8] fusion(%x), kind=kCustom, calls=%piece
  %d = f32[8]{0:T(8)S(1)} all-reduce(%x), channel_id=2, replica_groups={{0,1,2,3}}
}
"""

    assert parse_collectives(text) == [
        Collective("reduce-scatter", 128, 4, 1),
        Collective("reduce-scatter", 32, 4, 1),
        Collective("all-reduce", 32, 4, 1),
    ]


def test_a_computation_runs_as_often_as_all_its_callers_do():
    text = """
%leaf (x: f32[]) -> f32[] {
}
%node (x: f32[]) -> f32[] {
  %c = f32[] call(%x), to_apply=%leaf
}
ENTRY %main (a: f32[]) -> f32[] {
  %a = f32[] call(%x), to_apply=%node
  %b = f32[] call(%x), to_apply=%node
  %c = f32[] call(%x), to_apply=%leaf
}
"""

    assert trip_counts(text) == {"leaf": 3, "node": 2, "main": 1}


@pytest.mark.fast
@pytest.mark.parametrize(
    ("line", "kind", "size", "sent"),
    [
        ("(f32[4], bf16[2,3]) all-reduce(%a, %b)", "all-reduce", 28, 28 * 2 * 3 / 4),
        ("f32[4] all-reduce-start(%a)", "all-reduce", 16, 24),
        ("(f32[2], f32[8]) all-gather-start(%a)", "all-gather", 32, 24),
        ("((f32[2], pred[1]), (f32[8], pred[4])) all-gather-start(%a, %b)", "all-gather", 36, 27),
        ("f32[2] reduce-scatter(%a)", "reduce-scatter", 32, 24),
        ("f32[8] all-to-all(%a)", "all-to-all", 128, 24),
        ("(f32[2], f32[2], f32[2], f32[2]) all-to-all(%a)", "all-to-all", 32, 6),
        ("(u8[5], u8[5], u32[], u32[]) collective-permute-start(%a)", "collective-permute", 5, 5),
    ],
)
def test_every_form_of_an_operation_is_read(line, kind, size, sent):
    text = f"ENTRY %main (a: f32[4]) -> f32[4] {{\n  %x = {line}, GROUPS\n}}\n"

    (found,) = parse_collectives(text.replace("GROUPS", "replica_groups=[2,4]<=[8]"))

    assert (found.kind, found.bytes, found.devices) == (kind, size, 4)
    assert found.bytes_sent == sent


@pytest.mark.fast
@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("{{0,1},{2,3}}", 2),
        ("{{0,4,2,6}}", 4),
        ("{{0},{1}}", 1),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['axis_0'=1,'axis_1'=8] {'axis_1'}", 8),
        ("mesh['a'=2,'b'=4] {'a','b'}", 8),
        ("mesh['a'=8] {'a':(2)4}", 4),
    ],
)
def test_groups_of_devices_are_read_however_they_are_written(groups, devices):
    line = f"%r = f32[1] all-reduce(%x), replica_groups={groups}, to_apply=%add"

    assert group_size(line) == devices


def test_what_one_device_does_alone_is_not_counted():
    alone = "  %r = f32[8] all-reduce(%x), replica_groups={{0},{1}}, to_apply=%add"

    assert parse_collectives(f"ENTRY %main (x: f32[8]) -> f32[8] {{\n{alone}\n}}\n") == []
    text = jax.jit(jnp.sum).lower(jnp.ones(8)).compile().as_text()
    assert parse_collectives(text) == []
