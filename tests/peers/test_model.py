"""The same numbers as PyTorch and transformers: logits, gradients, training steps.

Run with `pytest -m peers -n0 tests/peers/test_model.py`; needs the extra [peers].
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax.config import GPTConfig, OptimConfig
from gptjax.model.attention.dispatch import compute_attention
from gptjax.model.attention.mask import AttentionMask
from gptjax.model.gpt import hidden_states, unembedding_matrix
from gptjax.training.loss import fused_cross_entropy
from gptjax.training.optimizer import make_optimizer
from gptjax.training.train_step import init_state, make_train_step, train_steps

pytestmark = [
    pytest.mark.peers,
    # Both libraries warn about their own coming versions; we only read their numbers.
    pytest.mark.filterwarnings("ignore"),
]

B, T, V, N, H, D = 3, 16, 97, 2, 4, 32
CONFIG = GPTConfig(vocab_size=V, context_length=T, n_layers=N, n_heads=H, d_model=D)
OPTIM = OptimConfig(
    peak_lr=1e-3, schedule="constant", warmup_steps=0, weight_decay=0.1, grad_clip=0.5
)


@pytest.fixture(scope="module")
def torch():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torch")


@pytest.fixture
def peer(torch):
    """A small GPT-2 of transformers, its parameters far from their start."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"n_layer": N, "n_head": H, "n_embd": D, "n_positions": T, "vocab_size": V}
    drops = dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **drops))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tree_of(tensors):
    """Our parameters from GPT-2's, or our gradients from its gradients."""
    tensors = {name: x.detach().numpy().copy() for name, x in tensors.items()}

    def leaf(name, *shape):
        """The array of every layer, stacked."""
        layers = [tensors[f"transformer.h.{n}.{name}"] for n in range(N)]
        return jnp.asarray(np.stack(layers).reshape(N, *shape))

    def linear(name, inner, outer):
        kernel = leaf(f"{name}.weight", *inner, *outer)
        return {"kernel": kernel, "bias": leaf(f"{name}.bias", *outer)}

    def norm(name):
        return {"scale": leaf(f"{name}.weight", D), "bias": leaf(f"{name}.bias", D)}

    joint = linear("attn.c_attn", (D,), (3, H, D // H))
    heads = {
        name: {"kernel": joint["kernel"][:, :, n], "bias": joint["bias"][:, n]}
        for n, name in enumerate(("query", "key", "value"))
    }
    out = linear("attn.c_proj", (H, D // H), (D,))
    mlp = {"up": linear("mlp.c_fc", (D,), (4 * D,)), "down": linear("mlp.c_proj", (4 * D,), (D,))}
    table, position, scale, bias = (
        jnp.asarray(tensors[f"transformer.{name}"])
        for name in ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias")
    )
    return {
        "token_embedding": {"embedding": table},
        "position_embedding": {"embedding": position},
        "blocks": {
            "attention_norm": norm("ln_1"),
            "attention": {**heads, "out": out},
            "mlp_norm": norm("ln_2"),
            "mlp": mlp,
        },
        "final_norm": {"scale": scale, "bias": bias},
    }


def parameters(peer):
    return tree_of(dict(peer.named_parameters()))


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


def tensor(torch, array):
    """An array of ours in PyTorch, whose indices are 64 bits wide."""
    array = np.array(array)
    return torch.tensor(array.astype(np.int64) if array.dtype == np.int32 else array)


def peer_loss(torch, peer, batch):
    """Mean cross-entropy of the targets that count, as PyTorch has it."""
    token_BT, target_BT, weight_BT = map(torch.tensor, batch)
    logit_BTV = peer(token_BT.long()).logits
    target_BT = torch.where(weight_BT > 0, target_BT.long(), -100)
    return torch.nn.functional.cross_entropy(logit_BTV.flatten(0, 1), target_BT.flatten())


def close(tree, other, atol):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), tree, other)


def test_the_loss_and_its_gradient_are_those_of_transformers(torch, peer):
    batch = batch_at(0)

    (nats, weight), grads = jax.value_and_grad(loss_fn, has_aux=True)(parameters(peer), batch, None)

    loss = peer_loss(torch, peer, batch)
    loss.backward()
    expected = tree_of({name: p.grad for name, p in peer.named_parameters()})
    np.testing.assert_allclose(nats / weight, loss.item(), rtol=1e-6)
    close(jax.tree.map(lambda g: g / weight, grads), expected, atol=1e-5)


def trained(torch, peer, count):
    """Losses, gradient norms and parameters of `count` steps in PyTorch."""
    decaying, others = [], []
    for parameter in peer.parameters():
        (decaying if parameter.ndim >= 2 else others).append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": decaying, "weight_decay": OPTIM.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=OPTIM.peak_lr,
        betas=(OPTIM.beta1, OPTIM.beta2),
    )
    losses, norms = [], []
    for step in range(count):
        loss = peer_loss(torch, peer, batch_at(step))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(peer.parameters(), OPTIM.grad_clip)
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm.item())
    return losses, norms, parameters(peer)


def test_clipped_adamw_steps_are_those_of_pytorch(torch, peer):
    count = 5
    optimizer = make_optimizer(OPTIM, count)
    step_fn = jax.jit(make_train_step(loss_fn, optimizer))
    state = init_state(parameters(peer), optimizer, jax.random.key(0))

    losses, norms = [], []
    batches = map(batch_at, range(count))
    for _, state, metrics in train_steps(state, step_fn, batches):  # noqa: B007, B020
        losses.append(float(metrics.loss))
        norms.append(float(metrics.grad_norm))

    peer_losses, peer_norms, expected = trained(torch, peer, count)
    assert min(norms) > OPTIM.grad_clip  # so that clipping is compared too
    np.testing.assert_allclose(losses, peer_losses, atol=1e-5)
    np.testing.assert_allclose(norms, peer_norms, rtol=1e-5)
    # Adam divides by the size of a gradient: where that is rounding noise, so is the
    # quotient, times the learning rate. Key biases have a gradient of exactly 0.
    for tree in (state.params, expected):
        del tree["blocks"]["attention"]["key"]["bias"]
    close(state.params, expected, atol=0.02 * OPTIM.peak_lr)


@pytest.mark.parametrize("backend", ["reference", "chunked", "xla", "flash"])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_is_that_of_pytorch(torch, backend, packed):
    rng = np.random.default_rng(0)
    query_BTHK, key_BSHK, value_BSHK = rng.normal(size=(3, B, T, H, 8)).astype("f4")
    segment_BT = np.sort(rng.integers(3, size=(B, T))) if packed else np.zeros((B, T), int)
    mask_BTS = np.tril(segment_BT[:, :, None] == segment_BT[:, None])

    out_BTHK = compute_attention(
        *map(jnp.asarray, (query_BTHK, key_BSHK, value_BSHK)),
        AttentionMask(segment_id_BT=jnp.asarray(segment_BT)),
        backend=backend,
    )

    query, key, value = (
        torch.tensor(x).transpose(1, 2) for x in (query_BTHK, key_BSHK, value_BSHK)
    )
    expected_BHTK = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=torch.tensor(mask_BTS)[:, None]
    )
    np.testing.assert_allclose(out_BTHK, expected_BHTK.transpose(1, 2), atol=1e-5)


def test_an_untied_model_without_biases_is_a_gpt2_with_them_taken_away(torch, peer):
    """The switches, checked against the peer with the same parts taken from it."""
    config = GPTConfig(**(vars(CONFIG) | {"qkv_bias": False, "tie_embeddings": False}))
    token_BT, _, _ = batch_at(0)
    params = parameters(peer)
    head_VD = params["token_embedding"]["embedding"][::-1]
    params["output_embedding"] = {"embedding": head_VD}
    for name in ("query", "key", "value"):
        del params["blocks"]["attention"][name]["bias"]

    logit_BTV = gptjax.apply(config, params, token_BT)

    with torch.no_grad():
        for block in peer.transformer.h:
            block.attn.c_attn.bias.zero_()
        x_BTD = peer.transformer(tensor(torch, token_BT)).last_hidden_state
    expected_BTV = x_BTD.numpy() @ np.asarray(head_VD).T
    np.testing.assert_allclose(logit_BTV, expected_BTV, atol=1e-5)
