"""Packed kernels say what the plain ones say; with 8 bits, what rounded ones say."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gptjax
from gptjax.config import GPTConfig
from gptjax.inference.generate import complete
from gptjax.model.gpt import (
    apply_with_cache,
    compute_dtype,
    init_cache,
    lm_logits,
    unembedding_matrix,
)
from gptjax.model.quantization import (
    INT8_MAX,
    SPLIT_BASE,
    decode_matmul,
    fake_quantize,
    prepare_decode_params,
    quantize_int8,
    unstack_layers,
)
from gptjax.tokenizer.tokenizer import load_tokenizer
from gptjax.tree import flatten_with_names
from gptjax.weights.model_folder import Model
from tests.model.test_gpt import draw_params

CONFIG = GPTConfig(
    vocab_size=257, context_length=32, n_layers=2, n_heads=2, d_model=24, dtype="auto"
)
apply = jax.jit(gptjax.apply, static_argnums=0)
TOKEN_BT = np.random.default_rng(0).integers(257, size=(3, 9)).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def cached_logits(config, layers):
    query_position_BT = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32)[None], TOKEN_BT.shape)
    cache = init_cache(config, 3, 16)
    x_BTD, _ = apply_with_cache(config, layers, jnp.asarray(TOKEN_BT), query_position_BT, cache)
    return lm_logits(config, unembedding_matrix(config, layers), x_BTD)


@pytest.mark.parametrize(
    ("tied", "multiple", "dtype", "int8", "near"),
    [
        (True, 64, "float32", False, 2e-6),
        (False, 1, "float32", False, 2e-6),
        (True, 1, "float32", True, 5e-4),  # rows are rounded to 15 bits, 13 times
        (False, 64, "float32", True, 5e-4),
        (True, 64, "bfloat16", False, 2e-2),
        (False, 1, "bfloat16", True, 2e-2),
    ],
)
def test_decode_layouts_give_the_logits_of_stacked_layers(tied, multiple, dtype, int8, near):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied, vocab_multiple=multiple, dtype=dtype)
    params = draw_params(config)
    params = fake_quantize(params) if int8 else params
    layers = prepare_decode_params(unstack_layers(params), compute_dtype(config), int8)

    expected = apply(config, params, jnp.asarray(TOKEN_BT))[..., :257]
    found = cached_logits(config, layers)[..., :257]

    np.testing.assert_allclose(found, expected, atol=near * float(jnp.abs(expected).max()))


def test_only_kernels_and_the_table_of_outputs_are_rounded():
    params = draw_params(CONFIG)
    rounded = flatten_with_names(fake_quantize(params))
    for name, leaf in flatten_with_names(params).items():
        changed = name.endswith("/kernel") or name == "token_embedding/embedding"
        assert changed == bool(jnp.any(rounded[name] != leaf)), name


def test_rounding_moves_no_weight_by_more_than_half_a_step_of_its_output():
    params = draw_params(CONFIG)
    kernel_NDHK = params["blocks"]["attention"]["query"]["kernel"]
    found = fake_quantize(params)["blocks"]["attention"]["query"]["kernel"]
    step_NHK = jnp.abs(kernel_NDHK).max(axis=1) / INT8_MAX
    assert jnp.all(
        jnp.abs(found - kernel_NDHK) <= step_NHK[:, None] * (0.5 + 1e-5)
    )  # and of rounding twice nothing is left
    again = fake_quantize(fake_quantize(params))
    np.testing.assert_allclose(again["blocks"]["attention"]["query"]["kernel"], found, rtol=1e-6)


@given(
    rows=st.sampled_from([1, 2, 11]),  # each compiles once
    seed=st.integers(0, 2**31 - 1),
    size=st.sampled_from([1e-20, 1e-3, 1.0, 1e4]),
)
def test_whole_numbers_multiply_as_exactly_as_rows_of_15_bits(rows, seed, size):
    random = np.random.default_rng(seed)
    x_BI = (random.standard_normal((rows, 40)) * size).astype(np.float32)
    x_BI[0, 3:] = 0  # a row of few numbers, and one of none
    x_BI[-1] = 0
    kernel_OI = random.standard_normal((7, 40)).astype(np.float32)
    whole = quantize_int8(jnp.asarray(kernel_OI))
    found = decode_matmul(jnp.asarray(x_BI), whole)

    exact_IO = np.asarray(whole.kernel_OI.T, np.float64) * np.asarray(whole.scale_O)
    expected = x_BI.astype(np.float64) @ exact_IO
    step_B1 = np.abs(x_BI).max(axis=1, keepdims=True) / (INT8_MAX * SPLIT_BASE)
    bound = 0.51 * step_B1 * np.abs(exact_IO).sum(axis=0) + 1e-6 * np.abs(expected)
    assert np.all(np.abs(found - expected) <= bound)


@pytest.mark.parametrize("rows", [1, 2])
def test_the_largest_sums_of_whole_numbers_fit_in_32_bits(rows):
    kernel_OI = np.ones((3, 30_000), np.float32) * [[1], [-1], [0.5]]
    whole = quantize_int8(jnp.asarray(kernel_OI, jnp.float32))
    found = decode_matmul(jnp.full((rows, 30_000), 2.0), whole)
    np.testing.assert_allclose(found, [[6e4, -6e4, 3e4]] * rows, rtol=1e-6)


def test_a_model_in_8_bits_writes_what_its_rounded_parameters_write():
    params = fake_quantize(draw_params(CONFIG))
    tokenizer = load_tokenizer("bytes")
    options = {"temperature": 0.0, "max_new_tokens": 12, "stop_ids": ()}
    ids = [
        complete(Model(CONFIG, params, tokenizer, int8=int8), "ab", **options)[0].ids
        for int8 in (False, True)
    ]
    assert ids[0] == ids[1]
