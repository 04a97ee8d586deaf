"""Llama and Qwen 3 models of transformers have the same logits, text and bits here.

Run with `pytest -m peers -n0 tests/peers/test_llama.py`; needs the extra [peers].
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import gptjax
from gptjax.config import MeshConfig
from gptjax.exporters.export import export_model
from gptjax.inference import generate
from gptjax.parallel import sharding
from gptjax.tokenizer.tokenizer import train_tokenizer

pytestmark = [
    pytest.mark.peers,
    # The libraries warn about their own coming versions; we only read their numbers.
    pytest.mark.filterwarnings("ignore"),
]

MOST = 2e-4  # difference of float32 logits that only the order of sums explains
TOKENIZER = train_tokenizer(["abab"], 258)  # an even number, for meshes
EOT = TOKENIZER.eot_token
SHAPE = {"vocab_size": 258, "max_position_embeddings": 128, "initializer_range": 0.3}
SHAPE |= {"bos_token_id": EOT, "eos_token_id": EOT, "pad_token_id": None}
LLAMA_3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0}
LLAMA_3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Half of the positions are beyond the original context of Llama 3.
LLAMA_3 |= {"original_max_position_embeddings": 64}


def sizes(layers, heads, kv_heads, head_dim, width, mlp_dim):
    return {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_size": width,
        "intermediate_size": mlp_dim,
    }


MODELS = {
    "Llama": {"rope_parameters": LLAMA_3, "tie_word_embeddings": True} | sizes(2, 4, 2, 16, 32, 48),
    "Llama untied": {"rms_norm_eps": 1e-2} | sizes(3, 6, 2, 8, 48, 192),
    "Qwen3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    | sizes(2, 4, 2, 16, 32, 96),
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request, torch, tmp_path_factory):
    """(our model, that of transformers, the folder that transformers wrote)."""
    transformers = pytest.importorskip("transformers")
    family = request.param.partition(" ")[0]
    config = getattr(transformers, f"{family}Config")(**SHAPE, **MODELS[request.param])
    torch.manual_seed(0)
    peer = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    draw_norms(torch, peer)
    folder = tmp_path_factory.mktemp("peer")
    save_peer(peer, folder)
    return gptjax.load(folder), peer, folder


def save_peer(peer, folder, **options):
    peer.save_pretrained(folder, **options)
    TOKENIZER.save(folder)


def draw_norms(torch, peer):
    """Scales of norms, which are ones in a new model."""
    for name, parameter in peer.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)


T = 128
TOKEN_BT = np.random.default_rng(2).integers(257, size=(4, T))
REAL_BT = np.arange(T) < np.array([T, 100, 65, 7])[:, None]
PADDED_BT = np.where(REAL_BT, TOKEN_BT, EOT)
PROMPTS = [TOKEN_BT[n, :length].tolist() for n, length in enumerate((40, 9, 17))]
whole_pass = jax.jit(gptjax.apply, static_argnums=0)


def peer_logits(torch, peer):
    mask_BT = torch.tensor(REAL_BT.astype(int))
    with torch.no_grad():
        return peer(torch.tensor(PADDED_BT), attention_mask=mask_BT).logits.numpy()


def peer_text(torch, peer, count=64):
    """Greedy continuations of the prompts."""
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    rows = [peer.generate(torch.tensor([prompt]), **options)[0].tolist() for prompt in PROMPTS]
    return [row[len(prompt) :] for row, prompt in zip(rows, PROMPTS, strict=True)]


def test_logits_of_padded_rows_are_those_of_transformers(pair, torch):
    model, peer, _ = pair

    ours = whole_pass(model.config, model.params, jnp.asarray(PADDED_BT))

    theirs = peer_logits(torch, peer)
    assert np.abs(theirs[REAL_BT]).max() > 3  # so that the tolerance means something
    assert np.abs(np.asarray(ours) - theirs)[REAL_BT].max() <= MOST


def test_greedy_text_of_uneven_prompts_is_that_of_transformers(pair, torch):
    model, peer, _ = pair

    ours = generate.complete(model, PROMPTS, max_new_tokens=64, temperature=0.0, stop_ids=[])

    assert [result.ids for result in ours] == peer_text(torch, peer)


@pytest.mark.parametrize("mesh_sizes", [(1, 1, 2), (2, 2, 1)])
def test_a_mesh_has_the_logits_and_the_text_of_transformers(pair, torch, mesh_sizes):
    model, peer, _ = pair
    data, fsdp, tensor = mesh_sizes
    devices = jax.devices()[: data * fsdp * tensor]
    mesh = sharding.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), devices)
    texts = peer_text(torch, peer)
    row_BT = np.full((4, T), EOT)
    for n, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
        row_BT[n, : len(prompt) + 64] = prompt + text

    with sharding.use_mesh(mesh):
        params = sharding.shard_tree(model.params, mesh)
        ours, chosen = (
            np.asarray(whole_pass(model.config, params, sharding.shard_batch(x, mesh, 4)))
            for x in (PADDED_BT, row_BT)
        )

    assert np.abs(ours - peer_logits(torch, peer))[REAL_BT].max() <= MOST
    for n, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
        assert chosen[n, len(prompt) - 1 :][:64].argmax(-1).tolist() == text


def tensors_in(folder):
    paths = sorted(folder.glob("*.safetensors"))
    return {n: a for path in paths for n, a in safetensors.numpy.load_file(path).items()}


def assert_same_files(folder, other):
    tensors, others = tensors_in(folder), tensors_in(other)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, others[name], err_msg=name, strict=True)


def test_an_export_has_the_tensors_of_the_file_that_was_imported(pair, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, peer, folder = pair

    export_model(model, "hf", tmp_path / "out")

    assert_same_files(folder, tmp_path / "out")
    again, about = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert type(again) is type(peer)
    assert not any(about[kind] for kind in ("missing_keys", "unexpected_keys"))
    ours, theirs = again.config.to_dict(), peer.config.to_dict()
    others = {n for n in theirs.keys() & ours.keys() if ours[n] != theirs[n]}
    assert others <= {"_name_or_path", "initializer_range", "dtype"}


def test_files_in_bfloat16_and_in_parts_keep_their_bits(pair, torch, tmp_path):
    _, peer, _ = pair
    half = type(peer)(peer.config).to(torch.bfloat16)
    save_peer(half, tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2

    export_model(gptjax.load(tmp_path / "parts"), "hf", tmp_path / "out")

    assert_same_files(tmp_path / "parts", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_classifiers_have_the_same_probabilities_in_both_directions(torch, family, tmp_path):
    transformers = pytest.importorskip("transformers")
    labels = {
        "id2label": {0: "ham", 1: "spam", 2: "other"},
        "label2id": {"ham": 0, "spam": 1, "other": 2},
    }
    options = SHAPE | {"pad_token_id": EOT} | labels | sizes(1, 4, 2, 16, 32, 48)
    config = getattr(transformers, f"{family}Config")(**options)
    peer = getattr(transformers, f"{family}ForSequenceClassification")(config).eval()
    draw_norms(torch, peer)
    save_peer(peer, tmp_path / "peer")
    texts = ["You won a prize!", "See you at six", "a longer text of several words"]

    model = gptjax.load(tmp_path / "peer")
    export_model(model, "hf", tmp_path / "out")

    assert_same_files(tmp_path / "peer", tmp_path / "out")
    again, about = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(about[kind] for kind in ("missing_keys", "unexpected_keys"))
    rows = [model.tokenizer.encode(text) for text in texts]
    padded = torch.tensor([row + [EOT] * (30 - len(row)) for row in rows])
    for theirs in (peer, again.eval()):
        with torch.no_grad():
            inputs = {"attention_mask": (padded != EOT).long()}
            prob_BC = theirs(padded, **inputs).logits.softmax(-1).numpy()
        for verdict, row in zip(gptjax.classify(model, texts), prob_BC, strict=True):
            np.testing.assert_allclose([*verdict.probabilities.values()], row, atol=1e-5)
            assert theirs.config.id2label[int(row.argmax())] == verdict.label
