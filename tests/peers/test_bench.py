"""What is timed of the peers is as much work as what is timed of gptjax."""

import pytest

from gptjax.bench.torch_workloads import TORCH_WORKLOADS
from gptjax.config import PRESETS
from tests.bench.test_runner import WORK

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("name", [x for x in WORK if f"transformers_{x}" in TORCH_WORKLOADS])
def test_their_work_is_as_much_as_ours(monkeypatch, name):
    monkeypatch.setitem(PRESETS, "mini", (1, 2, 16))
    options, units = WORK[name]

    assert TORCH_WORKLOADS[f"transformers_{name}"]("mini", **options)() == units
