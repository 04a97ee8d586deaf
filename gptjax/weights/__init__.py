"""Weights in and out: the portable model folder."""
