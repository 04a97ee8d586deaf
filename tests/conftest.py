"""Settings of all tests: eight emulated devices, no implicit rank promotion.

If JAX_PLATFORMS names a GPU, tests that need no mesh run on that one device:
`JAX_PLATFORMS=cuda pytest -n0 tests/model/attention/test_attention_conformance.py`.
"""

import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import settings
from packaging.version import Version

# Before jax is imported. Tests compile thousands of tiny programs on a CPU. Full
# optimization costs far more than it saves, and the newer code generator of XLA (the
# only one since jaxlib 0.11.1) takes five times as long as the older one in one module.
has_older_generator = Version(version("jaxlib")) < Version("0.11.1")
ON_CPU = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_NUM_CPU_DEVICES": "8",
    "XLA_FLAGS": "--xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_use_fusion_emitters=false" * has_older_generator,
}
# On others XLA needs it. Products of float32 are computed as such and in one order;
# memory is left for the processes that a test starts.
ON_OTHERS = {
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    "XLA_FLAGS": "--xla_gpu_deterministic_ops=true",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}
os.environ.setdefault("JAX_PLATFORMS", "cpu")
on_cpu = os.environ["JAX_PLATFORMS"] == "cpu"
for name, value in (ON_CPU if on_cpu else ON_OTHERS).items():
    os.environ.setdefault(name, value)
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("MPLBACKEND", "Agg")
# Processes that tests start compile for themselves; a test session: `programs`.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")

# A busy machine may be slow: time is measured by benchmarks, not by tests.
settings.register_profile("gptjax", deadline=None)
settings.load_profile("gptjax")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
if SHARED.is_dir():
    os.environ.setdefault("GPTJAX_DATA", str(SHARED))


@pytest.fixture(autouse=True, scope="session")
def one_device_unless_asked() -> Iterator[None]:
    """Runs train on one of the devices where their config leaves the mesh as it is."""
    from gptjax.config import MeshConfig
    from gptjax.training import run_dir

    make_mesh = run_dir.make_mesh

    def chosen(config: MeshConfig) -> object:
        return None if config == MeshConfig() else make_mesh(config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_dir, "make_mesh", chosen)
        yield


@pytest.fixture(autouse=True, scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What runs of a session have in common is compiled for the first of them."""
    import jax

    from gptjax.runtime.compilation_cache import enable_cache

    jax.config.update("jax_enable_compilation_cache", True)
    with enable_cache(tmp_path_factory.mktemp("programs")):
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data, which lies beside the project on some machines."""
    folder = Path(os.environ.get("GPTJAX_DATA", SHARED))
    if not folder.is_dir():
        pytest.skip(f"the folder of real data {folder} is not on this machine")
    return folder


@pytest.fixture(scope="session")
def verdict(shared_data: Path) -> str:
    """The text of the book's chapters 2 and 5."""
    return (shared_data / "the-verdict.txt").read_text(encoding="utf-8")
