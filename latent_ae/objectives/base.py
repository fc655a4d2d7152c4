"""The base of objectives: each is one optional term of training, in one file (docs/objectives.md)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from latent_ae.config import Problem, Settings
from latent_ae.models.likelihood import LikelihoodKind
from latent_ae.models.quantize import PLAIN, Quantiser
from latent_ae.models.settings import ModelFacts

if TYPE_CHECKING:  # brings diffusers
    from latent_ae.models.flow_matching import Path
    from latent_ae.models.reconstruct import Reconstruction, Reconstructor

S = TypeVar("S", bound=Settings)
Transform = Callable[[Tensor], Tensor]
Views = Callable[[Tensor], list[Tensor]]


class RunFacts(NamedTuple):
    """Facts of the run that an objective may use besides its own settings."""

    seed: int
    steps: int
    batch_size: int
    """Samples of a step, over all processes and passes."""
    micro_batch: int
    """Samples of one pass on one process."""
    accumulation: int
    """Passes of a process in a step."""
    resolution: int
    """Shortest side of the training crops, px."""
    validation_px: int
    """Side of the crops that are measured in validation, px."""
    smallest_px: int
    """Side of the smallest image that every objective in use can process, px."""
    train: Literal["all", "decoder", "encoder"]
    """The side of the autoencoder to which all that is trained belongs."""
    compile: bool | Literal["cuda"]
    """Whether networks are compiled: always, never, or on NVIDIA GPUs only."""
    weights_dir: str | None
    """Folder with the weights of metric networks; None searches for them."""
    enabled: frozenset[str]
    """Names of the objectives in use."""
    crop_sizes: tuple[tuple[int, int], ...]
    """Height and width of the training crops, px; more than one with data.buckets."""
    fixed_ends: frozenset[str] = frozenset()
    """Those of `encoder` and `decoder` whose last layer, where adaptive weights are measured, is not trained, and
    `codes` if there are codes and they are not trained."""
    existing: bool = False
    """Whether the autoencoder is an existing one (init_from), whose class is known only once it is loaded."""
    one_size: bool = True
    """Whether images and latents have the same size in all steps."""

    def compiles_on(self, device: torch.device) -> bool:
        """Return whether networks on the device are compiled."""
        return self.compile in (True, device.type)

    @property
    def resolution_key(self) -> str:
        """The setting that gives `resolution`."""
        return "data.buckets" if len(self.crop_sizes) > 1 else "data.resolution"


def unchanged(images: Tensor) -> list[Tensor]:
    """Return images as their only view."""
    return [images]


class Batch(NamedTuple):
    """One micro-batch on the device."""

    images: Tensor
    """The images that are encoded: (N, C, H, W) float32 in [-1, 1]."""
    target: Tensor
    """The images that should be reconstructed; they differ from `images` only under latents.equivariance."""
    noise: Tensor
    """Standard normal noise of the posterior, (N, c, h, w) like the latent."""
    numbers: Sequence[int]
    """Global numbers of the samples, consecutive."""
    draws: Mapping[str, tuple[Tensor, ...]] = {}
    """Random tensors of each objective for these samples (`Objective.draw`), by its name."""
    transforms: tuple[Transform, ...] = ()
    """Functions applied in turn to the latent before it is decoded."""
    decode: Tensor | None = None
    """A latent that is decoded in place of the posterior sample."""
    quantiser: Quantiser = PLAIN
    """How latents are replaced by codes, if there is a codebook."""
    second: Transform | None = None
    """Applied to the latent as it is decoded; the result is decoded, too, in the same forward pass."""
    compared: Views = unchanged
    """What pixel losses compare in place of images, (N, C, H, W): other images of the same samples, one loss each."""
    seen: Views = unchanged
    """What frozen networks see of them: (N, 1 or 3, H, W) images, one loss each."""
    full_size: int = 0
    """Number of elements (C x H x W) of one image as loaded."""
    path: "Path | None" = None
    """Where each image is on the way from noise, if the decoder is trained by flow matching."""
    labels: Tensor | None = None
    """(N,) int64 classes, -1 where they are unknown or hidden; None if no objective needs labels."""

    @property
    def area(self) -> float:
        """The target's area relative to the loaded image's, by which image losses are weighted, as in EQ-VAE's sums."""
        return self.target[0].numel() / self.full_size

    @property
    def encoded_area(self) -> float:
        """The encoded image's area relative to the loaded image's, by which losses of its latent are weighted."""
        return self.images[0].numel() / self.full_size


class Pass:
    """A micro-batch after its forward pass, to which objectives send gradients and numbers to log.

    The reconstruction is detached from the graph at `image`: its losses are differentiated there, so that each gradient
    is available separately and none reaches a network that it must not train. `backward` sends all of them through the
    autoencoder once.

    Args:
        batch: The micro-batch.
        out: The result of its forward pass.
        step: Number of the step, from 0.
        accumulation: Passes of this process in the step.
        model: The autoencoder.
        adversaries: The adversaries' networks, prepared for their passes, by the objective's name.
        autocast: Returns a context of the training precision.
        first: Whether it is this process's first pass of the step.
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
        """The weighted sum of the gradients passed to `send_image`, (N, C, H, W)."""
        self.reconstruction_gradient: Tensor | None = None
        """The part of it that comes from the reconstruction losses, against which other terms are balanced."""
        self.likelihood: LikelihoodKind | None = None
        """Name in `logs` of the reconstruction's negative log-likelihood per image element in nats, if there is one."""
        self.logs: dict[str, Tensor] = {}
        """Scalars to log; the log has their mean over the step's passes."""
        self.global_means: dict[str, Tensor] = {}
        """Tensors whose mean over the global batch goes to `Objective.remember`; keys begin with the objective's
        name."""
        self._tensors: list[Tensor] = []
        self._gradients: list[Tensor] = []

    def send_image(self, gradient: Tensor, weight: float | Tensor = 1.0) -> None:
        """Add a gradient of the micro-batch's mean loss at `image`.

        Args:
            gradient: (N, C, H, W).
            weight: Factor of the gradient.
        """
        if self.image_gradient is None:
            self.image_gradient = gradient * weight
        else:
            self.image_gradient = torch.add(self.image_gradient, gradient * weight)

    def send_reconstruction(self, gradient: Tensor, weight: float = 1.0) -> None:
        """Add a gradient of a reconstruction loss, against which other terms are balanced.

        Args:
            gradient: (N, C, H, W), gradient of the micro-batch's mean loss at `image`.
            weight: Factor of the gradient.
        """
        weighted, sum_before = gradient * weight, self.reconstruction_gradient
        self.reconstruction_gradient = weighted if sum_before is None else sum_before + weighted
        self.send_image(weighted)

    def send(self, tensor: Tensor, gradient: Tensor) -> None:
        """Add a gradient of the micro-batch's mean loss at any tensor of the autoencoder's graph.

        Args:
            tensor: The tensor.
            gradient: The gradient, of the same shape.
        """
        self._tensors.append(tensor)
        self._gradients.append(gradient * self.share)

    def send_loss(self, loss: Tensor, weight: float | Tensor = 1.0) -> None:
        """Add a loss that is itself part of the autoencoder's graph.

        Args:
            loss: A scalar, mean over the micro-batch.
            weight: Factor of the loss.
        """
        self.send(loss, torch.ones_like(loss) * weight)

    def backward(self) -> None:
        """Backpropagate all gradients through the autoencoder."""
        image = torch.zeros_like(self.image) if self.image_gradient is None else self.image_gradient
        tensors, gradients = list(self._tensors), list(self._gradients)
        if self.out.image.requires_grad:  # it does not where a codebook learns alone
            tensors, gradients = [self.out.image, *tensors], [image * self.share, *gradients]
        torch.autograd.backward(tensors, gradients)


class Objective(nn.Module, Generic[S]):
    """One term of training. Each hook does nothing unless a subclass overrides it.

    Parameters and buffers that a subclass registers are saved with every checkpoint. The autoencoder's optimizer trains
    the parameters, in a group of their own; the buffers are rolled back when a step is skipped, but not those of a
    module with `rolled_back = False`, which must itself leave out such a step. Other networks (frozen ones and the
    `adversary`) are kept by `hold`.

    Class attributes:
        name: Key of the objective among all objectives, in log names and in checkpoints.
        section: The section of the run's settings of which the objective's settings are a base class; empty for an
            objective that is passed to `train` as an instance.
        docs: The page that explains it.
        plan_line: Heading of the plan (`--dry-run`) under which `describe` is shown.
        charts: Titles of charts in the report, and the logged values that each shows.
        adversary_name: Name of the adversary's optimizer, gradient norm and file in a checkpoint; empty takes `name`.
        lr_scale: Learning rate of its parameters, relative to the autoencoder's.

    Args:
        own: Its settings; None if it has none.
        run: Facts of the run; `train` sets them for objectives that are passed to it.
    """

    name: ClassVar[str]
    section: ClassVar[str] = ""
    docs: ClassVar[str] = "docs/objectives.md"
    plan_line: ClassVar[str] = "latents"
    charts: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    adversary_name: ClassVar[str] = ""
    lr_scale: ClassVar[float] = 1.0

    adversary: nn.Module | None = None
    """A network with an optimizer of its own that this objective trains."""
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
        """Name of the adversary's optimizer, gradient norm and file."""
        return self.adversary_name or self.name

    def __setattr__(self, name: str, value: Any) -> None:
        # an adversary has its own optimizer, so its parameters are not registered
        if name == "adversary":
            self.hold(adversary=value)
        else:
            super().__setattr__(name, value)

    def hold(self, **networks: nn.Module | None) -> None:
        """Keep networks as attributes without registering their parameters and buffers."""
        self.__dict__.update(networks)

    # before networks are built; `own` is the objective's section of the settings

    @classmethod
    def enabled(cls, own: S) -> bool:
        """Return whether the settings turn it on; otherwise it is not built and costs nothing."""
        return True

    @classmethod
    def problems(cls, own: S, run: RunFacts, model: ModelFacts | None) -> Iterator[Problem]:
        """Yield settings that do not go together, by their full keys.

        Args:
            own: Its settings.
            run: Facts of the run.
            model: Facts of the autoencoder; None before they are known.
        """
        return iter(())

    @classmethod
    def needs_px(cls, own: S) -> int:
        """Return the side of the smallest image that it can process, px."""
        return 1

    @classmethod
    def build(cls, own: S, run: RunFacts, autoencoder: nn.Module, device: torch.device) -> "Objective[S]":
        """Build the objective and load its networks.

        Args:
            own: Its settings.
            run: Facts of the run.
            autoencoder: The autoencoder that it trains.
            device: Where its networks go.

        Raises:
            UserError: If it does not fit the autoencoder, or a network cannot be loaded.
        """
        return cls(own, run).to(device)

    @classmethod
    def describe(cls, own: S, run: RunFacts) -> str:
        """Return what it will do, for the plan; called only if it is enabled."""
        return ""

    @classmethod
    def diagnose(cls, own: S, run: RunFacts, lines: Sequence[Mapping[str, Any]]) -> str:
        """Return a clause on how training goes with respect to this objective; empty if there is nothing to say.

        The project's own objectives are called even if they are not enabled.

        Args:
            own: Its settings.
            run: Facts of the run.
            lines: The newest training lines of the log, oldest first.
        """
        return ""

    # in the step

    def head(self) -> nn.Module | None:
        """Return a network on the latent that is trained inside the autoencoder's wrapped forward pass, or None.

        It takes the latent and the objective's own draws. Its output is `Pass.out.heads[name]`.
        """
        return None

    def draw(self, numbers: Sequence[int], latent_shape: Sequence[int]) -> tuple[Tensor, ...]:
        """Return random tensors for samples, on the CPU; they depend on the run's seed and the sample's number alone.

        Args:
            numbers: Global numbers of N samples.
            latent_shape: (c, h, w) of a latent.

        Returns:
            Tensors whose first dimension is N; they become `Batch.draws[name]` on the device.
        """
        return ()

    def prepare(self, batch: Batch, step: int) -> Batch:
        """Return the micro-batch as the forward pass gets it; random changes depend on seed and step alone."""
        return batch

    def backward(self, p: Pass) -> None:
        """Compute its losses after the forward pass.

        Gradients for the autoencoder are sent to `p`, those of the adversary to the adversary's parameters.
        """

    def remember(self, means: Mapping[str, Tensor], logs: dict[str, Tensor]) -> None:
        """Update its state from means over the global batch, which are the same on all processes.

        A weight that is computed here lags by one step, so that no process waits and every split of a batch gives the
        same weight.

        Args:
            means: Means of `Pass.global_means`.
            logs: Values to log; may be added to.
        """

    def after_update(
        self, step: int, skipped: Tensor, model: "Reconstructor", optimizer: torch.optim.Optimizer
    ) -> None:
        """Act after the autoencoder's update.

        Args:
            step: Number of the step, from 0.
            skipped: Bool scalar on the device, True if the update was skipped because something was not finite.
            model: The autoencoder.
            optimizer: The autoencoder's optimizer.
        """

    def after_average(self, autoencoder: Any) -> None:
        """Act after the update of the averaged weights, if they are kept (ema.decay).

        Args:
            autoencoder: The autoencoder that holds them.
        """

    def trains_adversary(self, step: int) -> bool:
        """Return whether the adversary gets gradients in this step."""
        return True

    def cost(self, step: int) -> float:
        """Return how much memory the step needs, relative to other steps.

        The most expensive of the last steps is tried before the first one.
        """
        return 0.0

    # in exports and checkpoints

    def exported(self) -> tuple[str, nn.Module] | None:
        """Return the name of a folder in exports and the network that it holds, a ModelMixin; None if there is none.

        The network is saved with the objective's state or its head.
        """
        return None

    def facts(self) -> dict[str, Any]:
        """Return facts for state.json of a checkpoint, JSON-ready; may wait for the device."""
        return {}

    def refuse_another(self, facts: Mapping[str, Any]) -> None:
        """Raise UserError if the facts of the checkpoint from which a run resumes belong to a different objective."""


def mean_over_views(views: Views, loss: Callable[[Tensor, Tensor], Tensor], image: Tensor, target: Tensor) -> Tensor:
    """Return the mean over views of a loss.

    Args:
        views: `Batch.compared` or `Batch.seen`.
        loss: Compares a view of the images with one of the targets.
        image: (N, C, H, W), reconstructions.
        target: (N, C, H, W), the images that they should be.
    """
    losses = [loss(one, other) for one, other in zip(views(image), views(target), strict=True)]
    return losses[0] if len(losses) == 1 else torch.stack(losses).mean(0)


def loss_of_outputs(
    p: Pass, network: Callable[[Tensor], Tensor], distance: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Return the mean over `Batch.seen` of a distance between a frozen network's outputs.

    Args:
        p: The pass, whose reconstructions and targets are compared.
        network: Takes (N, 1 or 3, H, W).
        distance: Compares its outputs for reconstructions with those for targets, which have no gradient.
    """

    def compared(image: Tensor, target: Tensor) -> Tensor:
        with p.autocast():
            with torch.no_grad():
                expected = network(target)
            outputs = network(image)
        return distance(outputs, expected)

    return mean_over_views(p.batch.seen, compared, p.image, p.batch.target)


def recent_means(lines: Sequence[Mapping[str, Any]], count: int = 5) -> dict[str, float]:
    """Return the means over the newest `count` training lines of the values that all of them have.

    Single steps are noisy, so a diagnosis uses means.
    """
    recent = lines[-count:]
    columns = {key: numbers(recent, key) for key in recent[-1]}
    return {key: sum(values) / len(values) for key, values in columns.items() if len(values) == len(recent)}


def numbers(lines: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """Return the values of `key` in the training lines that have it."""
    return [line[key] for line in lines if isinstance(line.get(key), (int, float))]
