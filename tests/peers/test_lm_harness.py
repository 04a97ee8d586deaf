"""The harness measures the published accuracy of GPT-2.

Run with `pytest -m network -n0 tests/peers/test_lm_harness.py`; needs [lm-eval].
"""

import pytest

import gptjax
from gptjax.evaluation.lm_harness import evaluate_tasks

PUBLISHED_HELLASWAG = {"acc": 0.289, "acc_norm": 0.311}  # of GPT-2 124M in the harness


@pytest.mark.network
@pytest.mark.filterwarnings("ignore")  # of the libraries, about their own coming versions
def test_gpt2_has_the_published_accuracy_on_hellaswag():
    pytest.importorskip("lm_eval")

    results = evaluate_tasks(lambda: gptjax.load("gpt2"), ["hellaswag"], None, None)

    for name, published in PUBLISHED_HELLASWAG.items():
        assert results["hellaswag"][name] == pytest.approx(published, abs=0.002)
