"""The text of chapters 2 and 5."""

import pytest


@pytest.fixture(scope="package")
def verdict(shared_data):
    return (shared_data / "the-verdict.txt").read_text(encoding="utf-8")
