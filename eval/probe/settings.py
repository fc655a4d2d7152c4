"""Settings of `latent-ae eval probe`."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from latent_ae.config import Positive, Problem
from latent_ae.data.settings import DataSettings
from latent_ae_eval.settings import JobSettings


class ProbeSettings(JobSettings):
    """How well simple classifiers read classes from latents, with few labels."""

    label_column: str = "auto"
    """Column of the classes; auto takes a table's column `label` or `cls`, or the names of the folders of image
    files."""
    train_split: str = "train"
    """Split from which labels are drawn; `split` is tested on."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Fraction of the data that is tested on if there is no validation or test split."""
    labels_per_class: Annotated[tuple[Annotated[int, Field(ge=2)], ...], Field(min_length=1)] = (10, 50, 100)
    """Numbers of labels per class with which classifiers are fitted, one after another."""
    draws: Annotated[int, Field(ge=2)] = 5
    """Number of random choices of those labels."""
    scale: Literal["global", "feature"] = "global"
    """Divide all features by one number, or each feature by its own standard deviation."""
    l2: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    """Weights of the squared norm in logistic regression that are tried."""
    neighbours: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 5, 20)
    """Numbers of neighbours that are tried."""

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if len(set(self.labels_per_class)) < len(self.labels_per_class):
            yield Problem("labels_per_class", "has the same value twice; give each once")

    def data(self, source: str) -> DataSettings:
        """Return the training section `data` that opens both parts of `source`."""
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
