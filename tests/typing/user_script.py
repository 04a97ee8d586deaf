"""A user's script that calls every public function, for the type checkers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, assert_type

import jax
import jax.numpy as jnp
from jax import Array

import gptjax
from gptjax import GenerationConfig, GPTConfig, Model, RunConfig, TrainState


def use_model(config: GPTConfig, tokens: Array) -> Array:
    trained: gptjax.tokenizer.Tokenizer = gptjax.tokenizer.train(["a text"], 300)
    assert_type(gptjax.tokenizer.load("gpt2").encode("a") + trained.encode("b"), list[int])
    params = gptjax.init(config, jax.random.key(0))
    logits = gptjax.apply(config, params, tokens, dropout_key=jax.random.key(1))
    assert_type(logits, Array)
    _, activations = gptjax.apply(
        config, params, tokens, interventions={"residual": jnp.zeros(())}, capture=("residual",)
    )
    assert_type(activations, dict[str, Array])
    x_BTD, _ = gptjax.hidden_states(config, params, tokens, capture=("mlp_hidden",))
    return logits + x_BTD.sum()


def use_inference(model: Model) -> float:
    greedy = GenerationConfig(temperature=0.0, stop=("\n",))
    assert_type(gptjax.generate(model, "a", max_new_tokens=5, top_k=3), str)
    assert_type(gptjax.generate(model, [1, 2], generation_config=greedy), str)
    assert_type(gptjax.generate(model, ["a", "b"], samples=2), list[str])
    assert_type(gptjax.complete(model, "a", top_p=0.9, min_p=0.1, seed=1)[0].text, str)
    assert_type(gptjax.stream(model, "a", repetition_penalty=1.2), Iterator[str])
    assert_type(gptjax.answer(model, "Hello", generation_config=greedy, stop="\n"), str)
    print(*gptjax.stream_answer(model, "b", stop_ids=[0]))
    return gptjax.classify(model, ["a"])[0].probability + gptjax.score(model, "a", stride=16).loss


def use_training(config: RunConfig, run_dir: Path) -> TrainState:
    params = gptjax.init(config.model, jax.random.key(0))
    optimizer = gptjax.make_optimizer(config.optim, 10)

    def loss_fn(params: Any, batch: Array, key: Array) -> tuple[Array, Array]:
        logits = gptjax.apply(config.model, params, batch, dropout_key=key)
        return logits.sum(), jnp.float32(batch.size)

    train_step = gptjax.make_train_step(loss_fn, optimizer, accumulate=2)
    state = gptjax.init_state(params, optimizer, jax.random.key(1))
    batches = [jnp.zeros((2, 8), jnp.int32)]
    *_, (_, state, metrics) = gptjax.train_steps(state, train_step, batches)
    print(float(metrics.loss))
    try:
        gptjax.train(RunConfig(), run_dir, allow_change=("train.steps",))
    except gptjax.GptjaxError:
        gptjax.save(gptjax.load(run_dir), run_dir / "copy")
    return state
