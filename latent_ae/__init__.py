"""The first stage of latent diffusion as a component: load, train, measure and export autoencoders.

    import latent_ae as lae

    vae = lae.load("runs/mine")         # a run, checkpoint, export, pipeline folder or hub id
    z = vae.encode(images)              # z.mean and z.std, raw latents of NCHW images in [-1, 1]
    lae.psnr(lae.to_uint8(images), lae.to_uint8(vae.decode(z.mean)))

Importing this package costs nothing: a name is looked up when it is first used.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latent_ae.config import UserError as UserError
    from latent_ae.data.images import to_uint8 as to_uint8
    from latent_ae.export.write import export_autoencoder as export_autoencoder
    from latent_ae.latents.cache import open_latents as open_latents
    from latent_ae.latents.statistics import LatentStatistics as LatentStatistics
    from latent_ae.metrics.similarity import ms_ssim as ms_ssim
    from latent_ae.metrics.similarity import psnr as psnr
    from latent_ae.metrics.similarity import ssim as ssim
    from latent_ae.models.build import build_autoencoder as build_autoencoder
    from latent_ae.models.loading import load as load
    from latent_ae.pretrained.lpips import LPIPS as LPIPS

try:
    __version__ = version("latent-ae")
except PackageNotFoundError:  # a bare checkout on the path, not installed
    __version__ = "0+unknown"

_MODULES = {
    "LPIPS": "pretrained.lpips",
    "LatentStatistics": "latents.statistics",
    "UserError": "config",
    "build_autoencoder": "models.build",
    "export_autoencoder": "export.write",
    "load": "models.loading",
    "ms_ssim": "metrics.similarity",
    "open_latents": "latents.cache",
    "psnr": "metrics.similarity",
    "ssim": "metrics.similarity",
    "to_uint8": "data.images",
}
__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
