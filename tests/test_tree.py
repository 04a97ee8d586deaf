"""Rules over parameter names: exact cover of a tree, or an error."""

import jax
import jax.numpy as jnp
import pytest

from gptjax.tree import flatten_with_names, match_rules, num_params

TREE = {"tokens": {"embedding": 0}, "norm": {"scale": 1, "bias": 2}}


def test_rules_that_do_not_cover_each_leaf_once_are_rejected():
    for rules, message in (
        ({"*embedding": 0, "*scale": 0}, "norm/bias .* exactly one .* none"),
        ({"*embedding": 0, "norm/*": 0, "*bias": 0}, r"norm/bias .* \['norm/\*', '\*bias'\]"),
        ({"*": 0, "head/*": 0}, r"no parameter: \['head/\*'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            match_rules(TREE, rules)


def test_leaves_have_rules_by_name_and_names_by_path_in_the_order_of_the_tree():
    rules, names = match_rules(TREE, {"norm/*": "b", "*embedding": "a"}), flatten_with_names(TREE)

    assert rules == {"tokens": {"embedding": "a"}, "norm": {"scale": "b", "bias": "b"}}
    assert names == {"norm/bias": 2, "norm/scale": 1, "tokens/embedding": 0}
    assert list(names.values()) == jax.tree.leaves(TREE)
    assert num_params({"a": jnp.zeros((2, 3)), "b": {"c": jnp.zeros(4)}}) == 10
