"""Settings that several evaluations share."""

from collections.abc import Iterator, Sequence
from typing import Literal

from latent_ae.config import NonNegative, Positive, Problem, Settings
from latent_ae.data.settings import DataSettings
from latent_ae.inference import StageSettings

Net = Literal["vgg", "alex"]
"""Networks of LPIPS."""


class FeatureSettings(Settings):
    """Settings of evaluations that compare features of images, which their setting `frechet` names."""

    dinov2_model: str | None = None
    """Folder of a DINOv2 that transformers loads (config.json, model.safetensors, preprocessor_config.json), for
    `dinov2` in `frechet`; only that of a ViT-L/14 gives FD-DINOv2."""
    clip_model: str | None = None
    """Folder of a CLIP that transformers loads, for `clip` in `frechet`; only that of a ViT-L/14 at 336 px gives
    CMMD."""

    def problems_of_features(self, frechet: Sequence[str]) -> Iterator[Problem]:
        """Yield problems of features that are named without a folder, or of folders that are not used.

        Args:
            frechet: The features that are compared.
        """
        for kind in ("dinov2", "clip"):
            key, folder = f"{kind}_model", getattr(self, f"{kind}_model")
            if kind not in frechet and folder is not None:
                yield Problem(key, f"is used by frechet, which does not name {kind}: add it there")
            elif kind in frechet and folder is None:
                yield Problem(key, f"frechet names {kind}, which needs a folder with its network (docs/weights.md)")
            elif kind in frechet:
                from latent_ae.pretrained.frozen import folder_problems  # here: it imports torch, which takes long

                yield from folder_problems(key, folder)


class QuestionSettings(StageSettings):
    """Settings of all evaluations on held-out images."""

    split: str | None = None
    """Split of the data; null takes its validation or test split, or all images if it has neither."""
    limit: Positive | None = None
    """Largest number of images, spread over all of them by `seed`; of a stream the first ones."""
    seed: NonNegative = 0
    """Seed of everything random: samples of the posterior, choices of images."""

    def data(self, source: str) -> DataSettings:
        """Return the training section `data` that opens `source` as held-out images."""
        return self._data(eval_source=source, eval_split=self.split)


class EvalSettings(QuestionSettings):
    """Settings of evaluations whose images may come as a stream."""

    streaming: bool = False
    """Read a hub dataset or tables from start to end, without storing them first."""

    def data(self, source: str) -> DataSettings:
        return super().data(source).model_copy(update={"streaming": self.streaming})


class JobSettings(QuestionSettings):
    """Settings of evaluations with resized and cropped images."""

    resize_px: Positive | None = None
    """Shorter side to which images are resized, px; null keeps their size."""
    crop_px: Positive | None = None
    """Side of the centre crop, px; null keeps the largest sides that are multiples of the model's factor."""

    def problems(self) -> Iterator[Problem]:
        if self.resize_px is not None and self.crop_px is not None and self.resize_px < self.crop_px:
            yield Problem("resize_px", f"{self.resize_px} is smaller than crop_px {self.crop_px}; change one")
