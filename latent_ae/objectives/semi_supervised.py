"""Semi-supervised learning: a generative model of latents and labels, of which few are known (Kingma et al. 2014)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from latent_ae.config import FIXED, NonNegative, Positive, Problem, Settings, Weight
from latent_ae.data.rng import style_noise
from latent_ae.models.settings import ModelFacts
from latent_ae.objectives.balance import smooth_
from latent_ae.objectives.base import Objective, Pass, RunFacts

if TYPE_CHECKING:  # brings diffusers
    from latent_ae.models.label_model import LabelModel

SMOOTHING = 0.9
"""Part of the logged averages that a step keeps."""


class SemiSupervisedSettings(Settings):
    """A model of latents and labels that learns from few labels (M1 + M2)."""

    classes: Annotated[Annotated[int, Field(ge=2)] | None, FIXED] = None
    """Number of classes of the training images; null turns it off."""
    labels_per_class: Annotated[Positive | None, FIXED] = None
    """Labels of each class that training sees, chosen at random; the others are hidden. null shows all."""
    draw: Annotated[NonNegative, FIXED] = 0
    """Number of that random choice. `latent-ae eval probe` draws the same labels of the same training images."""
    label_column: Annotated[str, FIXED] = "auto"
    """Column of the classes; auto takes a table's column `label`, or the names of the folders of image files."""
    share: Annotated[float, Field(ge=0, lt=1), FIXED] = 0.25
    """Share of the samples that is drawn from the labelled images alone; 0 draws from all images evenly."""
    classification: Weight = 10.0
    """Weight of a labelled sample's cross-entropy, relative to its bound."""
    weight: Weight = 0.0
    """Weight of these losses in the encoder's training, normalised like `loss.kl`, whose prior the label model then
    replaces. 0 leaves the encoder to the other losses, as published: M1 first, then M2 on its latents."""
    style_size: Annotated[Positive, FIXED] = 50
    """Dimensions of the label model's own latent, which holds what the label does not tell."""
    width: Annotated[Positive, FIXED] = 500
    """Units of the hidden layer in each of the label model's networks."""


class Head(nn.Module):
    """Calls a label model on latents, and scales the gradient that it sends to them.

    Args:
        label_model: The label model.
        weight: Factor of the gradient.
    """

    def __init__(self, label_model: "LabelModel", weight: float):
        super().__init__()
        self.label_model, self.weight = label_model, weight

    def forward(self, latent: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return what `LabelModel.forward` returns; without noise the style is the mean of its posterior."""
        fixed = latent.detach()
        if noise is None:
            noise = latent.new_zeros(len(latent), self.label_model.style_size)
        terms: Tensor = self.label_model(fixed + self.weight * (latent - fixed) if self.weight else fixed, noise)
        return terms


class SemiSupervised(Objective[SemiSupervisedSettings]):
    """Trains a label model on latents by its bounds and the cross-entropy of labelled samples (eq. 9 of the paper).

    Args:
        own: The settings.
        run: Facts of the run.
        head: Calls the label model; it is trained with the autoencoder.
    """

    name, section, docs = "semi_supervised", "semi_supervised", "docs/vaes.md"
    plan_line = "labels"
    charts = {
        "Labels: cross-entropy of labelled samples (nats)": ("label_cross_entropy",),
        "Labels: entropy of guesses for the others (nats)": ("label_entropy",),
        "Bound on the density of latents (nats per dimension)": ("label_bound",),
    }

    network: Head
    averages: Tensor

    def __init__(self, own: SemiSupervisedSettings, run: RunFacts, head: Head) -> None:
        super().__init__(own, run)
        self.hold(network=head)
        # of the cross-entropy of labelled samples and the entropy of the others, for the log
        self.register_buffer("averages", torch.zeros(2))

    @classmethod
    def enabled(cls, own: SemiSupervisedSettings) -> bool:
        return own.classes is not None

    @classmethod
    def problems(cls, own: SemiSupervisedSettings, run: RunFacts, model: ModelFacts | None) -> Iterator[Problem]:
        plain = SemiSupervisedSettings()
        if own.classes is None:
            if changed := [key for key in type(own).model_fields if getattr(own, key) != getattr(plain, key)]:
                yield Problem(
                    f"semi_supervised.{changed[0]}", "needs the number of classes: give semi_supervised.classes"
                )
            return
        key = "semi_supervised.classes"
        if not run.one_size or len(run.crop_sizes) > 1:
            other = "data.buckets" if len(run.crop_sizes) > 1 else "latents.equivariance"
            yield Problem(key, f"needs latents of one size, and {other} gives several: leave one of the two out")
        if own.weight and run.train == "decoder":
            yield Problem("semi_supervised.weight", "is for the encoder, which train leaves fixed: set it to 0")
        if model is None:
            return
        if model.rescaled:
            yield Problem(
                key,
                f"learns the latents of the training, and the export of {model.name} scales each of their values: "
                "leave it out",
            )
        if own.weight and model.latent != "posterior":
            yield Problem(
                "semi_supervised.weight",
                f"needs a Gaussian posterior, which {model.name} does not have: set it to 0, which trains the label "
                "model alone",
            )

    @classmethod
    def build(
        cls, own: SemiSupervisedSettings, run: RunFacts, autoencoder: nn.Module, device: torch.device
    ) -> "SemiSupervised":
        from latent_ae.models.build import factor_of, latent_channels_of
        from latent_ae.models.label_model import LabelModel

        factor = factor_of(autoencoder)
        height, width = (side // factor for side in run.crop_sizes[0])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed + 4)
            network = LabelModel(
                own.classes or 0, (latent_channels_of(autoencoder), height, width), own.style_size, own.width
            )
        return cls(own, run, Head(network, own.weight).to(device))

    @classmethod
    def describe(cls, own: SemiSupervisedSettings, run: RunFacts) -> str:
        known = "all labels" if own.labels_per_class is None else f"{own.labels_per_class} labels per class"
        encoder = f"trains the encoder with weight {own.weight:g}" if own.weight else "does not train the encoder"
        if own.weight and "kl" in run.enabled:
            encoder += ", beside the prior of loss.kl, which it is meant to replace (loss.kl=0)"
        return f"{own.classes} classes, {known}; the label model {encoder}"

    @property
    def label_model(self) -> "LabelModel":
        """The label model."""
        return self.network.label_model

    def exported(self) -> tuple[str, nn.Module]:
        from latent_ae.models.label_model import FOLDER

        return FOLDER, self.label_model

    def name_classes(self, names: Sequence[str]) -> None:
        """Write the names of the classes, and which labels are seen, into the label model's config."""
        self.label_model.register_to_config(
            class_names=tuple(names), labels_per_class=self.own.labels_per_class, draw=self.own.draw
        )

    def facts(self) -> dict[str, Any]:
        return {"class_names": list(self.label_model.config.class_names or ())}

    def head(self) -> nn.Module:
        return self.network

    def draw(self, numbers: Sequence[int], latent_shape: Sequence[int]) -> tuple[Tensor, ...]:
        return (style_noise(self.run.seed, numbers, self.own.style_size),)

    def backward(self, p: Pass) -> None:
        own, terms, labels = self.own, p.out.heads[self.name], p.batch.labels
        if labels is None:  # a batch without data, as in measurements of cost
            labels = torch.full((len(terms),), -1, device=terms.device)
        bound, cross_entropy = semi_supervised_terms(terms, labels)
        elements = p.batch.images[0].numel()
        p.send_loss((own.classification * cross_entropy - bound).mean() / elements)
        if own.weight and p.out.logvar is not None:
            # log q(z | x) of the sample is minus this and its noise, which no weight changes
            p.send_loss(-0.5 * p.out.logvar.flatten(1).sum(1).mean() / elements, own.weight)
        with torch.no_grad():
            known, log_q = (labels >= 0).float(), terms[:, 0]
            entropy = -(log_q.exp() * log_q).sum(1)
            means = {"known": known, "cross_entropy": cross_entropy, "entropy": entropy * (1 - known)}
            p.global_means |= {f"{self.name}/{key}": values.mean() for key, values in means.items()}
            p.logs["label_bound"] = bound.mean() / p.out.latent[0].numel()

    def remember(self, means: Mapping[str, Tensor], logs: dict[str, Tensor]) -> None:
        known, cross_entropy, entropy = (means[f"{self.name}/{key}"] for key in ("known", "cross_entropy", "entropy"))
        # a step without such samples has 0 / 0, which does not change the average
        for average, value in zip(self.averages, (cross_entropy / known, entropy / (1 - known)), strict=True):
            smooth_(average, value, SMOOTHING)
        logs["label_cross_entropy"], logs["label_entropy"] = self.averages.clone()


def semi_supervised_terms(terms: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bound and the cross-entropy of each sample (Kingma et al. 2014, eq. 6 to 9).

    Args:
        terms: (N, 2, K), what `LabelModel.forward` returns.
        labels: (N,) integers, -1 where the label is unknown.

    Returns:
        -L(z, y) of a labelled sample, the bound on log p(z, y), and -U(z) of another, the bound on log p(z): the mean
        of -L(z, y) over q(y | z) plus the entropy of q(y | z). In nats, (N,).
        -log q(y | z) of a labelled sample, and 0 for another, (N,).
    """
    log_q, bounds = terms.unbind(1)
    known, chosen = labels >= 0, labels.clamp(min=0)[:, None]
    marginal = (log_q.exp() * (bounds - log_q)).sum(1)
    bound = torch.where(known, bounds.gather(1, chosen)[:, 0], marginal)
    return bound, torch.where(known, -log_q.gather(1, chosen)[:, 0], 0.0)
