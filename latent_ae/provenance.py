"""What a number depends on besides its settings, written beside it."""

import platform
from functools import lru_cache
from importlib.metadata import version

PACKAGES = ("latent-ae", "torch", "diffusers", "accelerate", "datasets", "torch-fidelity", "lpips", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that compute: what checkpoints, latents and results carry."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


@lru_cache
def _version(name: str) -> str:
    """Looking one up reads the whole description of the package."""
    return version(name)
