"""Exported GGUF files in llama.cpp: tokens, log-probabilities and templates.

Run with `pytest -m peers -n0 tests/peers/test_gguf_export.py`; needs the extra [peers].
"""

import dataclasses
import random
import unicodedata
from pathlib import Path
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import gptjax
from gptjax.exporters.export import GGUF_DTYPES, export_model
from gptjax.presets import LLAMA_OPTIONS
from gptjax.tokenizer.chat_template import compile_template, load_chat_template
from gptjax.tokenizer.pre_tokenizer import PRE_TOKENIZERS
from gptjax.tokenizer.tokenizer import train_tokenizer
from tests.peers.llama_cpp import next_logprobs, start_llama_cpp
from tests.small_models import make_model
from tests.tokenizer.test_vocab_files import WORDS

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
TEXT = "\n".join(topics[name] for name in sorted(topics)[:8])
SHAPE = {"n_layers": 2, "n_heads": 4, "d_model": 64, "context_length": 128, "std": 0.1}
LLAMA = LLAMA_OPTIONS | {"n_kv_heads": 2, "head_dim": 32, "mlp_dim": 96, "rope_theta": 5e5}
SHAPES = {
    "gpt2": {"mlp_dim": 96, "norm_eps": 1e-6},
    "gpt2, own head": {"tie_embeddings": False, "qkv_bias": False},
    "llama": LLAMA,
    "llama 3": LLAMA | {"rope_factor": 32.0, "rope_original_context": 64, "tie_embeddings": False},
    "qwen3": LLAMA | {"qk_norm": True},
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], 512)


def build(shape, tokenizer):
    return make_model(tokenizer=tokenizer, **SHAPE | shape)


def all_logprobs(model, ids):
    """Log-probabilities of the tokens after each of `ids`."""
    padded = np.zeros((1, model.config.context_length), np.int32)
    padded[0, : len(ids)] = ids
    logits = jitted_apply(model.config, model.params, jnp.asarray(padded))[0, : len(ids)]
    return np.asarray(jax.nn.log_softmax(logits[:, : model.tokenizer.vocab_size]))


jitted_apply = jax.jit(gptjax.apply, static_argnums=0)


def gelu_of_llama_cpp(x, approximate=True):
    """GELU by a table of float16; without it, log-probabilities are up to 2e-3 off."""
    half = exact_gelu(x.astype(jnp.float16).astype(jnp.float32), approximate).astype(jnp.float16)
    return jnp.where(jnp.abs(x) < 10, half.astype(jnp.float32), jnp.maximum(x, 0))


exact_gelu = linen.gelu


@pytest.mark.parametrize("name", SHAPES)
def test_llama_cpp_computes_the_same_log_probabilities(name, tokenizer, tmp_path, monkeypatch):
    model = build(SHAPES[name], tokenizer)
    export_model(model, "gguf", tmp_path / "out", "f32")
    monkeypatch.setattr(linen, "gelu", gelu_of_llama_cpp)

    call = start_llama_cpp(tmp_path / "out" / "model-f32.gguf")

    # Where sums round differently, the table sometimes gives the next float16.
    tolerance = 6e-4 if model.config.mlp == "gelu" else 1e-4
    ids, compared = tokenizer.encode(TEXT)[:48], 0
    logprobs = all_logprobs(model, ids)
    for n in range(1, len(ids) + 1):
        found = next_logprobs(call, ids[:n], tokenizer.vocab_size)
        ours = {token: logprobs[n - 1, token] for token in found}
        assert max(found, key=found.get, default=0) == max(ours, key=ours.get, default=0)
        np.testing.assert_allclose([*found.values()], [*ours.values()], rtol=0, atol=tolerance)
        compared += len(found)
    assert compared > 10_000


@pytest.mark.parametrize("dtype", GGUF_DTYPES)
def test_the_package_gguf_reads_the_same_bits(dtype, tokenizer, tmp_path):
    gguf = pytest.importorskip("gguf")
    model = build(LLAMA, tokenizer)
    export_model(model, "gguf", tmp_path / "out", dtype)
    plain = build(LLAMA, tokenizer)
    export_model(plain, "gguf", tmp_path / "f32", "f32")

    reader = gguf.GGUFReader(tmp_path / "out" / f"model-{dtype}.gguf")

    values = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "f32" / "model-f32.gguf").tensors}
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    for tensor in reader.tensors:
        expected = values[tensor.name]
        assert tensor.tensor_type == (kind if expected.ndim > 1 else 0)
        if tensor.tensor_type:
            expected = gguf.quantize(expected, kind)
        np.testing.assert_array_equal(tensor.data.view(np.uint8), expected.view(np.uint8))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["llama.attention.head_count_kv"] == 2
    assert len(fields["tokenizer.ggml.tokens"]) == tokenizer.vocab_size
    assert fields["tokenizer.ggml.add_bos_token"] is False


def mean_difference(call, model, ids):
    """Mean |difference| of the log-probabilities of the tokens of a text."""
    logprobs, differences = all_logprobs(model, ids), []
    for n in range(1, len(ids)):
        found = next_logprobs(call, ids[:n], model.tokenizer.vocab_size)
        if ids[n] in found:
            differences.append(abs(found[ids[n]] - logprobs[n - 1, ids[n]]))
    return np.mean(differences)


@pytest.mark.parametrize(("dtype", "limit"), [("f16", 2e-3), ("q8_0", 2e-2)])
def test_smaller_types_change_log_probabilities_little(dtype, limit, tokenizer, tmp_path):
    model = build({}, tokenizer)
    export_model(model, "gguf", tmp_path / "out", dtype)

    call = start_llama_cpp(tmp_path / "out" / f"model-{dtype}.gguf")

    assert 0 < mean_difference(call, model, tokenizer.encode(TEXT)[:60]) < limit


@pytest.mark.parametrize("name", ["gpt2", "bytes", *PRE_TOKENIZERS])
def test_llama_cpp_has_the_same_tokens_for_adversarial_texts(name, tokenizer, tmp_path):
    used = (
        dataclasses.replace(tokenizer, pre_tokenizer=name)
        if name in PRE_TOKENIZERS
        else gptjax.tokenizer.load(name)
    )
    export_model(build({"n_layers": 1}, used), "gguf", tmp_path / "out")
    draw = random.Random(0)
    texts = ["".join(draw.choices(WORDS, k=draw.randint(1, 12))) for _ in range(2000)]
    if name == "qwen2":  # llama.cpp does not normalize
        texts = [unicodedata.normalize("NFC", text) for text in texts]

    call = start_llama_cpp(tmp_path / "out" / "model-f16.gguf")

    for text in texts:
        reply = call("/tokenize", content=text, add_special=True, parse_special=False)
        assert reply["tokens"] == used.encode(text), text


@pytest.mark.parametrize("name", ["alpaca", "phi3", "chatml", "qa", "single"])
def test_llama_cpp_renders_our_chat_templates_the_same(name, tokenizer, tmp_path):
    template = load_chat_template(name)
    model = dataclasses.replace(build({"n_layers": 1}, tokenizer), chat_template=template.source)
    export_model(model, "gguf", tmp_path / "out")
    user, reply = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
    chats = [[user], [user, reply, {"role": "user", "content": "A list\n\n- a"}]]
    chats = chats[:1] if name == "single" else chats

    call = start_llama_cpp(Path(tmp_path / "out" / "model-f16.gguf"))

    for messages in chats:
        segments = compile_template(template.source).segments(messages, add_generation_prompt=True)
        expected = "".join(segment.text for segment in segments)
        assert call("/apply-template", messages=messages)["prompt"] == expected
