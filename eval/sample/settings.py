"""Settings of `latent-ae eval sample`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from latent_ae.config import Problem
from latent_ae.latents.settings import EncodeSettings
from latent_ae_eval.generation.settings import DIFFUSION_PRESETS, DiffusionSettings

FITTED = ("gaussian", "flow", "codes")
"""Priors that are fitted to the latents of DATA."""
PRIORS = ("normal", *FITTED)
CODE_PRIOR = "code-prior"
"""Folder of a transformer over codes in that of --out."""
OF_FLOWS = ("patch_size", "sampling_steps")
"""Settings that a transformer over codes does not use."""


class SampleSettings(DiffusionSettings):
    """The prior, how a flow is fitted, and how samples are measured; docs/jobs.md says more."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "cpu": DIFFUSION_PRESETS["cpu"]
        | {"width": 128, "depth": 4, "patch_size": None, "steps": 1500, "samples": 1000, "validation_images": 500},
        "gpu": DIFFUSION_PRESETS["gpu"] | {"patch_size": None},
    }
    prior: str = "normal"
    """`normal`: N(0, I), or the model's own prior; `gaussian`, `flow` and, for latents that are codes, `codes` are
    fitted to the latents of DATA; or a folder that `prior=flow` or `prior=codes` wrote."""
    label_column: str | None = None
    """Must be null, because a prior has no classes."""

    def encoding(self, part: Literal["train", "held_out"]) -> EncodeSettings:
        settings = super().encoding(part)
        # for some latents of a VQModel the nearest code would be another one after rounding
        return settings.model_copy(update={"stored": "fp32"}) if self.prior == "codes" else settings

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.prior not in PRIORS and not Path(self.prior).expanduser().is_dir():
            yield Problem("prior", f"neither one of {', '.join(PRIORS)} nor a folder: {self.prior} (from {Path.cwd()})")
        over_codes = self.prior == "codes" or (Path(self.prior).expanduser() / CODE_PRIOR).is_dir()
        for key in OF_FLOWS:
            if over_codes and getattr(self, key) != "preset":
                yield Problem(key, "is for flows, and a prior over codes draws one code after another: leave it out")
        if self.label_column is not None:
            yield Problem("label_column", "a prior has no classes; leave it null, or use eval diffusion")
