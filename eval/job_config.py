"""Settings of the jobs that a first stage is asked to do: interpolate, probe, factors, anomaly, likelihood."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from latent_ae.config import NonNegative, Positive, Problem
from latent_ae.data_settings import DataSettings

from .config import QuestionSettings


class JobSettings(QuestionSettings):
    """What all of them read: images, the model, and where they meet."""

    resize_px: Positive | None = None
    """Shorter side that images are resized to; null keeps their size."""
    crop_px: Positive | None = None
    """Side of the square cut from the middle; null keeps the largest sides that the model's factor divides."""

    def problems(self) -> Iterator[Problem]:
        if self.resize_px is not None and self.crop_px is not None and self.resize_px < self.crop_px:
            yield Problem("resize_px", f"{self.resize_px} is smaller than crop_px {self.crop_px}; change one")


class InterpolateSettings(JobSettings):
    """Paths between images in latent space."""

    images: Annotated[tuple[NonNegative | str, ...], Field(min_length=2)] | None = None
    """Numbers (over all of the data, from 0) or file names of the images that the path visits; null takes `num_images`,
    spread over all."""
    num_images: Annotated[int, Field(ge=2)] = 4
    """That the path visits where `images` names none."""
    steps: Annotated[int, Field(ge=3)] = 9
    """Points of each path in the picture and in the measures, both ends counted; an odd number has a middle."""
    centre: Literal["channels", "none"] = "channels"
    """What spherical interpolation turns around: each channel's mean over the images, or the origin."""
    lpips: Literal["vgg", "alex"] | None = "alex"
    """Network that the measures of a path's perceptual length use."""
    animation: Literal["webp", "gif"] | None = "webp"
    """Format of the animated path; null writes none."""
    frames: Positive = 16
    """Of the animation, from an image to the next."""

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.steps % 2 == 0:
            yield Problem("steps", f"{self.steps} is even, so no point lies in the middle; use {self.steps + 1}")
        if self.images is not None and len(set(self.images)) < len(self.images):
            yield Problem("images", "names one twice")
        if self.limit is not None:
            yield Problem("limit", "a path visits num_images images, or those that images names; set one of these")


class ProbeSettings(JobSettings):
    """What simple classifiers can read from latents, with few labels."""

    label_column: str = "auto"
    """Of the classes; auto takes a table's column `label`, or the names of the folders that image files lie in."""
    train_split: str = "train"
    """That labels are drawn from; `split` is tested on."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Tested on, where the data has no validation or test split."""
    labels_per_class: Annotated[tuple[Annotated[int, Field(ge=2)], ...], Field(min_length=1)] = (10, 50, 100)
    """So many labels the classifiers learn from, in turn."""
    draws: Annotated[int, Field(ge=2)] = 5
    """Random choices of those labels."""
    scale: Literal["global", "feature"] = "global"
    """Features are divided by one number, or each by its own standard deviation."""
    l2: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    """Tried weights of the squared norm in logistic regression."""
    neighbours: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 5, 20)
    """Tried numbers of neighbours."""

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if len(set(self.labels_per_class)) < len(self.labels_per_class):
            yield Problem("labels_per_class", "names one twice")

    def data(self, source: str) -> DataSettings:
        """What opens both parts of `source`."""
        common = super().data(source)
        return common.model_copy(
            update={
                "source": source,
                "eval_source": None,
                "split": self.train_split,
                "eval_fraction": self.test_fraction,
                "revision": self.data_revision,
            }
        )


class FactorsSettings(JobSettings):
    """Which latent dimension stands for which known factor."""

    factors: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Columns of integers or classes; null takes all that the table has."""
    traversed: NonNegative | None = None
    """Number of the image whose latent's dimensions are moved in the picture, counted from 0 over those that `limit`
    chooses; null: the middle one."""
    steps: Annotated[int, Field(ge=3)] = 9
    """Points of each row of that picture."""

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.factors is not None and len(set(self.factors)) < len(self.factors):
            yield Problem("factors", "names one twice")


Score = Literal["pixel_mean", "pixel_max", "lpips_mean", "lpips_max", "negative_elbo"]


class AnomalySettings(JobSettings):
    """What a first stage fails to reconstruct, taken as a sign of what it has not seen."""

    normal: str | None = None
    """Normal images that the model was not trained on, as DATA; thresholds and the ELBO's scale are taken from them."""
    normal_split: str | None = None
    """Of those, as `split`."""
    false_positive_rate: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """That the thresholds keep on further normal images."""
    normal_class: str | int | None = None
    """Class of the normal images, by name or number: DATA is then judged by its labels, and of `normal` only this
    class is taken where it has labels."""
    label_column: str = "auto"
    """Of the classes; auto takes a table's column `label`, or the names of the folders that image files lie in."""
    defects: bool = False
    """Judge DATA, taken as normal, against copies with pasted defects."""
    lpips: Literal["vgg", "alex"] | None = "alex"
    """Network of the LPIPS scores; null leaves them out."""
    blur_px: Annotated[float, Field(gt=0)] | None = None
    """Standard deviation by which maps of squared error are smoothed; null: 1/64 of the shorter side, at least 1."""
    rank_by: Score | None = None
    """Score that chooses the pictures; null takes lpips_max, or pixel_max where LPIPS cannot be had."""
    num_pictures: NonNegative = 4
    """Of each group in the report."""
    maps: bool = False
    """Write the heat maps of every image as pictures, too."""

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.defects and self.normal_class is not None:
            yield Problem("defects", "judges pasted defects and normal_class labels; give one of them")
        if self.normal_split is not None and self.normal is None:
            yield Problem("normal_split", "there is no normal to split; give normal=DATA")


class LikelihoodSettings(JobSettings):
    """Bounds on the likelihood that a variational autoencoder gives to images."""

    likelihood: Literal["auto", "bernoulli", "gaussian", "logistic"] = "auto"
    """Of the pixels given the latent; auto: that of the training, and gaussian where the model does not say."""
    scale: Literal["auto", "fit"] | Annotated[float, Field(gt=0)] = "auto"
    """Standard deviation (gaussian) or scale (logistic), in [-1, 1] units; fit: the most likely one of a fifth of the
    images, which then do not count; auto: that of the training, and fit where the model does not say."""
    discretised: bool = True
    """gaussian: the probability of a pixel's level of 8 bits; false: the density, which training has as its loss."""
    samples: Positive = 64
    """Of each posterior; so many has the importance-weighted bound."""
    num_pictures: NonNegative = 4
    """Of the best and of the worst images in the report."""

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.likelihood == "bernoulli" and self.scale != "auto":
            yield Problem("scale", "bernoulli has none; leave it out, or take gaussian or logistic")
        if not self.discretised and self.likelihood in ("bernoulli", "logistic"):
            yield Problem("discretised", f"{self.likelihood} gives probabilities, never densities; leave it out")
