"""Versions of software, which are stored beside results because the numbers depend on them."""

import platform
from functools import lru_cache
from importlib.metadata import version

COMPUTING = ("latent-ae", "torch", "diffusers", "numpy", "pillow")
"""Packages that compute latents."""
PACKAGES = ("latent-ae", "torch", "diffusers", "accelerate", "datasets", "torch-fidelity", "lpips", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that compute, for checkpoints and results."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def computing_versions() -> dict[str, str]:
    """Return the versions of the packages that compute latents: others may change while an encoding is unfinished."""
    return {name: _version(name) for name in COMPUTING}


@lru_cache
def _version(name: str) -> str:
    """Return the version of a package. Looking it up reads the package's whole description, hence the cache."""
    return version(name)
