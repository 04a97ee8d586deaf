"""What a run will need, and how long a step may take, before anything runs."""

import dataclasses
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptjax import ahead, budget, report
from gptjax.budget import human
from gptjax.chips import Topology
from gptjax.collectives import expected_bytes
from gptjax.config import RunConfig
from gptjax.errors import ConfigError, ModelError
from gptjax.sharding import AXES, check_rows, mesh_sizes


@dataclasses.dataclass(frozen=True)
class Plan:
    """One configuration on one set of devices."""

    config: RunConfig  # settled for them
    topology: Topology
    sizes: tuple[int, int, int]  # of the mesh
    memory: dict[str, int]  # bytes of one device by contributor, by arithmetic
    sent: dict[str, float]  # bytes that one device sends in a step, by arithmetic
    compiled: ahead.Compiled | None  # what the compiler says, where it was asked

    @property
    def estimate(self) -> int:
        """Bytes of a device in use, by arithmetic."""
        return sum(self.memory.values())

    @property
    def needed(self) -> int:
        """Bytes of a device in use, by the compiler where it was asked."""
        return self.compiled.memory if self.compiled else self.estimate

    @property
    def fits(self) -> bool | None:
        """Whether a device has so much memory; None where that is not known."""
        if self.compiled:
            return self.compiled.fits
        limit = self.topology.chip.memory
        return self.estimate <= budget.ROOM * limit if limit else None

    @property
    def tokens(self) -> int:
        """Tokens of a step, all devices together."""
        return self.config.data.batch_size * self.config.model.context_length

    @property
    def bytes_sent(self) -> float:
        """Bytes that one device sends in a step."""
        if self.compiled and self.compiled.fits:
            return sum((one.sent for one in self.compiled.collectives), 0.0)
        return sum(self.sent.values(), 0.0)

    @property
    def largest_gather(self) -> int | None:
        """Bytes of the largest array that is gathered at once; None: not compiled."""
        if not self.compiled or not self.compiled.fits:
            return None
        found = self.compiled.collectives
        return max((x.bytes for x in found if x.kind == "all-gather"), default=0)

    @property
    def seconds(self) -> dict[str, float]:
        """Least time of a step for each thing that a device is busy with."""
        chip, c = self.topology.chip, self.config
        work = budget.hardware_flops(c.model) * self.tokens / self.topology.devices
        return {
            "compute": work / chip.flops,
            "memory": budget.memory_traffic(c, self.sizes) / chip.bandwidth,
            "links": self.bytes_sent / chip.links,
        }

    def numbers(self) -> dict[str, Any]:
        """What `--json` prints."""
        c = self.config
        return {
            "topology": self.topology.name,
            "devices": self.topology.devices,
            "mesh": dict(zip(AXES, self.sizes, strict=True)),
            "batch_size": c.data.batch_size,
            "accumulate": c.train.accumulate,
            "parameters": budget.parameter_count(c.model),
            "flops_per_token": budget.flops_per_token(c.model),
            "causal_flops_per_token": budget.causal_flops_per_token(c.model),
            "attention": c.model.attention,
            "memory": self.memory,
            "memory_estimate": self.estimate,
            "memory_compiled": self.compiled.memory if self.compiled else None,
            "bytes_sent": self.bytes_sent,
            "largest_gather": self.largest_gather,
            "seconds": self.seconds,
            "fits": self.fits,
        }


def make_plan(c: RunConfig, topology: Topology, compiling: bool) -> Plan:
    """The plan of a run on such devices.

    Args:
        c: of the run; `train.accumulate` 0 is replaced by the least that fits.
        topology: where.
        compiling: whether to compile the step, which takes a minute or two.

    Raises:
        ConfigError: the mesh does not fit the devices, or model or rows the mesh.
    """
    sizes = mesh_sizes(c.mesh, topology.devices)
    topology = topology._replace(devices=math.prod(sizes))  # a run can leave some idle
    c = budget.settled(c, topology.chip.platform)
    if not c.train.accumulate:
        limit = topology.chip.memory or budget.host_memory()
        c = budget.with_micro_batch(c, sizes, limit)
    check_rows(c.data.batch_size, c.train.accumulate, sizes)
    return Plan(
        c,
        topology,
        sizes,
        budget.memory_bytes(c, sizes),
        expected_bytes(c, sizes),
        ahead.compile_step(c, topology) if compiling else None,
    )


def lines(plan: Plan) -> list[str]:
    """The plan for people."""
    c, chip, n = plan.config, plan.topology.chip, plan.topology.devices
    model, rows = c.model, c.data.batch_size
    names = [f"{a} {s}" for a, s in zip(AXES, plan.sizes, strict=True) if s > 1]
    shape = f", as {' x '.join(names)}" if names else ""
    flops = budget.flops_per_token(model) / 1e9
    causal = budget.causal_flops_per_token(model) / 1e9
    micro = rows // c.train.accumulate // (plan.sizes[0] * plan.sizes[1])
    parts = " + ".join(f"{name} {human(size)}" for name, size in plan.memory.items())
    sent = " + ".join(f"{name} {human(size)}" for name, size in plan.sent.items())
    told = [
        f"devices  {plan.topology}{shape}",
        f"model    {budget.parameter_count(model):,} parameters in {model.dtype}, "
        f"attention by {model.attention}, remat {model.remat}",
        f"work     {flops:.3f} GFLOPs per token forward and backward, with attention "
        f"over the full square; {causal:.3f} over the half that is causal",
        f"step     {rows} rows x {model.context_length} = {plan.tokens:,} tokens, "
        f"{micro} rows on a device at a time, {c.train.accumulate} times",
        f"memory   of a device, by arithmetic, {human(plan.estimate)}: {parts}",
    ]
    if plan.compiled:
        told.append(compiler_line(plan))
    if n > 1:
        told.append(
            f"links    a device sends {human(plan.bytes_sent)} in a step"
            f"{f': {sent}, by arithmetic' if sent else ''}"
        )
    if chip.memory:
        told += [time_line(plan), verdict(plan)]
    return told


def compiler_line(plan: Plan) -> str:
    """What the compiler says of the memory."""
    found: Any = plan.compiled
    if not found.fits:
        return f"compiler refuses: a device would need {human(found.memory)}"
    off = plan.estimate / found.memory - 1
    return (
        f"compiler {human(found.memory)}: arguments {human(found.arguments)} + "
        f"temporaries {human(found.temporaries)}; the arithmetic is {off:+.0%} off"
    )


def time_line(plan: Plan) -> str:
    """How fast a step can be at the published peaks."""
    parts = plan.seconds
    least = max(parts.values())
    rate = plan.tokens / least
    most = rate * budget.flops_per_token(plan.config.model)
    most /= plan.topology.chip.flops * plan.topology.devices
    each = ", ".join(f"{name} {value * 1e3:,.3g} ms" for name, value in parts.items())
    return (
        f"time     no step takes less than {least * 1e3:,.3g} ms ({each}, by published "
        f"peaks): at most {report.short(rate)} tokens/s and an MFU of {most:.0%}"
    )


def verdict(plan: Plan) -> str:
    """Whether it fits, and what to do where it does not."""
    limit = plan.topology.chip.memory
    by = "the compiler" if plan.compiled else "an estimate"
    text = f"by {by}, {human(plan.needed)} of {human(limit)}"
    if plan.fits:
        return f"fits     yes, {text}"
    return f"fits     NO, {text}. {advice(plan)}"


def advice(plan: Plan) -> str:
    """The first thing to change that makes it fit, by arithmetic."""
    c, devices = plan.config, plan.topology.devices
    limit = plan.topology.chip.memory

    def fitting(c: RunConfig) -> bool:
        try:
            sizes = mesh_sizes(c.mesh, devices)
            chosen = budget.with_micro_batch(c, sizes, limit)
        except ConfigError:
            return False
        parts = budget.memory_bytes(chosen, sizes)
        return sum(parts.values()) <= budget.ROOM * limit

    remat = dataclasses.replace(c, model=dataclasses.replace(c.model, remat="full"))
    mesh = dataclasses.replace(c.mesh, data=1, fsdp=-1, tensor=plan.sizes[2])
    ways = {
        "--train.accumulate 0": c,
        "--train.accumulate 0 --model.remat full": remat,
        "--train.accumulate 0 --mesh.data 1 --mesh.fsdp -1": dataclasses.replace(
            c, mesh=mesh
        ),
        "--train.accumulate 0 --model.remat full --mesh.data 1 --mesh.fsdp -1": (
            dataclasses.replace(remat, mesh=mesh)
        ),
    }
    for flags, changed in ways.items():
        if fitting(changed):
            return f"Do this: {flags}"
    return "Use more devices, or ones with more memory."


def compare(plan: Plan, folder: Path, say: Callable[[str], None]) -> None:
    """Says what a run measured beside what the plan has.

    Raises:
        ModelError: the run has measured nothing.
    """
    events = report.read_events(folder / "metrics.jsonl")
    _, rates = report.series(events, "train", "tokens_per_s")
    if len(rates) < 2:
        raise ModelError(
            f"{folder} has not logged two train events, so there is nothing to compare "
            "with. Let it run longer."
        )
    rate = statistics.median(rates[1:])  # the first waits for the compiler
    least = max(value for value in plan.seconds.values())
    say(f"measured {report.short(rate)} tokens/s, the median of {len(rates) - 1}")
    if plan.topology.chip.memory:
        most = plan.tokens / least
        say(f"planned  at most {report.short(most)}: measured is {rate / most:.0%}")
    for event in events:
        if event["event"] == "compile" and event.get("temporaries"):
            temporaries = event["temporaries"]
            state = sum(v for k, v in plan.memory.items() if k in budget.AT_REST)
            rest = plan.estimate - state
            say(
                f"memory   {human(temporaries)} of temporaries by the run's compiler; "
                f"{human(rest)} by arithmetic ({rest / temporaries - 1:+.0%})"
            )
            return
