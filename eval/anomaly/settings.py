"""Settings of `latent-ae eval anomaly`."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from latent_ae.config import NonNegative, Problem
from latent_ae_eval.settings import JobSettings

Score = Literal[
    "pixel_mean", "pixel_max", "lpips_mean", "lpips_max", "negative_elbo", "density", "mixture", "neighbours"
]


class AnomalySettings(JobSettings):
    """Which images a first stage fails to reconstruct, as a sign that it was not trained on such images."""

    normal: str | None = None
    """Normal images that the model was not trained on, given like DATA, for thresholds and the ELBO's scale."""
    normal_split: str | None = None
    """Split of the normal images; `split` is that of DATA."""
    false_positive_rate: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Rate of false alarms on further normal images that the thresholds guarantee."""
    normal_class: str | int | None = None
    """Class of the normal images, by name or number: detection in DATA is then measured by its labels, and only this
    class of `normal` is used if it has labels."""
    label_column: str = "auto"
    """Column of the classes; auto takes a table's column `label` or `cls`, or the names of the folders of image
    files."""
    defects: bool = False
    """Take DATA as normal and measure the detection of copies with pasted defects."""
    lpips: Literal["vgg", "alex"] | None = "alex"
    """Network of the LPIPS scores; null leaves them out."""
    blur_px: Annotated[float, Field(gt=0)] | None = None
    """Standard deviation by which maps of squared error are smoothed, px; null takes 1/64 of the shorter side, at least
    1."""
    mixture: NonNegative = 0
    """Number of Gaussians of a density of latents and reconstruction errors, which is fitted to a part of `normal`; 0
    leaves this score out."""
    neighbours: NonNegative = 0
    """Number of patches of normal images to whose VGG16 features those of an image are compared, for instance 4000; 0
    leaves this score, which does not use the first stage, out."""
    rank_by: Score | None = None
    """Score that chooses the pictures; null takes lpips_max, or pixel_max if LPIPS is not available."""
    num_pictures: NonNegative = 4
    """Number of pictures of each group in the report."""
    maps: bool = False
    """Also write the heat maps of every image as pictures."""

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.defects and self.normal_class is not None:
            yield Problem("defects", "measures pasted defects, and normal_class labelled ones; give one of them")
        if self.normal_split is not None and self.normal is None:
            yield Problem("normal_split", "there is no normal to split; give normal=DATA")
        for key in ("mixture", "neighbours"):
            if getattr(self, key) and self.normal is None:
                yield Problem(key, "is fitted to normal images; give normal=DATA")
