"""Generation: caches, batches, windows and chunks do not change the result."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax.errors import ConfigError, DataError, ModelError
from gptjax.inference import engine, generate
from gptjax.inference.generate import Detokenizer, GenerationConfig, complete, stream
from gptjax.model.gpt import apply
from gptjax.tokenizer.tokenizer import Tokenizer
from tests.small_models import make_model

CONTEXT = 16
FULL = "0123456789abcdef"  # fills the window
LONG = "0123456789" * 7
# All tests generate 1 or 6 rows of 24 tokens, so that few programs are compiled.
PROMPTS = ["ab", "to be or not", "x", FULL, FULL[1:], LONG]
SHORT = ["ab", "to be or not", "x"]
NUM_TOKENS = 24
apply_jitted = jax.jit(apply, static_argnums=0)


@pytest.fixture(scope="module")
def model():
    """Large random weights, so that choices differ between positions."""
    return make_model(0.6, context_length=CONTEXT, n_layers=1, vocab_multiple=64, dtype="float32")


def generate_tokens(model, prompts, **options):
    options = {"max_new_tokens": NUM_TOKENS, "stop_ids": [], **options}
    return complete(model, prompts, **options)


def generate_uncached(model, prompts):
    """Greedy tokens and log-probabilities by the window policy, without a cache."""
    windows = [model.tokenizer.encode(prompt)[-CONTEXT:] for prompt in prompts]
    new, logprobs = [[] for _ in prompts], [[] for _ in prompts]
    for _ in range(NUM_TOKENS):
        windows = [x[-(CONTEXT // 2) :] if len(x) > CONTEXT else x for x in windows]
        token_BT = np.zeros((len(prompts), CONTEXT), np.int32)
        for n, window in enumerate(windows):
            token_BT[n, : len(window)] = window
        logits = np.asarray(apply_jitted(model.config, model.params, jnp.asarray(token_BT)))
        for n, window in enumerate(windows):
            logit_V = logits[n, len(window) - 1, : model.config.vocab_size]
            new[n].append(int(logit_V.argmax()))
            shifted = logit_V - logit_V.max()
            logprobs[n].append((shifted - np.log(np.exp(shifted).sum()))[new[n][-1]])
            window.append(new[n][-1])
    return new, logprobs


@pytest.mark.fast
def test_cached_tokens_and_logprobs_are_uncached_ones_also_beyond_the_window(model):
    results = generate_tokens(model, PROMPTS, temperature=0.0)
    ids, logprobs = generate_uncached(model, PROMPTS)

    assert [result.ids for result in results] == ids
    np.testing.assert_allclose([result.logprobs for result in results], logprobs, atol=1e-4)
    assert {result.finish_reason for result in results} == {"length"}
    assert [result.truncated for result in results] == [0] * 5 + [len(LONG) - CONTEXT]


def test_seeds_and_samples_differ_and_repeat_also_without_a_batch(model):
    def ids(prompts=SHORT, samples=2, **options):
        results = generate_tokens(model, prompts, samples=samples, **options)
        return [tuple(result.ids) for result in results]

    assert ids() == ids() == ids(top_k=10**9)
    assert len({*ids(), *ids(seed=1), *ids(seed=2**32), *ids(seed=2**63 - 1)}) == 24
    assert ids(temperature=2.0, top_k=1) == ids(temperature=0.0)
    for options in ({}, {"temperature": 0.0}):
        alone = [ids(prompt, 1, **options)[0] for prompt in SHORT]
        assert ids(**options)[::2] == alone
    assert ids(temperature=0.0)[1::2] == alone


def test_keys_have_the_prng_implementation_that_is_set_at_the_call(model):
    def key_dtype():
        return generate.make_decode_args(model, GenerationConfig(), 1, 1).key_B.dtype

    for name in ("rbg", "threefry2x32"):
        with jax.default_prng_impl(name):
            assert key_dtype() == jax.random.key(0).dtype


@pytest.mark.fast
def test_other_prompts_lengths_and_options_compile_nothing(model):
    def count_programs():
        return [program._cache_size() for program in engine.jitted_steps()]

    generate_tokens(model, "abc")
    before = count_programs()
    options = {"top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.3, "stop_ids": [1, 2], "seed": 3}
    generate_tokens(model, "other", max_new_tokens=22, temperature=0.3, top_k=4, **options)

    assert count_programs() == before


def test_each_row_stops_at_its_own_stop_token(model):
    free = generate_tokens(model, SHORT, temperature=0.0, samples=2)
    stop = free[0].ids[5]

    results = generate_tokens(model, SHORT, temperature=0.0, samples=2, stop_ids=[3, stop])

    assert results[0].finish_reason == "stop"
    for result, whole in zip(results, free, strict=True):
        ends = [n for n, i in enumerate(whole.ids) if i in (3, stop)]
        assert result.ids == whole.ids[: min(ends, default=None)]
        assert result.finish_reason == ("stop" if ends else "length")


def test_a_prompt_starts_with_bos_and_ends_with_any_end_token_that_the_tokenizer_names(model):
    prompt = "to be or not"
    (free,) = generate_tokens(model, [[65, *prompt.encode()]], temperature=0.0)
    (other,) = generate_tokens(model, prompt, temperature=0.0)
    stop = next(i for i in free.ids if i != free.ids[0])
    names = {"bos_token": 65, "add_bos": True, "stop_tokens": (3, stop)}
    tokenizer = dataclasses.replace(model.tokenizer, **names)
    model = dataclasses.replace(model, tokenizer=tokenizer)

    (result,) = generate_tokens(model, prompt, temperature=0.0, stop_ids=None)

    assert free.ids[0] != other.ids[0]
    assert result.ids == free.ids[: free.ids.index(stop)] != []
    assert result.finish_reason == "stop"


def test_a_model_whose_logits_are_not_finite_generates_nothing(model):
    params = jax.tree.map(lambda leaf: leaf * np.nan, model.params)

    for temperature in (0.0, 1.0):
        with pytest.raises(ModelError, match="logits"):
            generate_tokens(
                dataclasses.replace(model, params=params),
                "ab",
                temperature=temperature,
                stop_ids=None,
            )


def test_repetition_penalty_covers_the_prompt_and_new_tokens(model):
    (result,) = generate_tokens(model, "ab", temperature=0.0, repetition_penalty=1e9)

    assert len({*result.ids, *b"ab"}) == NUM_TOKENS + 2


def test_stop_text_ends_the_text_before_it_also_across_chunks(model):
    (free,) = generate_tokens(model, "ab")
    for start in (3, 15, 16):
        stop = free.text[start : start + 3]
        options = {"max_new_tokens": NUM_TOKENS, "stop_ids": [], "stop": stop}

        (result,) = complete(model, "ab", **options)

        assert result.text == free.text[: free.text.index(stop)]
        assert result.finish_reason == "stop"
        assert "".join(stream(model, "ab", **options)) == result.text


def test_chunks_change_neither_the_stop_text_nor_split_a_character(model):
    def texts(text, size, stop=()):
        detokenizer, ids = Detokenizer(model, stop), model.tokenizer.encode(text)
        parts = [ids[n : n + size] for n in range(0, len(ids), size)]
        chunks = [detokenizer.append(part, is_final=False) for part in parts]
        return detokenizer, [*chunks, detokenizer.append([], is_final=True)]

    for size in range(1, 7):
        detokenizer, chunks = texts("xabcdy", size, ["abcd", "bc"])  # the second is complete first
        assert ("".join(chunks), detokenizer.num_tokens, detokenizer.is_stopped) == ("xa", 4, True)
        assert "".join(texts("xabcab", size, ["abcd"])[1]) == "xabcab"
    assert [chunk for chunk in texts("año 😀 ok", 1)[1] if chunk] == [*"año 😀 ok"]


def test_each_token_is_decoded_once_also_with_stop_texts_and_beyond_the_window(model, monkeypatch):
    decoded, decode_bytes = [], Tokenizer.decode_bytes

    def record(self, ids):
        decoded.extend(ids)
        return decode_bytes(self, ids)

    monkeypatch.setattr(Tokenizer, "decode_bytes", record)
    for options in ({}, {"stop": ["never", "found"]}):
        (result,) = generate_tokens(model, "ab", **options)
        decoded.clear()
        list(stream(model, "ab", max_new_tokens=NUM_TOKENS, stop_ids=[], **options))

        assert decoded == result.ids


def test_generate_returns_prompt_and_continuation(model):
    options = {"max_new_tokens": NUM_TOKENS, "temperature": 0.0}
    results = complete(model, SHORT * 2, **options)

    expected = [prompt + result.text for prompt, result in zip(SHORT * 2, results, strict=True)]
    assert gptjax.generate(model, SHORT * 2, **options) == expected
    config = GenerationConfig(**options)
    stop_id_I = generate.make_decode_args(model, config, rows=1, samples=1).stop_id_I
    assert set(stop_id_I.tolist()) == {model.tokenizer.eot_token, -1}


def test_invalid_options_and_prompts_are_rejected(model):
    for name, value in (
        *(("temperature", -0.1), ("top_p", 0.0), ("min_p", 1.5), ("top_k", -1), ("seed", -1)),
        *(("repetition_penalty", 0.0), ("max_new_tokens", 0), ("samples", 0)),
        *(("stop", [""]), ("stop_ids", [*range(9)]), ("temperature", float("nan"))),
    ):
        with pytest.raises(ConfigError, match=f"{name}="):
            complete(model, "ab", **{name: value})
    with pytest.raises(ConfigError, match="prompt is empty"):
        complete(model, "")
    for prompt, options in (([1, 257], {}), ("ab", {"stop_ids": [257]})):
        with pytest.raises(DataError, match="257"):
            complete(model, prompt, **options)
    with pytest.raises(ConfigError, match="2 prompts"):
        stream(model, ["ab", "cd"])


def test_few_shot_examples_come_before_the_query(tmp_path):
    path = tmp_path / "examples.jsonl"
    path.write_text('{"input": "woc", "output": "cow"}\n{"input": "sky", "output": "yks"}')

    assert generate.few_shot_prompt(path, "lie") == "woc -> cow\nsky -> yks\nlie ->"
