"""Checkpoints: a folder is complete or it does not exist, and what was written is what is read.

    checkpoints/step-00000300/
        autoencoder.safetensors    weights being trained
        ema.safetensors            their average, what validation and export use (only with ema.decay > 0)
        config.json                the autoencoder's diffusers config
        discriminator.safetensors  an objective's adversary, by its name (only with such an objective)
        heads.safetensors          networks on the latent, as alignment's projection (only with such an objective)
        optimizer.pt               the optimizers' state
        objectives.safetensors     what objectives remember: adaptive and controlled weights, averages
        state.json                 step, samples seen, number of processes, versions, the run's settings
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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latent_ae.config import UserError
from latent_ae.files import disk_trouble
from latent_ae.models.registry import config_of, untrained
from latent_ae.models.run_checkpoint import MANIFEST, PREFIX, finished_checkpoints, misfits, newest_whole, sha256_of
from latent_ae.objectives.gan import GanSettings
from latent_ae.provenance import versions

from .run_config import CheckpointSettings
from .step import TrainStep

PLACE = ("epoch", "file", "row", "block", "offset")
"""Where a stream stood."""


class Checkpoint(NamedTuple):
    """A complete checkpoint on disk."""

    folder: Path
    step: int
    """Updates made: training goes on with this step number."""

    def state(self) -> dict[str, Any]:
        """What state.json holds. Raises UserError for a file that is not this checkpoint's."""
        state = read_state(self.folder)
        if state["step"] != self.step:
            raise UserError(f"{self.folder} is of step {state['step']}: the folder has another one's name")
        return state


def read_state(folder: Path) -> dict[str, Any]:
    """What the state.json of a checkpoint holds. Raises UserError for a file that is not a checkpoint's."""
    path = folder / "state.json"
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kinds = {"step": int, "num_processes": int, "settings": dict, "versions": dict, "stream_states": list}
        for key, kind in kinds.items():
            if not isinstance(state[key], kind):
                raise TypeError(f"{key} is {state[key]!r}")
        if state["num_processes"] < 1 or not state["stream_states"]:
            raise ValueError("it tells of no process")
        for stream in state["stream_states"]:
            for worker in stream["workers"] if stream is not None else ():
                if worker is not None and not all(type(worker[key]) is int and worker[key] >= 0 for key in PLACE):
                    raise ValueError(f"a stream stood at {worker}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not a checkpoint's: {' '.join(str(error).split())[:300]}") from error
    return state


def save_checkpoint(run: Path, train_step: TrainStep, state: Mapping[str, Any]) -> Checkpoint:
    """Writes checkpoints/step-XXXXXXXX. One process calls this.

    `state` needs "step". Raises UserError, and writes nothing, when a weight is not finite.
    The files appear under a temporary name that `complete_checkpoints` does not take for a
    checkpoint; they are on the disk, listed in the manifest, before the folder gets its name.
    """
    refuse_bad_numbers(train_step, state["step"])
    folder = checkpoint_folder(run, state["step"])
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    try:
        temporary.mkdir(parents=True)
        train_step.bare_reconstructor.autoencoder.save_config(temporary)
        for name, module in modules_of(train_step).items():
            _save(module, temporary / f"{name}.safetensors")
        with open(temporary / "optimizer.pt", "wb") as stream:  # of a file of its own it would not say what failed
            torch.save({n: one.state_dict() for n, one in train_step.optimizers.by_name.items()}, stream)
        (temporary / "state.json").write_text(json.dumps({**state, "versions": versions()}, indent=2))
        _seal(temporary)
        os.replace(temporary, folder)
        for parent in (folder.parent, run):  # a name is on the disk when its folder is
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
    """Removes the checkpoints whose steps are not `kept`, and what a killed process left. One process calls this."""
    for pattern in (f"{PREFIX}*.tmp", f"{PREFIX}*.old"):
        for leftover in (run / "checkpoints").glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)
    for old in complete_checkpoints(run):
        if old.step not in kept:
            # out of sight first: a folder that is half removed must not be taken for a checkpoint
            doomed = old.folder.with_name(f"{old.folder.name}.old")
            try:
                old.folder.rename(doomed)
            except OSError:
                continue
            shutil.rmtree(doomed, ignore_errors=True)


def refuse_bad_numbers(train_step: TrainStep, step: int) -> None:
    """Raises UserError when a weight is not finite, so that no such checkpoint replaces a good one."""
    for network in train_step.networks:
        for name, parameter in network.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise UserError(
                    f"after step {step:,} the weight {name} is not finite: training has diverged. "
                    "Lower optim.lr, gan.weight or gan.adaptive_cap, or set optim.clip"
                )


def load_checkpoint(checkpoint: Checkpoint, train_step: TrainStep) -> None:
    """Restores weights, averages and optimizers in place. Every process calls this.

    Raises UserError for files that match their manifest and yet are not those of a checkpoint.
    """
    try:
        _restore(checkpoint, train_step)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of foreign content every reader raises kinds of its own
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(
            f"checkpoint {checkpoint.folder} cannot be read ({reason}): remove it to go on from an earlier one"
        ) from error


def _restore(checkpoint: Checkpoint, train_step: TrainStep) -> None:
    folder, modules = checkpoint.folder, modules_of(train_step)
    there = {path.name.removesuffix(".safetensors") for path in folder.glob("[!.]*.safetensors")}
    if "step_state" in there:
        raise UserError(
            f"{folder} was written by an older version, whose checkpoints this one does not go on from: finish the run "
            "with that version, or start a new one from its weights with init_from"
        )
    for name in sorted(modules.keys() ^ there):
        raise UserError(
            f"{folder} was written {'with' if name in there else 'without'} {name}, the settings say otherwise: "
            "restore the settings, and the objectives that train() was given, or choose another output_dir"
        )
    for name, module in modules.items():
        path = folder / f"{name}.safetensors"
        _load(module, load_file(path), path)
    optimizers = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    for name, optimizer in train_step.optimizers.by_name.items():
        keys = optimizer.defaults.keys() & {"betas", "eps", "weight_decay"}
        settings = [{key: group[key] for key in keys} for group in optimizer.param_groups]
        optimizer.load_state_dict(optimizers[name])
        for group, now in zip(optimizer.param_groups, settings, strict=True):
            group.update(now)  # those of the settings may have been changed; torch brings the old ones back


def newest_checkpoint(run: Path) -> Checkpoint | None:
    """As `newest_whole`."""
    folder = newest_whole(run)
    return Checkpoint(folder, int(folder.name.removeprefix(PREFIX))) if folder is not None else None


def set_damaged_aside(run: Path, newest: int) -> None:
    """Renames the checkpoints past step `newest`, from which a run goes on, to step-XXXXXXXX.damaged.

    They did not match their manifests; what counts, prunes or loads checkpoints is not to meet them again.
    """
    for later in complete_checkpoints(run):
        if later.step > newest:
            aside = later.folder.with_name(f"{later.folder.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)  # of an earlier time
            later.folder.rename(aside)


def complete_checkpoints(run: Path) -> list[Checkpoint]:
    """Checkpoints that were finished, oldest first. Their content is not checked."""
    return [Checkpoint(folder, step) for step, folder in finished_checkpoints(run).items()]


def checkpoint_folder(run: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return run / "checkpoints" / f"{PREFIX}{step:08d}"


def load_weights(folder: Path) -> ModelMixin:
    """The autoencoder of a whole checkpoint, float32 on the CPU: the averaged weights where there are any."""
    averaged = folder / "ema.safetensors"
    try:
        autoencoder = untrained(config_of(folder))
        autoencoder.load_state_dict(load_file(averaged if averaged.is_file() else folder / "autoencoder.safetensors"))
    except Exception as error:  # of foreign content every reader raises kinds of its own
        raise UserError(f"checkpoint {folder} cannot be read: {' '.join(str(error).split())[:300]}") from error
    return autoencoder.eval()


def modules_of(train_step: TrainStep) -> dict[str, nn.Module]:
    """What a checkpoint holds, by the names of its files: only what has tensors."""
    reconstructor = train_step.bare_reconstructor
    adversaries = {
        train_step.objectives[name].network_name: network for name, network in train_step.bare_adversaries.items()
    }
    ema = {"ema": train_step.ema.module} if train_step.ema is not None else {}
    own = {"heads": reconstructor.heads, "objectives": train_step.state}
    return {"autoencoder": reconstructor.autoencoder, **ema, **adversaries} | {
        name: module for name, module in own.items() if module.state_dict()
    }


def _save(module: nn.Module, path: Path) -> None:
    save_file({name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()}, path)


def _load(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Copies into the module's own tensors, so that memory format and optimizer references stay."""
    if differing := misfits(module, tensors):
        raise UserError(
            f"{path} does not fit the model of these settings (first difference: {differing[0]}): "
            "restore the model settings, and the objectives that train() was given, or choose another output_dir"
        )
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            tensor.copy_(tensors[name])


def _seal(folder: Path) -> None:
    """Flushes every file, then writes the manifest."""
    files = {}
    for path in sorted(folder.iterdir()):
        _sync(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
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
    """Which of the checkpoints at `steps` stay: the newest `keep`, each multiple of `keep_every`, the best, and the
    last one before the adversarial term (the place to return to when it goes wrong).

    `distances`: held-out LPIPS by step, of the steps that were validated; the lowest is the best.
    """
    ordered = sorted(steps)
    kept = set(ordered[-settings.keep :])
    if settings.keep_every:
        kept |= {step for step in ordered if step % settings.keep_every == 0}
    if validated := [step for step in ordered if step in distances]:
        kept.add(min(validated, key=lambda step: (distances[step], -step)))
    if before := before_gan(ordered, gan):
        kept.add(before)
    return kept


def before_gan(steps: Iterable[int], gan: GanSettings) -> int | None:
    """The last of `steps` whose weights no discriminator has moved."""
    if not gan.weight:
        return None
    return max((step for step in steps if step <= gan.start + gan.discriminator_warmup), default=None)
