"""Versions of software, which are stored beside results because the numbers depend on them."""

import platform
from functools import lru_cache
from importlib.metadata import version

PACKAGES = ("latent-ae", "torch", "diffusers", "accelerate", "datasets", "torch-fidelity", "lpips", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that compute, for checkpoints, latents and results."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


@lru_cache
def _version(name: str) -> str:
    """Return the version of a package. Looking it up reads the package's whole description, hence the cache."""
    return version(name)
