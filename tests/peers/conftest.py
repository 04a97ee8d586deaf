"""PyTorch for all tests of this folder."""

import pytest

from tests.torch_peer import import_torch


@pytest.fixture(scope="session")
def torch():
    return import_torch()
