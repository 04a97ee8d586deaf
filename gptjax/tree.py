"""Parameter trees addressed by name: rule tables, partition, flatten."""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

Params = dict[str, Any]  # nested dict of arrays; block parameters stacked on axis 0


def path_str(path: Any) -> str:
    """The name of a leaf: its keys joined by slashes."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten_with_names(tree: Any) -> dict[str, Any]:
    """Maps the name of every leaf to the leaf, in tree order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_str(path): leaf for path, leaf in leaves}


def match_rules(tree: Any, rules: Mapping[str, Any]) -> Any:
    """Replaces each leaf by the value of the only rule that matches its name.

    A leaf that matches no rule or several, or a rule without a leaf, is a ValueError.

    >>> tree = {"tokens": {"embedding": 0}, "norm": {"scale": 0, "bias": 0}}
    >>> match_rules(tree, {"*/embedding": True, "norm/*": False})
    {'norm': {'bias': False, 'scale': False}, 'tokens': {'embedding': True}}
    """
    used_patterns = set()

    def rule_value(path: Any, _: Any) -> Any:
        name = path_str(path)
        matches = [pattern for pattern in rules if fnmatch.fnmatchcase(name, pattern)]
        if len(matches) != 1:
            raise ValueError(
                f"parameter {name} must match exactly one rule but matches {matches or 'none'}."
            )
        used_patterns.update(matches)
        return rules[matches[0]]

    result = jax.tree_util.tree_map_with_path(rule_value, tree)
    if unused := sorted(set(rules) - used_patterns):
        raise ValueError(f"rules that match no parameter: {unused}.")
    return result


def partition(tree: Any, patterns: Sequence[str]) -> tuple[Any, Any]:
    """Splits a nested dict into leaves that match a pattern and all other leaves.

    >>> partition({"head": {"bias": 1}, "norm": {"bias": 2}}, ["head/*"])
    ({'head': {'bias': 1}}, {'norm': {'bias': 2}})
    """
    parts: tuple[Any, Any] = {}, {}
    for name, leaf in flatten_with_names(tree).items():
        is_match = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        parts[0 if is_match else 1][name] = leaf
    return unflatten_names(parts[0]), unflatten_names(parts[1])


def unflatten_names(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Builds a nested dict from named leaves; the inverse of `flatten_with_names`.

    >>> unflatten_names({"head/bias": 1, "head/kernel": 3})
    {'head': {'bias': 1, 'kernel': 3}}
    """
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *path, last = name.split("/")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def combine(left: Any, right: Any) -> Any:
    """Merges two nested dicts; the inverse of `partition`.

    >>> combine({"head": {"bias": 1}}, {"head": {"kernel": 3}, "norm": {"bias": 2}})
    {'head': {'bias': 1, 'kernel': 3}, 'norm': {'bias': 2}}
    """
    merged = dict(left)
    for key, value in right.items():
        merged[key] = combine(merged[key], value) if key in merged else value
    return merged


def num_params(params: Any) -> int:
    """Total number of elements of all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def layer_slice(leaf: Any, n: int) -> Any:
    """Returns `leaf[n]`, without a copy if the array is in CPU memory."""
    if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
        device = jax.devices()[0]
        if device.platform == "cpu" and leaf.devices() == {device}:
            return jax.device_put(np.asarray(leaf)[n])  # keeps `leaf` alive
    return leaf[n]
