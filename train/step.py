"""One training step of all networks from a single autoencoder pass per micro-batch.

The reconstruction is detached from the graph: every loss is differentiated with respect to the *image*, and the summed
gradient is sent back through the autoencoder once (`objectives.base.Pass`). So each gradient is available separately
without a second pass, and none reaches a network that it must not train. The losses are defined by the objectives.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from latent_ae.arithmetic import lay_out, training_memory_format
from latent_ae.config import UserError
from latent_ae.models.reconstruct import Reconstructor
from latent_ae.objectives.base import Batch, Objective, Pass

from .optim import Ema, Optimizers
from .settings import TrainSettings

TAKEN = ("autoencoder", "ema", "muon", "heads", "objectives")
"""Names of other files or optimizers in a checkpoint."""


class TrainStep:
    """Networks, objectives and optimizers; calling it with the step's number makes one update of all of them.

    Args:
        settings: The run's settings.
        accelerator: Wraps networks for distributed training; the bare networks own parameters and state.
        autoencoder: The autoencoder that is trained, on the CPU or the device.
        objectives: The objectives in the order in which they act.
        ema: The average of the autoencoder's weights, or None.
        layout: Memory format of the networks; None takes the fastest one on the device.

    Raises:
        UserError: If two objectives have the same name.
    """

    def __init__(
        self,
        settings: TrainSettings,
        accelerator: Accelerator,
        autoencoder: nn.Module,
        objectives: Sequence[Objective[Any]],
        ema: Ema | None,
        layout: torch.memory_format | None = None,
    ):
        self.settings, self.accelerator, self.ema = settings, accelerator, ema
        self.objectives = {objective.name: objective for objective in objectives}
        _refuse_equal_names(objectives)
        self.state = nn.ModuleDict(self.objectives)
        if any(tensor.device != accelerator.device for tensor in (*self.state.parameters(), *self.state.buffers())):
            self.state.to(accelerator.device)
        heads = {name: head for name, one in self.objectives.items() if (head := one.head()) is not None}
        layout = training_memory_format(accelerator.device) if layout is None else layout
        self.bare_reconstructor = lay_out(Reconstructor(autoencoder, heads), layout)
        self.reconstructor = accelerator.prepare_model(self.bare_reconstructor)
        self.bare_adversaries = {n: one.adversary for n, one in self.objectives.items() if one.adversary is not None}
        self.adversaries = {
            name: accelerator.prepare_model(lay_out(network, layout)) for name, network in self.bare_adversaries.items()
        }
        self.optimizers = Optimizers(settings, self.bare_reconstructor, objectives)
        self.skipped_steps = self.optimizers.skipped.newest
        self.mean_over_processes = mean_over_processes
        norms = batch_norms(autoencoder)
        self.fixed_norms = [norm for norm in norms if not norm.weight.requires_grad]
        self.statistics = [
            buffer
            for norm in norms
            if norm.weight.requires_grad
            for buffer in (norm.running_mean, norm.running_var)
            if buffer is not None
        ]
        """Running statistics of batch normalisations, of which each process computes its own."""

    @property
    def networks(self) -> list[nn.Module]:
        """The trained networks, not wrapped; the last holds the objectives' own state and parameters."""
        return [self.bare_reconstructor, *self.bare_adversaries.values(), self.state]

    def __call__(self, step: int, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """Make one update from `settings.accumulation` micro-batches.

        Args:
            step: Number of the step, from 0.
            batches: Yields micro-batches on the device.

        Returns:
            This process's mean losses, diagnostics and gradient norms by name, scalars on the device; nothing waits for
            them.
        """
        passes, logs, means = self.settings.accumulation, dict[str, Tensor](), dict[str, Tensor]()
        buffers = [buffer for network in self.networks for buffer in buffers_to_restore(network)]
        before = [buffer.clone() for buffer in buffers]
        # an autocast drops its casts of weights when the outermost one ends; in this one all passes share them
        with self.autocast(enabled=False):
            for index in range(passes):
                # spectral norm takes one power iteration per step, however the batch is split
                for network in self.bare_adversaries.values():
                    network.train(index == 0)
                with nullcontext() if index == passes - 1 else self.without_synchronisation():
                    done = self.forward_backward(next(batches), step, index == 0)
                for sums, values in ((logs, done.logs), (means, done.global_means)):
                    sums |= {name: sums[name] + value if name in sums else value for name, value in values.items()}
        logs = {name: value / passes for name, value in logs.items()}
        for parameter in self.state.parameters():  # their gradients are not averaged by a wrapper
            if parameter.grad is not None and self.accelerator.num_processes > 1:
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        reduced = self.mean_over_processes({name: value / passes for name, value in means.items()}, self.accelerator)
        for objective in self.objectives.values():
            objective.remember(reduced, logs)
        norms, skipped = self.optimizers(step)
        for objective in self.objectives.values():
            objective.after_update(step, skipped, self.bare_reconstructor, self.optimizers.autoencoder)
        for buffer, old in zip(buffers, before, strict=True):
            buffer.copy_(torch.where(skipped, old, buffer))
        if self.statistics:
            own = {str(number): buffer for number, buffer in enumerate(self.statistics)}
            for number, value in self.mean_over_processes(own, self.accelerator).items():
                own[number].copy_(value)
        if self.ema is not None:
            self.ema.update(self.bare_reconstructor.autoencoder, step)
            for objective in self.objectives.values():
                objective.after_average(self.ema.module)
        return logs | norms

    def forward_backward(self, batch: Batch, step: int, first: bool = True) -> Pass:
        """Add the gradients of one micro-batch to all networks.

        Args:
            batch: The micro-batch, on the device.
            step: Number of the step, from 0.
            first: Whether it is this process's first pass of the step.

        Returns:
            The pass, with its logs.
        """
        for norm in self.fixed_norms:  # which a validation has put into training mode
            norm.eval()
        with self.autocast():
            for objective in self.objectives.values():
                batch = objective.prepare(batch, step)
            out = self.reconstructor(
                batch.images,
                batch.noise,
                batch.transforms,
                batch.decode,
                batch.quantiser,
                batch.second,
                batch.draws,
                batch.path,
            )
        done = Pass(
            batch,
            out,
            step,
            self.settings.accumulation,
            self.bare_reconstructor,
            self.adversaries,
            self.autocast,
            first,
        )
        for objective in self.objectives.values():
            objective.backward(done)
        done.backward()
        done.logs["latent_std"] = out.latent.detach().std()
        return done

    def autocast(self, enabled: bool = True) -> torch.autocast:
        """Return the context of the networks' precision."""
        enabled = enabled and self.settings.precision == "bf16"
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=enabled)

    def without_synchronisation(self) -> ExitStack:
        """Return a context in which gradients are not averaged over processes, for all passes but the last."""
        stack = ExitStack()
        for network in (self.reconstructor, *self.adversaries.values()):
            stack.enter_context(self.accelerator.no_sync(network))
        return stack


def _refuse_equal_names(objectives: Sequence[Objective[Any]]) -> None:
    """Raise UserError if two objectives, or their files in a checkpoint, would have the same name."""
    names = [objective.name for objective in objectives]
    networks = [objective.network_name for objective in objectives if objective.adversary is not None]
    for kind, all_of in (("a name", names), ("an adversary_name", [*TAKEN, *networks])):
        if twice := {name for name in all_of if all_of.count(name) > 1}:
            raise UserError(f"objectives: each needs {kind} of its own, and there are two: {', '.join(sorted(twice))}")


def batch_norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    """Return the batch normalisations of a network that act in its forward pass, unlike the one of an
    AutoencoderKLFlux2, which has no weights and is for diffusion models."""
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d) and module.affine]


def mean_over_processes(means: dict[str, Tensor], accelerator: Accelerator) -> dict[str, Tensor]:
    """Return means over all processes, computed in one collective; all must pass the same names and shapes."""
    if accelerator.num_processes == 1 or not means:
        return means
    values = list(means.values())
    flat = accelerator.reduce(torch.cat([value.flatten() for value in values]), "mean")
    pieces = flat.split([value.numel() for value in values])
    return {name: piece.view_as(means[name]) for name, piece in zip(means, pieces, strict=True)}


def buffers_to_restore(network: nn.Module) -> list[Tensor]:
    """Return the buffers that must be as before when a step is skipped: all but those of `rolled_back = False`."""
    return [
        buffer
        for module in network.modules()
        if getattr(module, "rolled_back", True)
        for buffer in module.buffers(recurse=False)
    ]
