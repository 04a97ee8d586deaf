"""Parameters spoken of by name: tables of rules instead of branches."""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np


def path_name(path: Any) -> str:
    """The name of a leaf: its keys joined by slashes."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Any) -> dict[str, Any]:
    """Every leaf under its name, in the order of the tree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path): leaf for path, leaf in leaves}


def assign(tree: Any, rules: Mapping[str, Any]) -> Any:
    """Gives each leaf the value of the one rule whose pattern matches its name.

    Raises:
        ValueError: a leaf that no rule or more than one rule matches, or a rule
            that matches no leaf: a table of rules is an exact cover.

    >>> tree = {"tokens": {"embedding": 0}, "norm": {"scale": 0, "bias": 0}}
    >>> assign(tree, {"*/embedding": True, "norm/*": False})
    {'norm': {'bias': False, 'scale': False}, 'tokens': {'embedding': True}}
    """
    used = set()

    def value(path: Any, _: Any) -> Any:
        name = path_name(path)
        hits = [pattern for pattern in rules if fnmatch.fnmatchcase(name, pattern)]
        if len(hits) != 1:
            raise ValueError(
                f"parameter {name} needs exactly one rule but matches {hits or 'none'}."
            )
        used.update(hits)
        return rules[hits[0]]

    result = jax.tree_util.tree_map_with_path(value, tree)
    if idle := sorted(set(rules) - used):
        raise ValueError(f"rules that match no parameter: {idle}.")
    return result


def partition(tree: Any, patterns: Sequence[str]) -> tuple[Any, Any]:
    """The nested dict in two: leaves whose names match a pattern, and the others.

    >>> partition({"head": {"bias": 1}, "norm": {"bias": 2}}, ["head/*"])
    ({'head': {'bias': 1}}, {'norm': {'bias': 2}})
    """
    parts: tuple[Any, Any] = {}, {}
    for name, leaf in named_leaves(tree).items():
        hit = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        parts[0 if hit else 1][name] = leaf
    return unnamed(parts[0]), unnamed(parts[1])


def unnamed(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict of leaves under their names; the inverse of `named_leaves`.

    >>> unnamed({"head/bias": 1, "head/kernel": 3})
    {'head': {'bias': 1, 'kernel': 3}}
    """
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *path, last = name.split("/")
        place = tree
        for key in path:
            place = place.setdefault(key, {})
        place[last] = leaf
    return tree


def merge(one: Any, other: Any) -> Any:
    """The nested dict of all leaves of both; the inverse of `partition`.

    >>> merge({"head": {"bias": 1}}, {"head": {"kernel": 3}, "norm": {"bias": 2}})
    {'head': {'bias': 1, 'kernel': 3}, 'norm': {'bias': 2}}
    """
    merged = dict(one)
    for key, value in other.items():
        merged[key] = merge(merged[key], value) if key in merged else value
    return merged


def count(tree: Any) -> int:
    """Numbers in all leaves together."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def part(leaf: Any, n: int) -> Any:
    """`leaf[n]`; of an array in a CPU's memory it is seen there and not copied."""
    if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
        here = jax.devices()[0]
        if here.platform == "cpu" and leaf.devices() == {here}:
            return jax.device_put(np.asarray(leaf)[n])  # which keeps all of it alive
    return leaf[n]
