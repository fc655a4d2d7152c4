"""Tries before the first step what could otherwise fail at the end of a run."""

import errno
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import ModelMixin

from latent_ae.config import UserError
from latent_ae.export.write import check_upload, refuse_foreign
from latent_ae.files import amount, writing
from latent_ae.models.borrowed_encoder import borrowed_parameters
from latent_ae.models.build import count_parameters
from latent_ae.models.stored_encoder import out_of_memory_parameters
from latent_ae.objectives.base import Batch

from .phases import Phase
from .report import write_report
from .settings import TrainSettings
from .step import TrainStep, buffers_to_restore

BYTES = 4
"""Bytes of a float32."""
DEAREST_OF = 1000
"""Number of the run's last steps among which the one that needs the most memory is tried."""


def preflight(phase: Phase, train_step: TrainStep) -> None:
    """Check the run folder, disk space, the export through stock diffusers, the report, and the right to upload.

    One process calls this.

    Raises:
        UserError: If something must be mended before training.
        RuntimeError: If diffusers loads other weights than those that were saved.
    """
    run, settings = phase.folder, phase.settings
    if phase.recipe.push_to_hub is not None:
        check_upload(phase.recipe.push_to_hub)
    for left in (*run.glob(".preflight-*"), *run.glob(".export-*")):  # of a run that was killed there
        shutil.rmtree(left, ignore_errors=True)
    _check_places(run)
    _warn_of_slow_bf16(settings, train_step.accelerator.device)
    autoencoder: ModelMixin = train_step.bare_reconstructor.autoencoder
    weights = (count_parameters(autoencoder) + out_of_memory_parameters(autoencoder)) * BYTES
    learning = BYTES * sum(p.numel() for p in autoencoder.parameters() if p.requires_grad)
    adversaries = BYTES * sum(count_parameters(network) for network in train_step.bare_adversaries.values())
    files = [weights, weights if train_step.ema is not None else 0, adversaries, 2 * learning + 2 * adversaries]
    kept = (*train_step.state.state_dict().values(), *train_step.bare_reconstructor.heads.state_dict().values())
    files.append(sum(tensor.numel() * tensor.element_size() for tensor in kept))
    files.append(borrowed_parameters(autoencoder) * BYTES)
    each = sum(files)
    # the newest, the best, the one before the GAN, and a new one that is written before an older one is removed
    count = settings.checkpoint.keep + 3
    if settings.checkpoint.keep_every:
        count += settings.steps // settings.checkpoint.keep_every
    there = sum(path.stat().st_size for path in (run / "checkpoints").rglob("*") if path.is_file())
    needed, free = count * each + 2 * weights + files[-1] - there, shutil.disk_usage(run).free
    if free < needed:
        raise UserError(
            f"output_dir: {run} has {amount(free)} free, and up to {count} checkpoints of {amount(each)} and "
            f"the export need {amount(needed)}: free space, choose another output_dir, or lower checkpoint.keep"
        )
    with writing(run), tempfile.TemporaryDirectory(prefix=".preflight-", dir=run) as folder:
        autoencoder.save_pretrained(folder)
        again = type(autoencoder).from_pretrained(folder, torch_dtype=torch.float32).state_dict()
        write_report(Path(folder), settings, [])
        for number, size in enumerate(files):
            _allocate(Path(folder) / f"{number}", size)
    differing = [
        name for name, tensor in autoencoder.state_dict().items() if not torch.equal(tensor.cpu(), again[name])
    ]
    if differing:
        raise RuntimeError(f"stock diffusers would load other weights than these: {differing[0]}")


def try_passes(step: TrainStep, batch: Batch) -> None:
    """Run one micro-batch through the most expensive of the run's last steps, with the optimizers' memory reserved.

    Everything is restored afterwards, and no other process is waited for.

    Raises:
        UserError: If the device has too little memory.
    """
    dearest = dearest_step(step)
    buffers = [buffer for network in step.networks for buffer in buffers_to_restore(network)]
    before = [buffer.clone() for buffer in buffers]
    wrapped = step.reconstructor, step.adversaries
    # wrapped networks would wait for the buffers of other processes
    step.reconstructor, step.adversaries = step.bare_reconstructor, step.bare_adversaries
    for network in step.bare_adversaries.values():
        network.train()
    try:
        placeholder = step.optimizers.memory_placeholder()
        step.forward_backward(batch, dearest)
        if step.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        del placeholder
    except torch.OutOfMemoryError as error:
        height, width = batch.images.shape[2:]
        size = f"{width}" if height == width else f"{width} x {height}"
        raise UserError(
            f"a micro-batch of {len(batch.images)} images of {size} px does not fit into the memory "
            f"of {step.accelerator.device} in the last steps: lower micro_batch_size, or set "
            f"gradient_checkpointing=true or precision=bf16 ({' '.join(str(error).split())[:200]})"
        ) from error
    finally:
        step.reconstructor, step.adversaries = wrapped
        for network in step.networks:
            network.zero_grad(set_to_none=True)
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)


def dearest_step(step: TrainStep) -> int:
    """Return the number of the step that needs the most memory, among the run's last ones."""
    steps = range(max(0, step.settings.steps - DEAREST_OF), step.settings.steps)
    return max(steps, key=lambda number: sum(one.cost(number) for one in step.objectives.values()))


def _warn_of_slow_bf16(settings: TrainSettings, device: torch.device) -> None:
    if settings.precision != "bf16" or device.type != "cuda":
        return
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        print(
            f"precision: {torch.cuda.get_device_name(device)} has no bf16 arithmetic and emulates it: fp32 is faster "
            "there and more exact",
            file=sys.stderr,
        )


def _check_places(run: Path) -> None:
    """Check that every file and folder of the run can be written, also over existing ones."""
    for name in ("checkpoints", "previews"):
        with writing(run / name):
            (run / name).mkdir(exist_ok=True)
            tempfile.TemporaryFile(dir=run / name).close()
    for name in ("log.jsonl", "results.json", "report.html"):
        path = run / name
        with writing(path):
            if path.exists():
                open(path, "ab").close()
    refuse_foreign(run / "export")


def _allocate(path: Path, size: int) -> None:
    """Allocate a file of `size` bytes, which quotas and size limits may refuse although `df` shows free space."""
    with open(path, "wb") as stream:
        if size and hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(stream.fileno(), 0, size)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENODEV):  # the disk cannot allocate
                    raise
