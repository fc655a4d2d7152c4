"""A larger first stage that a smaller one learns from, as TAESD does from Stable Diffusion's (docs/family.md)."""

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from latent_ae.config import UserError
from latent_ae.models.build import factor_of, latent_channels_of
from latent_ae.models.loading import load_first_stage
from latent_ae.models.posterior import Drawn, draw
from latent_ae.models.reconstruct import keep_posterior_precise_
from latent_ae.models.registry import family_of

from .settings import TrainSettings


class Teacher(nn.Module):
    """A frozen first stage, with its latents as a diffusion model is fed them.

    They are (z - shift_factor) * scaling_factor, or (z - latents_mean) * scaling_factor / latents_std where its config
    has these; the student's own latents become the same, so its scaling_factor is 1.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, settings: TrainSettings, student: ModelMixin):
        """Of distillation.teacher. Raises UserError where there is no first stage, or `student` cannot be its."""
        super().__init__()
        location = str(settings.distillation.teacher)
        try:
            stage = load_first_stage(location)
        except UserError as error:
            raise UserError(f"distillation.teacher: {error}") from error
        assert stage.module is not None
        side, config = settings.data.resolution, stage.module.config
        kinds = f"{location} ({stage.name})", f"this {type(student).__name__}"
        latent = family_of(student).latent
        if latent == "codebook":
            raise UserError(
                f"distillation.teacher: the latents of {kinds[1]} are codes, the teacher's are not: use another class"
            )
        if latent in ("flow", "hierarchy"):
            raise UserError(
                f"distillation.teacher: the posterior of {kinds[1]} has no mean that could be drawn to the teacher's: "
                "use another class"
            )
        if latent == "posterior" and settings.distillation.decode == "teacher":
            raise UserError(
                f"distillation.decode: teacher leaves the posterior's width of {kinds[1]} to chance: use own"
            )
        if stage.channels != student.config.in_channels:
            raise UserError(
                f"distillation.teacher: {kinds[0]} sees {stage.channels} channels, {kinds[1]} "
                f"{student.config.in_channels}: they must see the same images"
            )
        grids = (
            (stage.latent_channels, *2 * [side / stage.factor]),
            (latent_channels_of(student), *2 * [side / factor_of(student)]),
        )
        if grids[0] != grids[1]:
            theirs, ours = (" x ".join(f"{size:g}" for size in grid) for grid in grids)
            raise UserError(
                f"distillation.teacher: {kinds[0]} has latents of {theirs} for {side} px, {kinds[1]} of {ours}: give "
                "model.config as many levels and latent_channels"
            )
        self.sha256 = stage.sha256
        self.module = stage.module.requires_grad_(False).to(memory_format=torch.channels_last)
        keep_posterior_precise_(self.module)
        per_channel = config.get("latents_mean") is not None and config.get("latents_std") is not None
        shift = config.get("latents_mean") if per_channel else [config.get("shift_factor") or 0.0]
        std = config.get("latents_std") if per_channel else [1.0]
        self.register_buffer("shift", torch.tensor(shift, dtype=torch.float32).view(-1, 1, 1))
        scale = (config.get("scaling_factor") or 1.0) / torch.tensor(std, dtype=torch.float32)
        self.register_buffer("scale", scale.view(-1, 1, 1))

    @torch.no_grad()
    def forward(self, images: Tensor, noise: Tensor) -> Drawn:
        """The mean of its posterior (the mode, where that is no Gaussian) and a sample with `noise`, scaled; float32.

        Of NCHW images in [-1, 1].
        """
        drawn = draw(self.module, images, noise)
        # where the posterior is no Gaussian, the mode stands for its mean, and not one sample
        mode = draw(self.module, images, None).mean if drawn.rates and drawn.logvar is None else drawn.mean
        mean, latent = ((z - self.shift) * self.scale for z in (mode, drawn.latent))
        return drawn._replace(mean=mean, latent=latent)

    def refuse_another(self, sha256: str | None) -> None:
        """Raises UserError when the weights are not those with that sum."""
        if self.sha256 != sha256:
            raise UserError(
                f"distillation.teacher: the run learned from weights with sha256 {sha256}, this teacher's have "
                f"{self.sha256}: restore the former, or choose another output_dir"
            )


def take_its_scale(student: ModelMixin) -> None:
    """Its raw latents become those that a diffusion model knows, so its config scales by 1."""
    unit = {"scaling_factor": 1.0, "shift_factor": 0.0, "latents_mean": None, "latents_std": None}
    student.register_to_config(**{key: value for key, value in unit.items() if key in student.config})
