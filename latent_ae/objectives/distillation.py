"""Distils a larger first stage into a smaller one, as TAESD was from Stable Diffusion's (docs/family.md)."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from latent_ae.arithmetic import lay_out
from latent_ae.config import SWITCH, Problem, Settings, UserError
from latent_ae.models.settings import ModelFacts
from latent_ae.objectives.base import Batch, Objective, Pass, RunFacts

if TYPE_CHECKING:  # brings diffusers
    from latent_ae.models.loading import FirstStage


class DistillationSettings(Settings):
    """Trains the latents to match a larger first stage's, as TAESD's match Stable Diffusion's; see docs/family.md."""

    teacher: Annotated[str | None, SWITCH] = None
    """Folder, run or hub id of that first stage; null turns distillation off."""
    latents: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the mean squared error between the student's latents and the teacher's scaled ones."""
    decode: Literal["teacher", "own"] = "teacher"
    """Latents on which the decoder is trained: samples of the teacher's scaled latents, or the student's own."""


class Distillation(Objective[DistillationSettings]):
    """The mean squared error to the teacher's latents; the decoder is trained on the teacher's latents or its own.

    Args:
        own: The settings.
        run: Facts of the run.
        teacher: The frozen first stage.
    """

    name, section, docs = "distillation", "distillation", "docs/family.md"
    charts = {"Squared distance to the teacher's latents": ("distillation",)}

    teacher: "Teacher"

    def __init__(self, own: DistillationSettings, run: RunFacts, teacher: "Teacher") -> None:
        super().__init__(own, run)
        self.hold(teacher=teacher)

    @classmethod
    def enabled(cls, own: DistillationSettings) -> bool:
        return own.teacher is not None

    @classmethod
    def problems(cls, own: DistillationSettings, run: RunFacts, model: ModelFacts | None) -> Iterator[Problem]:
        if own.teacher is None:
            return
        if run.train == "encoder" and own.decode == "teacher":
            yield Problem("distillation.decode", "teacher moves the decoder, which train leaves fixed: use own")
        if run.train == "decoder" and own.decode == "own":
            yield Problem(
                "distillation.decode",
                "own, and train leaves the encoder fixed: nothing is left to the teacher: use teacher",
            )
        if model is None:
            return
        if model.latent in ("codebook", "code_levels", "categorical"):
            yield Problem(
                "distillation.teacher",
                f"the latents of {model.name} are codes, the teacher's are not: use another class",
            )
        if model.latent in ("flow", "hierarchy"):
            yield Problem(
                "distillation.teacher",
                f"the posterior of {model.name} has no mean that could be drawn to the teacher's: use another class",
            )
        if model.latent == "posterior" and own.decode == "teacher":
            yield Problem(
                "distillation.decode", f"teacher leaves the posterior's width of {model.name} to chance: use own"
            )

    @classmethod
    def build(
        cls, own: DistillationSettings, run: RunFacts, autoencoder: nn.Module, device: torch.device
    ) -> "Distillation":
        from latent_ae.models.loading import load_first_stage

        location = str(own.teacher)
        try:
            stage = load_first_stage(location)
        except UserError as error:
            raise UserError(f"distillation.teacher: {error}") from error
        refuse_misfit(location, stage, autoencoder, run.resolution)
        take_its_scale(autoencoder)
        return cls(own, run, Teacher(stage).to(device))

    @classmethod
    def describe(cls, own: DistillationSettings, run: RunFacts) -> str:
        return f"drawn to those of {own.teacher}"

    def prepare(self, batch: Batch, step: int) -> Batch:
        mean, latent = self.teacher(batch.images, batch.noise)
        batch = batch._replace(draws={**batch.draws, self.name: (mean,)})
        return batch._replace(decode=latent) if self.own.decode == "teacher" else batch

    def backward(self, p: Pass) -> None:
        if not p.out.mean.requires_grad:
            return
        (mean,) = p.batch.draws[self.name]
        loss = F.mse_loss(p.out.mean, mean)
        p.logs["distillation"] = loss.detach()
        p.send_loss(loss, self.own.latents)

    def facts(self) -> dict[str, Any]:
        return {"teacher_sha256": self.teacher.sha256}

    def refuse_another(self, facts: Mapping[str, Any]) -> None:
        before = facts.get("teacher_sha256")
        if self.teacher.sha256 != before:
            raise UserError(
                f"distillation.teacher: the run learned from weights with sha256 {before}, this teacher's have "
                f"{self.teacher.sha256}: restore the former, or choose another output_dir"
            )


class Teacher(nn.Module):
    """A frozen first stage that returns the scaled latents which a diffusion model takes.

    They are (z - shift_factor) * scaling_factor, or (z - latents_mean) * scaling_factor / latents_std if its config has
    these keys. The student's raw latents are trained to match them, so the student's scaling_factor is 1.

    Args:
        stage: The first stage, a supported class of diffusers.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, stage: "FirstStage") -> None:
        from latent_ae.models.reconstruct import keep_posterior_precise_
        from latent_ae.models.registry import scaling_of

        super().__init__()
        assert stage.module is not None
        self.sha256, scaling = stage.sha256, scaling_of(stage.module)
        self.module = lay_out(stage.module.requires_grad_(False), torch.channels_last)
        keep_posterior_precise_(self.module)
        shift = torch.tensor(scaling.mean or [scaling.shift], dtype=torch.float32)
        self.register_buffer("shift", shift.view(-1, 1, 1))
        scale = scaling.factor / torch.tensor(scaling.std or [1.0], dtype=torch.float32)
        self.register_buffer("scale", scale.view(-1, 1, 1))

    @torch.no_grad()
    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the teacher's scaled latents of images.

        Args:
            images: (N, C, H, W) float in [-1, 1].
            noise: (N, c, h, w) standard normal noise.

        Returns:
            The mean of the posterior (its mode, if it is no Gaussian) and a sample of it, (N, c, h, w) float32 each.
        """
        from latent_ae.models.posterior import draw

        drawn = draw(self.module, images, noise)
        # where the posterior is no Gaussian, the mode stands for its mean, and not one sample
        mode = draw(self.module, images, None).mean if drawn.rates and drawn.logvar is None else drawn.mean
        return (mode - self.shift) * self.scale, (drawn.latent - self.shift) * self.scale


def refuse_misfit(location: str, stage: "FirstStage", student: nn.Module, side_px: int) -> None:
    """Raise UserError if images or latents of teacher and student differ in shape.

    Args:
        location: Where the teacher was loaded from, for the message.
        stage: The teacher.
        student: The autoencoder that is trained.
        side_px: Side of the training crops, px.
    """
    from latent_ae.models.build import channels_of, factor_of, latent_channels_of

    kinds = f"{location} ({stage.name})", f"this {type(student).__name__}"
    if stage.channels != channels_of(student):
        raise UserError(
            f"distillation.teacher: {kinds[0]} sees {stage.channels} channels, {kinds[1]} "
            f"{channels_of(student)}: they must see the same images"
        )
    grids = (
        (stage.latent_channels, *2 * [side_px / stage.factor]),
        (latent_channels_of(student), *2 * [side_px / factor_of(student)]),
    )
    if grids[0] != grids[1]:
        theirs, ours = (" x ".join(f"{size:g}" for size in grid) for grid in grids)
        raise UserError(
            f"distillation.teacher: {kinds[0]} has latents of {theirs} for {side_px} px, {kinds[1]} of {ours}: give "
            "model.config as many levels and latent_channels"
        )


def take_its_scale(student: Any) -> None:
    """Set the scaling in the student's config to 1: its raw latents match the teacher's scaled ones."""
    unit = {"scaling_factor": 1.0, "shift_factor": 0.0, "latents_mean": None, "latents_std": None}
    student.register_to_config(**{key: value for key, value in unit.items() if key in student.config})
