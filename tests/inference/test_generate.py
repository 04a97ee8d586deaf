"""Generation: caches, batches, windows and chunks change nothing but the speed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax.config import GPTConfig
from gptjax.errors import ConfigError, DataError
from gptjax.inference import engine, generate
from gptjax.model.gpt import apply, init
from gptjax.weights.model_folder import Model

CONTEXT = 32
whole_pass = jax.jit(apply, static_argnums=0)
PROMPTS = ["ab", "to be or not to be", "x"]
FULL = "a prompt that fills the window.."  # CONTEXT bytes


@pytest.fixture(scope="module")
def model():
    """Random weights, scaled up so that its choices are not all alike."""
    tokenizer = gptjax.tokenizer.load("bytes")
    config = GPTConfig(
        vocab_size=tokenizer.vocab_size,
        context_length=CONTEXT,
        n_layers=2,
        n_heads=2,
        d_model=16,
        vocab_multiple=64,
        dtype="float32",
    )
    params = init(config, jax.random.key(0))
    return Model(config, jax.tree.map(lambda p: p * 4, params), tokenizer)


def slow_logits(model, ids):
    """The scores after `ids`, from one pass over the whole window without a cache."""
    padded = np.zeros((1, CONTEXT), np.int32)
    padded[0, : len(ids)] = ids
    logits = whole_pass(model.config, model.params, jnp.asarray(padded))
    return np.asarray(logits)[0, len(ids) - 1, : model.config.vocab_size]


def slow_greedy(model, ids, count):
    """The greedy tokens and their log-probabilities, by the stated window policy."""
    window, new, logprobs = list(ids), [], []
    for _ in range(count):
        if len(window) > CONTEXT:
            window = window[-(CONTEXT // 2) :]
        logits = slow_logits(model, window)
        new.append(int(logits.argmax()))
        logprobs.append(float(jax.nn.log_softmax(logits)[new[-1]]))
        window.append(new[-1])
    return new, logprobs


@pytest.mark.fast
@pytest.mark.parametrize("prompt", [*PROMPTS, FULL, FULL[1:]])
def test_cached_text_and_logprobs_are_uncached_ones_also_beyond_the_window(model, prompt):
    (result,) = generate.complete(model, prompt, max_new_tokens=40, temperature=0.0, stop_ids=[])
    ids, logprobs = slow_greedy(model, model.tokenizer.encode(prompt), 40)

    assert result.ids == ids
    np.testing.assert_allclose(result.logprobs, logprobs, atol=1e-4)
    assert result.finish_reason == "length"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_of_a_batch_is_what_it_is_alone(model, temperature):
    options = {"max_new_tokens": 40, "temperature": temperature, "samples": 2}

    batch = generate.complete(model, PROMPTS, **options)
    alone = [r for p in PROMPTS for r in generate.complete(model, p, **options)]

    assert [r.ids for r in batch] == [r.ids for r in alone]


def test_seeds_and_samples_differ_and_repeat(model):
    def texts(seed):
        results = generate.complete(model, "ab", max_new_tokens=12, samples=3, seed=seed)
        return [r.text for r in results]

    assert texts(0) == texts(0)
    assert len({*texts(0), *texts(1)}) == 6


def test_one_kept_token_is_greedy_for_every_row(model):
    greedy = generate.complete(model, PROMPTS, max_new_tokens=8, temperature=0.0)
    options = {"max_new_tokens": 8, "temperature": 2.0, "top_k": 1}

    assert [r.ids for r in generate.complete(model, PROMPTS, **options)] == [r.ids for r in greedy]


def test_padding_of_the_vocabulary_is_never_written(model):
    options = {"max_new_tokens": 60, "temperature": 100.0, "samples": 20}

    results = generate.complete(model, "ab", stop_ids=[], **options)

    ids = [i for r in results for i in r.ids]
    assert max(ids) < model.config.vocab_size
    assert len(set(ids)) > 200


@pytest.mark.fast
def test_other_prompts_lengths_and_options_compile_nothing_anew(model):
    def compiled():
        return [program._cache_size() for program in engine.jitted_steps()]

    generate.complete(model, "abc", max_new_tokens=9)
    before = compiled()
    for n, prompt in enumerate(["x", "other"]):
        generate.complete(
            model,
            prompt,
            max_new_tokens=8 + n,
            temperature=0.3 * n,
            top_k=n,
            top_p=0.9,
            min_p=0.1,
            repetition_penalty=1.3,
            stop_ids=[1, 2],
            seed=n,
        )

    assert compiled() == before


def test_each_row_stops_at_its_own_token(model):
    free = generate.complete(model, PROMPTS, max_new_tokens=20, temperature=0.0)
    stop = free[0].ids[5]

    results = generate.complete(model, PROMPTS, max_new_tokens=20, temperature=0.0, stop_ids=[stop])

    for result, whole in zip(results, free, strict=True):
        if stop in whole.ids:
            assert result.ids == whole.ids[: whole.ids.index(stop)]
            assert result.finish_reason == "stop"
        else:
            assert result.ids == whole.ids
    assert results[0].finish_reason == "stop"


@pytest.mark.parametrize("at", [3, 15, 16, 17])
def test_a_stop_text_ends_the_text_before_it_also_across_chunks(model, at):
    # ASCII only, so that a place in the text is a place among the tokens.
    options = {"max_new_tokens": 30, "temperature": 1.0, "stop_ids": []}
    seed = 0
    (free,) = generate.complete(model, "ab", seed=seed, **options)
    text = model.tokenizer.decode_bytes(free.ids).decode("latin-1")
    stop = free.text[at : at + 3]
    end = free.text.index(stop)

    (result,) = generate.complete(model, "ab", seed=seed, stop=[stop], **options)
    pieces = generate.stream(model, "ab", seed=seed, stop=[stop], **options)

    assert len(text) == 30
    assert result.text == free.text[:end]
    assert result.finish_reason == "stop"
    assert len(result.ids) == len(result.logprobs) <= 30
    assert "".join(pieces) == result.text


def test_the_stop_text_that_is_complete_first_decides(model, monkeypatch):
    ids = model.tokenizer.encode("xabcdy")

    for chunk in range(1, 7):

        def grow(*args, chunk=chunk, **kwargs):
            for n in range(chunk, 6 + chunk, chunk):
                yield [(ids[:n], [0.0] * len(ids[:n]), False)]

        monkeypatch.setattr(generate, "decode_sequences", grow)
        stop = ["abcd", "bc"]
        (result,) = generate.complete(model, "q", stop=stop)
        assert result.text == "".join(generate.stream(model, "q", stop=stop)) == "xa"
        assert (len(result.ids), result.finish_reason) == (4, "stop")


def test_one_stop_text_needs_no_list(model):
    options = {"max_new_tokens": 30, "stop_ids": [], "seed": 0}
    (free,) = generate.complete(model, "ab", **options)
    stop = free.text[5:8]

    (result,) = generate.complete(model, "ab", stop=stop, **options)

    assert result.text == free.text[: free.text.index(stop)]


def test_more_kept_tokens_than_there_are_keep_all(model):
    (free,) = generate.complete(model, "ab", max_new_tokens=8)
    (kept,) = generate.complete(model, "ab", max_new_tokens=8, top_k=2**40)

    assert kept.ids == free.ids


def test_a_context_of_one_token_is_enough_to_write(model):
    config = GPTConfig(vocab_size=257, context_length=1, n_layers=1, n_heads=1, d_model=8)
    tiny = Model(config, init(config, jax.random.key(0)), model.tokenizer)

    (result,) = generate.complete(tiny, "ab", max_new_tokens=3, stop_ids=[])

    assert (len(result.ids), result.truncated) == (3, 1)


@pytest.mark.parametrize("seed", range(4))
def test_streamed_pieces_are_the_text(model, seed):
    options = {"max_new_tokens": 50, "seed": seed}

    pieces = list(generate.stream(model, "ab", **options))
    (result,) = generate.complete(model, "ab", **options)

    assert "".join(pieces) == result.text


def test_no_character_is_split_between_pieces(model, monkeypatch):
    ids = model.tokenizer.encode("año 😀 ok")

    def grow(*args, **kwargs):
        for n in range(1, len(ids) + 1):
            yield [(ids[:n], [0.0] * n, False)]

    monkeypatch.setattr(generate, "decode_sequences", grow)

    assert list(generate.stream(model, "ab")) == [*"año 😀 ok"]


def test_a_prompt_longer_than_the_context_keeps_its_end_and_says_so(model):
    prompt = "0123456789" * 7
    options = {"max_new_tokens": 4, "temperature": 0.0}

    (result,) = generate.complete(model, prompt, **options)
    (short,) = generate.complete(model, prompt[-CONTEXT:], **options)

    assert result.truncated == 70 - CONTEXT
    assert short.truncated == 0
    assert result.ids == short.ids


def test_generate_returns_prompt_and_continuation(model):
    options = {"max_new_tokens": 5, "temperature": 0.0}
    results = generate.complete(model, PROMPTS, **options)

    assert gptjax.generate(model, "ab", **options) == "ab" + results[0].text
    assert gptjax.generate(model, PROMPTS, **options) == [
        p + r.text for p, r in zip(PROMPTS, results, strict=True)
    ]
    assert gptjax.generate(model, [97, 98], **options) == "ab" + results[0].text


WRONG = {
    "temperature": (-0.1, "temperature=-0.1"),
    "top_p": (0.0, "top_p=0.0"),
    "min_p": (1.5, "min_p=1.5"),
    "top_k": (-1, "top_k=-1"),
    "repetition_penalty": (0.0, "repetition_penalty=0.0"),
    "max_new_tokens": (0, "max_new_tokens=0"),
    "stop": ([""], "stop contains an empty text"),
    "stop_ids": (list(range(9)), "stop_ids has 9 tokens.* 8"),
}


@pytest.mark.parametrize("name", WRONG)
def test_options_that_choose_nothing_are_refused(model, name):
    value, message = WRONG[name]

    with pytest.raises(ConfigError, match=message):
        generate.complete(model, "ab", **{name: value})


def test_empty_prompts_and_unknown_tokens_are_refused(model):
    for prompt in ("", []):
        for write in (generate.complete, generate.stream):
            with pytest.raises(ConfigError, match="prompt is empty"):
                write(model, prompt)
    with pytest.raises(DataError, match="token 257 in the prompt"):
        generate.complete(model, [1, 257])
    with pytest.raises(DataError, match="token 257 in stop_ids"):
        generate.complete(model, "ab", stop_ids=[257])
    with pytest.raises(ConfigError, match="2 prompts cannot be streamed"):
        generate.stream(model, ["ab", "cd"])


def test_examples_of_a_file_come_before_the_query(tmp_path):
    path = tmp_path / "examples.jsonl"
    rows = [{"input": "woc", "output": "cow"}, {"input": "sky", "output": "yks"}]
    path.write_text("\n".join(map(json.dumps, rows)))

    prompt = generate.few_shot_prompt(path, "lie")

    assert prompt == "woc -> cow\nsky -> yks\nlie ->"

    path.write_text('{"input": "woc", "output": "cow"}\n{"input": 3}\n')
    with pytest.raises(DataError, match=r"examples.jsonl:2: "):
        generate.few_shot_prompt(path, "lie")
