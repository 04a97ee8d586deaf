"""Hashes of what a run reads, so that it goes on with the same or not at all.

The config of a run only names its data, its template and the model it starts from;
what lies there can change. meta.json has the hashes of what was there.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.errors import ModelError
from gptjax.strict_json import read_json
from gptjax.tree import named_leaves

META_BYTES = 1 << 26
KEPT = {  # name in meta.json: what it is to people, and the options that name it
    "data": ("data", "data.source"),
    "tokenizer": ("tokenizer", "data.tokenizer"),
    "start": ("model to start from", "tune.start"),
    "template": ("chat template", "data.template"),
}


def of_rows(rows: Iterable[Any]) -> dict[str, Any]:
    """How many rows there are, and a hash of all, each anything that JSON can hold."""
    digest, count = hashlib.sha256(), 0
    for row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
        count += 1
    return {"rows": count, "sha256": digest.hexdigest()}


def of_text(text: str) -> str:
    """A hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def of_arrays(tree: Any) -> str:
    """A hash of the names, shapes, types and numbers of all leaves."""
    digest = hashlib.sha256()
    for name, leaf in named_leaves(tree).items():
        array = np.ascontiguousarray(leaf)
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def check_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Compares what a run is about to read with what it has read so far.

    What an older version of gptjax did not record is not compared.

    Args:
        folder: of the run.
        facts: what it reads now; `KEPT`, and others.

    Raises:
        ModelError: something has changed, or meta.json is damaged.
    """
    before = read_meta(folder)
    for name, (what, option) in KEPT.items():
        now = json.loads(json.dumps(facts.get(name)))
        if name in before and before[name] != now:
            raise ModelError(
                f"the {what} of the run in {folder} has changed since it was started "
                f"({option}): {difference(before[name], now)}. Put back what it was, "
                "or start anew with another --run DIR."
            )


def read_meta(folder: Path) -> dict[str, Any]:
    """What meta.json of a run says; nothing before there is one.

    Raises:
        ModelError: it is damaged.
    """
    path = folder / "meta.json"
    if not path.is_file():
        return {}
    try:
        return dict(read_json(path, META_BYTES))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"cannot read {path}, which tells whether the data are still the same: "
            f"{error}. Restore it from a copy, or name another --run DIR."
        ) from error


def difference(before: Any, now: Any, name: str = "") -> str:
    """The first value that differs, with its name; hashes are cut short.

    >>> difference({"a": {"rows": 3}}, {"a": {"rows": 4}})
    'a rows was 3, now 4'
    """
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            if before.get(key) != now.get(key):
                return difference(before.get(key), now.get(key), f"{name} {key}")
    return f"{name} was {shown(before)}, now {shown(now)}".strip()


def shown(value: Any) -> str:
    """A value for people; the first digits tell hashes apart."""
    return "none" if value is None else str(value)[:16]
