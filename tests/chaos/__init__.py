"""Campaigns of faults: see `python -m tests.chaos --help`."""
