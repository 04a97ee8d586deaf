"""The comparison with PyTorch, on a model so small that it takes seconds."""

import pytest

from gptjax.config import GPTConfig

pytestmark = pytest.mark.peers

SMALL = GPTConfig.preset("gpt2", n_layers=1, n_heads=2, d_model=16, context_length=32)


def test_their_work_is_as_much_as_ours():
    from tests.benchmarks import torch_workloads

    assert torch_workloads.transformers_train(SMALL, rows=2, context=8)() == 16
    assert torch_workloads.transformers_decode(SMALL, rows=2, new=5)() == 10
    assert torch_workloads.transformers_prefill(SMALL, rows=2, context=8)() == 16
    assert torch_workloads.transformers_load(SMALL)() == 1
