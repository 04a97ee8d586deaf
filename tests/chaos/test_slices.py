"""A small slice of every campaign of faults."""

import importlib
import pkgutil

import pytest

from tests.chaos.__main__ import CAMPAIGNS, failures
from tests.chaos.sigterm import PHASES


@pytest.mark.chaos
@pytest.mark.parametrize("name", CAMPAIGNS)
def test_campaign_slice_finds_no_fault(name):
    cases = range(importlib.import_module(f"tests.chaos.{name}").SLICE)
    assert not list(failures(name, 0, cases))


def test_phases_of_the_sigterm_campaign_name_functions():
    for phase in PHASES.values():
        assert callable(pkgutil.resolve_name(":".join(phase.split()[:2])))
