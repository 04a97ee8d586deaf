"""A file that a scheduler runs, for training on many hosts; nothing is started here.

Slurm, GKE, Cloud TPU VMs and SkyPilot stay the owners of their machines. The file says
at its top how it is submitted, and holds `gptjax train CONFIG --run DIR --distributed
auto`, the same for every host and for every start: a run that was stopped, and said so
with exit code 75, goes on when the scheduler starts it again.

Names that a scheduler reads are checked; all other values are quoted, for a shell or
as YAML, whatever they hold.
"""

import dataclasses
import posixpath
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from gptjax.config import config_path, read_config, shipped_configs, suggestion
from gptjax.errors import ConfigError
from gptjax.machines import (
    GENERATIONS,
    USUAL,
    Machines,
    Slice,
    check,
    check_run,
    tpu_slice,
)

FOLDER = Path(__file__).parent / "launchers"
FILES = {  # kind of launcher: its template
    "slurm": "slurm.sh.jinja",
    "gke": "gke.yaml.jinja",
    "tpu-vm": "tpu-vm.sh.jinja",
    "skypilot": "skypilot.yaml.jinja",
}
RESTARTS = 3  # after failures; stops with everything saved are not counted


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
    """The text of the file with which `kind` trains `config`.

    Args:
        kind: slurm, gke, tpu-vm or skypilot.
        config: a TOML file, or the name of one of those that gptjax ships with.
        overrides: `--section.option value` flags, which the caller has checked.
        run: the run's folder, which all hosts share; runs/CONFIG if None.
        out: the new file that is written, or None.
        dry_run: whether `out` is only named in the text, and nothing written.
        machines: fields of `Machines`.

    Raises:
        ConfigError: the config cannot be used, or the launcher cannot do this.
    """
    if kind not in FILES:
        raise ConfigError(
            f"there is no launcher {kind!r}.{suggestion(kind, FILES)} "
            f"Known: {', '.join(FILES)}."
        )
    wanted = Machines(**machines)
    check(kind, wanted)
    path = config_path(config)
    read_config(path)
    folder = str(run) if run is not None else f"runs/{path.stem}"
    for text in (config, folder, wanted.install, *overrides):
        check_text(text)
    check_run(wanted, folder)
    text = rendered(kind, config, path, list(overrides), folder, out, wanted)
    if out is not None and not dry_run:
        write_new(out, text)
    return text


def rendered(
    kind: str,
    config: str,
    path: Path,
    overrides: list[str],
    run: str,
    out: Path | None,
    wanted: Machines,
) -> str:
    """The template of `kind`, filled in with what was checked."""
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
    install = wanted.install or f"gptjax[{'tpu' if tpus else 'cuda12'}]"
    values |= {
        "name": job_name(run),
        "file": shown(out),
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
    """The templates, with the two ways of quoting."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER, encoding="utf-8"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"sh": shlex.quote, "sh_join": shlex.join, "yaml": yaml_text}
    return environment


def container(command: list[str], image: str, install: str) -> list[str]:
    """What a container runs: the command, in a bare one after an installation."""
    if image:
        return command
    line = f"pip install --quiet {shlex.quote(install)} && exec {shlex.join(command)}"
    return ["bash", "-c", line]


def check_text(text: str) -> None:
    """Raises for characters that no shell and no YAML can hold."""
    if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
        raise ConfigError(
            f"{text!r} holds a byte that is no character, so no file can name it. "
            "Use another name."
        )


def size_of(kind: str, tpus: Slice) -> str:
    """A slice's size in the words of the launcher."""
    generation = GENERATIONS[tpus.generation]
    size = f"{generation.size}-{tpus.chips * generation.cores}"
    if kind == "skypilot":
        return f"tpu-{size}"
    if tpus.shape in USUAL:
        return f"--accelerator-type={size}"
    return f"--type={tpus.generation} --topology={tpus.shape}"


def hosts_line(tpus: Slice | None, nodes: int, devices: int, accelerator: str) -> str:
    """What is trained on, in words."""
    if tpus:
        chips = plural(tpus.chips // tpus.hosts, "chip")
        return f"{plural(tpus.hosts, 'host')} with {chips} each ({':'.join(tpus[:2])})"
    if not devices:
        return plural(nodes, "node")
    gpu = f"{accelerator} GPU".strip()
    return f"{plural(nodes, 'node')} with {plural(devices, gpu)} each"


def plural(count: int, thing: str) -> str:
    """A number of things."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


def job_name(run: str) -> str:
    """A name that every scheduler takes: `gptjax-` and what it takes of the run's."""
    last = posixpath.basename(posixpath.normpath(run)).lower()
    plain = re.sub(r"[^a-z0-9]+", "-", last).strip("-").removeprefix("gptjax-")
    return f"gptjax-{plain[:33]}".rstrip("-")


def shipped_name(path: Path) -> str:
    """The name under which every installation has this config, or nothing."""
    folder = shipped_configs().resolve()
    found = path.resolve()
    if not found.is_relative_to(folder):
        return ""
    return found.relative_to(folder).with_suffix("").as_posix()


def shown(out: Path | None) -> str:
    """The file in a line of a comment."""
    name = shlex.quote(str(out)) if out is not None else "FILE"
    return name if name.isprintable() else "FILE"


def yaml_text(text: str, indent: int = 0) -> str:
    """Any text as a YAML scalar: lines as a block where they can be, else quoted."""
    lines = text.removesuffix("\n").split("\n")
    if (
        indent
        and text.endswith("\n")
        and all(line.isprintable() for line in lines)
        and lines[0].strip()
        and lines[-1].strip()
        and not lines[0].startswith(" ")
    ):
        return "|\n" + "\n".join(
            f"{' ' * indent}{line}" if line else "" for line in lines
        )
    return '"' + "".join(map(yaml_character, text)) + '"'


def yaml_character(char: str) -> str:
    """One character between the double quotes of YAML."""
    if " " <= char <= "~" and char not in '"\\':
        return char
    return {"\n": "\\n", '"': '\\"', "\\": "\\\\"}.get(char) or f"\\U{ord(char):08x}"


def read_text(path: Path) -> str:
    """The text of a config that was already read once."""
    return path.read_text(encoding="utf-8")


def write_new(path: Path, text: str) -> None:
    """Writes a file that was not there.

    Raises:
        ConfigError: it is there, or cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8", newline="") as file:
            file.write(text)
    except FileExistsError as error:
        raise ConfigError(
            f"--out={path} is there already, and files are never overwritten. Name "
            "another file."
        ) from error
    except OSError as error:
        raise ConfigError(f"cannot write --out={path}: {error}.") from error
