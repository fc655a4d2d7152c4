"""The run folder's config.yaml: written at the start, held against the settings when a run goes on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from latent_ae.config import UserError, to_yaml
from latent_ae.disk import replacing, writing

from .config import TrainSettings

RECIPE = (
    *("seed", "batch_size", "precision", "init_from", "train", "model", "data"),
    *("validate.images", "validate.crop_px"),  # before and after must be measured alike
    *("loss.perceptual_net", "loss.learned_logvar", "optim.kind"),
    *("gan.loss", "gan.norm", "gan.channels", "gan.layers", "gan.blur"),
)
"""Keys that a run cannot change under way: the weights or the sample order would no longer fit."""
FREE = ("data.num_workers", "data.max_bad_fraction")
"""Keys under RECIPE that may change all the same."""
SWITCHES = ("gan.weight", "ema.decay")
"""Keys whose value may change, but not to or from 0: a checkpoint holds the network or it does not."""
SILENT = (
    *("output_dir", "report_to", "push_to_hub", "micro_batch_size", "checkpoint", "log"),
    *("compile", "gradient_checkpointing", "gan.init_from"),
    *("validate.every", "validate.preview_images"),
)
"""Keys whose change needs no word."""


def changed_settings(run: Path, settings: TrainSettings) -> list[str]:
    """Holds the settings against the config.yaml of a run that goes on; returns notes on what changed.

    Raises UserError naming the keys when the recipe differs.
    """
    config = run / "config.yaml"
    if not config.is_file():
        return []
    before = flatten(yaml.safe_load(config.read_text(encoding="utf-8")) or {})
    now = flatten(settings.model_dump(mode="json", by_alias=True))
    changed = [key for key in now if key in before and before[key] != now[key] and not _under(key, SILENT)]
    refused = [
        key
        for key in changed
        if (_under(key, RECIPE) and not _under(key, FREE)) or (key in SWITCHES and bool(before[key]) != bool(now[key]))
    ]
    if refused:
        lines = "\n".join(f"  {key}: {before[key]} in {config}, now {now[key]}" for key in refused)
        raise UserError(
            f"{run} holds a run with another recipe:\n{lines}\n"
            "Restore these settings to go on with it, or choose another output_dir"
        )
    return [f"changed since the last start: {key} from {before[key]} to {now[key]}" for key in changed]


def write_config(run: Path, settings: TrainSettings, *, resuming: bool) -> None:
    """Makes the folder and writes config.yaml. One process calls this. Raises UserError when it cannot."""
    config = run / "config.yaml"
    with writing(run):
        run.mkdir(parents=True, exist_ok=True)
        log = run / "log.jsonl"
        if log.is_file() and not resuming:  # a run that stopped before its first checkpoint
            log.replace(run / "log.previous.jsonl")
    with replacing(config) as part:
        part.write_text(to_yaml(settings), encoding="utf-8")


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _under(key: str, prefixes: Sequence[str]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)
