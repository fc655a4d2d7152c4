"""Memory and arithmetic of a training step, known before a run starts: the step runs on tensors without data."""

import copy
import math
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import ModelMixin
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from latent_ae.arithmetic import training_memory_format
from latent_ae.config import UserError
from latent_ae.files import amount
from latent_ae.models.build import channels_of, factor_of, facts_of, latent_channels_of

from .build import build_objectives
from .data import drawn_batch
from .optim import Ema
from .preflight import dearest_step
from .settings import TrainSettings
from .step import TrainStep


class Gpu(NamedTuple):
    """What a plan needs to know of a GPU."""

    memory_gb: float
    """GB of 1e9 bytes."""
    tflops: float = 0.0
    """Peak of dense bf16 matrix products, TFLOP/s, as its maker states it; 0 if it is not known."""


GPUS = {
    "a100-40gb": Gpu(42.9, 312),
    "a100": Gpu(85.9, 312),
    "h100": Gpu(85.9, 989),
    "h200": Gpu(151.0, 989),
    "b200": Gpu(193.0, 2250),
    "l40s": Gpu(51.5, 362),
    "rtx3090": Gpu(25.8, 71),
    "rtx4090": Gpu(25.8, 165),
    "rtx5090": Gpu(34.2, 210),
}
"""GPUs by name. Their memory is stated in GiB by their makers, and is in GB here."""
USUAL = "80"
"""The GPU for which a plan is made, if none is named: one of 80 GB."""
RESERVED = 0.08
"""Fraction of a GPU's memory that is left for CUDA itself, cuDNN's workspaces and gaps between tensors."""
UTILISATION = 0.3
"""Fraction of the peak that a training of convolutions is assumed to reach."""


def gpu_of(word: str) -> Gpu:
    """Return a GPU by its name, or by its memory in GB.

    Raises:
        UserError: If the word is neither.
    """
    known = GPUS.get(word.lower().replace(" ", "").replace("_", "-"))
    if known is not None:
        return known
    try:
        memory = float(word.lower().removesuffix("gb"))
    except ValueError:
        memory = 0.0
    if not 0 < memory < float("inf"):
        raise UserError(f"--gpu: {word} is not known: give its memory in GB, or one of {', '.join(GPUS)}")
    return Gpu(memory)


class StepCost(NamedTuple):
    """What the most expensive step of a run needs, on one process. Memory is in bytes of tensors."""

    networks: int
    """Parameters and buffers of all networks, trained and frozen."""
    average: int
    """The average of the weights."""
    optimizers: int
    """States of the optimizers."""
    gradients: int
    """Gradients of all trained parameters."""
    first_image: int
    """What the first image of a micro-batch adds at the step's peak: activations and their gradients."""
    per_image: int
    """What each further image adds."""
    flops_per_image: int
    """Floating point operations of a step for each image, forward and backward, of all networks."""

    @property
    def fixed(self) -> int:
        """Memory that does not depend on the micro-batch."""
        return self.networks + self.average + self.optimizers + self.gradients

    def peak(self, micro_batch: int) -> int:
        """Return the memory at the step's peak."""
        return self.fixed + self.first_image + (micro_batch - 1) * self.per_image

    def largest_micro_batch(self, memory: float) -> int:
        """Return the largest micro-batch that fits into `memory` bytes with RESERVED left free; 0 if none does."""
        free = (1 - RESERVED) * memory - self.fixed - self.first_image
        return 1 + int(free // self.per_image) if free >= 0 else 0


def describe_cost(settings: TrainSettings, autoencoder: ModelMixin, gpu: Gpu) -> dict[str, str]:
    """Return lines of the plan about memory and arithmetic by their headings.

    Args:
        settings: The run's settings.
        autoencoder: As for `step_cost`.
        gpu: The GPU for which it is planned.
    """
    try:
        cost = step_cost(settings, autoencoder)
    except UserError as error:  # for example a vision model whose folder is not there yet
        return {"memory": f"not computed: {error}"}
    size, most = settings.micro_batch, cost.largest_micro_batch(gpu.memory_gb * 1e9)
    parts = {
        "networks": cost.networks,
        "average": cost.average,
        "optimizer states": cost.optimizers,
        "gradients": cost.gradients,
        "each image": cost.per_image,
    }
    fits = f"up to {most:,} images fit" if most else "not even one image fits"
    lines = {
        "memory": f"{amount(cost.peak(size))} for a micro-batch of {size}; {fits} into {gpu.memory_gb:g} GB",
        "of which": ", ".join(f"{name} {amount(part)}" for name, part in parts.items() if part),
        "arithmetic": f"{cost.flops_per_image / 1e12:.3g} TFLOPs per image, "
        f"{cost.flops_per_image * settings.batch_size / 1e12:,.3g} per step",
    }
    if gpu.tflops and settings.precision == "bf16":
        total = cost.flops_per_image * settings.batch_size * settings.steps / 1e12
        hours = total / (UTILISATION * gpu.tflops) / 3600
        lines["arithmetic"] += f"; {hours:,.0f} GPU hours if {UTILISATION:.0%} of {gpu.tflops:,.0f} TFLOP/s are reached"
    return lines


def step_cost(settings: TrainSettings, autoencoder: ModelMixin, gpu: bool = True) -> StepCost:
    """Return what a run's most expensive step needs, without computing it: only shapes pass through the networks.

    With data.buckets it is a step on the largest crops.

    Counted are the tensors that are alive at the same time, each with its whole storage. What kernels use inside
    themselves, gaps between tensors and CUDA's own memory come on top.

    Args:
        settings: The run's settings.
        autoencoder: The autoencoder with which the run starts, with weights or without (device "meta").
        gpu: Whether the step is that of a GPU, which under bf16 computes norms in float32, or of this CPU.

    Raises:
        UserError: If a network of an objective cannot be loaded.
    """
    small, large = (_measured(settings, autoencoder, gpu, size) for size in (2, 4))
    per_image = (large.peak - small.peak) // 2
    first_image = small.peak - sum(small.fixed) - per_image
    return StepCost(*small.fixed, first_image, per_image, small.flops // 2)


class _Measured(NamedTuple):
    fixed: tuple[int, int, int, int]
    """As the first fields of StepCost."""
    peak: int
    flops: int


def _measured(settings: TrainSettings, autoencoder: ModelMixin, gpu: bool, size: int) -> _Measured:
    autoencoder = copy.deepcopy(autoencoder).to("meta")
    batch_size = size * settings.accumulation * settings.processes
    fresh = settings.gan.model_copy(update={"init_from": None})  # in a later phase it is not there yet
    optim = settings.optim.model_copy(update={"layerwise": False})  # it looks at data, and needs hardly any memory
    changes = {"micro_batch_size": size, "batch_size": batch_size, "gan": fresh, "optim": optim}
    changes["compile"] = False  # compiled blocks keep less; how much, only compiling them would show
    settings = settings.model_copy(update=changes)
    objectives = build_objectives(settings, autoencoder, torch.device("meta"))
    for objective in objectives:
        objective.run = settings.facts(facts_of(autoencoder))
    ema = Ema(autoencoder, settings.ema.decay) if settings.ema.decay else None
    layout = torch.channels_last if gpu else training_memory_format(torch.device("cpu"))
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        Allocations() as used,
        NormsInFloat32() if gpu else nullcontext(),
    ):
        for network in (autoencoder, *objectives):
            without_data_(network)
        of_networks = used.now
        if ema is not None:
            without_data_(ema.module)
        of_average = used.now - of_networks
        step = TrainStep(settings, cast(Accelerator, _OneProcess()), autoencoder, objectives, ema, layout)
        for network in step.bare_adversaries.values():
            network.train()
        states = step.optimizers.memory_placeholder()
        trained = [one for network in step.networks for one in network.parameters() if one.requires_grad]
        of_states = used.now - of_average - of_networks
        of_gradients = sum(one.nbytes for one in trained)
        used.peak = used.now
        height, width = max(settings.data.crop_sizes, key=math.prod)
        factor = factor_of(autoencoder)
        images = torch.empty(size, channels_of(autoencoder), height, width, memory_format=layout)
        noise = torch.empty(size, latent_channels_of(autoencoder), height // factor, width // factor)
        batch = drawn_batch(images, noise, range(size), objectives)
        if settings.decoder.latents is not None:
            batch = batch._replace(decode=noise)
        step.forward_backward(batch, dearest_step(step))
        del states
    if settings.accumulation > 1:  # the placeholder has the gradients of earlier passes
        of_states -= of_gradients
    return _Measured((of_networks, of_average, of_states, of_gradients), used.peak, used.flops)


def without_data_(module: nn.Module) -> None:
    """Replace all parameters and buffers by tensors of the same shapes, in place, inside a FakeTensorMode.

    Networks and tensors that its modules hold without registering them (frozen ones, adversaries) are included.
    """
    tensors = [*module.parameters(), *module.buffers()]
    if tensors and all(isinstance(one, FakeTensor) for one in tensors):  # two modules can hold the same one
        return
    trained = {name: one.requires_grad for name, one in module.named_parameters()}
    module.to_empty(device="cpu")
    for name, one in module.named_parameters():
        one.requires_grad_(trained[name])
    for part in module.modules():
        for name, held in list(vars(part).items()):
            if isinstance(held, nn.Module):
                without_data_(held)
            elif isinstance(held, Tensor) and held.is_meta:
                setattr(part, name, torch.empty_like(held, device="cpu"))


class Allocations(TorchDispatchMode):
    """Counts the bytes of all tensors that are made and alive in a `with` block, and the arithmetic of what is called.

    Torch's own FlopCounterMode hangs hooks on modules, with which gradients of some objectives cannot be taken.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
            if func._overloadpacket is torch.ops.aten.convolution_backward and args[9] > 1 and args[10][1]:
                # torch's formula for the weight's gradient does not know of groups
                without = count(*args[:10], [args[10][0], False, False], out_val=out)
                of_weight = count(*args, out_val=out) - without
                self.flops -= of_weight - of_weight // args[9]
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.known:
            return
        size = storage.nbytes()
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


class NormsInFloat32(TorchFunctionMode):
    """Computes norms in float32, as an autocast does on a GPU and not on a CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (F.group_norm, F.layer_norm, torch.group_norm, torch.layer_norm):
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


class _OneProcess:
    """What the step uses of an accelerator, for one process that runs nothing."""

    num_processes = 1

    device = torch.device("cpu")

    def prepare_model(self, network: nn.Module) -> nn.Module:
        return network

    def no_sync(self, network: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()
