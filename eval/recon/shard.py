"""Measures a shard of images: one pass through the model and through each metric's network."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from latent_ae.config import UserError
from latent_ae.data.held_out import HeldOutImage
from latent_ae.data.images import bicubic_down_up, to_uint8, visible
from latent_ae.data.rng import decoder_generators, posterior_noise
from latent_ae.metrics.labels import shift_keys
from latent_ae.metrics.similarity import colour_shift, compare, json_columns
from latent_ae.models.loading import CPU_BATCH_PX, FirstStage
from latent_ae.models.posterior import draw
from latent_ae.pretrained.dists import DISTS
from latent_ae.pretrained.inception import InceptionFeatures
from latent_ae.pretrained.lpips import LPIPS, TRUNKS
from latent_ae.pretrained.weights import briefly
from latent_ae_eval.features import FeatureNetwork, folder_networks, inception_network
from latent_ae_eval.recon.cost import Stopwatch
from latent_ae_eval.recon.settings import ReconSettings
from latent_ae_eval.storage import ReferenceCache, Shard

BASELINE = "baseline"
Metrics = dict[str, dict[str, Tensor]]
Features = dict[str, Tensor]


class Measurer:
    """Measures shards of images; everything stays on the device until a shard is done.

    Args:
        stage: The model.
        settings: The settings.
        device: Where the networks run.
        networks: Feature networks by their name in the setting `frechet`, besides those of LPIPS.
        caches: Caches of their features of originals, by the same names; may be empty.

    Raises:
        UserError: If the weights of LPIPS or DISTS are not available.
    """

    def __init__(
        self,
        stage: FirstStage,
        settings: ReconSettings,
        device: torch.device,
        networks: Mapping[str, FeatureNetwork],
        caches: Mapping[str, ReferenceCache],
    ):
        self.stage, self.settings, self.protocol, self.device = stage, settings, settings.resolved(), device
        self.networks, self.caches = networks, caches
        features = {"vgg": "vgg16" in settings.frechet, "alex": "alexnet" in settings.frechet}
        nets = [net for net in TRUNKS if net in self.protocol.lpips or features[net]]
        self.lpips = {net: LPIPS(net).to(device) for net in nets}
        self.dists = DISTS().to(device) if settings.dists else None
        self.frechet_nets = [net for net in nets if features[net]]
        self.kinds = self.protocol.latents if stage.random else ("mode",)
        self.watch = Stopwatch(device)

    @torch.no_grad()
    def measure(self, items: Sequence[HeldOutImage]) -> Shard:
        """Return rows, skipped files and features of a shard's images."""
        readable = [item for item in items if item.image is not None]
        most_px = CPU_BATCH_PX if self.device.type == "cpu" else None
        batches = list(_batches(readable, self.settings.batch_size, most_px))
        ordered = [item for batch in batches for item in batch]
        digests = [item.digest for item in ordered]
        found = {name: cache.find(digests) for name, cache in self.caches.items()} if ordered else {}
        cached = {name: features for name, features in found.items() if features is not None}
        measured = [self._batch(batch, cached.keys()) for batch in batches]
        # from here on, values are read from the device
        rows = []
        for batch, (metrics, _) in zip(batches, measured, strict=True):
            numbers = {
                f"{kind}_{key}": column
                for kind, columns in metrics.items()
                for key, column in json_columns(columns).items()
                if not key.startswith("lpips_") or key.removeprefix("lpips_") in self.protocol.lpips
            }
            rows += [_row(item, {name: column[i] for name, column in numbers.items()}) for i, item in enumerate(batch)]
        names = measured[0][1] if measured else {}
        features = {name: torch.cat([parts[name] for _, parts in measured]).cpu() for name in names}
        for name in found:
            if name in cached:
                features[f"{name}.input"] = cached[name]
            else:
                self.caches[name].keep(digests, features[f"{name}.input"])
        return Shard(rows, [f"{item.name}: {item.reason}" for item in items if item.image is None], features)

    def reconstruct(self, items: Sequence[HeldOutImage]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return readable images of one size as a batch, and their reconstructions by kind (without the baseline).

        Returns:
            (N, C, H, W) float32 in [-1, 1] on the device, and the same by "mode" and "sample".
        """
        images = torch.stack([item.image for item in items if item.image is not None])
        if self.device.type == "cuda":
            images = images.pin_memory().to(self.device, non_blocking=True)
        if self.stage.function is not None:
            with self.watch.lap("whole", images):
                return images, {"mode": self.stage.reconstruct(images)}
        laid_out = images.contiguous(memory_format=torch.channels_last)
        with self.watch.lap("encode", images):
            mean, std = self.stage.encode(laid_out)
        self.watch.encoded(images, mean)
        reconstructions, numbers = dict[str, Tensor](), [item.index for item in items]
        for kind in self.kinds:
            latent = mean
            if kind == "sample":
                noise = posterior_noise(self.settings.seed, numbers, mean.shape[1:]).to(self.device)
                if std is not None:
                    latent = mean + std * noise
                elif self.stage.module is not None:
                    latent = draw(self.stage.module, images.to(self.stage.dtype), noise).latent
            with self.watch.lap("decode", images):
                reconstructions[kind] = self.stage.decode(latent, decoder_generators(self.settings.seed, numbers))
        return images, reconstructions

    def _batch(self, batch: Sequence[HeldOutImage], cached: Collection[str]) -> tuple[Metrics, Features]:
        """Return the metrics and features of a batch, on the device; nan where there are none.

        Args:
            batch: Images of one size.
            cached: Names of the networks whose features of the originals are known.
        """
        inputs, reconstructions = self.reconstruct(batch)
        bands = self.settings.bands
        alpha = inputs.shape[1] == 4 and not bands
        if alpha:
            ground = self.settings.background
            inputs = visible(inputs, ground)
            reconstructions = {kind: visible(image, ground) for kind, image in reconstructions.items()}
        kinds_of_image = dict(reconstructions)
        if self.settings.baseline and self.stage.factor > 1:
            kinds_of_image[BASELINE] = bicubic_down_up(inputs, self.stage.factor)
        pixels = {"input": to_uint8(inputs, self.protocol.rounding)}
        pixels |= {kind: to_uint8(image, self.protocol.rounding) for kind, image in kinds_of_image.items()}
        compared = compare(
            inputs,
            kinds_of_image,
            self.lpips,
            dists=self.dists,
            similarity_of=self.protocol.similarity_of,
            psnr_of=self.protocol.psnr_of,
            window=self.protocol.ssim_window,
            pixels=pixels,
            alpha=alpha,
            bands=bands,
        )
        for kind, image in kinds_of_image.items():
            shifts = colour_shift(pixels["input"], pixels[kind])
            shifts = shifts.masked_fill(~image.isfinite().flatten(1).all(1, keepdim=True), torch.nan)
            compared.metrics[kind].update(zip(shift_keys(inputs.shape[1], bands), shifts.unbind(1), strict=True))
        features: Features = {}
        for net in self.frechet_nets:
            by_kind = dict(zip(("input", *kinds_of_image), compared.features.get(net, ()), strict=False))
            missing = inputs.new_full((len(batch), TRUNKS[net].features), torch.nan)
            features |= {
                f"{TRUNKS[net].weights}.{kind}": by_kind.get(kind, missing) for kind in ("input", *reconstructions)
            }
        bad = {kind: ~image.isfinite().flatten(1).all(1, keepdim=True) for kind, image in reconstructions.items()}
        for name, network in self.networks.items():
            kinds = ["input"] * (name not in cached) + list(reconstructions)
            if not bands and (inputs.shape[1] in (1, 3) or alpha):
                colours = torch.cat([pixels[kind][:, :3] for kind in kinds])
                parts = network(colours).chunk(len(kinds))
            else:
                parts = (inputs.new_full((len(batch), network.dimensions), torch.nan),) * len(kinds)
            features |= {
                f"{name}.{kind}": part.masked_fill(bad[kind], torch.nan) if kind in bad else part
                for kind, part in zip(kinds, parts, strict=True)
            }
        return compared.metrics, features


def _batches(
    items: Sequence[HeldOutImage], batch_size: int, most_px: int | None = None
) -> Iterator[list[HeldOutImage]]:
    """Yield batches of images of one shape, of up to `batch_size` images or `most_px` pixels.

    The order depends on the shard alone.
    """

    def shape(item: HeldOutImage) -> tuple[int, ...]:
        assert item.image is not None
        return tuple(item.image.shape)

    for (_, height, width), group in groupby(sorted(items, key=shape), key=shape):  # sorting is stable
        of_one_shape = list(group)
        size = batch_size if most_px is None else max(1, min(batch_size, most_px // (height * width)))
        for first in range(0, len(of_one_shape), size):
            yield of_one_shape[first : first + size]


def _row(item: HeldOutImage, values: dict[str, Any]) -> dict[str, Any]:
    assert item.image is not None
    channels, height, width = item.image.shape
    shape = {"channels": channels, "height": height, "width": width}
    name = item.name.encode("utf-8", "backslashreplace").decode()  # file names may hold bytes that are no valid UTF-8
    return {"index": item.index, "name": name, "digest": item.digest, "enlarged": item.enlarged} | shape | values


def networks_of(settings: ReconSettings, device: torch.device) -> tuple[dict[str, FeatureNetwork], str]:
    """Return the feature networks by their name in the setting `frechet`, besides those of LPIPS.

    The text is empty, or the reason why Inception is not among them although it was requested.

    Raises:
        UserError: If the weights that a setting names cannot be used.
    """
    networks = folder_networks(settings.frechet, settings, device)
    if "inception" in settings.frechet:
        protocol = settings.resolved()
        try:
            network = InceptionFeatures(
                protocol.extractor, settings.inception_weights, double=protocol.extractor_dtype == "fp64"
            )
        except UserError as error:
            if settings.inception_weights is not None:
                raise
            return networks, f"FID and KID are missing: {briefly(error)}"
        networks["inception"] = inception_network(network, device)
    return networks, ""
