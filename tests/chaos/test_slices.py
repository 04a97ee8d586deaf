"""A small slice of every campaign of faults."""

import pytest

from tests.chaos.__main__ import CAMPAIGNS, failures, load_campaign

pytestmark = pytest.mark.chaos


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_campaign_slice_finds_no_fault(name):
    assert not list(failures(name, 0, range(load_campaign(name).SLICE)))
