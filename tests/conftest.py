"""What every test starts from: eight emulated devices, no silent broadcasting."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Before jax is imported anywhere. Tests compile hundreds of tiny programs, for
# which XLA's full optimisation costs far more than it saves.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("MPLBACKEND", "Agg")

# A busy machine may be slow: time is measured by benchmarks, not by tests.
settings.register_profile("gptjax", deadline=None)
settings.load_profile("gptjax")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
if SHARED.is_dir():
    os.environ.setdefault("GPTJAX_DATA", str(SHARED))


@pytest.fixture
def shared_data() -> Path:
    """The folder of real data, which lies beside the project on some machines."""
    folder = Path(os.environ.get("GPTJAX_DATA", SHARED))
    if not folder.is_dir():
        pytest.skip(f"the folder of real data {folder} is not on this machine")
    return folder
