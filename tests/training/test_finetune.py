"""The parameters that each choice of `finetune.trainable` trains."""

import dataclasses

import jax
import numpy as np
import pytest

from gptjax.config import FinetuneConfig, RunConfig
from gptjax.training.finetune import combine_params, merge_last_layers, split_trainable
from tests.small_models import make_model


@pytest.mark.parametrize(
    ("trainable", "num_layers", "others"),
    [
        ("all", 3, {"token_embedding", "position_embedding", "final_norm"}),
        ("head", 0, set()),
        ("last-block", 1, {"final_norm"}),
        ("last-two-blocks", 2, {"final_norm"}),
        ("lora", 0, {"adapters"}),
    ],
)
def test_trained_parameters_of_each_choice(trainable, num_layers, others):
    model = make_model(n_layers=3, n_classes=2)
    finetune = FinetuneConfig(trainable=trainable, lora_rank=2)
    config = dataclasses.replace(RunConfig(), model=model.config, finetune=finetune)

    trained, frozen = split_trainable(config, model.params, jax.random.key(0))

    blocks = {"tail", "blocks"} & trained.keys()
    assert trained.keys() - blocks == others | {"head"}
    layers = [trained[name]["mlp"]["up"]["kernel"] for name in blocks]
    assert sum(map(len, layers)) == num_layers
    merged = merge_last_layers(combine_params(config, trained, frozen)[0])
    jax.tree.map(np.testing.assert_array_equal, merged, model.params)
