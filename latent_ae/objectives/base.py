"""What an objective is: one optional term of training, with all that belongs to it in one file (docs/objectives.md)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from latent_ae.config import Problem, Settings
from latent_ae.models.likelihood import LikelihoodKind
from latent_ae.models.settings import ModelFacts

if TYPE_CHECKING:  # brings diffusers
    from latent_ae.models.reconstruct import Reconstruction, Reconstructor

S = TypeVar("S", bound=Settings)
Transform = Callable[[Tensor], Tensor]
ADAPTIVE_EPS = 1e-4
"""As latent diffusion has it: it stands beside the adversarial gradient, whose units are the same there and here."""


class RunFacts(NamedTuple):
    """What an objective may know of the run besides its own settings."""

    seed: int
    steps: int
    batch_size: int
    """Samples of a step over all processes and passes."""
    micro_batch: int
    """Samples of one pass of one process."""
    accumulation: int
    """Passes of a process in a step."""
    resolution: int
    """Side of the training crops, px."""
    validation_px: int
    """Side of the crops that are measured in validation, px."""
    smallest_px: int
    """Side of the smallest image that every objective in use can look at, px."""
    train: Literal["all", "decoder", "encoder"]
    compile: bool
    weights_dir: str | None
    enabled: frozenset[str]
    """Names of the objectives in use."""


class Batch(NamedTuple):
    """One micro-batch on the device."""

    images: Tensor
    """What is encoded: float32, N x C x H x W in [-1, 1]."""
    target: Tensor
    """What should come out; it differs from `images` under latents.equivariance only."""
    noise: Tensor
    """Standard normal, N x c x h x w like the latent."""
    numbers: Sequence[int]
    """Global numbers of the samples, consecutive."""
    draws: Mapping[str, tuple[Tensor, ...]] = {}
    """What each objective drew for these samples (`Objective.draw`), by its name."""
    transforms: tuple[Transform, ...] = ()
    """Applied to the latent one after another before it is decoded."""
    decode: Tensor | None = None
    """A latent that is decoded in place of the sample."""
    full_size: int = 0
    """Numbers of one image as the loader gave it."""

    @property
    def area(self) -> float:
        """What the target's area is of the full one's: losses of the image count so much, as in EQ-VAE's sums."""
        return self.target[0].numel() / self.full_size

    @property
    def encoded_area(self) -> float:
        """The same of the encoded image, for losses of its latent."""
        return self.images[0].numel() / self.full_size


class Pass:
    """A micro-batch after its forward pass: what objectives read, and where they leave gradients and numbers.

    The reconstruction is cut out of the graph at `image`: its losses are differentiated there, so that their gradients
    are available apart and none reaches a network that it must not train. `backward` sends all of them through the
    autoencoder once.
    """

    def __init__(
        self,
        batch: Batch,
        out: "Reconstruction",
        step: int,
        accumulation: int,
        model: "Reconstructor",
        adversaries: Mapping[str, nn.Module],
        autocast: Callable[..., torch.autocast],
        first: bool = True,
    ):
        self.batch, self.out, self.step, self.model = batch, out, step, model
        self.accumulation, self.share = accumulation, 1.0 / accumulation
        self.adversaries, self.autocast = adversaries, autocast
        self.first = first
        """Whether it is this process's first pass of the step."""
        self.image = out.image.detach().requires_grad_()
        self.image_gradient: Tensor | None = None
        """The weighted sum of what `send_image` got."""
        self.reconstruction_gradient: Tensor | None = None
        """The part of it that comes from the reconstruction losses, against which other terms are balanced."""
        self.likelihood: LikelihoodKind | None = None
        """Name in `logs` of the reconstruction's negative log-likelihood per image element in nats, if there is one."""
        self.logs: dict[str, Tensor] = {}
        """Scalars to log; the step's mean over its passes."""
        self.global_means: dict[str, Tensor] = {}
        """Tensors whose mean over the global batch `Objective.remember` gets; keys begin with the objective's name."""
        self._tensors: list[Tensor] = []
        self._gradients: list[Tensor] = []

    def send_image(self, gradient: Tensor, weight: float | Tensor = 1.0) -> None:
        """Adds a gradient of the micro-batch's mean loss at `image`."""
        if self.image_gradient is None:
            self.image_gradient = gradient * weight
        else:
            self.image_gradient = torch.add(self.image_gradient, gradient * weight)

    def send(self, tensor: Tensor, gradient: Tensor) -> None:
        """Adds a gradient of the micro-batch's mean loss at any tensor of the autoencoder's graph."""
        self._tensors.append(tensor)
        self._gradients.append(gradient * self.share)

    def send_loss(self, loss: Tensor, weight: float | Tensor = 1.0) -> None:
        """Adds a loss that is itself in the autoencoder's graph, a scalar."""
        self.send(loss, torch.ones_like(loss) * weight)

    def backward(self) -> None:
        """Sends all gradients through the autoencoder."""
        image = torch.zeros_like(self.image) if self.image_gradient is None else self.image_gradient
        torch.autograd.backward([self.out.image, *self._tensors], [image * self.share, *self._gradients])


class Objective(nn.Module, Generic[S]):
    """One term of training. Each hook does nothing unless a subclass overrides it.

    What a subclass registers (parameters, buffers) is saved with every checkpoint; its buffers are rolled back when a
    step is skipped, and its parameters are trained by the autoencoder's optimizer, in a group of their own. Networks
    that are no part of that, frozen ones and `adversary`, are kept by `hold`.

    Class attributes:
        name: Its key among the objectives, in log names and in checkpoints.
        section: The section of the run's settings that its `Settings` are a base class of; empty for an objective that
            is given to `train` as an instance.
        docs: Where it is explained.
        plan_line: The heading of the plan (`--dry-run`) under which `describe` is shown.
        charts: Titles of charts in the report, and the logged values that each shows.
        adversary_name: What the adversary's optimizer, gradient norm and file in a checkpoint are called; or `name`.
        lr_scale: Learning rate of its parameters, relative to the autoencoder's.

    Args:
        own: Its settings; None where it has none.
        run: What it may know of the run; `train` sets it for objectives that it is given.
    """

    name: ClassVar[str]
    section: ClassVar[str] = ""
    docs: ClassVar[str] = "docs/objectives.md"
    plan_line: ClassVar[str] = "latents"
    charts: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    adversary_name: ClassVar[str] = ""
    lr_scale: ClassVar[float] = 1.0

    adversary: nn.Module | None = None
    """A network with an optimizer of its own, which this objective trains."""
    own: S
    run: RunFacts

    def __init__(self, own: S | None = None, run: RunFacts | None = None) -> None:
        super().__init__()
        if own is not None:
            self.own = own
        if run is not None:
            self.run = run

    @property
    def network_name(self) -> str:
        """What the adversary's optimizer, gradient norm and file are called."""
        return self.adversary_name or self.name

    def __setattr__(self, name: str, value: Any) -> None:
        # an adversary is no part of what an objective trains with the autoencoder
        if name == "adversary":
            self.hold(adversary=value)
        else:
            super().__setattr__(name, value)

    def hold(self, **networks: nn.Module | None) -> None:
        """Keeps networks as attributes without registering them."""
        self.__dict__.update(networks)

    # before the networks are there; `own` is the section of the settings

    @classmethod
    def enabled(cls, own: S) -> bool:
        """Whether the settings give it a weight; where not, it is not built and costs nothing."""
        return True

    @classmethod
    def problems(cls, own: S, run: RunFacts, model: ModelFacts | None) -> Iterator[Problem]:
        """Settings that do not go together, by their full keys; `model` is None as long as it is not known."""
        return iter(())

    @classmethod
    def needs_px(cls, own: S) -> int:
        """Side of the smallest image that it can look at, px."""
        return 1

    @classmethod
    def build(cls, own: S, run: RunFacts, autoencoder: nn.Module, device: torch.device) -> "Objective[S]":
        """Loads or makes its networks. Raises UserError for what does not go with the autoencoder."""
        return cls(own, run).to(device)

    @classmethod
    def describe(cls, own: S, run: RunFacts) -> str:
        """What it will do, for the plan; called only where it is enabled."""
        return ""

    @classmethod
    def diagnose(cls, own: S, run: RunFacts, lines: Sequence[Mapping[str, Any]]) -> str:
        """A clause on how it goes, from the newest training lines of the log (oldest first); empty: nothing to say.

        The project's objectives are asked where they are off, too.
        """
        return ""

    # in the step

    def head(self) -> nn.Module | None:
        """A network on the latent that is trained inside the autoencoder's wrapped forward pass (`Pass.out.heads`)."""
        return None

    def draw(self, numbers: Sequence[int], latent_shape: Sequence[int]) -> tuple[Tensor, ...]:
        """Random tensors on the CPU for the samples, a function of the run's seed and each sample's number alone."""
        return ()

    def prepare(self, batch: Batch, step: int) -> Batch:
        """Changes a micro-batch before the forward pass; what it draws is a function of seed and step alone."""
        return batch

    def backward(self, p: Pass) -> None:
        """Computes its losses after the forward pass; sends gradients to `p`, and its adversary's to its parameters."""

    def remember(self, means: Mapping[str, Tensor], logs: dict[str, Tensor]) -> None:
        """Gets the means over the global batch, the same on all processes; may add to `logs`.

        Weights that are taken from them so lag by one step: no process waits, and any split gives the same ones.
        """

    def after_update(
        self, step: int, skipped: Tensor, model: "Reconstructor", optimizer: torch.optim.Optimizer
    ) -> None:
        """Follows the autoencoder's update; `skipped` tells on the device whether that was passed over."""

    def trains_adversary(self, step: int) -> bool:
        """Whether the adversary gets gradients in this step."""
        return True

    def cost(self, step: int) -> float:
        """Memory that the step needs beside others; the dearest of the last steps is tried before the first."""
        return 0.0

    # in checkpoints

    def facts(self) -> dict[str, Any]:
        """What state.json of a checkpoint says of it; may read the device."""
        return {}

    def refuse_another(self, facts: Mapping[str, Any]) -> None:
        """Raises UserError where the facts of the checkpoint that a run goes on from are of another objective."""


class GradientBalance(nn.Module):
    """The adaptive weight of a term: |gradient of the reconstruction| / |gradient of the term| at one layer.

    Esser et al. 2021, eq. 7, of the global batch, capped, smoothed and one step late, so that it is the same for any
    split and needs no second pass.

    Args:
        name: That of the objective, for the keys in `Pass.global_means`.
        cap: Largest ratio.
        smoothing: Share of the former value that the ratio keeps in each step.
    """

    weight: Tensor

    def __init__(self, name: str, cap: float, smoothing: float):
        super().__init__()
        self.term, self.reconstruction = f"{name}/term", f"{name}/reconstruction"
        self.cap, self.smoothing = cap, smoothing
        # 0 until the first measurement, so the first step with the term only measures
        self.register_buffer("weight", torch.zeros(()))

    def at(self, area: float) -> Tensor:
        """The weight where the reconstruction's losses count only `area` of what they do at full size."""
        return (area * self.weight).clamp(max=self.cap)

    def measure_at_decoder(self, p: Pass, gradient: Tensor) -> None:
        """Measures both gradients at the decoder's output convolution; each costs one small product.

        Args:
            p: The pass; its reconstruction gradient is there.
            gradient: Of the term at `p.image`, without a weight.
        """
        layer = p.model.last_layer
        if not layer.requires_grad:  # train: encoder leaves it fixed
            return
        assert p.reconstruction_gradient is not None
        for key, at_image in ((self.reconstruction, p.reconstruction_gradient), (self.term, gradient)):
            (p.global_means[key],) = torch.autograd.grad(p.out.image, layer, at_image, retain_graph=True)

    def measure_at_encoder(self, p: Pass, tensor: Tensor, gradient: Tensor) -> None:
        """Measures both gradients at the encoder's output convolution; the image's when it comes by the latent.

        Args:
            p: The pass.
            tensor: Of the autoencoder's graph.
            gradient: Of the term at it, without a weight.
        """
        layer, latent = p.model.encoder_last_layer, p.out.latent
        (p.global_means[self.term],) = torch.autograd.grad(tensor, layer, gradient, retain_graph=True)

        def image_gradient_arrives(at_latent: Tensor) -> None:
            (at_layer,) = torch.autograd.grad(latent, layer, at_latent, retain_graph=True)
            p.global_means[self.reconstruction] = at_layer * p.accumulation  # what arrives is the pass's share

        p.out.to_decode.register_hook(image_gradient_arrives)

    def update(self, means: Mapping[str, Tensor], area: float, skip_zero: bool = False) -> None:
        """Takes up the ratio of a step whose images had `area`; `skip_zero`: not where the term had no gradient."""
        if self.term not in means:
            return
        reconstruction, term = means[self.reconstruction], means[self.term]
        ratio = adaptive_ratio(reconstruction, term, self.cap)
        if skip_zero:
            ratio = torch.where(term.norm() > 0, ratio, torch.nan)
        smooth_(self.weight, ratio / area, self.smoothing)


def adaptive_ratio(reconstruction_gradient: Tensor, adversarial_gradient: Tensor, cap: float) -> Tensor:
    """|grad of reconstruction| / (|grad of adversarial| + 1e-4) at the last layer, clamped to [0, cap].

    Esser et al. 2021, eq. 7, in per-element means as all losses here are. Latent diffusion's
    `calculate_adaptive_weight` sums the reconstruction over a sample's C x H x W elements and takes the mean of the
    logits, so its ratio is C H W times this one, and its clamp at 1e4 is `cap = 1e4 / (C H W)`.

    Args:
        reconstruction_gradient: of the reconstruction losses (per-element means) with respect to the layer's weight.
        adversarial_gradient: of the mean of -D(r) with respect to the same weight, without any weight of its own.
        cap: the largest ratio.

    Returns:
        A scalar; NaN where a gradient or the ratio is not finite.
    """
    norm = adversarial_gradient.norm()
    ratio = reconstruction_gradient.norm() / (norm + ADAPTIVE_EPS)
    # infinity must not pass for the cap, nor below the line for 0: the step passes over what is not finite
    return torch.where(ratio.isfinite() & norm.isfinite(), ratio.clamp(0.0, cap), torch.nan)


def smooth_(average: Tensor, value: Tensor, smoothing: float) -> None:
    """Moves the average towards the value, or to it where there is none yet (0); passes over what is not finite."""
    smoothed = torch.where(average > 0, torch.lerp(value, average, smoothing), value)
    average.copy_(torch.where(value.isfinite(), smoothed, average))


def recent_means(lines: Sequence[Mapping[str, Any]], count: int = 5) -> dict[str, float]:
    """Means of what each of the newest `count` training lines has: single steps are noise."""
    recent = lines[-count:]
    columns = {key: numbers(recent, key) for key in recent[-1]}
    return {key: sum(values) / len(values) for key, values in columns.items() if len(values) == len(recent)}


def numbers(lines: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """The values of `key` in the training lines that have it."""
    return [line[key] for line in lines if isinstance(line.get(key), (int, float))]
