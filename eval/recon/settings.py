"""Settings of `latent-ae eval recon`."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from latent_ae.config import Bands, NonNegative, Positive, Problem
from latent_ae_eval.recon.protocols import PROTOCOLS, Extractor, Latent, Name, Protocol, Resample, Rounding
from latent_ae_eval.settings import EvalSettings, FeatureSettings, Net

OfProtocol = Literal["protocol"]
FeatureName = Literal["inception", "vgg16", "alexnet", "dinov2", "clip"]


class ReconSettings(FeatureSettings, EvalSettings):
    """How reconstructions are measured; docs/evaluation.md explains the effect of each choice."""

    protocol: Name = "default"
    """Settings with which others measured; the next seven settings change single parts of them."""
    resize_px: Positive | OfProtocol | None = "protocol"
    """Shorter side to which an image is resized before the crop, px; null keeps its size."""
    crop_px: Positive | OfProtocol | None = "protocol"
    """Side of the centre crop, px; null takes whole images, cut to a multiple of the factor."""
    resample: Resample | OfProtocol = "protocol"
    """Resampling method."""
    rounding: Rounding | OfProtocol = "protocol"
    """How a float becomes one of 256 levels: to the nearest with halves up or to even, or with fractions cut off
    (cut32 does so in float32)."""
    latents: tuple[Latent, ...] | OfProtocol = "protocol"
    """What is decoded: the posterior's mode (a Gaussian's mean, the most likely codes) or a sample of it."""
    lpips: tuple[Net, ...] | OfProtocol = "protocol"
    """Networks of LPIPS."""
    extractor: Extractor | OfProtocol = "protocol"
    """Variant of Inception: how it resizes to 299 px and normalises."""
    dists: bool = False
    """Also measure DISTS (Ding et al. 2020)."""
    frechet: tuple[FeatureName, ...] = ("inception",)
    """Features whose Fréchet distance is measured: inception gives FID and KID; dinov2 and clip need their folder and
    have a kernel distance, too; vgg16 and alexnet are available wherever LPIPS is."""
    precision_recall: tuple[FeatureName, ...] = ()
    """Features of `frechet` in which precision and recall are measured, with 3 neighbours."""
    inception_weights: str | None = None
    """File with other weights than the published ones; the distances are then not called FID and KID."""
    bands: Bands = ()
    """Groups of one or three channels, counted from 0, as [[2, 1, 0], [3], [4]]: LPIPS is the mean over them, and the
    first one is shown in pictures. Without them four channels are RGBA: metrics compare images over `background`, and
    psnr_alpha is that of alpha itself."""
    baseline: bool = True
    """Also measure bicubic down- and upsampling by the model's factor."""

    reference_cache: bool = True
    """Keep the features of the originals (inception, dinov2, clip) for the next model, under a key of their content and
    the protocol."""
    num_pictures: NonNegative = 3
    """Number of worst, of median and of best images in the report."""

    def problems(self) -> Iterator[Problem]:
        protocol = self.resolved()
        resize_px, crop_px = protocol.resize_px, protocol.crop_px
        if resize_px is not None and crop_px is not None and resize_px < crop_px:
            key = "crop_px" if self.resize_px == "protocol" else "resize_px"
            yield Problem(key, f"resize_px {resize_px} is smaller than crop_px {crop_px}; change one or set it to null")
        if not protocol.latents:
            yield Problem("latents", "nothing to decode: give [mode], [sample] or [mode, sample]")
        if len(set(protocol.latents)) < len(protocol.latents):
            yield Problem("latents", "has the same value twice; give each once")
        if self.dists and find_spec("torchmetrics") is None:
            advice = "pip install '.[dists]' in the checkout"
            yield Problem("dists", f"needs torchmetrics, which ships its weights: {advice}")
        yield from self.problems_of_features(self.frechet)
        for key in ("frechet", "precision_recall"):
            if len(set(getattr(self, key))) < len(getattr(self, key)):
                yield Problem(key, "has the same value twice; give each once")
        if missing := [name for name in self.precision_recall if name not in self.frechet]:
            yield Problem("precision_recall", f"measures features of frechet, which lacks {', '.join(missing)}")
        weights = self.inception_weights
        if weights is not None and not Path(weights).expanduser().is_file():
            yield Problem("inception_weights", f"no such file: {weights} (from {Path.cwd()})")

    def changes(self) -> dict[str, Any]:
        """Return the settings that differ from the protocol."""
        own = {name: getattr(self, name) for name in Protocol.model_fields if name in type(self).model_fields}
        protocol = PROTOCOLS[self.protocol]
        return {key: value for key, value in own.items() if value not in ("protocol", getattr(protocol, key))}

    def resolved(self) -> Protocol:
        """Return the protocol with those changes."""
        return PROTOCOLS[self.protocol].model_copy(update=self.changes())
