"""Checkpoints: a folder is complete or does not exist, and its files are checked when they are read.

    checkpoints/step-00000300/
        autoencoder.safetensors    weights being trained
        ema.safetensors            their average, used by validation and export (only with ema.decay > 0)
        config.json                the autoencoder's diffusers config
        encoder/                   the first stage that encodes, as a diffusers folder (only with decoder.kind)
        discriminator.safetensors  an objective's adversary, under its name (only with such an objective)
        heads.safetensors          networks on the latent, such as alignment's projection (only with such an objective)
        layerwise.safetensors      what learning rates by layer were made from (only with optim.layerwise)
        optimizer.pt               the optimizers' state
        objectives.safetensors     the state of objectives: adaptive and controlled weights, averages
        state.json                 step, samples seen, number of processes, versions, the run's settings, and a
                                   digest of the encoder (only where it stays that of init_from)
        manifest.json              size and SHA-256 of every other file; written last

Random states are not saved: order, crops and noise are functions of (seed, sample number).
"""

import json
import os
import shutil
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from latent_ae.config import UserError
from latent_ae.files import disk_trouble
from latent_ae.models.borrowed_encoder import borrow_, save_borrowed
from latent_ae.models.build import facts_of
from latent_ae.models.discriminator import save_network
from latent_ae.models.encoder_digest import encoder_sha256
from latent_ae.models.loading import borrowed_from
from latent_ae.models.registry import config_of, untrained
from latent_ae.models.run_checkpoint import (
    MANIFEST,
    PREFIX,
    files_in,
    finished_checkpoints,
    misfits,
    newest_whole,
    sha256_of,
)
from latent_ae.objectives.gan import GanSettings
from latent_ae.provenance import versions

from .run_config import CheckpointSettings
from .step import TrainStep

ENCODER = "encoder_sha256"
"""Key of state.json."""
PLACE = ("epoch", "file", "row", "block", "offset")
"""Keys of a stream's position."""


class Checkpoint(NamedTuple):
    """A complete checkpoint on disk."""

    folder: Path
    step: int
    """Number of updates made, which is also the number of the next step."""

    def state(self) -> dict[str, Any]:
        """Return the content of state.json. Raises UserError if the file does not belong to this checkpoint."""
        state = read_state(self.folder)
        if state["step"] != self.step:
            raise UserError(f"{self.folder} holds step {state['step']}: the folder has the name of another checkpoint")
        return state


def read_state(folder: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's state.json. Raises UserError if the file is missing or is something else."""
    path = folder / "state.json"
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kinds = {"step": int, "num_processes": int, "settings": dict, "versions": dict, "stream_states": list}
        for key, kind in kinds.items():
            if not isinstance(state[key], kind):
                raise TypeError(f"{key} is {state[key]!r}")
        if state["num_processes"] < 1 or not state["stream_states"]:
            raise ValueError("it names no process")
        for stream in state["stream_states"]:
            for worker in stream["workers"] if stream is not None else ():
                if worker is not None and not all(type(worker[key]) is int and worker[key] >= 0 for key in PLACE):
                    raise ValueError(f"a stream's position is {worker}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not a checkpoint's: {' '.join(str(error).split())[:300]}") from error
    return state


def save_checkpoint(run: Path, train_step: TrainStep, state: Mapping[str, Any]) -> Checkpoint:
    """Write checkpoints/step-XXXXXXXX. One process calls this.

    The files are written under a temporary name that `complete_checkpoints` ignores; they are flushed to the disk and
    listed in the manifest before the folder gets its name.

    Args:
        run: The run folder.
        train_step: Networks, objectives and optimizers.
        state: Content of state.json, with the key "step"; versions are added.

    Returns:
        The checkpoint.

    Raises:
        UserError: If a weight is not finite or the files cannot be written; then there is no new checkpoint.
    """
    refuse_bad_numbers(train_step, state["step"])
    folder = checkpoint_folder(run, state["step"])
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
    try:
        temporary.mkdir(parents=True)
        train_step.bare_reconstructor.autoencoder.save_config(temporary)
        save_borrowed(train_step.bare_reconstructor.autoencoder, temporary)
        for name, module in modules_of(train_step).items():
            save_network(module, temporary / f"{name}.safetensors")
        content = {**state, **fixed_encoder(train_step), "versions": versions()}
        with open(temporary / "optimizer.pt", "wb") as stream:  # given a path, torch.save would hide why it failed
            torch.save({n: one.state_dict() for n, one in train_step.optimizers.by_name.items()}, stream)
        (temporary / "state.json").write_text(json.dumps(content, indent=2))
        _seal(temporary)
        os.replace(temporary, folder)
        for parent in (folder.parent, run):  # a folder's name is on the disk once its parent is flushed
            _sync(parent)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save says RuntimeError on a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        if (reason := disk_trouble(error)) is None:
            raise
        raise UserError(
            f"cannot write the checkpoint {folder}: {reason}. "
            "Earlier checkpoints are whole; free space or change output_dir, then run the same command again"
        ) from error
    return Checkpoint(folder, state["step"])


def prune_checkpoints(run: Path, kept: Container[int]) -> None:
    """Remove checkpoints whose steps are not in `kept`, and leftovers of a killed process. One process calls this."""
    for pattern in (f"{PREFIX}*.tmp", f"{PREFIX}*.old"):
        for leftover in (run / "checkpoints").glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)
    for old in complete_checkpoints(run):
        if old.step not in kept:
            # renamed first, so that a half-removed folder is not taken for a checkpoint
            doomed = old.folder.with_name(f"{old.folder.name}.old")
            try:
                old.folder.rename(doomed)
            except OSError:
                continue
            shutil.rmtree(doomed, ignore_errors=True)


def refuse_bad_numbers(train_step: TrainStep, step: int) -> None:
    """Raise UserError if a weight, or a buffer of the autoencoder, is not finite, so that no such checkpoint replaces a
    good one."""
    tensors = [named for network in train_step.networks for named in network.named_parameters()]
    for name, tensor in (*tensors, *train_step.bare_reconstructor.named_buffers()):
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"after step {step:,} the weight {name} is not finite: training has diverged. "
                "Lower optim.lr, gan.weight or gan.adaptive_cap, or set optim.clip"
            )


def load_checkpoint(checkpoint: Checkpoint, train_step: TrainStep) -> None:
    """Restore weights, averages and optimizers in place. Every process calls this.

    Raises:
        UserError: If the files do not fit the settings or cannot be read.
    """
    try:
        _restore(checkpoint, train_step)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # each reader raises its own kinds of errors for foreign content
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(
            f"checkpoint {checkpoint.folder} cannot be read ({reason}): remove it to resume from an earlier one"
        ) from error


def _restore(checkpoint: Checkpoint, train_step: TrainStep) -> None:
    folder, modules = checkpoint.folder, modules_of(train_step)
    present = {path.name.removesuffix(".safetensors") for path in folder.glob("[!.]*.safetensors")}
    # the setting cannot change in a run, so such a file is missing only where an older version wrote
    if "step_state" in present or ("layerwise" in modules and "layerwise" not in present):
        raise UserError(
            f"{folder} was written by an older version, whose checkpoints this one cannot resume: finish the run "
            "with that version, or start a new one from its weights with init_from"
        )
    saved, own = read_state(folder).get(ENCODER), fixed_encoder(train_step).get(ENCODER)
    if saved is not None and own is not None and saved != own:
        raise UserError(
            f"init_from: its encoder or its scaling is not the one with which {folder} was trained: restore it, or "
            "choose another output_dir"
        )
    for name in sorted(modules.keys() ^ present):
        raise UserError(
            f"{folder} was written {'with' if name in present else 'without'} {name}, the settings say otherwise: "
            "restore the settings, and the objectives passed to train(), or choose another output_dir"
        )
    for name, module in modules.items():
        path = folder / f"{name}.safetensors"
        _load(module, load_file(path), path)
    if train_step.optimizers.layerwise is not None:  # which another processor may have measured otherwise
        train_step.optimizers.autoencoder = train_step.optimizers.new_adamw()
    optimizers = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    for name, optimizer in train_step.optimizers.by_name.items():
        keys = optimizer.defaults.keys() & {"betas", "eps", "weight_decay"}
        settings = [{key: group[key] for key in keys} for group in optimizer.param_groups]
        optimizer.load_state_dict(optimizers[name])
        _lay_out_as_parameters(optimizer)
        for group, now in zip(optimizer.param_groups, settings, strict=True):
            group.update(now)  # the settings may have changed, and torch restores the old values


def _lay_out_as_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Put moments into the memory formats of their parameters.

    A checkpoint brings those of the machine that wrote it, and the fused kernels take elements in the order of memory:
    moments in another format would silently belong to other elements.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def fixed_encoder(train_step: TrainStep) -> dict[str, str]:
    """Return the digest of init_from's encoder and scaling as state.json has it; nothing if the encoder learns."""
    autoencoder, settings = train_step.bare_reconstructor.autoencoder, train_step.settings
    if settings.init_from is None or settings.facts(facts_of(autoencoder)).train != "decoder":
        return {}
    return {ENCODER: encoder_sha256(autoencoder)}


def newest_checkpoint(run: Path) -> Checkpoint | None:
    """Return the run's newest checkpoint that matches its manifest, or None. Raises UserError like `newest_whole`."""
    folder = newest_whole(run)
    return Checkpoint(folder, int(folder.name.removeprefix(PREFIX))) if folder is not None else None


def set_damaged_aside(run: Path, newest: int) -> None:
    """Rename the checkpoints past step `newest`, from which a run resumes, to step-XXXXXXXX.damaged.

    They do not match their manifests and must not be counted, pruned or loaded later.
    """
    for later in complete_checkpoints(run):
        if later.step > newest:
            aside = later.folder.with_name(f"{later.folder.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)  # left by an earlier resume
            later.folder.rename(aside)


def complete_checkpoints(run: Path) -> list[Checkpoint]:
    """Return the finished checkpoints of a run, oldest first. Their content is not checked."""
    return [Checkpoint(folder, step) for step, folder in finished_checkpoints(run).items()]


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return run / "checkpoints" / f"{PREFIX}{step:08d}"


def load_weights(folder: Path) -> ModelMixin:
    """Return the autoencoder of a whole checkpoint, float32 on the CPU: the averaged weights if there are any.

    Raises:
        UserError: If it cannot be read.
    """
    averaged = folder / "ema.safetensors"
    try:
        autoencoder = untrained(config_of(folder))
        autoencoder.load_state_dict(load_file(averaged if averaged.is_file() else folder / "autoencoder.safetensors"))
        borrow_(autoencoder, lambda: borrowed_from(folder))
    except Exception as error:  # each reader raises its own kinds of errors for foreign content
        raise UserError(f"checkpoint {folder} cannot be read: {' '.join(str(error).split())[:300]}") from error
    return autoencoder.eval()


def modules_of(train_step: TrainStep) -> dict[str, nn.Module]:
    """Return the modules that a checkpoint holds by the names of their files; modules without tensors are left out."""
    reconstructor = train_step.bare_reconstructor
    adversaries = {
        train_step.objectives[name].network_name: network for name, network in train_step.bare_adversaries.items()
    }
    ema = {"ema": train_step.ema.module} if train_step.ema is not None else {}
    own = {"heads": reconstructor.heads, "objectives": train_step.state}
    if (layerwise := train_step.optimizers.layerwise) is not None:
        own["layerwise"] = layerwise
    return {"autoencoder": reconstructor.autoencoder, **ema, **adversaries} | {
        name: module for name, module in own.items() if module.state_dict()
    }


def _load(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy tensors into the module's own, so that their memory format and the optimizers' references stay."""
    if differing := misfits(module, tensors):
        raise UserError(
            f"{path} does not fit the model of these settings (first difference: {differing[0]}): "
            "restore the model settings, and the objectives passed to train(), or choose another output_dir"
        )
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            tensor.copy_(tensors[name])


def _seal(folder: Path) -> None:
    """Flush every file, then write the manifest."""
    files = {}
    for name in files_in(folder):
        path = folder / name
        _sync(path)
        files[name.as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=2))
    _sync(folder / MANIFEST)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def kept_steps(
    steps: Iterable[int], settings: CheckpointSettings, gan: GanSettings, distances: Mapping[int, float]
) -> set[int]:
    """Return which checkpoints are kept.

    They are the newest `keep`, the first one from each multiple of `keep_every` on, the best, and the last one before
    the adversarial term (from which to restart if adversarial training fails).

    Args:
        steps: Steps of all checkpoints.
        settings: The numbers to keep.
        gan: When the adversarial term begins.
        distances: Held-out LPIPS of the validated steps; the lowest is the best.
    """
    ordered = sorted(steps)
    kept = set(ordered[-settings.keep :])
    if settings.keep_every:
        firsts: dict[int, int] = {}
        for step in ordered:  # one that was due at a step that changed nothing is a little later
            firsts.setdefault(step // settings.keep_every, step)
        kept |= {step for multiple, step in firsts.items() if multiple}
    if validated := [step for step in ordered if step in distances]:
        kept.add(min(validated, key=lambda step: (distances[step], -step)))
    if before := before_gan(ordered, gan):
        kept.add(before)
    return kept


def before_gan(steps: Iterable[int], gan: GanSettings) -> int | None:
    """Return the last of `steps` before the adversarial term trains the autoencoder; None if there is none."""
    if not gan.weight:
        return None
    return max((step for step in steps if step <= gan.start + gan.discriminator_warmup), default=None)
