"""Versions of software, which are stored beside results because the numbers depend on them."""

import platform
from importlib.metadata import version

PACKAGES = ("latent-ae", "torch", "diffusers", "accelerate", "datasets", "torch-fidelity", "lpips", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that compute, for checkpoints, latents and results."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
