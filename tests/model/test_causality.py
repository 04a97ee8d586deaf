"""Nothing leaks: not from later positions, other documents or other rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax.config import GPTConfig

B, T, V = 2, 8, 50
TINY = GPTConfig(vocab_size=V, context_length=T, n_layers=2, n_heads=2, d_model=16)
TOKEN_BT = jax.random.randint(jax.random.key(1), (B, T), 0, V)


@pytest.fixture(autouse=True)
def _no_silent_casts():
    with jax.numpy_dtype_promotion("strict"):
        yield


def lively(config):
    """Parameters far from their start, so that attention is not near uniform."""
    shapes = jax.eval_shape(lambda: gptjax.init(config, jax.random.key(0)))
    rng = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(rng.normal(0, 0.2, leaf.shape), leaf.dtype)

    return jax.tree.map(draw, shapes)


@functools.partial(jax.jit, static_argnums=0)
def scores(config, params, token_BT, **options):
    return gptjax.apply(config, params, token_BT, **options)


def input_gradients(config, params, segment_id_BT=None):
    """[T, T, D]: of the loss at each position, by the input embedding at each.

    The position table adds to the inputs and is used nowhere else, so that with one
    row its gradient is that of the inputs.
    """
    token_BT, target_B = TOKEN_BT[:1], TOKEN_BT[0, ::-1]

    def nats(table_TD):
        position = {"position_embedding": {"embedding": table_TD}}
        logit_BTV = gptjax.apply(config, params | position, token_BT, segment_id_BT=segment_id_BT)
        return -jax.nn.log_softmax(logit_BTV[0])[jnp.arange(T), target_B]

    return jax.jit(jax.jacrev(nats))(params["position_embedding"]["embedding"])


@pytest.mark.fast
@pytest.mark.parametrize(
    "changes",
    [
        {"attention": "reference"},
        {"attention": "chunked"},
        {"attention": "xla"},
        {"attention": "reference", "dtype": "bfloat16", "remat": "full"},
    ],
)
def test_the_loss_of_a_position_depends_on_no_later_input(changes):
    config = dataclasses.replace(TINY, **changes)

    grad_TSD = input_gradients(config, lively(config))

    used_TS = np.any(np.asarray(grad_TSD) != 0, axis=-1)
    np.testing.assert_array_equal(used_TS, np.tril(np.ones((T, T), bool)))


@pytest.mark.fast
@pytest.mark.parametrize("attention", ["reference", "chunked", "xla"])
def test_documents_of_one_row_exchange_no_gradient(attention):
    config = dataclasses.replace(TINY, attention=attention)
    segment_id_BT = jnp.array([[3, 3, 3, 1, 1, 2, 2, 2]])

    grad_TSD = input_gradients(config, lively(config), segment_id_BT)

    used_TS = np.any(np.asarray(grad_TSD) != 0, axis=-1)
    same_TS = np.asarray(segment_id_BT[0, :, None] == segment_id_BT[0, None])
    np.testing.assert_array_equal(used_TS, np.tril(same_TS))


def test_packed_documents_are_scored_as_if_each_were_alone():
    params = lively(TINY)
    segment_id_BT = jnp.array([[0, 0, 0, 1, 1, 2, 2, 2]])
    position_BT = jnp.array([[0, 1, 2, 0, 1, 0, 1, 2]])

    packed_BTV = scores(
        TINY, params, TOKEN_BT[:1], segment_id_BT=segment_id_BT, position_BT=position_BT
    )

    for first, last in ((0, 3), (3, 5), (5, 8)):
        alone_BTV = scores(TINY, params, TOKEN_BT[:1, first:last])
        np.testing.assert_allclose(packed_BTV[:, first:last], alone_BTV, atol=1e-5)


def test_rows_do_not_see_each_other():
    params, order = lively(TINY), jnp.array([1, 0])

    logit_BTV = scores(TINY, params, TOKEN_BT)

    np.testing.assert_allclose(scores(TINY, params, TOKEN_BT[order]), logit_BTV[order], atol=1e-6)


def test_a_prefix_has_the_logits_that_it_has_in_the_whole_row():
    params = lively(TINY)

    whole_BTV = scores(TINY, params, TOKEN_BT)

    for length in (1, 5):
        prefix_BTV = scores(TINY, params, TOKEN_BT[:, :length])
        np.testing.assert_allclose(prefix_BTV, whole_BTV[:, :length], atol=1e-5)
