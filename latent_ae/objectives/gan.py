"""The adversarial term: a discriminator of images, its losses and its regularisers."""

from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from latent_ae.config import (
    FIXED,
    SILENT,
    SWITCH,
    Decay,
    NonNegative,
    Positive,
    Problem,
    Settings,
    UserError,
    Weight,
    looks_like_path,
)
from latent_ae.data.rng import augmentation_numbers, replay_numbers
from latent_ae.models.dino_discriminator import DinoDiscriminator
from latent_ae.models.discriminator import Discriminator
from latent_ae.models.discriminators import NETWORKS, discriminator_weights
from latent_ae.models.settings import ModelFacts
from latent_ae.objectives.adversarial_losses import (
    AdversarialLoss,
    discriminator_loss,
    generator_loss,
    lecam_loss,
    r1_penalty,
)
from latent_ae.objectives.balance import GradientBalance
from latent_ae.objectives.base import Objective, Pass, RunFacts, recent_means
from latent_ae.objectives.diffaug import NUMBERS, augment
from latent_ae.objectives.replay import Replay
from latent_ae.pretrained.frozen import folder_problems
from latent_ae.pretrained.vision import VisionModel, vision_shape

if TYPE_CHECKING:  # brings diffusers
    from latent_ae.models.reconstruct import Reconstructor

LECAM_DECAY = 0.99
SURE, BLIND = 0.97, 0.53
"""Accuracy above which the discriminator has won, and below which it distinguishes nothing."""
YOUNG_STEPS = 1000
"""Steps of training before a discriminator is called blind."""
DOMINANT, FAINT = 2.0, 0.005
"""Norms of the adversarial gradient at the last layer, relative to the reconstruction's: too large, and negligible."""


class GanSettings(Settings):
    """The adversarial term."""

    weight: Annotated[Weight, SWITCH] = 0.5
    """Weight of the adversarial term; 0 builds no discriminator."""
    start: NonNegative = 50_000
    """First step at which the discriminator trains."""
    discriminator_warmup: NonNegative = 500
    """Steps from `start` during which only the discriminator trains."""
    warmup: NonNegative = 2000
    """Steps over which the autoencoder's adversarial term then rises to its full weight."""
    loss: Annotated[AdversarialLoss, FIXED] = "hinge"
    """hinge; vanilla: cross-entropy for the discriminator and -D(fake) for the autoencoder; non_saturating:
    cross-entropy and softplus(-D(fake))."""
    init_from: Annotated[str | None, SILENT] = None
    """A run, checkpoint, export or hub id with an export, from whose discriminator to start."""
    network: Annotated[Literal["patch", "dino", "stylegan"], FIXED] = "patch"
    """The discriminator: patch (PatchGAN), dino (heads on a frozen vision transformer, as RAE) or stylegan (residual,
    with one logit per image)."""
    channels: Annotated[Positive, FIXED] = 64
    """Width of the first layer of patch or stylegan; later layers of patch have up to eight times as many channels,
    those of stylegan up to 512."""
    layers: Annotated[int, Field(ge=1, le=16), FIXED] = 3
    """Layers of patch that halve the resolution."""
    norm: Annotated[Literal["group", "spectral", "batch", "instance", "none"], FIXED] = "group"
    """Normalisation in patch (group, spectral, batch, none) or dino (group, instance, none, besides spectral norm)."""
    blur: Annotated[bool, FIXED] = False
    """Low-pass filter before each subsampling in patch."""
    conditional: Annotated[bool, FIXED] = False
    """Show patch each image's latent, too, so that it judges the image for that latent (seraena, for tiny decoders)."""
    replay: Annotated[NonNegative, FIXED] = 0
    """Number of stored reconstructions, one of each step; in every second sample the discriminator sees one of them in
    place of the new reconstruction (seraena: 16384). 0 stores none."""
    dino_model: str | None = None
    """Folder of the vision transformer that dino needs, such as DINO-S/8 (config.json, model.safetensors,
    preprocessor_config.json)."""
    dino_px: Annotated[Positive, FIXED] = 224
    """Side to which images are resized for dino, px; it is rounded down to whole patches."""
    dino_kernel: Annotated[Positive, FIXED] = 9
    """Width of the wide kernel in dino's heads, in tokens."""
    diffaug: tuple[Literal["color", "translation", "cutout"], ...] = ()
    """Differentiable augmentations of the discriminator's input; they help on small data sets."""
    adaptive: bool = True
    """Scale the term by the ratio of gradient norms at the last layer; false uses the weight as it is."""
    adaptive_cap: Annotated[float, Field(gt=0)] = 0.0509
    """Largest such ratio, for losses that are means over elements. The default is latent diffusion's clamp of 1e4 for
    its sums, converted for RGB at 256 px: 1e4 / (3 x 256 x 256). Taming's VQ loss takes means, so its 1e4 stays 1e4."""
    adaptive_smoothing: Decay = 0.9
    """Fraction of the previous value that the ratio keeps in each step; 0 takes the ratio of the step before."""
    lecam: Weight = 0.0
    """Weight of the discriminator's LeCam regularisation."""
    alarm: Annotated[float, Field(gt=1)] = 1.25
    """Warn when the held-out LPIPS exceeds this many times its value before the adversarial term."""
    r1: Weight = 0.0
    """Weight (gamma) of the discriminator's gradient penalty on real images."""
    r1_every: Positive = 16
    """The penalty is computed on every n-th step, with n times its weight."""

    @property
    def felt_from(self) -> int:
        """First step in which the adversarial term trains the autoencoder."""
        return self.start + self.discriminator_warmup


SHAPE = ("gan.network", *sorted({f"gan.{key}" for kind in NETWORKS.values() for key in kind.settings}))
"""Settings that determine which weights the discriminator can start from."""


class Phase(NamedTuple):
    """The adversarial training in one step."""

    discriminator: bool
    """Whether the discriminator trains."""
    generator: float
    """Weight of the autoencoder's adversarial term before the adaptive factor."""
    r1: float = 0.0
    """Weight of the discriminator's gradient penalty."""


class GAN(Objective[GanSettings]):
    """Trains a discriminator of real and reconstructed images, and sends the autoencoder its gradient.

    One pass of the discriminator over both kinds serves both networks.

    Args:
        own: The settings.
        run: Facts of the run.
        adversary: The discriminator.
        replay: Stored reconstructions; None without gan.replay.
    """

    name, section, docs = "gan", "gan", "docs/losses.md"
    plan_line = "adversarial"
    charts = {
        "Adversarial losses": ("generator", "discriminator"),
        "Discriminator logits": ("logits_real", "logits_fake"),
        "Discriminator accuracy": ("accuracy",),
        "Adaptive weight": ("adaptive_weight",),
        "Adversarial gradient at the last layer, relative to reconstruction": ("gradient_ratio",),
    }
    adversary_name = "discriminator"

    adversary: Discriminator
    lecam_averages: Tensor
    lecam_share: Tensor

    def __init__(self, own: GanSettings, run: RunFacts, adversary: Discriminator, replay: Replay | None = None) -> None:
        super().__init__(own, run)
        self.replay = replay
        self.newest: tuple[Tensor, Tensor] | None = None
        """The first reconstruction of the newest step, and its latent, if it is to be stored."""
        self.hold(adversary=adversary)
        self.balance = GradientBalance(self.name, own.adaptive_cap, own.adaptive_smoothing)
        self.phase, self.area = Phase(False, 0.0), 1.0
        """Phase and image area of the newest pass."""
        # moving averages of the logits of real and reconstructed images from 0 on, and the total weight of the steps
        self.register_buffer("lecam_averages", torch.zeros(2))
        self.register_buffer("lecam_share", torch.zeros(()))

    @classmethod
    def enabled(cls, own: GanSettings) -> bool:
        return own.weight > 0

    @classmethod
    def problems(cls, own: GanSettings, run: RunFacts, model: ModelFacts | None) -> Iterator[Problem]:
        start = own.init_from
        if start is not None and looks_like_path(start) and not Path(start).expanduser().is_dir():
            yield Problem("gan.init_from", f"no such folder: {start} (from {Path.cwd()})")
        if not own.weight:
            return
        yield from network_problems(own, run, model)
        if run.resolution < cls.needs_px(own):
            yield Problem(
                "gan.layers",
                f"{own.layers} need crops of at least {cls.needs_px(own)} px; the shortest side of "
                f"{run.resolution_key} is {run.resolution}",
            )
        if own.norm == "batch" and (run.micro_batch != run.batch_size or run.batch_size < 2):
            yield Problem(
                "gan.norm",
                f"batch takes its statistics from one pass of {run.micro_batch}, and batch_size is {run.batch_size}: "
                "training would depend on the split. Use group, or one process with micro_batch_size null and "
                "batch_size of at least 2",
            )
        if "decoder" in run.fixed_ends and own.adaptive:
            yield Problem(
                "gan.adaptive",
                "measures gradients at the decoder's last layer, which train leaves fixed: set it to false",
            )
        if run.compile and own.r1:
            yield Problem("gan.r1", "needs a second derivative, which compiled networks do not give: set compile=false")

    @classmethod
    def needs_px(cls, own: GanSettings) -> int:
        return NETWORKS[own.network].needs_px(**own.model_dump()) if own.weight else 1

    @classmethod
    def build(cls, own: GanSettings, run: RunFacts, autoencoder: nn.Module, device: torch.device) -> "GAN":
        from latent_ae.models.build import channels_of, factor_of, latent_channels_of

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed + 1)
            network = cls.network(own, channels_of(autoencoder), run.resolution, latent_channels_of(autoencoder))
        if isinstance(network, DinoDiscriminator):
            vision = VisionModel(
                str(own.dino_model),
                image_px=own.dino_px,
                setting="gan.dino_model",
                twice_differentiable=own.r1 > 0,
            )
            if vision.grid[0] ** 2 < own.dino_kernel:
                raise UserError(
                    f"gan.dino_kernel: {own.dino_kernel} is wider than the {vision.grid[0] ** 2} tokens of an image of "
                    f"{own.dino_px} px: raise gan.dino_px or lower it"
                )
            network.attach(vision, vision.sha256())
        if own.init_from is not None:
            network.load_state_dict(discriminator_weights(own.init_from, network))
        if run.compiles_on(device):
            network.compile()
        replay = None
        if own.replay:
            image, latent = (run.resolution, run.resolution), 2 * [run.resolution // factor_of(autoencoder)]
            replay = Replay(own.replay, (channels_of(autoencoder), *image), (latent_channels_of(autoencoder), *latent))
        return cls(own, run, network.to(device), replay).to(device)

    @classmethod
    def network(cls, own: GanSettings, channels: int, side_px: int, latent_channels: int = 0) -> Discriminator:
        """Return a new discriminator, without the frozen network that it may need.

        Args:
            own: The settings.
            channels: Channels of the images.
            side_px: Side of the training crops, px.
            latent_channels: Channels of the latents, for gan.conditional.

        Raises:
            UserError: If the frozen network's folder has no readable config.
        """
        kind, values = NETWORKS[own.network], {"in_channels": channels, "side_px": side_px, **own.model_dump()}
        values["latent_channels"] = latent_channels if own.conditional else 0
        if kind is DinoDiscriminator:
            values |= vision_shape(str(own.dino_model), "gan.dino_model")
        return kind(**{name: values[name] for name in kind.arguments})

    @classmethod
    def describe(cls, own: GanSettings, run: RunFacts) -> str:
        kind = "conditional " if own.conditional else "" if own.network == "patch" else f"{own.network} "
        text = f"{kind}discriminator from step {own.start:,}, in the autoencoder's loss from {own.felt_from:,}"
        text += f", half of its reconstructions from {own.replay:,} stored ones" if own.replay else ""
        return text + (f": never, the run ends at {run.steps:,}" if own.felt_from >= run.steps else "")

    @classmethod
    def diagnose(cls, own: GanSettings, run: RunFacts, lines: Sequence[Mapping[str, Any]]) -> str:
        mean, step = recent_means(lines), lines[-1]["step"]
        if not own.weight:
            return "reconstruction losses only (gan.weight is 0)"
        if step <= own.start:
            return f"reconstruction losses only; the discriminator starts at step {own.start:,}"
        if "accuracy" not in mean:
            return "the discriminator has just started"
        tells = f"it tells {mean['accuracy']:.0%} of real and reconstructed patches apart"
        if step <= own.felt_from:
            return f"the discriminator learns alone until step {own.felt_from:,}: {tells}"
        # a cap that binds is usual; a gradient that is small even so is not
        risen = step > own.felt_from + own.warmup
        capped = own.adaptive and mean.get("adaptive_weight", 0.0) >= 0.99 * own.adaptive_cap
        if risen and capped and mean.get("gradient_ratio", 1.0) < FAINT:
            return (
                f"the adversarial gradient is {mean['gradient_ratio']:.1g}x the reconstruction's at the last layer, "
                "and the adaptive weight is at gan.adaptive_cap: raise gan.adaptive_cap or gan.weight"
            )
        if mean.get("gradient_ratio", 0.0) > DOMINANT:
            return (
                f"the adversarial gradient is {mean['gradient_ratio']:.1f}x the reconstruction's at the last layer: "
                "expect invented texture; lower gan.weight"
            )
        if mean["accuracy"] > SURE:
            return (
                f"discriminator wins: {tells}, the gradient it gives is poor; "
                "lower optim.discriminator_lr, or try gan.lecam, gan.r1 or gan.diffaug"
            )
        if step - own.start < YOUNG_STEPS:
            return f"the discriminator is still young: {tells}"
        if mean["accuracy"] < BLIND:
            return f"discriminator blind: {tells}; raise optim.discriminator_lr or give it more steps"
        return f"balanced: {tells}"

    def draw(self, numbers: Sequence[int], latent_shape: Sequence[int]) -> tuple[Tensor, ...]:
        """Return numbers for gan.diffaug, (N, 14), the first half for real images and the other for reconstructions,
        and for gan.replay, (N,)."""
        augmentation = (augmentation_numbers(self.run.seed, numbers, 2 * NUMBERS),) if self.own.diffaug else ()
        return (*augmentation, replay_numbers(self.run.seed, numbers)) if self.own.replay else augmentation

    def backward(self, p: Pass) -> None:
        own = self.own
        self.phase, self.area = phase, area = phase_at(p.step, own), p.batch.area
        if p.first:
            image, latent = p.image.detach()[0], p.out.to_decode.detach()[0]
            self.newest = (image, latent) if self.replay is not None and phase.discriminator else None
        if not phase.discriminator:
            return
        real = p.batch.target.detach().requires_grad_() if phase.r1 else p.batch.target
        fake = p.image if phase.generator else p.image.detach()
        with p.autocast(enabled=not phase.r1):  # a second derivative in bf16 is too inexact
            real_logits, fake_logits, judged = self.discriminate(p, real, fake)
        p.logs["logits_real"], p.logs["logits_fake"] = real_logits.detach().mean(), fake_logits.detach().mean()
        p.logs["accuracy"] = 0.5 * ((real_logits > 0).float().mean() + (fake_logits < 0).float().mean())
        if phase.generator:
            generator = generator_loss(own.loss, fake_logits)
            (gradient,) = torch.autograd.grad(generator, p.image, retain_graph=True)
            p.logs["generator"] = generator.detach()
            self.balance.measure_at_decoder(p, gradient)
            p.send_image(gradient, phase.generator * self.balance.at(area) if own.adaptive else phase.generator)
        loss = discriminator_loss(own.loss, real_logits, judged)
        p.logs["discriminator"] = loss.detach()
        if own.lecam:
            real_average, fake_average, known = self.lecam_anchors()
            lecam = known * lecam_loss(real_logits, judged, real_average, fake_average)
            p.logs["lecam"] = lecam.detach()
            p.global_means["gan/logits"] = torch.stack([p.logs["logits_real"], p.logs["logits_fake"]])
            loss = loss + own.lecam * lecam
        if phase.r1:
            penalty = r1_penalty(real_logits, real)
            p.logs["r1"] = penalty.detach()
            loss = loss + phase.r1 * penalty
        # `inputs`: the reconstruction must not receive the discriminator's gradient
        (loss / p.accumulation).backward(inputs=list(self.adversary.parameters()))

    def discriminate(self, p: Pass, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logits of real images, of reconstructions, and of those that the discriminator learns from.

        The last two are the same without gan.replay, and before the first reconstruction is stored. With it, those of
        every second sample are of a stored reconstruction.

        Args:
            p: The pass.
            real: (N, C, H, W) in [-1, 1].
            fake: (N, C, H, W) reconstructions.

        Returns:
            Float32 logits, three tensors of one shape.
        """
        own = self.own
        images, latents, numbers = [real, fake], [p.out.to_decode.detach()] * 2, p.batch.draws.get(self.name, ())
        odd = slice((p.batch.numbers[0] + 1) % 2, None, 2)
        stored, there = p.step - own.start, None
        if self.replay is not None and stored and range(*odd.indices(len(fake))):
            earlier, their_latents, there = self.replay.chosen(numbers[-1][odd], stored)
            images, latents = [*images, earlier], [*latents, their_latents]
        if own.diffaug:
            halves = (numbers[0][:, :NUMBERS], numbers[0][:, NUMBERS:], numbers[0][odd, NUMBERS:])
            images = [augment(x, one, own.diffaug) for x, one in zip(images, halves, strict=False)]
        shown = [(x, z) if own.conditional else (x,) for x, z in zip(images, latents, strict=True)]
        network = p.adversaries[self.name]
        if own.norm == "batch":  # each kind of images with its own statistics, as published
            logits = [network(*one) for one in shown]
        else:
            together = (torch.cat(tensors) for tensors in zip(*shown, strict=True))
            logits = list(network(*together).split([len(x) for x in images]))
        real_logits, fake_logits, *replayed = logits
        judged = fake_logits
        if there is not None:
            judged = fake_logits.clone()
            known = there.view(-1, *[1] * (judged.ndim - 1))
            judged[odd] = torch.where(known, replayed[0], fake_logits[odd])
        return real_logits, fake_logits, judged

    def lecam_anchors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return running averages of the logits of real and reconstructed images, and whether there are any (0 or 1).

        They are divided by the total weight of the steps, 1 - decay^t after t steps, as `zero_debias` of TensorFlow's
        moving averages does in the authors' code (google/lecam-gan, stylegan2/lecam_loss.py).
        """
        real, fake = self.lecam_averages / self.lecam_share.clamp(min=1e-6)
        return real, fake, (self.lecam_share > 0).float()

    def remember(self, means: Mapping[str, Tensor], logs: dict[str, Tensor]) -> None:
        balance = self.balance
        if balance.term in means:
            # the size of the adversarial gradient at the last layer in this step, relative to the reconstruction's
            weight = self.phase.generator * (balance.at(self.area) if self.own.adaptive else 1.0)
            term, reconstruction = means[balance.term].norm(), means[balance.reconstruction].norm()
            logs["gradient_ratio"] = (weight * term / (reconstruction + 1e-12)).nan_to_num(0.0)
            if self.own.adaptive:
                balance.update(means, self.area)
                logs["adaptive_weight"] = balance.weight.clone()
        if (averages := means.get("gan/logits")) is not None:
            for old, new in ((self.lecam_averages, averages), (self.lecam_share, torch.ones_like(self.lecam_share))):
                old.copy_(torch.where(averages.isfinite().all(), torch.lerp(old, new, 1.0 - LECAM_DECAY), old))

    def after_update(
        self, step: int, skipped: Tensor, model: "Reconstructor", optimizer: torch.optim.Optimizer
    ) -> None:
        if self.replay is not None and self.newest is not None:
            self.replay.store(*self.newest, self.run.seed, step - self.own.start, skipped)

    def trains_adversary(self, step: int) -> bool:
        return phase_at(step, self.own).discriminator

    def facts(self) -> dict[str, Any]:
        """Return the checksum of the discriminator's frozen network, if it has one."""
        sha256 = self.adversary.shape.get("sha256")
        return {"dino_sha256": sha256} if sha256 is not None else {}

    def refuse_another(self, facts: Mapping[str, Any]) -> None:
        before, now = facts.get("dino_sha256"), self.adversary.shape.get("sha256")
        if before != now:
            raise UserError(
                f"gan.dino_model: the discriminator learned on weights with sha256 {before}, those in this folder have "
                f"{now}: restore the former, or choose another output_dir"
            )

    def cost(self, step: int) -> float:
        phase = phase_at(step, self.own)
        return float(phase.discriminator) + float(phase.generator > 0) + float(phase.r1 > 0)


def settings_of_others(network: str) -> list[str]:
    """Return the keys of the section that concern other values of gan.network than this one."""
    keys = (key.removeprefix("gan.") for key in SHAPE[1:])
    return [key for key in keys if network in NETWORKS and key not in NETWORKS[network].settings]


def network_problems(own: GanSettings, run: RunFacts, model: ModelFacts | None) -> Iterator[Problem]:
    """Yield settings that do not go with the discriminator that gan.network names.

    Args:
        own: The settings.
        run: Facts of the run.
        model: Facts of the autoencoder; None before they are known.
    """
    kind = NETWORKS[own.network]
    for key in settings_of_others(own.network):
        if getattr(own, key) != GanSettings.model_fields[key].default:
            others = " and ".join(name for name, other in NETWORKS.items() if key in other.settings)
            yield Problem(f"gan.{key}", f"is for gan.network {others}, and this one is {own.network}: leave it out")
    if kind.norms and own.norm not in kind.norms:
        yield Problem("gan.norm", f"{own.norm} is not for gan.network {own.network}: use {' or '.join(kind.norms)}")
    yield from (Problem(f"gan.{key}", text) for key, text in kind.misfits(run.resolution, **own.model_dump()))
    if kind is DinoDiscriminator and own.dino_model is None:
        yield Problem(
            "gan.dino_model", "gan.network=dino needs a folder with a vision transformer (docs/weights.md): give it"
        )
    elif kind is DinoDiscriminator:
        yield from folder_problems("gan.dino_model", str(own.dino_model))
    if not kind.any_size and not run.one_size:
        yield Problem(
            "gan.network", f"{own.network} takes images of one size, and latents.equivariance scales them: set it to 0"
        )
    if not kind.any_size and set(run.crop_sizes) != {(run.resolution, run.resolution)}:
        yield Problem("gan.network", f"{own.network} takes square images of one size: leave data.buckets out")
    if own.replay and not run.one_size:
        yield Problem("gan.replay", "stores images of one size, and latents.equivariance scales them: set one to 0")
    if own.replay and len(run.crop_sizes) > 1:
        yield Problem("gan.replay", "stores images of one size: set it to 0, or leave data.buckets out")
    if own.replay and model is not None and not model.one_grid:
        yield Problem("gan.replay", f"{model.name} has latents on several grids, and one is stored: set it to 0")
    if own.conditional and "equivariance" in run.enabled:
        yield Problem(
            "gan.conditional", "shows latents as they are, and latents.equivariance changes them: set one to 0"
        )
    if own.conditional and set(own.diffaug) - {"color"}:
        yield Problem("gan.diffaug", "moves images against the latents that gan.conditional shows: use [color] or []")
    if own.conditional and model is not None and not model.one_grid:
        yield Problem(
            "gan.conditional", f"{model.name} has latents on several grids, and one is shown: set it to false"
        )
    if model is not None and kind.channels is not None and model.channels not in kind.channels:
        channels = " or ".join(map(str, kind.channels))
        yield Problem(
            "gan.network", f"{own.network} sees {channels} channels, {model.name} has {model.channels}: use patch"
        )


def shape_of(settings: Any) -> dict[str, Any]:
    """Return what decides whether a discriminator can start from another run's, by the full keys of the settings.

    Args:
        settings: All settings of a run.
    """
    more = () if NETWORKS[settings.gan.network].any_size else ("data.resolution",)
    return {key: attrgetter(key)(settings) for key in (*SHAPE, *more)}


def phase_at(step: int, own: GanSettings) -> Phase:
    """Return the phase of a step: nothing before `start`, then the discriminator alone, then a linear rise of the term.

    Args:
        step: Number of the step, from 0.
        own: The settings.
    """
    if not own.weight or step < own.start:
        return Phase(False, 0.0)
    since = step - own.felt_from
    r1 = own.r1 * own.r1_every if (step - own.start) % own.r1_every == 0 else 0.0
    return Phase(True, own.weight * min(1.0, max(0, since + 1) / (own.warmup + 1)), r1)
