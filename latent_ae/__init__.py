"""The first stage of latent diffusion as a component: models, losses, data, metrics and export."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("latent-ae")
except PackageNotFoundError:  # a bare checkout on the path, not installed
    __version__ = "0+unknown"
