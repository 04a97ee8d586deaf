"""Target platform and versions of installed packages."""

import importlib.metadata

import jax

GPU_PRE_AMPERE = "gpu without cuDNN attention"  # or not from NVIDIA
TRACKED_PACKAGES = (
    *("gptjax", "jax", "jaxlib", "flax", "optax"),
    *("orbax-checkpoint", "grain", "numpy", "tiktoken"),
)


def target_platform() -> str:
    """Returns the platform to compile for: "cpu", "tpu", "gpu" or `GPU_PRE_AMPERE`.

    Colab's T4 is a `GPU_PRE_AMPERE`. A mesh of TPUs in context takes precedence over
    the local devices: ahead-of-time compilation targets another machine.
    """
    mesh_device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if mesh_device is not None and mesh_device.device_kind.startswith("TPU"):
        return "tpu"
    name = jax.default_backend()
    if name != "gpu":
        return name
    capability = getattr(jax.devices()[0], "compute_capability", "")
    major = str(capability).split(".")[0]
    return "gpu" if major.isdecimal() and int(major) >= 8 else GPU_PRE_AMPERE


def package_versions() -> dict[str, str]:
    """Versions of packages that affect results; "missing" if not installed."""
    versions = {}
    for name in TRACKED_PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "missing"
    return versions
