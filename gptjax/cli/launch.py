"""Launch scripts for Slurm, GKE, Cloud TPU VMs and SkyPilot; starts nothing itself.

A comment at the top of the script explains how to submit it. It runs `gptjax train
CONFIG --run DIR --distributed auto`, the same command on every host and start: an
interrupted run (exit code 75) resumes when the scheduler restarts it.

Names that a scheduler reads are validated; all other values are quoted for the shell or
YAML.
"""

import dataclasses
import posixpath
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from gptjax.cli.machines import (
    GENERATIONS,
    USUAL,
    Machines,
    Slice,
    check_machines,
    check_run,
    tpu_slice,
)
from gptjax.config import builtin_config_dir, did_you_mean, find_config, load_config
from gptjax.errors import ConfigError
from gptjax.runtime.installation import install_requirement

FOLDER = Path(__file__).parent / "launchers"
FILES = {  # launcher: template
    "slurm": "slurm.sh.jinja",
    "gke": "gke.yaml.jinja",
    "tpu-vm": "tpu-vm.sh.jinja",
    "skypilot": "skypilot.yaml.jinja",
}
RESTARTS = 3  # after failures; saved interruptions do not count


def launch(
    kind: str,
    config: str,
    overrides: Sequence[str] = (),
    *,
    run: Path | str | None = None,
    out: Path | None = None,
    dry_run: bool = False,
    **machines: Any,
) -> str:
    """Renders the launch script of `kind` for training `config`.

    Args:
        kind: slurm, gke, tpu-vm or skypilot.
        config: a TOML file, or the name of a built-in config.
        overrides: `--section.option value` flags, already validated.
        run: run directory on shared storage; runs/CONFIG if None.
        out: new file to write, or None.
        dry_run: mention `out` in the script, but do not write it.
        machines: fields of `Machines`.

    Raises:
        ConfigError: invalid config, or options that the launcher does not support.
    """
    if kind not in FILES:
        raise ConfigError(
            f"{kind!r} is not a launcher.{did_you_mean(kind, FILES)} Use one of {', '.join(FILES)}."
        )
    wanted = Machines(**machines)
    check_machines(kind, wanted)
    path = find_config(config)
    load_config(path)
    folder = str(run) if run is not None else f"runs/{path.stem}"
    for text in (config, folder, wanted.install, *overrides):
        check_text(text)
    check_run(wanted, folder)
    text = render_launcher(kind, config, path, list(overrides), folder, out, wanted)
    if out is not None and not dry_run:
        write_new(out, text)
    return text


def render_launcher(
    kind: str,
    config: str,
    path: Path,
    overrides: list[str],
    run: str,
    out: Path | None,
    wanted: Machines,
) -> str:
    """Renders the template of `kind` with validated values."""
    values = dataclasses.asdict(wanted)
    tpus = tpu_slice(wanted.topology) if wanted.topology else None
    nodes = 1 if wanted.nodes is None else wanted.nodes
    devices = 1 if wanted.devices is None else wanted.devices
    shipped = shipped_name(path)
    source = "" if shipped or kind == "slurm" else posixpath.join(".", config)
    end = [*overrides, "--run", f"./{run}" if run.startswith("-") else run]
    if tpus or kind == "slurm" or nodes > 1:
        end += ["--distributed", "auto"]
    there = config if kind == "slurm" else shipped or "/etc/gptjax/config.toml"
    command = ["gptjax", "train", there, *end]
    home = '"$HOME"/gptjax.toml' if source else shlex.quote(there)
    install = wanted.install or install_requirement("tpu" if tpus else "cuda12")
    values |= {
        "name": job_name(run),
        "file": format_output(out),
        "limits": {name: values[name] for name in ("partition", "account", "time")},
        "nodes": nodes,
        "devices": devices,
        "hosts": hosts_line(tpus, nodes, devices, wanted.accelerator),
        "slice": tpus,
        "generation": GENERATIONS[tpus.generation] if tpus else None,
        "size": size_of(kind, tpus) if tpus else "",
        "command": command,
        "container": container(command, wanted.image, install),
        "remote": f"gptjax train {home} {shlex.join(end)}",
        "source": source,
        "toml": read_text(path) if source and kind == "gke" else "",
        "install": install,
        "nfs": wanted.volume if kind != "gke" and ":" in wanted.volume else "",
        "restarts": RESTARTS,
    }
    environment = templates()
    values["setup"] = environment.get_template("setup.sh.jinja").render(values)
    return environment.get_template(FILES[kind]).render(values)


def templates() -> jinja2.Environment:
    """Makes the Jinja environment with filters for shell and YAML quoting."""
    environment = jinja2.Environment(  # noqa: S701 (scripts, not HTML)
        loader=jinja2.FileSystemLoader(FOLDER, encoding="utf-8"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"sh": shlex.quote, "sh_join": shlex.join, "yaml": yaml_text}
    return environment


def container(command: list[str], image: str, install: str) -> list[str]:
    """Returns the container command; without an image it installs gptjax first."""
    if image:
        return command
    line = f"pip install --quiet {shlex.quote(install)} && exec {shlex.join(command)}"
    return ["bash", "-c", line]


def check_text(text: str) -> None:
    """Raises for characters that shell and YAML cannot represent."""
    if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
        raise ConfigError(f"{text!r} must not contain null bytes or surrogates. Use another name.")


def size_of(kind: str, tpus: Slice) -> str:
    """Returns the slice size in the launcher's notation."""
    generation = GENERATIONS[tpus.generation]
    size = f"{generation.size}-{tpus.chips * generation.cores}"
    if kind == "skypilot":
        return f"tpu-{size}"
    if tpus.shape in USUAL:
        return f"--accelerator-type={size}"
    return f"--type={tpus.generation} --topology={tpus.shape}"


def hosts_line(tpus: Slice | None, nodes: int, devices: int, accelerator: str) -> str:
    """Describes the machines in words."""
    if tpus:
        chips = plural(tpus.chips // tpus.hosts, "chip")
        return f"{plural(tpus.hosts, 'host')} with {chips} each ({':'.join(tpus[:2])})"
    if not devices:
        return plural(nodes, "node")
    gpu = f"{accelerator} GPU".strip()
    return f"{plural(nodes, 'node')} with {plural(devices, gpu)} each"


def plural(count: int, thing: str) -> str:
    """Formats a count with a noun."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


def job_name(run: str) -> str:
    """Makes a job name from the run directory that is valid for every scheduler."""
    last = posixpath.basename(posixpath.normpath(run)).lower()
    plain = re.sub(r"[^a-z0-9]+", "-", last).strip("-").removeprefix("gptjax-")
    return f"gptjax-{plain[:33]}".rstrip("-")


def shipped_name(path: Path) -> str:
    """Returns the name of a built-in config, empty for other files."""
    folder = builtin_config_dir().resolve()
    found = path.resolve()
    if not found.is_relative_to(folder):
        return ""
    return found.relative_to(folder).with_suffix("").as_posix()


def format_output(out: Path | None) -> str:
    """Returns the file name for use in a comment."""
    name = shlex.quote(str(out)) if out is not None else "FILE"
    return name if name.isprintable() else "FILE"


def yaml_text(text: str, indent: int = 0) -> str:
    """Formats text as a YAML scalar: a block if possible, else quoted."""
    lines = text.removesuffix("\n").split("\n")
    if (
        indent
        and text.endswith("\n")
        and all(line.isprintable() for line in lines)
        and lines[0].strip()
        and lines[-1].strip()
        and not lines[0].startswith(" ")
    ):
        return "|\n" + "\n".join(f"{' ' * indent}{line}" if line else "" for line in lines)
    return '"' + "".join(map(yaml_character, text)) + '"'


def yaml_character(char: str) -> str:
    """Escapes one character for a double-quoted YAML scalar."""
    if " " <= char <= "~" and char not in '"\\':
        return char
    return {"\n": "\\n", '"': '\\"', "\\": "\\\\"}.get(char) or f"\\U{ord(char):08x}"


def read_text(path: Path) -> str:
    """Reads the text of a config file."""
    return path.read_text(encoding="utf-8")


def write_new(path: Path, text: str) -> None:
    """Writes a new file.

    Raises:
        ConfigError: the file exists or cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8", newline="") as file:
            file.write(text)
    except FileExistsError as error:
        raise ConfigError(
            f"--out={path} already exists and is not overwritten. Use another file."
        ) from error
    except OSError as error:
        raise ConfigError(f"cannot write --out={path}: {error}.") from error
