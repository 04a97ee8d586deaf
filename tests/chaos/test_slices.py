"""A small slice of every campaign of faults."""

import pytest

from tests.chaos.__main__ import CAMPAIGNS, campaign, failures

pytestmark = pytest.mark.chaos


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_nothing_goes_wrong_in_a_slice_of(name):
    assert not list(failures(name, 0, range(campaign(name).SLICE)))
