"""The discriminators by name, and those that checkpoints, runs and exports hold."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from latent_ae.config import UserError
from latent_ae.models.dino_discriminator import DinoDiscriminator
from latent_ae.models.discriminator import FILE, Discriminator, read_network
from latent_ae.models.patch_discriminator import PatchDiscriminator
from latent_ae.models.stylegan_discriminator import StyleGANDiscriminator

NETWORKS: dict[str, type[Discriminator]] = {
    "patch": PatchDiscriminator,
    "dino": DinoDiscriminator,
    "stylegan": StyleGANDiscriminator,
}
"""The discriminators by the values of gan.network."""


def discriminator_weights(location: str, network: Discriminator) -> dict[str, Tensor]:
    """Return the discriminator's weights in a checkpoint, the newest checkpoint of a run, or an export.

    Args:
        location: The checkpoint, run or export, or the hub id of an export.
        network: The network that they must fit.

    Raises:
        UserError: If there are none, they cannot be read, or they do not fit.
    """
    from latent_ae.models.run_checkpoint import misfits

    path = _discriminator_file(location)
    weights, stored = _read(path, "gan.init_from: ")
    shape, ours = ({"network": "patch", **one} for one in (stored, network.shape))
    other = {key: shape[key] for key, own in ours.items() if shape.get(key, own) != own}
    if "in_channels" in other:
        raise UserError(
            f"gan.init_from: the discriminator of {path} is of images of {other['in_channels']} channels, and these "
            f"have {ours['in_channels']}: leave gan.init_from out"
        )
    if "latent_channels" in other:
        raise UserError(
            f"gan.init_from: the discriminator of {path} sees latents of {other['latent_channels']} channels, and "
            f"these have {ours['latent_channels']}: leave gan.init_from out"
        )
    if "network" in other:
        raise UserError(f"gan.init_from: the discriminator of {path} is another: set gan.network={other['network']}")
    if "side_px" in other:
        raise UserError(
            f"gan.init_from: the discriminator of {path} takes images of {other['side_px']} px, and these have "
            f"{ours['side_px']}: leave gan.init_from out"
        )
    if other.keys() & {"features", "depth", "sha256"}:
        raise UserError(
            f"gan.init_from: the discriminator of {path} learned on another vision model, whose weights have sha256 "
            f"{shape.get('sha256')}: give its folder as gan.dino_model"
        )
    if other:
        words = " ".join(f"gan.{key}={json.dumps(value).strip(chr(34))}" for key, value in other.items())
        raise UserError(f"gan.init_from: the discriminator of {path} has another shape: set {words}")
    if differing := misfits(network, weights):
        keys = " and ".join(f"gan.{key}" for key in ("network", *type(network).settings))
        raise UserError(
            f"gan.init_from: the discriminator of {path} has another shape (first difference: {differing[0]}): "
            f"set {keys} as in its run"
        )
    return weights


def stored_discriminator(checkpoint: Path) -> Discriminator:
    """Return the discriminator of a checkpoint, built by the shape in its file, without its frozen network.

    Raises:
        UserError: If it cannot be read.
    """
    path = checkpoint / FILE
    weights, shape = _read(path)
    try:
        kind = NETWORKS[shape.pop("network", "patch")]
        network = kind(**shape)
        network.load_state_dict(weights)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} holds no discriminator of its shape: {' '.join(str(error).split())[:200]}") from error
    return network


def _read(path: Path, setting: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        return read_network(path)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{setting}cannot read {path}: {error}") from error


def _discriminator_file(location: str) -> Path:
    """Return the file of weights in a checkpoint, run or export. Raises UserError if there is none."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    from latent_ae.models.run_checkpoint import checkpoint_at

    folder = Path(location).expanduser()
    if folder.is_dir():
        path = (checkpoint_at(folder) or folder) / FILE
        if not path.is_file():
            raise UserError(
                f"gan.init_from: {folder} is neither a checkpoint nor a run nor an export with a discriminator"
            )
        return path
    try:
        cached = try_to_load_from_cache(location, FILE)  # what was downloaded before needs no network
        return Path(cached if isinstance(cached, str) else hf_hub_download(location, FILE))
    except Exception as error:  # no network, offline mode, no permission, no such repository or file
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"gan.init_from: {location} is not a folder here (from {Path.cwd()}), and the hub gives no {FILE} of it "
            f"({reason}). Give a run, a checkpoint or an export"
        ) from error
