"""Public API: the stub, lazy imports, signatures, and errors for common mistakes."""

import ast
import dataclasses
import importlib
import inspect
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest

import gptjax
from gptjax.config import RunConfig
from gptjax.errors import ConfigError, DataError, ModelError
from gptjax.inference.generate import GenerationConfig, GenerationOptions
from gptjax.tokenizer.chat_template import load_chat_template
from gptjax.training.train_step import init_state, make_train_step
from tests.small_models import make_model

ROOT = Path(__file__).resolve().parents[1]
STUB = ast.parse((ROOT / "gptjax" / "__init__.pyi").read_text())
MODEL = make_model()
TOKEN_BT = jnp.arange(8)[None]


@pytest.mark.fast
def test_the_stub_has_the_names_and_objects_of_the_package():
    names = []
    for node in STUB.body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names.append(alias.asname)
                found = importlib.import_module(f"gptjax.{node.module or alias.name}")
                found = getattr(found, alias.name) if node.module else found
                assert getattr(gptjax, alias.asname) is found
    assert sorted(names) == sorted(gptjax.__all__) == sorted(dir(gptjax))


def test_generation_options_are_the_fields_of_the_config():
    assert get_type_hints(GenerationOptions) == get_type_hints(GenerationConfig)
    for name in ("generate", "complete", "stream", "answer", "stream_answer"):
        parameters = inspect.signature(getattr(gptjax, name)).parameters
        for field in dataclasses.fields(GenerationConfig):
            assert parameters[field.name].default == field.default, name


def test_options_replace_those_of_a_generation_config():
    greedy = GenerationConfig(temperature=0.0, max_new_tokens=3)

    def ids(**options):
        return gptjax.complete(MODEL, "ab", **options)[0].ids

    whole = ids(temperature=0.0, max_new_tokens=3)
    assert ids(generation_config=greedy) == whole
    assert ids(generation_config=greedy, max_new_tokens=2) == whole[:2]


@pytest.mark.parametrize("function", [gptjax.apply, gptjax.hidden_states])
def test_invalid_tokens_and_points_are_rejected(function, monkeypatch):
    # As for a user: without the checks of types that the tests turn on.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for tokens, error, message in [
        (TOKEN_BT[0], ConfigError, r"\(8,\).*tokens\[None\]"),
        *((jnp.zeros(s, jnp.int32), ConfigError, r"shape \(\d, \d\)") for s in ((0, 3), (1, 0))),
        (jnp.zeros((1, 9), jnp.int32), ConfigError, r"9 tokens.*context_length=8"),
        (TOKEN_BT.at[0, 3].set(257), DataError, "257.*model.vocab_size=257"),
        (np.array([[0, -1]]), DataError, "token -1"),
    ]:
        with pytest.raises(error, match=message):
            function(MODEL.config, MODEL.params, tokens)
    for capture in (("residual", "mlp_outputs"), "residual"):
        with pytest.raises(ConfigError, match=r"capture: .*Known: residual"):
            function(MODEL.config, MODEL.params, TOKEN_BT, capture=capture)
    for name, shape in (("atention", 3), ("residual", (2, 2, 8, 16))):
        with pytest.raises(ConfigError, match=name):
            function(MODEL.config, MODEL.params, TOKEN_BT, interventions={name: jnp.zeros(shape)})


def test_params_of_another_config_are_rejected_while_tracing():
    apply = jax.jit(gptjax.apply, static_argnums=0)
    for changes, name in [
        ({"n_layers": 3}, r"blocks/.*\(2, .*instead of \(3, "),
        ({"n_heads": 4}, r"blocks/attention/.*\(2, 2, 8.*instead of \(2, 4, 4"),
        ({"qkv_bias": False}, r"blocks/attention/\w+/bias.*not one of"),
        ({"tie_embeddings": False}, "output_embedding/embedding.*missing"),
    ]:
        with pytest.raises(ModelError, match=name):
            apply(dataclasses.replace(MODEL.config, **changes), MODEL.params, TOKEN_BT)


CLASSIFIER = dataclasses.replace(MODEL, labels=("a", "b"))
MISTAKES = {  # name in the message: calls
    "model='my-model'": [
        *(lambda f=f: f("my-model", "Hi") for f in (gptjax.generate, gptjax.stream, gptjax.answer)),
        lambda: gptjax.score("my-model", "Hi"),
        lambda: gptjax.classify("my-model", ["Hi"]),
        lambda: gptjax.save("my-model", MODEL),
    ],
    "classifier": [
        *(lambda f=f: f(CLASSIFIER, "Hi") for f in (gptjax.generate, gptjax.stream, gptjax.answer)),
        lambda: gptjax.score(CLASSIFIER, "Hi"),
    ],
    "prompt": [
        *(lambda x=x: gptjax.generate(MODEL, x) for x in (None, 5, [1.5], ["a", 5], {"a": "b"}))
    ],
    "max_new_tokens=": [
        *(lambda x=x: gptjax.generate(MODEL, "Hi", max_new_tokens=x) for x in ("5", 2.5, None, 1e9))
    ],
    "seed=": [*(lambda x=x: GenerationConfig(seed=x) for x in (2**63, -1, 0.5, "1"))],
    "stop": [lambda: GenerationConfig(stop=5), lambda: GenerationConfig(stop_ids=["a"])],
    "key=0": [
        lambda: gptjax.init(MODEL.config, 0),
        lambda: gptjax.init_state(MODEL.params, optax.sgd(0.1), 0),
        lambda: gptjax.apply(MODEL.config, MODEL.params, TOKEN_BT, dropout_key=0),
    ],
    "config": [
        lambda: gptjax.init(jax.random.key(0), MODEL.config),
        lambda: gptjax.apply(MODEL, MODEL.params, TOKEN_BT),
        lambda: gptjax.train("tiny", "run"),
        lambda: gptjax.generate(MODEL, "Hi", generation_config={"seed": 1}),
        lambda: gptjax.generate(
            dataclasses.replace(MODEL, config=dataclasses.replace(MODEL.config, n_layers=1)), "Hi"
        ),
    ],
    "n_layers=": [*(lambda x=x: gptjax.GPTConfig(n_layers=x) for x in ("2", 2.5, None, 0))],
    "tokens": [lambda: gptjax.apply(MODEL.config, MODEL.params, [[1, 2]])],
    "text": [lambda: MODEL.tokenizer.encode(None), lambda: gptjax.score(MODEL, ["a"])],
    "ids": [lambda: MODEL.tokenizer.decode("a"), lambda: MODEL.tokenizer.decode(5)],
    "path": [lambda: gptjax.load(5), *(lambda x=x: gptjax.load(x * 3000) for x in ("x", "x/"))],
    "allow_change='train.steps'": [
        lambda: gptjax.train(RunConfig(), "run", allow_change="train.steps")
    ],
}


@pytest.mark.parametrize("named", MISTAKES)
def test_an_argument_of_a_wrong_kind_is_named(named, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for call in MISTAKES[named]:
        with pytest.raises(gptjax.GptjaxError, match=named):
            call()


def test_messages_of_a_wrong_form_are_rejected(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    assistant = dataclasses.replace(MODEL, chat_template=load_chat_template("qa").source)
    for messages in (
        *({"role": "user", "content": "x"}, [{"content": "x"}], [("user", "x")], ["x"]),
        *([{"role": "user", "content": None}], [{"role": "user"}], 5),
    ):
        with pytest.raises(ConfigError, match="message"):
            gptjax.answer(assistant, messages)


def test_no_cached_value_holds_a_tracer():
    for int8 in (False, True):
        model = dataclasses.replace(MODEL, int8=int8)
        expected = gptjax.generate(model, "ab", max_new_tokens=2)
        traced_first = dataclasses.replace(MODEL, int8=int8)

        jax.jit(lambda x, model=traced_first: (model.decode_params, x)[1])(0)

        assert not any(
            isinstance(leaf, jax.core.Tracer)
            for leaf in jax.tree.leaves((vars(traced_first), traced_first.decode_params))
        )
        assert gptjax.generate(traced_first, "ab", max_new_tokens=2) == expected


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_without_a_weight_is_rejected(accumulate):
    def loss_fn(params, batch, key):
        return jnp.sum(params["w"] * batch)

    optimizer = optax.sgd(0.1)
    state = init_state({"w": jnp.ones(())}, optimizer, jax.random.key(0))

    with pytest.raises(ConfigError, match=r"loss_fn.*\(\) instead"):
        make_train_step(loss_fn, optimizer, accumulate)(state, jnp.ones((2,)))


@pytest.mark.parametrize(
    "command",
    [
        pytest.param("basedpyright --level error --pythonpath", marks=pytest.mark.slow),
        "pyrefly check --python-interpreter-path",
    ],
)
def test_a_users_script_passes_the_type_checkers(command):
    name, *words = command.split()
    program = shutil.which(name, path=Path(sys.executable).parent)
    if program is None:
        pytest.skip(f"{name} is not installed; it is part of [dev]")

    subprocess.run(
        [program, *words, sys.executable, "tests/typing/user_script.py"], cwd=ROOT, check=True
    )
