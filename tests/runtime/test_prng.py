"""Seeds: every seed has a key of its own."""

import ast
from pathlib import Path

import jax
import numpy as np

import gptjax
from gptjax.runtime.prng import make_key


def test_keys_of_all_seeds_differ_and_those_below_2_to_the_32_are_those_of_jax():
    small, large = [0, 1, 2**31, 2**32 - 1], [2**32, 2**32 + 1, 2**33, 2**63 - 1]

    data = {seed: tuple(np.asarray(jax.random.key_data(make_key(seed)))) for seed in small + large}

    assert len(set(data.values())) == len(data)
    for seed in small:
        np.testing.assert_array_equal(data[seed], jax.random.key_data(jax.random.key(seed)))


def test_no_other_module_makes_the_key_of_a_seed():
    package = Path(gptjax.__file__).parent
    for path in set(package.rglob("*.py")) - {package / "runtime" / "prng.py"}:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "jax.random.key":
                assert isinstance(node.args[0], ast.Constant), f"{path}:{node.lineno}"
