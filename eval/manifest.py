"""What a number depends on, written beside it."""

import platform
from importlib.metadata import version

FORMAT = "latent-ae reconstruction 1"
"""What a result of `eval recon` calls itself, and `eval compare` asks for."""
PACKAGES = ("latent-ae", "torch", "diffusers", "accelerate", "torch-fidelity", "lpips", "numpy", "pillow")


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
