"""Provenance: hashes of a run's inputs, checked when it resumes.

The config only names the data, the chat template and the initial model, whose content
can change; meta.json stores their hashes.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.errors import ModelError
from gptjax.strict_json import read_json
from gptjax.tree import flatten_with_names

MAX_RUN_METADATA_BYTES = 1 << 26
TRACKED_INPUTS = {  # key in meta.json: (description, config option)
    "data": ("data", "data.source"),
    "tokenizer": ("tokenizer", "data.tokenizer"),
    "start": ("initial model", "finetune.init_from"),
    "template": ("chat template", "data.chat_template"),
}


def hash_rows(rows: Iterable[Any]) -> dict[str, Any]:
    """Number of rows and a hash of all; a row is any JSON value."""
    digest, count = hashlib.sha256(), 0
    for row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
        count += 1
    return {"rows": count, "sha256": digest.hexdigest()}


def hash_text(text: str) -> str:
    """Hashes a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def hash_pytree(tree: Any) -> str:
    """Hashes the names, shapes, dtypes and values of all leaves."""
    digest = hashlib.sha256()
    for name, leaf in flatten_with_names(tree).items():
        array = np.ascontiguousarray(leaf)
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def check_provenance(run_dir: Path, provenance: Mapping[str, Any]) -> None:
    """Compares the inputs of a resumed run with those recorded in meta.json.

    Inputs that an older version of gptjax did not record are not compared.

    Raises:
        ModelError: an input has changed, or meta.json is corrupt.
    """
    before = read_run_metadata(run_dir)
    for name, (description, option) in TRACKED_INPUTS.items():
        now = json.loads(json.dumps(provenance.get(name)))
        if name in before and before[name] != now:
            raise ModelError(
                f"the {description} of the run in {run_dir} has changed since it was started "
                f"({option}): {describe_mismatch(before[name], now)}. Restore the original "
                "or start a new run with another --run DIR."
            )


def read_run_metadata(run_dir: Path) -> dict[str, Any]:
    """Reads meta.json of a run; empty if there is none.

    Raises:
        ModelError: the file is corrupt.
    """
    path = run_dir / "meta.json"
    if not path.is_file():
        return {}
    try:
        return dict(read_json(path, MAX_RUN_METADATA_BYTES))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"cannot read {path}, which records the inputs of the run: {error}. "
            "Restore it from a copy, or start a new run with another --run DIR."
        ) from error


def describe_mismatch(before: Any, now: Any, name: str = "") -> str:
    """Describes the first value that differs; long values are shortened.

    >>> describe_mismatch({"a": {"rows": 3}}, {"a": {"rows": 4}})
    'a rows was 3, now 4'
    """
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            if before.get(key) != now.get(key):
                return describe_mismatch(before.get(key), now.get(key), f"{name} {key}")
    return f"{name} was {shorten_value(before)}, now {shorten_value(now)}".strip()


def shorten_value(value: Any) -> str:
    """Shortens a value for display; the first digits identify a hash."""
    return "none" if value is None else str(value)[:16]
