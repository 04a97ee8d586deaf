"""A small model, and a Hugging Face export of it."""

import shutil

import pytest

from gptjax.weights import export
from tests.small_models import make_model


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "model"
    with pytest.MonkeyPatch.context() as patch:  # compiles; see test_export
        patch.setattr(export, "compare_logits", lambda *models: 0.0)
        export.export_model(model, "hf", folder)
    return folder


@pytest.fixture
def hf(exported, tmp_path):
    """A copy of the exported folder to be changed."""
    return shutil.copytree(exported, tmp_path / "hf")
