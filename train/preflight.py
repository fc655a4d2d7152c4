"""What can fail at the end is tried before the first step."""

import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError

from latent_ae.config import UserError
from latent_ae.models import count_parameters

from .config import TrainSettings
from .step import TrainStep

BYTES = 4
"""Per float32."""


def preflight(run: Path, settings: TrainSettings, train_step: TrainStep) -> None:
    """Checks room for the checkpoints and the way of an export through stock diffusers. One process calls this.

    Raises UserError with what to mend.
    """
    autoencoder: AutoencoderKL = train_step.bare_reconstructor.autoencoder
    weights = count_parameters(autoencoder) * BYTES
    learning = BYTES * sum(p.numel() for p in autoencoder.parameters() if p.requires_grad)
    judge = BYTES * (
        count_parameters(train_step.bare_discriminator) if train_step.bare_discriminator is not None else 0
    )
    each = weights * (2 if train_step.ema is not None else 1) + 2 * learning + 3 * judge
    # the newest, the best, the one before the GAN, and the one that is being written before an older one goes
    count = settings.checkpoint.keep + 3
    if settings.checkpoint.keep_every:
        count += settings.steps // settings.checkpoint.keep_every
    there = sum(path.stat().st_size for path in (run / "checkpoints").glob("*/*") if path.is_file())
    needed, free = count * each + 2 * weights - there, shutil.disk_usage(run).free
    if free < needed:
        raise UserError(
            f"output_dir: {run} has {free / 1e9:.1f} GB free, and up to {count} checkpoints of {each / 1e9:.1f} GB and "
            f"the export need {needed / 1e9:.1f} GB: free space, choose another output_dir, or lower checkpoint.keep"
        )
    try:
        with tempfile.TemporaryDirectory(prefix=".preflight-", dir=run) as folder:
            autoencoder.save_pretrained(folder)
            again = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).state_dict()
    except (OSError, SafetensorError) as error:
        raise UserError(f"output_dir: cannot write an export into {run}: {error}") from error
    differing = [
        name for name, tensor in autoencoder.state_dict().items() if not torch.equal(tensor.cpu(), again[name])
    ]
    if differing:
        raise RuntimeError(f"stock diffusers would load other weights than these: {differing[0]}")
