"""Built-in classification data: code and docstring lines of the standard library."""

import ast
import importlib.util
from pathlib import Path

PYTHON_LINES = "python-lines"
# Pure-Python modules with many docstrings, present in all supported versions.
PYTHON_LINE_MODULES = (
    *("argparse", "calendar", "contextlib", "doctest", "heapq", "inspect", "pathlib"),
    *("random", "statistics", "subprocess", "textwrap", "threading", "zipfile"),
)
MIN_LINE_CHARS, MAX_LINE_CHARS = 20, 100  # characters per line


def python_lines() -> list[tuple[str, str, str]]:
    """Returns distinct (line, "code" or "prose", location), in module order."""
    rows: dict[str, tuple[str, str]] = {}
    for name in PYTHON_LINE_MODULES:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.origin or not spec.origin.endswith(".py"):
            continue
        text = Path(spec.origin).read_text(encoding="utf-8")
        docstring_numbers = docstring_line_numbers(text)
        for number, raw in enumerate(text.splitlines(), 1):
            line = raw.strip()
            has_valid_length = MIN_LINE_CHARS <= len(line) <= MAX_LINE_CHARS
            if has_valid_length and not line.startswith(("#", ">>>", "...", '"', "'")):
                kind = "prose" if number in docstring_numbers else "code"
                rows.setdefault(line, (f"{name}.py:{number}", kind))
    return [(line, kind, location) for line, (location, kind) in rows.items()]


def docstring_line_numbers(text: str) -> set[int]:
    """Returns the line numbers of a source text that lie inside docstrings."""
    numbers: set[int] = set()
    node_types = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, node_types) and ast.get_docstring(node) is not None:
            first = node.body[0]
            numbers |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return numbers
