"""Trains a decoder by flow matching, or distils one that is trained so into one that takes a single step."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from latent_ae.arithmetic import lay_out
from latent_ae.config import SWITCH, NonNegative, Problem, Settings, UserError, Weight
from latent_ae.data.rng import path_noise
from latent_ae.models.settings import ModelFacts
from latent_ae.objectives.base import Batch, Objective, Pass, RunFacts

LEAST_REST = 0.05
"""Least 1 - t by which the loss divides (Li and He 2025, arXiv:2511.13720, algorithm 1)."""


class FlowMatchingSettings(Settings):
    """How the decoder of a FlowMatchingVAE learns."""

    weight: Weight = 1.0
    """Weight of the loss of the velocity, in units of the model's noise_scale."""
    time_mean: float = 0.0
    """Mean of the logit of the time t on the path from noise (0) to image (1), which is normal (Esser et al. 2024)."""
    time_std: Annotated[float, Field(gt=0)] = 1.0
    """Standard deviation of the logit of t."""
    teacher_steps: Annotated[NonNegative, SWITCH] = 0
    """Distils: the images to which the decoder of init_from carries noise in so many steps become the targets of all
    losses, and the decoder takes one step from the same noise; 0 trains by flow matching."""


class FlowMatching(Objective[FlowMatchingSettings]):
    """The squared error of the velocity; does nothing for other classes than FlowMatchingVAE.

    Args:
        own: The settings.
        run: Facts of the run.
        autoencoder: The FlowMatchingVAE that is trained; None for any other class.
        teacher_sha256: Digest of the weights from which the run begins, if they teach.
    """

    name, section, docs, plan_line = "flow_matching", "flow", "docs/family.md", "flow"
    charts = {"Flow matching": ("flow_matching", "distance_to_teacher")}

    teacher: Any

    def __init__(
        self,
        own: FlowMatchingSettings,
        run: RunFacts,
        autoencoder: Any = None,
        teacher_sha256: str | None = None,
    ) -> None:
        super().__init__(own, run)
        self.active, self.teacher_sha256 = autoencoder is not None, teacher_sha256
        self.hold(teacher=None)
        if autoencoder is None:
            return
        config = autoencoder.config
        self.factor, self.channels = 2 ** (len(config.block_out_channels) - 1), int(config.out_channels)
        self.noise_scale = float(config.noise_scale)
        if own.teacher_steps:
            from latent_ae.models.reconstruct import keep_posterior_precise_

            teacher = copy.deepcopy(autoencoder).eval().requires_grad_(False)
            keep_posterior_precise_(teacher)
            teacher.encoder = teacher.quant_conv = None  # it gets latents
            self.hold(teacher=lay_out(teacher, torch.channels_last))

    @classmethod
    def problems(cls, own: FlowMatchingSettings, run: RunFacts, model: ModelFacts | None) -> Iterator[Problem]:
        plain = FlowMatchingSettings()
        changed = [key for key in FlowMatchingSettings.model_fields if getattr(own, key) != getattr(plain, key)]
        if model is not None and changed and not model.flow_matching:
            yield Problem(f"flow.{changed[0]}", f"is for a FlowMatchingVAE, and not for {model.name}: leave it out")
        if not own.weight:
            yield Problem(
                "flow.weight", "0 leaves the decoder of a FlowMatchingVAE without what it learns from: raise it"
            )
        if own.teacher_steps == 1:
            yield Problem("flow.teacher_steps", "1 teaches what the decoder does already: give more, or 0")
        for key in ("time_mean", "time_std"):
            if own.teacher_steps and key in changed:
                yield Problem(f"flow.{key}", "is for flow matching, and flow.teacher_steps distils: leave it out")

    @classmethod
    def build(
        cls, own: FlowMatchingSettings, run: RunFacts, autoencoder: nn.Module, device: torch.device
    ) -> "FlowMatching":
        from latent_ae.models.registry import family_of

        if not family_of(autoencoder).flow_matching:
            return cls(own, run)
        digest = None
        if own.teacher_steps and device.type != "meta":
            from latent_ae.models.loading import first_stage

            digest = first_stage(autoencoder).sha256
            autoencoder.train()  # which it has put into evaluation mode
        return cls(own, run, autoencoder, digest).to(device)

    @classmethod
    def describe(cls, own: FlowMatchingSettings, run: RunFacts) -> str:
        if own.teacher_steps:
            return f"the decoder learns in one step what that of init_from does in {own.teacher_steps}"
        return f"the decoder learns to carry noise to an image, with weight {own.weight:g}"

    def draw(self, numbers: Sequence[int], latent_shape: Sequence[int]) -> tuple[Tensor, ...]:
        if not self.active:
            return ()
        shape = (self.channels, *(side * self.factor for side in latent_shape[1:]))
        return path_noise(self.run.seed, numbers, shape)

    def prepare(self, batch: Batch, step: int) -> Batch:
        if not self.active:
            return batch
        from latent_ae.models.flow_matching import Path

        normal, noise = batch.draws[self.name]
        height, width = batch.target.shape[-2:]
        times = torch.sigmoid(self.own.time_mean + self.own.time_std * normal)
        if self.own.teacher_steps:
            times = torch.zeros_like(times)
        return batch._replace(path=Path(batch.target, noise[..., :height, :width], times))

    def backward(self, p: Pass) -> None:
        path = p.batch.path
        if path is None:
            return
        if self.teacher is not None:
            p.batch = p.batch._replace(target=self.taught(p, path.noise))
        rest = (1.0 - path.times).clamp(min=LEAST_REST)[:, None, None, None]
        error = (p.image - p.batch.target) / (self.noise_scale * rest)
        loss = p.batch.area * error.square().mean()
        (gradient,) = torch.autograd.grad(loss, p.image)
        p.send_reconstruction(gradient, self.own.weight)
        p.logs["flow_matching" if self.teacher is None else "distance_to_teacher"] = loss.detach()

    @torch.no_grad()
    def taught(self, p: Pass, noise: Tensor) -> Tensor:
        """Return the teacher's images of the latents that were decoded, (N, C, H, W) float32.

        Args:
            p: The pass.
            noise: (N, C, H, W), from which they begin.
        """
        latents = p.out.to_decode
        for transform in p.batch.transforms:
            latents = transform(latents)
        with p.autocast():
            images: Tensor = self.teacher.carried(latents, noise, self.own.teacher_steps)
        return images

    def facts(self) -> dict[str, Any]:
        return {"flow_teacher_sha256": self.teacher_sha256} if self.teacher_sha256 else {}

    def refuse_another(self, facts: Mapping[str, Any]) -> None:
        before = facts.get("flow_teacher_sha256")
        if self.teacher_sha256 and before and self.teacher_sha256 != before:
            raise UserError(
                f"flow.teacher_steps: the run learned from weights with sha256 {before}, those of init_from have "
                f"{self.teacher_sha256} now: restore the former, or choose another output_dir"
            )
