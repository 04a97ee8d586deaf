"""Checks of the installation and machine, with a fix for each problem."""

import os
import platform
from typing import get_args

from gptjax.config import TrackerName
from gptjax.errors import ConfigError, install_command, is_installed
from gptjax.fileio.paths import user_cache_dir
from gptjax.runtime.device import package_versions
from gptjax.runtime.terminal import print_result

# Oldest tested version of each package that training needs.
MIN_VERSIONS = {
    "jax": "0.7.2",
    "flax": "0.11.2",
    "optax": "0.2.6",
    "orbax-checkpoint": "0.11.31",
    "grain": "0.2.15",
    "numpy": "2.0",
    "tiktoken": "0.13",
}
# A module of each extra.
EXTRA_MODULES = {"test": "pytest", "judge": "openai", "peers": "torch", "dev": "ruff"}
EXTRA_MODULES |= {name: name for name in get_args(TrackerName)}


def run_doctor() -> int:
    """Prints all checks; returns 1 if training cannot run, else 0."""
    installed = package_versions()
    problems = check_packages(installed)
    names = " · ".join(f"{name} {installed[name]}" for name in ("gptjax", *MIN_VERSIONS))
    print_check("python", f"{platform.python_version()} · {names}", problems)
    if problems:
        return 1
    problems = check_devices()
    from gptjax.tokenizer.tokenizer import load_tokenizer

    try:
        gpt2 = load_tokenizer("gpt2")
        print_check("tokenizer", f"gpt2: {gpt2.vocab_size:,} tokens, hash {gpt2.hash[:12]}")
    except (OSError, ValueError) as error:
        problems.append(f"{error} -> install gptjax again")
        print_check("tokenizer", "gpt2: damaged", problems[-1:])
    try:
        data = os.environ.get("GPTJAX_DATA") or user_cache_dir("data")
        programs = os.environ.get("JAX_COMPILATION_CACHE_DIR") or user_cache_dir("xla")
        print_check("cache", f"data in {data} · compiled programs in {programs}")
    except ConfigError as error:
        print_check("cache", f"none: {error} Or set GPTJAX_HOME.")
    for extra, module in EXTRA_MODULES.items():
        text = "installed" if is_installed(module) else f"not installed -> {install_command(extra)}"
        print_check("extra", f"[{extra}] {text}")
    return 1 if problems else 0


def print_check(topic: str, text: str, problems: list[str] | None = None) -> None:
    """Prints the result of one check and its problems."""
    print_result(f"{topic:<10} {text}")
    for problem in problems or []:
        print_result(f"{'problem':<10} {problem}")


def check_packages(installed: dict[str, str]) -> list[str]:
    """Finds packages that are missing or too old; each problem names its fix."""

    def parse(version: str) -> list[int]:
        return [int(part) for part in version.split(".") if part.isdecimal()]

    return [
        f"{name} is {installed[name]}, requires {minimum} -> pip install '{name}>={minimum}'"
        for name, minimum in MIN_VERSIONS.items()
        if parse(installed[name]) < parse(minimum)
    ]


def check_devices() -> list[str]:
    """Prints devices, memory, dtype and attention backend; returns problems."""
    import jax

    from gptjax.config import GPTConfig
    from gptjax.model.gpt import compute_dtype, resolve_backend
    from gptjax.training.estimate import device_memory, format_bytes

    try:
        devices = jax.devices()
    except RuntimeError as error:
        problem = f"jax found no device: {error} -> export JAX_PLATFORMS=cpu"
        print_check("devices", "none", [problem])
        return [problem]
    is_cpu = devices[0].platform == "cpu"
    detail = f" of memory, {os.cpu_count()} cores" if is_cpu else " each"
    process = f"process {jax.process_index()} of {jax.process_count()}"
    kind = f"{len(devices)} x {devices[0].device_kind}"
    print_check("devices", f"{kind} · {format_bytes(device_memory())}{detail} · {process}")
    c = GPTConfig(vocab_size=1)
    print_check("compute", f"{compute_dtype(c)} · attention {resolve_backend(c)}")
    return []
