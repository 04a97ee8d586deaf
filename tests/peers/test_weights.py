"""Models go to transformers and come back: the same logits, losses, text and bits.

Run with `pytest -m peers -n0 tests/peers/test_weights.py`; needs the extra [peers].
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax.config import GPTConfig
from gptjax.evaluation.perplexity import score_tokens
from gptjax.exporters.export import export_model
from gptjax.inference import generate
from gptjax.inference.assistant import encode_chat
from gptjax.tokenizer.chat_template import load_chat_template
from gptjax.weights.model_folder import Model
from tests.model.test_gpt import draw_params

pytestmark = [
    pytest.mark.peers,
    # The libraries warn about their own coming versions; we only read their numbers.
    pytest.mark.filterwarnings("ignore"),
]

MOST = 2e-4  # difference of float32 logits that only the order of sums explains
whole_pass = jax.jit(gptjax.apply, static_argnums=0)
SIZES = {
    "tied": {"n_layers": 1, "n_heads": 2, "d_model": 128},
    "untied": {"n_layers": 2, "n_heads": 4, "d_model": 16, "tie_embeddings": False},
}


@pytest.fixture(scope="module", params=SIZES)
def pair(request, torch, tmp_path_factory):
    """(our model, that of transformers read from our export, its folder)."""
    transformers = pytest.importorskip("transformers")
    config = GPTConfig.preset("gpt2", context_length=128, **SIZES[request.param])
    model = Model(config, draw_params(config, 0.3), gptjax.tokenizer.load("gpt2"))
    folder = tmp_path_factory.mktemp("export") / "model"
    export_model(model, "hf", folder)
    peer, about = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert type(peer).__name__ == "GPT2LMHeadModel"
    assert not any(about[kind] for kind in ("missing_keys", "unexpected_keys"))
    return model, peer.eval(), folder


TOKEN_BT = np.random.default_rng(2).integers(50_257, size=(3, 64))


def test_logits_and_losses_are_those_of_transformers_with_padding_too(pair, torch):
    model, peer, _ = pair
    real_BT = np.arange(64) < np.array([64, 40, 7])[:, None]
    padded_BT = np.where(real_BT, TOKEN_BT, 50_256)
    mask_BT, whole = torch.tensor(real_BT.astype(int)), torch.tensor(TOKEN_BT[:1])

    ours = whole_pass(model.config, model.params, jnp.asarray(padded_BT))
    loss = score_tokens(model, TOKEN_BT[0].astype(np.int32), 128, None).loss
    with torch.no_grad():
        theirs = peer(torch.tensor(padded_BT), attention_mask=mask_BT).logits.numpy()
        their_loss = peer(whole, labels=whole).loss.item()

    assert np.abs(np.asarray(ours) - theirs)[real_BT].max() <= MOST
    assert loss == pytest.approx(their_loss, rel=1e-5)


def test_greedy_text_of_uneven_prompts_is_that_of_transformers(pair, torch):
    model, peer, _ = pair
    prompts = [TOKEN_BT[n, :length].tolist() for n, length in enumerate((9, 5, 12))]

    ours = generate.complete(model, prompts, max_new_tokens=12, temperature=0.0, stop_ids=[])

    for prompt, result in zip(prompts, ours, strict=True):
        options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
        theirs = peer.generate(torch.tensor([prompt]), **options)
        assert result.ids == theirs[0, len(prompt) :].tolist()


def test_what_transformers_saves_comes_back_bit_for_bit_with_the_same_tokenizer(pair, tmp_path):
    model, peer, folder = pair
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    peer.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    again = gptjax.load(tmp_path)

    assert again.config == model.config
    assert again.tokenizer.hash == model.tokenizer.hash
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    text = "Every effort moves you, año 2026 😀\n\n  and   spaces"
    assert tokenizer.encode(text) == model.tokenizer.encode(text)
    assert tokenizer.eos_token_id == model.tokenizer.eot_token


def test_added_tokens_and_classes_of_transformers_are_those_of_transformers(torch, tmp_path):
    transformers = pytest.importorskip("transformers")
    from gptjax.weights.foreign_config import hf_config

    hf_config(transformers.GPT2Config().to_dict() | {"id2label": None})  # knows all keys
    gptjax.tokenizer.load("gpt2").save(tmp_path / "gpt2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "gpt2")
    tokens = {"pad_token": "[PAD]", "extra_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    tokenizer.add_special_tokens(tokens)
    tokenizer.chat_template = load_chat_template("chatml").source
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 64}
    config = transformers.GPT2Config(**shape, pad_token_id=tokenizer.pad_token_id)
    peer = transformers.GPT2ForSequenceClassification(config)
    peer.resize_token_embeddings(len(tokenizer))
    peer.save_pretrained(tmp_path / "peer")
    tokenizer.save_pretrained(tmp_path / "peer")
    texts = ["You won a prize!", "See you at six, or a bit later"]
    with torch.no_grad():
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        theirs = peer.eval()(**inputs).logits.softmax(-1).numpy()

    model = gptjax.load(tmp_path / "peer")

    assert model.labels == ("LABEL_0", "LABEL_1")
    assert model.tokenizer.added_tokens["[PAD]"] == tokenizer.pad_token_id
    assert model.config.vocab_size == len(tokenizer) == 50_260
    messages = [{"role": "user", "content": "Hi, what is 2 + 2?"}]
    options = {"add_generation_prompt": True, "return_dict": False}
    chat = dataclasses.replace(model, labels=())
    assert tokenizer.apply_chat_template(messages, **options) == encode_chat(chat, messages)
    messages[0]["content"] = "".join(model.tokenizer.special_tokens)
    special_ids = {*model.tokenizer.special_tokens.values()}
    assert len([n for n in encode_chat(chat, messages) if n in special_ids]) == 3
    for verdict, row in zip(gptjax.classify(model, texts), theirs, strict=True):
        np.testing.assert_allclose([*verdict.probabilities.values()], row, atol=1e-5)


def test_an_exported_classifier_has_the_same_probabilities(torch, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = GPTConfig.preset("gpt2", n_layers=1, n_heads=2, d_model=16, n_classes=3)
    head = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    params = draw_params(config, 0.3) | {"head": {"kernel": jnp.asarray(head)}}
    tokenizer = gptjax.tokenizer.load("gpt2")
    model = Model(config, params, tokenizer, ("ham", "spam", "other"))
    export_model(model, "hf", tmp_path / "out")
    texts = ["You won a prize!", "See you at six", "a longer text of several words"]

    peer, about = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    rows = [tokenizer.encode(text) for text in texts]
    longest = max(map(len, rows))
    padded = torch.tensor([row + [50_256] * (longest - len(row)) for row in rows])
    with torch.no_grad():
        theirs = peer.eval()(padded, attention_mask=(padded != 50_256).long()).logits
    theirs = theirs.softmax(-1).numpy()

    assert not any(about[kind] for kind in ("missing_keys", "unexpected_keys"))
    for verdict, row in zip(gptjax.classify(model, texts), theirs, strict=True):
        np.testing.assert_allclose([*verdict.probabilities.values()], row, atol=1e-5)
        assert peer.config.id2label[int(row.argmax())] == verdict.label
    again = gptjax.load(tmp_path / "out")
    assert again.labels == model.labels
    jax.tree.map(np.testing.assert_array_equal, again.params, params)
