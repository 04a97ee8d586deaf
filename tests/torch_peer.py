"""PyTorch, where the extra [peers] is installed."""

import warnings

import pytest


def import_torch():
    """PyTorch, whose import warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torch")


def import_exact_torch():
    """PyTorch where its numbers have the bits that ours have: see torch_random.py."""
    torch = import_torch()
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("PyTorch's numbers have other last bits on this processor")
    return torch
