"""The gradients and reduced numbers of steps whose global batch is split in one way or another.

A reference run in one pass saves its weights, optimizers and state before each step. Every other split starts each step
from these, so a difference is one of that step alone: weights after steps of Adam would rather show the processor's
rounding, which Adam scales up to full steps wherever a gradient is zero but for it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from latent_ae.models.build import factor_of, latent_channels_of
from latent_ae.models.settings import ModelSettings
from latent_ae_train.optim import Optimizers
from latent_ae_train.settings import TrainSettings
from latent_ae_train.step import TrainStep
from tests.runs import SHAPES
from tests.tiny import GAN, SIDE, adversary_of, build_step, micro_batches, settings_for

CODEBOOKS = ("VQModel", "VQVAE2")
TAUGHT: dict[str, Any] = {"kl": 1e-2, "learned_logvar": True, "perceptual": 0.5, "perceptual_every": 2}
FELT = {**GAN, "lecam": 0.1, "discriminator_warmup": 2, "warmup": 5}


class Case(NamedTuple):
    """A run of so many steps with `changes` to the tiny settings."""

    steps: int
    changes: dict[str, Any]


def cases(place: Path) -> dict[str, Case]:
    """All that a step can do, in two runs of 20 steps, and a few steps of every other class and likelihood.

    `place` holds the folders `vision`, `convnext`, `teacher`, `original` and `flow`. On several processes
    gan.norm=batch and loss.total_correlation are refused.
    """
    augmented = {"diffaug": ["color", "translation", "cutout"], "r1": 0.1, "r1_every": 3}
    found = {
        "pixels": Case(20, {"loss": TAUGHT, "gan": {**FELT, **augmented}}),
        "latents": Case(
            20,
            {
                "loss": {"kl": 1e-2, "kl_target": 0.06, "free_bits": 0.05},
                "latents": {"equivariance": 0.6, "noise": 1.0, "min_channels": 2},
                "alignment": {"model": str(place / "vision")},
                "gan": {**FELT, "blur": True, "layers": 2},
                "optim": {"kind": "muon"},
            },
        ),
        "capacity": Case(
            3,
            {
                "loss": {"pixel": "logistic", "scale": 0.3, "learned_logvar": True, "kl": 1.0, "kl_capacity": 3.0},
                "optim": {"layerwise": True},
            },
        ),
        "buckets": Case(
            3,
            {
                "data": {"buckets": [16, [24, 12], [8, 20]]},
                "loss": TAUGHT,
                "gan": {**FELT, "discriminator_warmup": 0},
            },
        ),
        "AutoencoderTiny, taught": Case(
            3,
            {
                "model": {"kind": "AutoencoderTiny", "config": SHAPES["AutoencoderTiny"]},
                "distillation": {"teacher": str(place / "teacher")},
                "gan": {**FELT, "discriminator_warmup": 0, "network": "stylegan", "channels": 4},
            },
        ),
        "frozen networks": Case(
            2,
            {
                "loss": {
                    **{"convnext": 0.3, "convnext_weights": str(place / "convnext")},
                    **{"dino": 0.7, "dino_model": str(place / "vision"), "dino_px": 8, "scale_consistency": 0.25},
                    "bands": [[2, 0, 1], [1]],
                },
                "gan": {
                    **{**FELT, "discriminator_warmup": 0, "network": "dino", "norm": "instance"},
                    **{"dino_model": str(place / "vision"), "dino_px": 8, "dino_kernel": 5},
                },
            },
        ),
    }
    found["RGBA"] = Case(
        2,
        {
            "model": {"in_channels": 4, "out_channels": 4},
            "loss": {**TAUGHT, "backgrounds": ["white", "random", "random"], "alpha": 0.5},
            "gan": {**FELT, "discriminator_warmup": 0},
        },
    )
    found["stored latents"] = Case(
        3,
        {
            **{"model": ModelSettings().model_dump(), "init_from": str(place / "original"), "train": "decoder"},
            "decoder": {"layers_per_block": 2, "latents": "given by `observed`"},
            "gan": {**FELT, "discriminator_warmup": 0},
        },
    )
    found["flow"] = Case(
        4,
        {
            **{"model": ModelSettings().model_dump(), "init_from": str(place / "original"), "train": "decoder"},
            "decoder": {
                **{"kind": "FlowMatchingVAE", "block_out_channels": [8]},
                "config": {"patch_size": 1, "unet_norm_num_groups": 4},
            },
            "loss": {"perceptual": 0.5, "perceptual_every": 2, "pixel_weight": 0.0},
            "gan": {**FELT, "discriminator_warmup": 0, "adaptive_cap": 1e6},
        },
    )
    found["distilled flow"] = Case(
        3,
        {
            **{"model": ModelSettings().model_dump(), "init_from": str(place / "flow"), "train": "decoder"},
            "flow": {"teacher_steps": 2},
            "loss": {"perceptual": 0.5, "pixel_weight": 0.0},
        },
    )
    found["codes"] = Case(
        4,
        {
            "model": {"kind": "VQModel", "config": SHAPES["VQModel"]},
            "codebook": {"normalised": True, "gradient": "rotation", "entropy": 0.1, "ema_decay": 0.9},
            "loss": {"revive_after": 2},
            "latents": {"noise": 0.8, "noise_form": "added"},
        },
    )
    labels = {"classes": 3, "weight": 0.5, "style_size": 3, "width": 8}
    found["density"] = Case(24, {"density": {"components": 2, "decay": 0.8}, "loss": {"kl": 1e-4}})
    found["labels"] = Case(3, {"semi_supervised": labels, "loss": {"kl": 1e-2}})
    for kind, shape in SHAPES.items():
        more: dict[str, Any] = {"revive_after": 1} if kind in CODEBOOKS else {"kl": 1e-3}
        more |= {"pixel": "logit_laplace"} if kind == "DiscreteVAE" else {}
        more |= {"kl_balance": True, "kl_warmup": 9, "spectral": 1e-3} if kind == "HierarchicalVAE" else {}
        gan = {**FELT, "discriminator_warmup": 0, "conditional": kind == "AutoencoderDC"}
        gan["replay"] = 2 if kind == "AutoencoderDC" else 0
        codebook = {"entropy": 0.1} if kind in CODEBOOKS else {}
        model = {"kind": kind, "config": shape}
        changes = {"model": model, "loss": more, "codebook": codebook, "gan": gan}
        found[kind] = Case(5 if kind in CODEBOOKS else 3, changes)
    return found


class Distance(nn.Module):
    """Stands for LPIPS, whose weights are not everywhere: squared differences of fixed features, one mean a sample."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(0))
        self.register_buffer("weight", weight)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        features = [torch.tanh(nn.functional.conv2d(x, self.weight)) for x in (images, targets)]
        return (features[0] - features[1]).square().mean((1, 2, 3))


def split_settings(case: Case, micro: int) -> TrainSettings:
    """Clipping, an average and a constant learning rate besides; `micro` samples of the 8 in a pass."""
    optim = {"clip": 1.0, "lr": 1e-3, **case.changes.get("optim", {})}
    changes = {"ema": {"decay": 0.9}, "batch_size": 8, "micro_batch_size": micro}
    return settings_for(**{**case.changes, **changes, "optim": optim})


def parts_of(step: TrainStep) -> dict[str, Any]:
    """All that a checkpoint would hold."""
    parts = {
        "reconstructor": step.bare_reconstructor,
        "discriminator": adversary_of(step),
        "average": step.ema.module if step.ema is not None else None,
        "state": step.state,
        "optimizer": step.optimizers.autoencoder,
        "muon": step.optimizers.muon,
        "discriminator_optimizer": step.optimizers.adversaries.get("gan"),
    }
    return {name: part for name, part in parts.items() if part is not None}


def saved(step: TrainStep) -> dict[str, Any]:
    return {name: _copied(part.state_dict()) for name, part in parts_of(step).items()}


def restore(step: TrainStep, before: dict[str, Any]) -> None:
    for name, part in parts_of(step).items():
        part.load_state_dict(_copied(before[name]))


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(one) for key, one in value.items()}
    return [_copied(one) for one in value] if isinstance(value, list) else value


class Watched:
    """The optimizers, with a look at the gradients before they are clipped."""

    def __init__(self, optimizers: Optimizers, look: Callable[[], None]):
        self.optimizers, self.look = optimizers, look

    def __call__(self, step: int) -> Any:
        self.look()
        return self.optimizers(step)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizers, name)


def observed(step: TrainStep, number: int) -> dict[str, Tensor]:
    """The gradients of one step before they are clipped, and what it takes over the global batch."""
    found: dict[str, Tensor] = {}
    optimizers = step.optimizers

    def look() -> None:
        networks = {"autoencoder": step.bare_reconstructor, "discriminator": adversary_of(step)}
        for name, network in networks.items():
            grads = [p.grad.flatten() for p in network.parameters() if p.grad is not None] if network else []
            found.update({f"gradient of the {name}": torch.cat(grads).clone()} if grads else {})
        for name, parameter in step.state.named_parameters():
            if parameter.grad is not None:
                found[f"gradient of {name}"] = parameter.grad.clone()

    step.optimizers = Watched(optimizers, look)  # type: ignore[assignment]
    try:
        autoencoder, rank = step.bare_reconstructor.autoencoder, step.accelerator.process_index
        latent = (latent_channels_of(autoencoder), *2 * [SIDE // factor_of(autoencoder)])
        batches = micro_batches(number, step.settings, rank, latent)
        if step.settings.decoder.latents is not None:
            batches = (batch._replace(decode=batch.noise) for batch in batches)
        step(number, batches)
    finally:
        step.optimizers = optimizers
    found |= {name: buffer.clone() for name, buffer in step.state.named_buffers()}
    if "codebook.code_age" in found:
        for level, codebook in enumerate(step.bare_reconstructor.codebooks, start=1):
            if codebook.requires_grad:  # only the revived codes: the others have been moved by Adam
                moments = step.optimizers.autoencoder.state[codebook]["exp_avg"]
                found[f"revived codes {level}"] = torch.where(moments.any(1, keepdim=True), 0.0, codebook.detach())
            else:
                found[f"averaged codes {level}"] = codebook.detach().clone()
    return found


KINK = 0.05
"""What a kink may change of a gradient."""


class Reference(NamedTuple):
    """A run in one pass a step: what each step started from, and what was observed in it."""

    states: list[dict[str, Any]]
    seen: list[dict[str, Tensor]]


def reference_run(case: Case) -> Reference:
    step, run = build_step(split_settings(case, 8), Distance()), Reference([], [])
    for number in range(case.steps):
        run.states.append(saved(step))
        run.seen.append(observed(step, number))
    return run


def observed_from(states: list[dict[str, Any]], step: TrainStep, numbers: Sequence[int]) -> list[dict[str, Tensor]]:
    """What is observed in the steps `numbers`, each from the state that the reference run started it with."""
    seen = []
    for number in numbers:
        restore(step, states[number])
        seen.append(observed(step, number))
    return seen


def differences(ours: Sequence[dict[str, Tensor]], theirs: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """The second largest difference over the steps of each thing observed, relative to its norm.

    In one step of all, a difference may be larger, up to KINK: where a value stands on the kink of a hinge, a ReLU or
    |x|, rounding decides on which side of it, and that changes a gradient by far more than rounding does. It happens in
    about one step of 500.
    """
    found: dict[str, list[float]] = {}
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            difference = (tensor - other[name]).norm()
            found.setdefault(name, []).append(float(difference / tensor.norm()) if difference else 0.0)
    return {
        name: max(values) if len(values) == 1 or max(values) > KINK else sorted(values)[-2]
        for name, values in found.items()
    }


def bypass(step: TrainStep) -> None:
    """Calls the bare autoencoder: its gradients are not averaged over the processes."""
    step.reconstructor = step.bare_reconstructor
    step.without_synchronisation = torch.enable_grad  # type: ignore[method-assign, assignment]


def bypass_discriminator(step: TrainStep) -> None:
    step.adversaries = step.bare_adversaries


def local_weight(step: TrainStep) -> None:
    """Every process takes the adaptive weight from its own share of the batch; all else is reduced."""
    gan, own = step.objectives["gan"], dict[str, Tensor]()
    keep_, remember = step.mean_over_processes, gan.remember

    def kept(means: dict[str, Tensor], accelerator: Any) -> dict[str, Tensor]:
        own.update({name: value.clone() for name, value in means.items()})
        return keep_(means, accelerator)

    def remembered(means: dict[str, Tensor], logs: dict[str, Tensor]) -> None:
        local = {name: own[name] for name in (gan.balance.term, gan.balance.reconstruction) if name in own}
        remember({**means, **local}, logs)

    step.mean_over_processes = kept  # type: ignore[method-assign]
    gan.remember = remembered  # type: ignore[method-assign, assignment]


def forgotten(step: TrainStep) -> None:
    """Nothing that the objectives remember is reduced."""
    step.mean_over_processes = lambda means, _: means  # type: ignore[method-assign]


BREAKAGES: dict[str, Callable[[TrainStep], None]] = {
    function.__name__: function for function in (bypass, bypass_discriminator, local_weight, forgotten)
}
BROKEN_STEPS = (4, 5, 6)
"""Taken with each breakage: the adversarial term is felt."""


def on_two_processes(rank: int, place: Path) -> None:
    """Takes the steps of every case on two processes in two passes, and some of the first two with each breakage.

    Reads `place`/CASE.pt and writes `place`/CASE.two.pt.
    """
    for name, case in cases(place).items():
        states = torch.load(place / f"{name}.pt", weights_only=False)
        step = build_step(split_settings(case, 2), Distance())
        found = {"": observed_from(states, step, range(case.steps))}
        tensors = [value for one in found[""] for value in one.values()]
        tensors += [parameter.detach() for network in step.networks for parameter in network.parameters()]
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        every = step.accelerator.gather(flat[None])
        assert bool((every == every[0]).all()), f"{name}: the processes hold different numbers"
        for breakage, break_it in BREAKAGES.items() if name in ("pixels", "latents") else ():
            broken = build_step(split_settings(case, 2), Distance())
            break_it(broken)
            found[breakage] = observed_from(states, broken, BROKEN_STEPS)
        if rank == 0:
            torch.save(found, place / f"{name}.two.pt")
