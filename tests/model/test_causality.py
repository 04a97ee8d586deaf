"""Nothing leaks: not from later positions, other documents or other rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from tests.model.test_gpt import TINY, TOKEN_BT, B, T, draw_params, logits

SEGMENT_BT = jnp.array([[3, 3, 3, 1, 1, 2, 2, 2]])


@pytest.fixture(autouse=True)
def _no_silent_casts():
    with jax.numpy_dtype_promotion("strict"):
        yield


@functools.partial(jax.jit, static_argnums=0)
def input_gradients(config, params, segment_id_BT):
    """[T, T, D]: of the loss at each position, by the input embedding at each.

    The position table adds to the inputs and is used nowhere else, so that with one
    row its gradient is that of the inputs.
    """
    token_BT, target_B = TOKEN_BT[:1], TOKEN_BT[0, ::-1]

    def nats(table_TD):
        position = {"position_embedding": {"embedding": table_TD}}
        logit_BTV = gptjax.apply(config, params | position, token_BT, segment_id_BT=segment_id_BT)
        return -jax.nn.log_softmax(logit_BTV[0])[jnp.arange(T), target_B]

    return jax.jacrev(nats)(params["position_embedding"]["embedding"])


@pytest.mark.fast
@pytest.mark.parametrize(
    "changes",
    [
        {"attention": "reference", "dtype": "bfloat16", "remat": "full"},
        {"attention": "chunked"},
        {"attention": "xla"},
    ],
)
def test_a_loss_has_no_gradient_from_later_inputs_and_other_documents(changes):
    config = dataclasses.replace(TINY, **changes)
    params = draw_params(config)

    for segment_id_BT in (jnp.zeros_like(SEGMENT_BT), SEGMENT_BT):
        grad_TSD = input_gradients(config, params, segment_id_BT)

        used_TS = np.any(np.asarray(grad_TSD) != 0, axis=-1)
        same_TS = np.asarray(segment_id_BT[0, :, None] == segment_id_BT[0, None])
        np.testing.assert_array_equal(used_TS, np.tril(same_TS))


def test_without_causality_a_loss_depends_on_all_inputs():
    config = dataclasses.replace(TINY, causal=False)

    grad_TSD = input_gradients(config, draw_params(config), jnp.zeros_like(SEGMENT_BT))

    assert np.all(np.any(np.asarray(grad_TSD) != 0, axis=-1))


def test_prefixes_documents_and_rows_have_the_logits_that_they_have_alone():
    params = draw_params(TINY)
    half = T // 2
    whole_BTV = logits(TINY, params, TOKEN_BT)
    segment_id_BT = jnp.repeat(jnp.array([[0, 1]]), half, axis=1).repeat(B, 0)
    position_BT = jnp.tile(jnp.arange(half), 2)[None].repeat(B, 0)

    packed_BTV = logits(
        TINY, params, TOKEN_BT, segment_id_BT=segment_id_BT, position_BT=position_BT
    )
    first_BTV, second_BTV = (
        logits(TINY, params, token_BT) for token_BT in (TOKEN_BT[:, :half], TOKEN_BT[:, half:])
    )

    np.testing.assert_allclose(first_BTV, whole_BTV[:, :half], atol=1e-5)
    np.testing.assert_allclose(first_BTV, packed_BTV[:, :half], atol=1e-5)
    np.testing.assert_allclose(second_BTV, packed_BTV[:, half:], atol=1e-5)
    swapped_BTV = logits(TINY, params, TOKEN_BT[::-1])
    np.testing.assert_allclose(swapped_BTV, whole_BTV[::-1], atol=1e-6)
