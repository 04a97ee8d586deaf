"""Memory, communication and speed of a training run, estimated before it starts."""

import contextlib
import dataclasses
import math
import statistics
from pathlib import Path
from typing import Any

from gptjax.config import RunConfig
from gptjax.errors import ConfigError, ModelError
from gptjax.parallel.sharding import MESH_AXES, check_batch_divisible, resolve_mesh_shape
from gptjax.planning import aot
from gptjax.planning.collectives import estimate_collective_bytes
from gptjax.training import estimate
from gptjax.training.estimate import format_bytes
from gptjax.training.hardware import Topology
from gptjax.training.metrics import format_number, metric_series, read_events


@dataclasses.dataclass(frozen=True)
class Plan:
    """Requirements of a run on a set of devices."""

    config: RunConfig  # resolved for the devices
    topology: Topology
    mesh_shape: tuple[int, int, int]  # mesh axes, as `MESH_AXES`
    memory: dict[str, int]  # estimated bytes per device, by part
    collective_bytes: dict[str, float]  # estimated bytes sent per device and step
    compile_report: aot.CompileReport | None  # None if not compiled

    @property
    def memory_estimate(self) -> int:
        """Estimated bytes in use per device."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool | None:
        """True if the memory of a device suffices; None if it is unknown."""
        if self.compile_report:
            return self.compile_report.fits
        limit = self.topology.chip.memory
        return self.memory_estimate <= estimate.USABLE_MEMORY_FRACTION * limit if limit else None

    @property
    def tokens_per_step(self) -> int:
        """Tokens per step on all devices."""
        return self.config.data.batch_size * self.config.model.context_length

    @property
    def bytes_sent(self) -> float:
        """Bytes sent per device and step."""
        if self.compile_report and self.compile_report.fits:
            return sum((one.bytes_sent for one in self.compile_report.collectives), 0.0)
        return sum(self.collective_bytes.values(), 0.0)

    @property
    def min_seconds(self) -> dict[str, float]:
        """Lower bound on the seconds per step, by resource."""
        chip, c = self.topology.chip, self.config
        flops = estimate.hardware_flops(c.model) * self.tokens_per_step / self.topology.devices
        return {
            "compute": flops / chip.peak_flops,
            "memory": estimate.memory_traffic(c, self.mesh_shape, chip.platform)
            / chip.memory_bandwidth,
            "links": self.bytes_sent / chip.interconnect_bandwidth,
        }

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON object that `--json` prints."""
        c, report = self.config, self.compile_report
        ops = report.collectives if report else []
        return {
            "topology": self.topology.name,
            "devices": self.topology.devices,
            "mesh": dict(zip(MESH_AXES, self.mesh_shape, strict=True)),
            "batch_size": c.data.batch_size,
            "accumulate": c.train.accumulate,
            "parameters": estimate.parameter_count(c.model),
            "flops_per_token": estimate.flops_per_token(c.model),
            "causal_flops_per_token": estimate.causal_flops_per_token(c.model),
            "attention": c.model.attention,
            "memory": self.memory,
            "memory_estimate": self.memory_estimate,
            "memory_accuracy": estimate.MEMORY_ACCURACY.get(self.topology.chip.platform),
            "memory_compiled": report.peak_bytes if report else None,
            "bytes_sent": self.bytes_sent,
            "largest_gather": max(
                (x.bytes for x in ops if x.kind == "all-gather"),
                default=0 if report and report.fits else None,
            ),
            "seconds": self.min_seconds,
            "fits": self.fits,
        }


def make_plan(config: RunConfig, topology: Topology, run_compiler: bool) -> Plan:
    """Plans a run on a topology.

    Replaces a `train.accumulate` of 0 by the smallest value that fits. Compiling the
    step takes a minute or two.
    """
    mesh_shape = resolve_mesh_shape(config.mesh, topology.devices)
    # A run may leave some devices idle.
    topology = topology._replace(devices=math.prod(mesh_shape))
    config = estimate.resolve_config(config, topology.chip.platform)
    if not config.train.accumulate:
        limit = topology.chip.memory or estimate.host_memory()
        config = estimate.fit_micro_batch(config, mesh_shape, limit, topology.chip.platform)
    check_batch_divisible(config.data.batch_size, config.train.accumulate, mesh_shape)
    return Plan(
        config,
        topology,
        mesh_shape,
        estimate.memory_bytes(config, mesh_shape, topology.chip.platform),
        estimate_collective_bytes(config, mesh_shape),
        aot.compile_step(config, topology) if run_compiler else None,
    )


def format_plan(plan: Plan) -> list[str]:
    """Formats a plan as lines of text."""
    c, chip, n = plan.config, plan.topology.chip, plan.topology.devices
    model, rows, report = c.model, c.data.batch_size, plan.compile_report
    names = [f"{a} {s}" for a, s in zip(MESH_AXES, plan.mesh_shape, strict=True) if s > 1]
    shape = f", mesh {' x '.join(names)}" if names else ""
    flops = format_number(estimate.flops_per_token(model))
    causal = format_number(estimate.causal_flops_per_token(model))
    accuracy = estimate.MEMORY_ACCURACY.get(chip.platform)
    basis = (
        f"estimated to within {accuracy:.0%}"
        if accuracy
        else f"estimated, unverified on a {chip.platform}"
    )
    micro_batch = rows // c.train.accumulate // (plan.mesh_shape[0] * plan.mesh_shape[1])
    parts, sent = (
        " + ".join(f"{name} {format_bytes(size)}" for name, size in sizes.items())
        for sizes in (plan.memory, plan.collective_bytes)
    )
    lines = [
        f"devices  {plan.topology}{shape}",
        f"model    {estimate.parameter_count(model):,} parameters in {model.dtype}, "
        f"attention {model.attention}, remat {model.remat}",
        f"work     {flops} FLOPs per token, forward and backward; {causal} without the "
        "masked half of attention",
        f"step     {rows} rows x {model.context_length} = {plan.tokens_per_step:,} "
        f"tokens; micro-batches: {c.train.accumulate}, of {micro_batch} rows per "
        "device",
        f"memory   {format_bytes(plan.memory_estimate)} per device, {basis}: {parts}",
    ]
    if report and report.fits:
        error = plan.memory_estimate / report.peak_bytes - 1
        lines.append(
            f"compiler {format_bytes(report.peak_bytes)}: arguments "
            f"{format_bytes(report.argument_bytes)} + temporaries "
            f"{format_bytes(report.temp_bytes)}; the estimate is {abs(error):.0%} "
            f"{'higher' if error > 0 else 'lower'}"
        )
    if n > 1:
        bytes_sent = format_bytes(plan.bytes_sent)
        lines.append(f"links    {bytes_sent} sent per device and step; estimated: {sent}")
    if chip.memory:
        lines += [time_message(plan), fits_message(plan)]
    return lines


def time_message(plan: Plan) -> str:
    """Formats the lower bound on the step time at published peak rates."""
    parts = plan.min_seconds
    min_step_seconds = max(parts.values())
    rate = plan.tokens_per_step / min_step_seconds
    mfu = rate * estimate.flops_per_token(plan.config.model)
    mfu /= plan.topology.chip.peak_flops * plan.topology.devices
    details = ", ".join(f"{name} {value * 1e3:,.3g} ms" for name, value in parts.items())
    return (
        f"time     at least {min_step_seconds * 1e3:,.3g} ms per step ({details}, at "
        f"peak rates): at most {format_number(rate)} tokens/s, {mfu:.0%} MFU"
    )


def fits_message(plan: Plan) -> str:
    """Formats whether the run fits, and a fix if it does not."""
    report, limit = plan.compile_report, plan.topology.chip.memory
    needed = format_bytes(report.peak_bytes if report else plan.memory_estimate)
    basis = "compiler report" if report else "analytic estimate"
    sizes = f"{needed} of {format_bytes(limit)} ({basis})"
    return f"fits     yes, {sizes}" if plan.fits else f"fits     NO, {sizes}. {suggest_fix(plan)}"


def suggest_fix(plan: Plan) -> str:
    """Suggests the first change of options with which the estimate fits."""
    c = plan.config
    train = dataclasses.replace(c.train, accumulate=0)
    full_remat = dataclasses.replace(c.model, remat="full")
    fsdp = dataclasses.replace(c.mesh, data=1, fsdp=-1, tensor=plan.mesh_shape[2])
    for mesh_flags, mesh in (("", c.mesh), (" --mesh.data 1 --mesh.fsdp -1", fsdp)):
        for model_flags, model in (("", c.model), (" --model.remat full", full_remat)):
            config = dataclasses.replace(c, model=model, mesh=mesh, train=train)
            with contextlib.suppress(ConfigError):  # this mesh does not divide the batch
                if make_plan(config, plan.topology, run_compiler=False).fits:
                    return f"Try --train.accumulate 0{model_flags}{mesh_flags}"
    return "Use more devices, or devices with more memory."


def compare_with_profile(plan: Plan, run_dir: Path) -> list[str]:
    """Formats the measurements of a run next to the plan."""
    events = read_events(run_dir / "metrics.jsonl")
    _, rates = metric_series(events, "train", "tokens_per_s")
    if not rates:
        raise ModelError(
            f"{run_dir} has logged no train event. Let the run continue until step train.log_every."
        )
    rate = statistics.median(rates)
    lines = [f"measured {format_number(rate)} tokens/s (median of {len(rates)})"]
    if plan.topology.chip.memory:
        max_rate = plan.tokens_per_step / max(plan.min_seconds.values())
        share = f"{rate / max_rate:.0%}"
        lines.append(f"planned  at most {format_number(max_rate)}; measured {share} of it")
    _, temporaries = metric_series(events, "compile", "temporaries")
    if measured := next(filter(None, temporaries), 0):
        state = sum(plan.memory[name] for name in estimate.TRAIN_STATE_PARTS)
        estimated = plan.memory_estimate - state
        lines.append(
            f"memory   {format_bytes(measured)} of temporaries in the run, "
            f"{format_bytes(estimated)} estimated ({estimated / measured - 1:+.0%})"
        )
    return lines
