"""Generation: caches, batches, windows and chunks do not change the result."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax.errors import ConfigError, DataError
from gptjax.inference import engine, generate
from gptjax.inference.generate import GenerationConfig, complete, stream
from gptjax.model.gpt import apply, init
from gptjax.weights.model_folder import Model
from tests.small_models import make_model

CONTEXT = 32
FULL = "a prompt that fills the window.."  # CONTEXT bytes
LONG = "0123456789" * 7
# All tests generate 1 or 6 rows of 40 tokens, so that few programs are compiled.
PROMPTS = ["ab", "to be or not", "x", FULL, FULL[1:], LONG]
SHORT = ["ab", "to be or not", "x"]
NUM_TOKENS = 40
apply_jitted = jax.jit(apply, static_argnums=0)


@pytest.fixture(scope="module")
def model():
    """Random weights, scaled up so that choices differ between positions."""
    made = make_model(context_length=CONTEXT, vocab_multiple=64, dtype="float32")
    params = jax.tree.map(lambda p: p * 4, init(made.config, jax.random.key(0)))
    return Model(made.config, params, made.tokenizer)


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


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_row_of_a_batch_is_what_it_is_alone(model, temperature):
    batch = generate_tokens(model, SHORT, temperature=temperature, samples=2)

    for n, prompt in enumerate(SHORT):
        (alone,) = generate_tokens(model, prompt, temperature=temperature)
        assert batch[2 * n].ids == alone.ids
        assert (batch[2 * n + 1].ids == alone.ids) == (temperature == 0)


def test_seeds_and_samples_differ_and_repeat(model):
    def texts(seed):
        return [result.text for result in generate_tokens(model, "ab", samples=6, seed=seed)]

    assert texts(0) == texts(0)
    assert len({*texts(0), *texts(1)}) == 12


def test_top_k_of_one_is_greedy_for_every_row_and_above_the_vocabulary_is_off(model):
    def ids(**options):
        return [result.ids for result in generate_tokens(model, SHORT, samples=2, **options)]

    assert ids(temperature=2.0, top_k=1) == ids(temperature=0.0)
    assert ids(top_k=2**40) == ids()


def test_padding_of_the_vocabulary_is_never_sampled(model):
    ids = [
        i
        for seed in range(4)
        for result in generate_tokens(model, "ab", temperature=100.0, samples=6, seed=seed)
        for i in result.ids
    ]

    assert max(ids) < model.config.vocab_size
    assert len(set(ids)) > 200


@pytest.mark.fast
def test_other_prompts_lengths_and_options_compile_nothing(model):
    def count_programs():
        return [program._cache_size() for program in engine.jitted_steps()]

    generate_tokens(model, "abc", max_new_tokens=39)
    before = count_programs()
    options = {"top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.3, "stop_ids": [1, 2]}
    for n, prompt in enumerate(["x", "other"]):
        generate_tokens(
            model, prompt, max_new_tokens=40 + n, temperature=0.3 * n, top_k=n, seed=n, **options
        )

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


def test_repetition_penalty_covers_the_prompt_and_new_tokens(model):
    (result,) = generate_tokens(model, "ab", temperature=0.0, repetition_penalty=1e9)

    assert len({*result.ids, *b"ab"}) == NUM_TOKENS + 2


@pytest.mark.parametrize("at", [3, 15, 16, 17])
def test_stop_text_ends_the_text_before_it_also_across_chunks(model, at):
    (free,) = generate_tokens(model, "ab")
    stop = free.text[at : at + 3]
    options = {"max_new_tokens": NUM_TOKENS, "stop_ids": [], "stop": stop}

    (result,) = complete(model, "ab", **options)

    assert result.text == free.text[: free.text.index(stop)]
    assert result.finish_reason == "stop"
    assert len(result.ids) == len(result.logprobs) < NUM_TOKENS
    assert "".join(stream(model, "ab", **options)) == result.text


def test_stop_text_that_is_complete_first_decides_whatever_the_chunks(model, monkeypatch):
    ids = model.tokenizer.encode("xabcdy")

    for chunk in range(1, 7):

        def decode(*args, chunk=chunk, **kwargs):
            for n in range(chunk, 6 + chunk, chunk):
                yield [(ids[:n], [0.0] * len(ids[:n]), False)]

        monkeypatch.setattr(generate, "decode_sequences", decode)
        stop = ["abcd", "bc"]
        (result,) = complete(model, "q", stop=stop)
        assert result.text == "".join(stream(model, "q", stop=stop)) == "xa"
        assert (len(result.ids), result.finish_reason) == (4, "stop")


def test_streamed_chunks_are_the_text_and_split_no_character(model, monkeypatch):
    for seed in range(4):
        options = {"max_new_tokens": NUM_TOKENS, "seed": seed}
        (result,) = complete(model, "ab", **options)
        assert "".join(stream(model, "ab", **options)) == result.text

    ids = model.tokenizer.encode("año 😀 ok")

    def decode(*args, **kwargs):
        for n in range(1, len(ids) + 1):
            yield [(ids[:n], [0.0] * n, False)]

    monkeypatch.setattr(generate, "decode_sequences", decode)
    assert list(stream(model, "ab")) == [*"año 😀 ok"]


def test_generate_returns_prompt_and_continuation(model):
    options = {"max_new_tokens": NUM_TOKENS, "temperature": 0.0}
    results = complete(model, SHORT * 2, **options)

    expected = [prompt + result.text for prompt, result in zip(SHORT * 2, results, strict=True)]
    assert gptjax.generate(model, SHORT * 2, **options) == expected
    assert gptjax.generate(model, "ab", **options) == expected[0]
    config = GenerationConfig(**options)
    assert gptjax.generate(model, [97, 98], generation_config=config) == expected[0]


def test_invalid_options_and_prompts_are_rejected(model):
    for name, value in (
        *(("temperature", -0.1), ("top_p", 0.0), ("min_p", 1.5), ("top_k", -1), ("seed", -1)),
        *(("repetition_penalty", 0.0), ("max_new_tokens", 0), ("samples", 0)),
        *(("stop", [""]), ("stop_ids", [*range(9)]), ("temperature", float("nan"))),
    ):
        with pytest.raises(ConfigError, match=f"{name}="):
            complete(model, "ab", **{name: value})
    for prompt in ("", []):
        for function in (complete, stream):
            with pytest.raises(ConfigError, match="prompt is empty"):
                function(model, prompt)
    with pytest.raises(DataError, match="257 in the prompt"):
        complete(model, [1, 257])
    with pytest.raises(DataError, match="257 in stop_ids"):
        complete(model, "ab", stop_ids=[257])
    with pytest.raises(ConfigError, match="2 prompts"):
        stream(model, ["ab", "cd"])


def test_few_shot_examples_come_before_the_query(tmp_path):
    path = tmp_path / "examples.jsonl"
    rows = [{"input": "woc", "output": "cow"}, {"input": "sky", "output": "yks"}]
    path.write_text("\n".join(map(json.dumps, rows)))

    assert generate.few_shot_prompt(path, "lie") == "woc -> cow\nsky -> yks\nlie ->"

    path.write_text('{"input": "woc", "output": "cow"}\n{"input": 3}\n')
    with pytest.raises(DataError, match=r"examples.jsonl:2: "):
        generate.few_shot_prompt(path, "lie")
