"""Records what reconstruction metrics depend on, and makes the keys of stored work."""

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from latent_ae.data.sources import fingerprint
from latent_ae.provenance import versions
from latent_ae_eval.recon.settings import ReconSettings


def protocol_manifest(settings: ReconSettings) -> dict[str, Any]:
    """Return the whole protocol, and the settings that differ from it, JSON-ready."""
    own = {"name": settings.protocol, "changed": settings.changes()}
    background = {"background": settings.background, "pixel_range": "[-1, 1]", "arithmetic": "float32 without TF32"}
    groups = {"bands": settings.bands} if settings.bands else {}
    manifest = own | settings.resolved().model_dump(mode="json") | background | groups
    plain: dict[str, Any] = json.loads(json.dumps(manifest))
    return plain


def data_fingerprint(table: pa.Table) -> str:
    """Return a digest over the contents of the measured files, in their order."""
    return fingerprint(table["digest"].to_pylist())


def evaluation_key(
    settings: ReconSettings, *, model: str, data: str, shard: int, networks: Mapping[str, str]
) -> dict[str, Any]:
    """Return everything that the numbers depend on, JSON-ready: only shards with the same key are used to resume.

    Args:
        settings: The settings.
        model: sha256 of the weights.
        data: Stamp of the images, see `sources.source_stamp`.
        shard: Images per shard.
        networks: sha256 of the weights of each feature network, by its name in the setting `frechet`.
    """
    irrelevant = {"batch_size", "num_workers", "num_pictures", "reference_cache", "max_bad_fraction", "device"}
    return {
        "settings": settings.model_dump(mode="json", exclude=irrelevant),
        "model": model,
        "data": data,
        "shard": shard,
        "networks": dict(networks),
        "versions": versions(),
    }


def reference_key(settings: ReconSettings, channels: int, multiple_of: int, network: str) -> dict[str, Any]:
    """Return everything besides a file that a network's features of an original depend on, JSON-ready.

    Args:
        settings: The settings.
        channels: Channels of the images.
        multiple_of: The model's downsampling factor, of which the sides are multiples.
        network: sha256 of the network's weights.
    """
    framing = ("resize_px", "crop_px", "resample", "crop_rounds", "rounding", "extractor", "extractor_dtype")
    protocol = settings.resolved().model_dump(mode="json", include=set(framing))
    own = {"channels": channels, "background": settings.background, "network": network, "versions": versions()}
    own["alpha"] = channels == 4 and not settings.bands
    return protocol | own | {"multiple_of": multiple_of if settings.resolved().crop_px is None else None}
