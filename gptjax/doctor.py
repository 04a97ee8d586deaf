"""What this machine offers to gptjax, and the line that fixes what is missing."""

import importlib.util
import os
import platform
from pathlib import Path

from gptjax.run_folder import versions

# Lowest version that is tested of each package that training needs.
FLOORS = {
    "jax": (0, 7, 2),
    "flax": (0, 11, 2),
    "optax": (0, 2, 6),
    "orbax-checkpoint": (0, 11, 31),
    "grain": (0, 2, 15),
    "numpy": (2, 0),
    "tiktoken": (0, 13),
}
EXTRAS = {"test": "pytest", "peers": "torch", "dev": "ruff"}  # extra: what it brings


def doctor() -> int:
    """Prints the findings; 1 if training cannot run, else 0."""
    problems = package_problems()
    found = versions()
    names = " · ".join(f"{name} {found[name]}" for name in ("gptjax", *FLOORS))
    tell("python", f"{platform.python_version()} · {names}", problems)
    if problems:
        return 1
    problems = device_problems()
    tell("tokenizer", *tokenizer_state())
    tell("cache", cache_state())
    for extra, module in EXTRAS.items():
        there = importlib.util.find_spec(module) is not None
        fix = "" if there else f" -> pip install 'gptjax[{extra}]'"
        tell("extra", f"[{extra}] {'is there' if there else 'is not there'}{fix}")
    return 1 if problems else 0


def tell(topic: str, text: str, problems: list[str] | None = None) -> None:
    """Prints one finding and the problems that it brought up."""
    print(f"{topic:<10} {text}")
    for problem in problems or []:
        print(f"{'problem':<10} {problem}")


def package_problems() -> list[str]:
    """Packages that are missing or too old, each with its fix."""
    problems = []
    found = versions()
    for name, floor in FLOORS.items():
        numbers = [int(part) for part in found[name].split(".") if part.isdecimal()]
        if tuple(numbers) < floor:
            lowest = ".".join(map(str, floor))
            fix = f"pip install '{name}>={lowest}'"
            problems.append(f"{name} is {found[name]}, needs {lowest} -> {fix}")
    return problems


def device_problems() -> list[str]:
    """Prints devices, memory, compute type and attention; problems with their fix."""
    import jax

    from gptjax.attention.choice import chosen_backend
    from gptjax.budget import human
    from gptjax.config import GPTConfig
    from gptjax.model import compute_dtype

    try:
        devices = jax.devices()
    except RuntimeError as error:
        problem = f"jax finds no device: {error} -> export JAX_PLATFORMS=cpu"
        tell("devices", "none", [problem])
        return [problem]
    if devices[0].platform == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        memory_text = f"{human(memory)} of memory, {os.cpu_count()} cores"
    else:
        stats = devices[0].memory_stats() or {}
        memory_text = f"{human(stats.get('bytes_limit', 0))} each"
    process = f"process {jax.process_index()} of {jax.process_count()}"
    kind = f"{len(devices)} x {devices[0].device_kind}"
    tell("devices", f"{kind} · {memory_text} · {process}")
    c = GPTConfig(vocab_size=1)
    dtype = compute_dtype(c)
    attention = chosen_backend(
        c.attention, length=c.context_length, head_width=c.head_width, dtype=dtype
    )
    tell("compute", f"{dtype} · attention {attention}")
    return []


def tokenizer_state() -> tuple[str, list[str]]:
    """Whether GPT-2's merge table that ships with the package is whole."""
    from gptjax import tokenizer
    from gptjax.errors import GptjaxError

    try:
        gpt2 = tokenizer.load("gpt2")
    except (GptjaxError, OSError) as error:
        return "gpt2 is damaged", [f"{error} -> pip install --force-reinstall gptjax"]
    return f"gpt2: {gpt2.vocab_size:,} tokens, hash {gpt2.hash[:12]}", []


def cache_state() -> str:
    """Where downloads and compiled programs are kept."""
    from gptjax.download import cache_folder

    compiled = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    hint = "off -> export JAX_COMPILATION_CACHE_DIR=~/.cache/gptjax/xla"
    data = Path(os.environ.get("GPTJAX_DATA", cache_folder("data")))
    return f"data in {data} · compiled programs: {compiled or hint}"
