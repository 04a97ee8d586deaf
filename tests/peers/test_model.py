"""The same numbers as PyTorch and transformers: logits, gradients, training steps.

Run with `pytest -m peers -n0 tests/peers/test_model.py`; needs the extra [peers].
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax.config import GPTConfig, OptimConfig
from gptjax.exporters.tensors import named_tensors
from gptjax.model.gpt import hidden_states, unembedding_matrix
from gptjax.training.loss import fused_cross_entropy
from gptjax.training.optimizer import make_optimizer
from gptjax.training.train_step import init_state, make_train_step, train_steps
from gptjax.weights.model_folder import Model
from tests.model.test_gpt import draw_params

pytestmark = [
    pytest.mark.peers,
    # Both libraries warn about their own coming versions; we only read their numbers.
    pytest.mark.filterwarnings("ignore"),
]

B, T, V, N, H, D = 3, 16, 97, 2, 4, 32
CONFIG = GPTConfig(vocab_size=V, context_length=T, n_layers=N, n_heads=H, d_model=D)
OPTIM = OptimConfig(
    peak_lr=1e-3, schedule="constant", warmup_steps=0, weight_decay=0.1, grad_clip=0.3
)


@pytest.fixture
def peer(torch):
    """A small GPT-2 of transformers with our parameters."""
    transformers = pytest.importorskip("transformers")
    shape = {"n_layer": N, "n_head": H, "n_embd": D, "n_positions": T, "vocab_size": V}
    drops = dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **drops))
    ours = named(draw_params(CONFIG, 0.2))
    model.transformer.load_state_dict({name: torch.tensor(x) for name, x in ours.items()})
    return model


def named(params):
    """Our parameters, or gradients, by the names of GPT-2."""
    return named_tensors(Model(CONFIG, params, gptjax.tokenizer.load("bytes")), "hf")


def batch_at(step):
    """Tokens, targets and weights; some targets do not count."""
    rng = np.random.default_rng(step)
    row_BT = jnp.asarray(rng.integers(V, size=(B, T + 1)), jnp.int32)
    weight_BT = jnp.asarray(rng.uniform(size=(B, T)) > 0.3, jnp.float32)
    return row_BT[:, :-1], row_BT[:, 1:], weight_BT


def loss_fn(params, batch, key):
    token_BT, target_BT, weight_BT = batch
    x_BTD, _ = hidden_states(CONFIG, params, token_BT)
    table_VD = unembedding_matrix(CONFIG, params)
    nats = fused_cross_entropy(CONFIG, x_BTD, table_VD, target_BT, weight_BT, 8)
    return nats, jnp.sum(weight_BT)


def peer_loss(torch, peer, batch):
    """Mean cross-entropy of the targets that count, as PyTorch has it."""
    token_BT, target_BT, weight_BT = (torch.tensor(np.array(x)) for x in batch)
    logit_BTV = peer(token_BT.long()).logits
    target_BT = torch.where(weight_BT > 0, target_BT.long(), -100)
    return torch.nn.functional.cross_entropy(logit_BTV.flatten(0, 1), target_BT.flatten())


def assert_close(params, tensors, atol):
    for name, array in named(params).items():
        theirs = tensors[name].detach().numpy()
        if name.endswith("c_attn.bias"):  # but keys', whose gradient is exactly 0
            array, theirs = (np.delete(x, np.s_[D : 2 * D]) for x in (array, theirs))
        np.testing.assert_allclose(array, theirs, atol=atol, err_msg=name)


def test_the_loss_and_its_gradient_are_those_of_transformers(torch, peer):
    grad_fn = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))

    (nats, weight), grads = grad_fn(draw_params(CONFIG, 0.2), batch_at(0), None)

    loss = peer_loss(torch, peer, batch_at(0))
    loss.backward()
    np.testing.assert_allclose(nats / weight, loss.item(), rtol=1e-6)
    expected = {name: p.grad for name, p in peer.transformer.named_parameters()}
    assert_close(jax.tree.map(lambda g: g / weight, grads), expected, atol=1e-5)


def test_clipped_adamw_steps_are_those_of_pytorch(torch, peer):
    count, parameters = 5, [*peer.parameters()]
    optimizer = make_optimizer(OPTIM, count)
    step_fn = jax.jit(make_train_step(loss_fn, optimizer))
    state = init_state(draw_params(CONFIG, 0.2), optimizer, jax.random.key(0))
    decays = {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1}
    others = {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}
    betas = OPTIM.beta1, OPTIM.beta2
    peer_optimizer = torch.optim.AdamW([decays, others], lr=OPTIM.peak_lr, betas=betas)

    batches = map(batch_at, range(count))
    for step, state, metrics in train_steps(state, step_fn, batches):  # noqa: B007, B020
        loss = peer_loss(torch, peer, batch_at(step - 1))
        peer_optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, OPTIM.grad_clip).item()
        peer_optimizer.step()
        assert norm > OPTIM.grad_clip  # so that clipping is compared too
        np.testing.assert_allclose(metrics.loss, loss.item(), atol=1e-5)
        np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-5)

    # Adam divides by the size of a gradient: where that is rounding noise, so is the
    # quotient, times the learning rate.
    tensors = dict(peer.transformer.named_parameters())
    assert_close(state.params, tensors, atol=0.02 * OPTIM.peak_lr)


def test_their_work_in_the_benchmarks_is_as_much_as_ours(torch):
    from tests.benchmarks import torch_workloads

    config = GPTConfig.preset("gpt2", n_layers=1, n_heads=2, d_model=16, context_length=32)
    assert torch_workloads.transformers_train(config, rows=2, context=8)() == 16
    assert torch_workloads.transformers_decode(config, rows=2, new=5)() == 10
    assert torch_workloads.transformers_prefill(config, rows=2, context=8)() == 16
    assert torch_workloads.transformers_load(config)() == 1
