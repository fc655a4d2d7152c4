"""What reconstruction figures depend on, written beside them, and the keys of stored work."""

import json
from typing import Any

import pyarrow as pa

from latent_ae.data.sources import fingerprint
from latent_ae.provenance import versions
from latent_ae_eval.recon.settings import ReconSettings


def protocol_manifest(settings: ReconSettings) -> dict[str, Any]:
    """The protocol in full, and what was set apart from it."""
    own = {"name": settings.protocol, "changed": settings.changes()}
    background = {"background": settings.background, "pixel_range": "[-1, 1]", "arithmetic": "float32 without TF32"}
    manifest = own | settings.resolved().model_dump(mode="json") | background
    plain: dict[str, Any] = json.loads(json.dumps(manifest))
    return plain


def data_fingerprint(table: pa.Table) -> str:
    """Over the contents of the files measured, in their order."""
    return fingerprint(table["digest"].to_pylist())


def evaluation_key(
    settings: ReconSettings, *, model: str, data: str, shard: int, inception: str | None
) -> dict[str, Any]:
    """All that the numbers depend on: shards of another key are not gone on from."""
    irrelevant = {"batch_size", "num_workers", "num_pictures", "reference_cache", "max_bad_fraction", "device"}
    return {
        "settings": settings.model_dump(mode="json", exclude=irrelevant),
        "model": model,
        "data": data,
        "shard": shard,
        "inception": inception,
        "versions": versions(),
    }


def reference_key(settings: ReconSettings, channels: int, multiple_of: int, inception: str) -> dict[str, Any]:
    """All that makes Inception's features of an original, besides its file."""
    framing = ("resize_px", "crop_px", "resample", "crop_rounds", "rounding", "extractor", "extractor_dtype")
    protocol = settings.resolved().model_dump(mode="json", include=set(framing))
    own = {"channels": channels, "background": settings.background, "inception": inception, "versions": versions()}
    return protocol | own | {"multiple_of": multiple_of if settings.resolved().crop_px is None else None}
