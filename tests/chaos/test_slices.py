"""A small slice of every campaign of faults."""

import importlib

import pytest

from tests.chaos.__main__ import CAMPAIGNS, failures


@pytest.mark.chaos
@pytest.mark.parametrize("name", CAMPAIGNS)
def test_campaign_slice_finds_no_fault(name):
    cases = range(importlib.import_module(f"tests.chaos.{name}").SLICE)
    assert not list(failures(name, 0, cases))
