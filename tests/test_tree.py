"""A table of rules covers a tree of parameters exactly, or it is refused."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.tree import flatten_with_names, match_rules, num_params

TREE = {"tokens": {"embedding": 0}, "norm": {"scale": 1, "bias": 2}}


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(), min_size=1))
def test_one_rule_per_leaf_gives_each_leaf_its_value(values):
    tree = {"layer": dict.fromkeys(values, 0)}

    assert match_rules(tree, {f"layer/{name}": v for name, v in values.items()}) == {
        "layer": values
    }


@pytest.mark.fast
def test_a_pattern_covers_every_leaf_that_it_matches():
    result = match_rules(TREE, {"norm/*": "b", "*embedding": "a"})

    assert result == {"tokens": {"embedding": "a"}, "norm": {"scale": "b", "bias": "b"}}


def test_a_leaf_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match=r"norm/bias .* exactly one .* none"):
        match_rules(TREE, {"*embedding": 0, "*scale": 0})


def test_a_leaf_with_two_rules_is_an_error():
    with pytest.raises(ValueError, match=r"norm/bias .* \['norm/\*', '\*bias'\]"):
        match_rules(TREE, {"*embedding": 0, "norm/*": 0, "*bias": 0})


def test_a_rule_without_a_leaf_is_an_error():
    with pytest.raises(ValueError, match=r"no parameter: \['\*kernel', 'head/\*'\]"):
        match_rules(TREE, {"*": 0, "head/*": 0, "*kernel": 0})


def test_patterns_distinguish_upper_and_lower_case():
    with pytest.raises(ValueError, match="matches none"):
        match_rules({"norm": 0}, {"Norm": 0})


@pytest.mark.fast
def test_leaves_are_named_by_their_path_in_the_order_of_the_tree():
    names = flatten_with_names(TREE)

    assert names == {"norm/bias": 2, "norm/scale": 1, "tokens/embedding": 0}
    assert list(names.values()) == jax.tree.leaves(TREE)


def test_the_count_is_of_numbers_not_of_arrays():
    assert num_params({"a": jnp.zeros((2, 3)), "b": {"c": jnp.zeros(4)}}) == 10
