"""A user's script that calls every public function; checked by pyright and pyrefly.

It is only type-checked: `tests/test_api.py` runs the checkers that are installed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, assert_type

import jax
import jax.numpy as jnp
from jax import Array

import gptjax
from gptjax import GenerationConfig, GPTConfig, Model, RunConfig, TrainState


def use_tokenizer() -> list[int]:
    tokenizer = gptjax.tokenizer.load("gpt2")
    trained: gptjax.tokenizer.Tokenizer = gptjax.tokenizer.train(["a text"], 300)
    return tokenizer.encode("a") + trained.encode("b")


def use_model(config: GPTConfig, tokens: Array) -> Array:
    params = gptjax.init(config, jax.random.key(0))
    logits = gptjax.apply(config, params, tokens, dropout_key=jax.random.key(1))
    assert_type(logits, Array)
    _, activations = gptjax.apply(
        config,
        params,
        tokens,
        position_BT=tokens,
        segment_id_BT=tokens,
        adapters=None,
        interventions={"mlp_output": jnp.zeros((2, 1, 1, 16))},
        capture=("residual", "attention", "head_output"),
    )
    assert_type(activations, dict[str, Array])
    x_BTD, activations = gptjax.hidden_states(config, params, tokens, capture=("mlp_hidden",))
    return logits + activations["mlp_hidden"].sum() + x_BTD.sum()


def use_generation(model: Model) -> str:
    greedy = GenerationConfig(temperature=0.0, stop=("\n",))
    assert_type(gptjax.generate(model, "a", max_new_tokens=5, top_k=3), str)
    assert_type(gptjax.generate(model, [1, 2], generation_config=greedy), str)
    assert_type(gptjax.generate(model, ["a", "b"], samples=2), list[str])
    completion = gptjax.complete(model, "a", samples=2, top_p=0.9, min_p=0.1, seed=1)[0]
    text = completion.text + completion.finish_reason
    assert_type(gptjax.stream(model, "a", repetition_penalty=1.2), Iterator[str])
    chunks = [*gptjax.stream(model, "a", stop_ids=[0]), *gptjax.stream_answer(model, "b")]
    messages = [{"role": "user", "content": "Hello"}]
    answers = [
        gptjax.answer(model, "Hello", temperature=0.0),
        gptjax.answer(model, messages, generation_config=greedy, stop="\n"),
    ]
    return text + "".join(chunks + answers)


def use_classifier(model: Model) -> float:
    (prediction,) = gptjax.classify(model, ["free entry"])
    evaluation = gptjax.score(model, "some text", stride=16)
    return prediction.probability + evaluation.loss


def use_train_step(config: RunConfig) -> TrainState:
    params = gptjax.init(config.model, jax.random.key(0))
    optimizer = gptjax.make_optimizer(config.optim, 10)

    def loss_fn(params: Any, batch: Array, key: Array) -> tuple[Array, Array]:
        logits = gptjax.apply(config.model, params, batch, dropout_key=key)
        return logits.sum(), jnp.float32(batch.size)

    train_step = gptjax.make_train_step(loss_fn, optimizer, accumulate=2)
    state = gptjax.init_state(params, optimizer, jax.random.key(1))
    batches = [jnp.zeros((2, 8), jnp.int32)]
    for step, new_state, metrics in gptjax.train_steps(state, train_step, batches):
        print(step, float(metrics.loss))
        state = new_state
    return state


def use_runs(run_dir: Path) -> None:
    try:
        model = gptjax.train(RunConfig(), run_dir, allow_change=("train.steps",))
    except gptjax.GptjaxError as error:
        print(error)
        model = gptjax.load(run_dir)
    gptjax.save(model, run_dir / "copy")
