"""Labelled lines that every Python carries: code, or prose of its docstrings."""

import ast
import importlib.util
from pathlib import Path

PYTHON_LINES = "python-lines"
# Modules of some size, written in Python, with docstrings, in all supported versions.
MODULES = (
    *("argparse", "calendar", "contextlib", "doctest", "heapq", "inspect", "pathlib"),
    *("random", "statistics", "subprocess", "textwrap", "threading", "zipfile"),
)
SHORTEST, LONGEST = 20, 100  # characters of a line


def python_lines() -> list[tuple[str, str, str]]:
    """(line, "code" or "prose", place), each line once, in the order of the modules."""
    found: dict[str, tuple[str, str]] = {}
    for name in MODULES:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.origin or not spec.origin.endswith(".py"):
            continue
        text = Path(spec.origin).read_text(encoding="utf-8")
        inside = docstring_lines(text)
        for number, raw in enumerate(text.splitlines(), 1):
            line = raw.strip()
            sized = SHORTEST <= len(line) <= LONGEST
            if sized and not line.startswith(("#", ">>>", "...", '"', "'")):
                kind = "prose" if number in inside else "code"
                found.setdefault(line, (f"{name}.py:{number}", kind))
    return [(line, kind, place) for line, (place, kind) in found.items()]


def docstring_lines(text: str) -> set[int]:
    """Numbers of the lines of a program that are inside docstrings."""
    inside: set[int] = set()
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, holders) and ast.get_docstring(node) is not None:
            first = node.body[0]
            inside |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return inside
