"""Packed kernels say what the plain ones say; with 8 bits, what rounded ones say."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax.config import GPTConfig
from gptjax.inference.generate import complete
from gptjax.model import quantization
from gptjax.model.gpt import compute_dtype, init_cache
from gptjax.model.quantization import (
    INT8_MAX,
    SPLIT_BASE,
    decode_matmul,
    prepare_decode_params,
    quantize_int8,
    unstack_layers,
)
from gptjax.tree import flatten_with_names
from gptjax.weights.model_folder import Model, save
from tests.model.test_gpt import draw_params, extend, logits
from tests.small_models import LLAMA

SHAPE = {"context_length": 16, "n_layers": 1, "n_heads": 2, "d_model": 24, "dtype": "auto"}
CONFIG = GPTConfig(vocab_size=257, **SHAPE)
fake_quantize = jax.jit(quantization.fake_quantize)  # eagerly it compiles each operation
TOKEN_BT = jnp.asarray(np.random.default_rng(0).integers(257, size=(3, 4)), "int32")


@pytest.mark.parametrize(
    ("tied", "multiple", "dtype", "int8", "near", "changes"),
    [
        (True, 64, "float32", False, 2e-6, {}),
        (False, 1, "float32", True, 5e-4, {}),  # rows are rounded to 15 bits, 7 times
        (True, 1, "bfloat16", False, 2e-2, {}),
        (True, 1, "float32", False, 2e-6, LLAMA),
        (True, 1, "float32", True, 5e-4, LLAMA),
    ],
)
def test_decode_layouts_give_the_logits_of_stacked_layers(
    tied, multiple, dtype, int8, near, changes
):
    options = {"tie_embeddings": tied, "vocab_multiple": multiple, "dtype": dtype}
    config = dataclasses.replace(CONFIG, **options, **changes)
    params = draw_params(config, 0.2)
    params = fake_quantize(params) if int8 else params
    layers = prepare_decode_params(unstack_layers(params), compute_dtype(config), int8)

    position_BT = jnp.arange(4, dtype=jnp.int32)[None].repeat(3, 0)

    expected = logits(config, params, TOKEN_BT)[..., :257]
    found, _ = extend(config, layers, TOKEN_BT, position_BT, init_cache(config, 3, 16))

    atol = near * float(np.abs(expected).max())
    np.testing.assert_allclose(found[..., :257], expected, atol=atol)


def test_only_kernels_and_the_table_of_outputs_are_rounded_to_half_a_step_of_their_output():
    params = draw_params(CONFIG)
    rounded, again = fake_quantize(params), fake_quantize(fake_quantize(params))

    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), again, rounded)
    for name, leaf in flatten_with_names(params).items():
        changed = name.endswith("/kernel") or name == "token_embedding/embedding"
        assert changed == np.any(flatten_with_names(rounded)[name] != leaf), name
    for name, axes in (("query", 1), ("out", (1, 2))):
        kernel, found = (tree["blocks"]["attention"][name]["kernel"] for tree in (params, rounded))
        step = np.abs(kernel).max(axes, keepdims=True) / INT8_MAX
        assert np.all(np.abs(found - kernel) <= step * (0.5 + 1e-5)), name
        assert np.abs(found - kernel).max() > 0.4 * step.min(), name


@jax.jit
def multiply(x_BI, kernel_OI):
    whole = quantize_int8(kernel_OI)
    return decode_matmul(x_BI, whole), whole


@pytest.mark.parametrize("rows", [1, 11])
def test_whole_numbers_multiply_as_exactly_as_rows_of_15_bits(rows):
    random = np.random.default_rng(rows)
    for size in (1e-20, 1e-3, 1.0, 1e4):
        x_BI = (random.standard_normal((rows, 40)) * size).astype(np.float32)
        x_BI[0, 3:] = 0  # a row of few numbers, and one of none
        x_BI[-1] *= rows == 1

        found, whole = multiply(x_BI, random.standard_normal((7, 40)).astype(np.float32))

        exact_IO = np.asarray(whole.kernel_OI.T, np.float64) * np.asarray(whole.scale_O)
        expected = x_BI.astype(np.float64) @ exact_IO
        step_B1 = np.abs(x_BI).max(axis=1, keepdims=True) / (INT8_MAX * SPLIT_BASE)
        bound = 0.51 * step_B1 * np.abs(exact_IO).sum(axis=0) + 1e-6 * np.abs(expected)
        assert np.all(np.abs(found - expected) <= bound)


def test_a_model_loaded_in_8_bits_writes_what_its_rounded_parameters_write(tmp_path):
    model = Model(CONFIG, draw_params(CONFIG), gptjax.tokenizer.load("bytes"))
    save(model, tmp_path / "model")

    loaded = gptjax.load(tmp_path / "model", int8=True)

    params = fake_quantize(model.params)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(close, loaded.params, params)
    options = {"temperature": 0.0, "max_new_tokens": 6, "stop_ids": ()}
    prompt = [97, 98]
    ids = prompt + complete(loaded, [prompt], **options)[0].ids
    logit_BTV = logits(CONFIG, params, jnp.array([ids]))
    assert ids[2:] == np.argmax(logit_BTV[0, 1:-1], -1).tolist()
