"""A small model, and a Hugging Face export of it."""

import pytest

from gptjax.exporters import export
from tests.small_models import make_model


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def hf(model, tmp_path):
    with pytest.MonkeyPatch.context() as patch:  # compiles; see test_export
        patch.setattr(export, "compare_logits", lambda *models: 0.0)
        export.export_model(model, "hf", tmp_path / "hf")
    return tmp_path / "hf"
