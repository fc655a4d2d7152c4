"""LPIPS for training: finite gradients everywhere, little memory, in the ambient autocast precision."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from latent_ae.pretrained.weights import weight_file

# No feature norm falls under 0.3 on photographs and flat colours, where this changes no digit. Where all channels
# are zero, it bounds the derivative of the unit normalisation by EPS ** -0.5.
EPS = 1e-8
Net = Literal["vgg", "alex"]


class Conv(NamedTuple):
    """A convolution of the trunk by its position in torchvision's `features`."""

    position: int
    stride: int = 1
    padding: int = 1


class Trunk(NamedTuple):
    """Five stages of convolution + ReLU; the last ReLU of each stage is compared."""

    weights: str
    stages: tuple[tuple[Conv, ...], ...]
    pool_px: int
    pooled_stages: tuple[int, ...]  # these begin with a max pooling of stride 2
    min_px: int
    features: int
    """Channels of the last stage."""


TRUNKS: dict[Net, Trunk] = {
    "vgg": Trunk(
        weights="vgg16",
        stages=(
            (Conv(0), Conv(2)),
            (Conv(5), Conv(7)),
            (Conv(10), Conv(12), Conv(14)),
            (Conv(17), Conv(19), Conv(21)),
            (Conv(24), Conv(26), Conv(28)),
        ),
        pool_px=2,
        pooled_stages=(1, 2, 3, 4),
        min_px=16,
        features=512,
    ),
    "alex": Trunk(
        weights="alexnet",
        stages=(
            (Conv(0, stride=4, padding=2),),
            (Conv(3, padding=2),),
            (Conv(6),),
            (Conv(8),),
            (Conv(10),),
        ),
        pool_px=3,
        pooled_stages=(1, 2),
        min_px=31,
        features=256,
    ),
}


class LPIPS(nn.Module):
    """Learned perceptual distance, version 0.1 (Zhang et al. 2018, arXiv:1801.03924), frozen.

    The linear heads are those of the installed `lpips` package, the trunk comes from `latent_ae.pretrained.weights`.
    There is no dropout, so `train()` changes nothing. All tensors are non-persistent buffers, so optimizers, averages
    of weights and checkpoints never see them. The trunk runs in the ambient autocast precision, the comparison of
    features in float32.

    Distances differ from those of `lpips` by less than 1e-6: the unit normalisation divides by
    sqrt(sum f^2 + 1e-8) where `lpips` divides by sqrt(sum f^2) + 1e-10, whose gradient is not finite where the squares
    vanish. Gradients can be taken once (there is no double backward).

    Args:
        net: "vgg" (the usual training loss) or "alex" (the usual metric).
        weights_folder: The folder to search first; see `latent_ae.pretrained.weights.weight_file`.
        weights: Whether to load the trunk's weights; without them it has shapes and no data (device "meta").

    Raises:
        ValueError: If `net` is unknown.
        UserError: If the weights are not available.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self, net: Literal["vgg", "alex"] = "vgg", weights_folder: str | Path | None = None, weights: bool = True
    ) -> None:
        super().__init__()
        if net not in TRUNKS:
            raise ValueError(f"LPIPS net must be one of {', '.join(TRUNKS)}, not {net!r}")
        self.net = net
        self.trunk = TRUNKS[net]
        self._casts: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._keep("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self._keep("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        tensors = load_file(weight_file(self.trunk.weights, weights_folder)) if weights else _shapes(self.trunk.weights)
        for name, tensor in tensors.items():
            layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
            self._keep(name.replace("features.", "conv").replace(".", "_"), tensor.contiguous(memory_format=layout))
        for number, head in enumerate(_linear_heads(net)):
            self._keep(f"head{number}", head)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the distances of image pairs.

        Args:
            x: (N, C, H, W) floating point in [-1, 1]; C is 3, or 1, which is repeated to 3.
            y: The same shape. If only one of the two needs a gradient, no activations are kept for the other.

        Returns:
            (N,) float32.

        Raises:
            ValueError: If shapes or types differ from these, or a side is under 16 px (vgg) or 31 px (alex).
        """
        self._check(x, y)
        if not torch.is_grad_enabled() or x.requires_grad == y.requires_grad:
            return self.compare(x, [y])[0][0]
        # The distance is symmetric, so swap the two where y is the one with a gradient.
        if y.requires_grad:
            x, y = y, x
        x_features, y_features = self._prepare(x), self._prepare(y)
        distance = torch.zeros((), device=x.device)
        for number in range(len(self.trunk.stages)):
            x_features = self._stage(number, x_features)
            with torch.no_grad():
                y_features = self._stage(number, y_features)
            distance = distance + self._compare(number, x_features, y_features)
        return distance

    def compare(self, x: Tensor, others: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the distances of x to each of several image batches. The trunk runs on x only once.

        Args:
            x: Images as in `forward`.
            others: Batches of the same shape.

        Returns:
            A (N,) float32 tensor of distances for each of `others`; and for x and each of them the features of the last
            stage, averaged over the image: (N, 512) of vgg or (N, 256) of alex.

        Raises:
            ValueError: As in `forward`.
        """
        for y in others:
            self._check(x, y)
        features, count = self._prepare(torch.cat([x, *others])), 1 + len(others)
        distances = [torch.zeros((), device=x.device)] * len(others)
        for number in range(len(self.trunk.stages)):
            features = self._stage(number, features)
            first, *rest = features.chunk(count)
            distances = [total + self._compare(number, first, y) for total, y in zip(distances, rest, strict=True)]
        return distances, [part.mean(dim=(2, 3)) for part in features.chunk(count)]

    @torch.no_grad()
    def maps(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the distances of `forward` and a map of where they come from.

        Args:
            x: Images as in `forward`.
            y: Images of the same shape.

        Returns:
            (N,) float32 distances, and (N, H, W) float32 maps: the distances of each stage, resized to the image by
            bilinear interpolation and summed, as `lpips` does with `spatial=True`.

        Raises:
            ValueError: As in `forward`.
        """
        self._check(x, y)
        features, size = self._prepare(torch.cat([x, y])), list(x.shape[2:])
        distance, local = torch.zeros((), device=x.device), torch.zeros((), device=x.device)
        for number in range(len(self.trunk.stages)):
            features = self._stage(number, features)
            a, b = features.float().chunk(2)
            squares = (a * _inverse_norm(a)).sub_(b * _inverse_norm(b)).square_()
            here = squares.mul_(self.get_buffer(f"head{number}")).sum(1, keepdim=True)
            distance = distance + here.mean((1, 2, 3))
            local = local + F.interpolate(here, size, mode="bilinear", align_corners=False)
        return distance, local[:, 0]

    @torch.no_grad()
    def activations(self, images: Tensor, stages: Sequence[int]) -> list[Tensor]:
        """Return the last activations of some of the trunk's five stages, (N, C, h, w) each.

        Args:
            images: Images as in `forward`.
            stages: Numbers of the stages, from 0, ascending.
        """
        self._check(images, images)
        features, found = self._prepare(images), []
        for number in range(stages[-1] + 1):
            features = self._stage(number, features)
            if number in stages:
                found.append(features.float())
        return found

    def _prepare(self, images: Tensor) -> Tensor:
        images = (images.to(self.shift.dtype) - self.shift) / self.scale  # one channel broadcasts to three
        return images.contiguous(memory_format=torch.channels_last)

    def _stage(self, number: int, features: Tensor) -> Tensor:
        if number in self.trunk.pooled_stages:
            features = F.max_pool2d(features, self.trunk.pool_px, stride=2)
        for conv in self.trunk.stages[number]:
            features = F.conv2d(features, *self._weights(conv.position), conv.stride, conv.padding)
            # In place is safe: a convolution's backward needs its input, not its output.
            features = F.relu_(features)
        return features

    def _weights(self, position: int) -> tuple[Tensor, Tensor]:
        """Return weight and bias of a convolution in the ambient autocast's precision, cast at their first use only.

        An autocast itself keeps the casts of trained weights alone.
        """
        weight, bias = self.get_buffer(f"conv{position}_weight"), self.get_buffer(f"conv{position}_bias")
        if not torch.is_autocast_enabled(weight.device.type):
            return weight, bias
        dtype = torch.get_autocast_dtype(weight.device.type)
        if (position, dtype) not in self._casts:
            self._casts[position, dtype] = weight.to(dtype), bias.to(dtype)
        return self._casts[position, dtype]

    def _apply(self, *arguments: Any, **options: Any) -> "LPIPS":
        self._casts.clear()  # the weights move to another device or precision
        return super()._apply(*arguments, **options)

    def _compare(self, number: int, a: Tensor, b: Tensor) -> Tensor:
        return _UnitDistance.apply(a, b, self.get_buffer(f"head{number}"))

    def _keep(self, name: str, tensor: Tensor) -> None:
        self.register_buffer(name, tensor, persistent=False)

    def _check(self, x: Tensor, y: Tensor) -> None:
        if x.ndim != 4 or x.shape != y.shape or x.shape[1] not in (1, 3):
            raise ValueError(
                f"LPIPS compares two (N, 1 or 3, H, W) batches of one shape, not {tuple(x.shape)} and {tuple(y.shape)}"
            )
        if not (x.is_floating_point() and y.is_floating_point()):
            raise ValueError(f"LPIPS needs floating point images in [-1, 1], not {x.dtype} and {y.dtype}")
        if min(x.shape[2:]) < self.trunk.min_px:
            raise ValueError(
                f"LPIPS with net={self.net!r} needs images of at least {self.trunk.min_px} px, not {tuple(x.shape[2:])}"
            )


class _UnitDistance(torch.autograd.Function):
    """Mean over pixels of sum_c w_c (a_c/|a| - b_c/|b|)^2 with |a|^2 = sum_c a_c^2 + EPS, in float32.

    a, b: (N, C, H, W) in any precision; w: (1, C, 1, 1); result: (N,). Written by hand because autograd would keep
    some six float32 tensors of the size of the features: here a and b are kept as they are, plus their norms.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, w: Tensor) -> Tensor:
        with torch.autocast(a.device.type, enabled=False):
            a_scale, b_scale = _inverse_norm(a), _inverse_norm(b)
            difference = (a * a_scale).sub_(b * b_scale)
            distance = difference.square_().mul_(w).sum(dim=(1, 2, 3)) / a[0, 0].numel()
        ctx.save_for_backward(a, b, w, a_scale, b_scale)
        return distance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        a, b, w, a_scale, b_scale = ctx.saved_tensors
        with torch.autocast(a.device.type, enabled=False):
            a_unit, b_unit = a * a_scale, b * b_scale
            grad_unit = (a_unit - b_unit).mul_(w * (grad.view(-1, 1, 1, 1) * (2 / a[0, 0].numel())))
            grad_a = _through_norm(grad_unit, a_unit, a_scale, a.dtype) if ctx.needs_input_grad[0] else None
            grad_b = _through_norm(-grad_unit, b_unit, b_scale, b.dtype) if ctx.needs_input_grad[1] else None
        return grad_a, grad_b, None


def _inverse_norm(f: Tensor) -> Tensor:
    # a norm is one pass over the features where squares and their sum are two
    norm = torch.linalg.vector_norm(f, dim=1, keepdim=True, dtype=torch.promote_types(f.dtype, torch.float32))
    return norm.square_().add_(EPS).rsqrt_()


def _through_norm(grad_unit: Tensor, unit: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Derivative of f / sqrt(sum f^2 + EPS): (g - unit (unit . g)) / norm, exact with EPS included."""
    along = (grad_unit * unit).sum(dim=1, keepdim=True)
    return torch.addcmul(grad_unit, unit, along, value=-1).mul_(scale).to(dtype)


def _shapes(name: str) -> dict[str, Tensor]:
    """Return tensors without data (device "meta") of the shapes of a trunk's weights."""
    from torchvision import models

    with torch.device("meta"):
        network: nn.Module = getattr(models, name)()
    return {key: tensor for key, tensor in network.state_dict().items() if key.startswith("features.")}


def _linear_heads(net: str) -> list[Tensor]:
    """The five (1, C, 1, 1) heads that the `lpips` package ships; the package itself is not imported."""
    spec = importlib.util.find_spec("lpips")
    assert spec and spec.origin, "lpips is a dependency of this package"
    state = torch.load(Path(spec.origin).parent / f"weights/v0.1/{net}.pth", map_location="cpu", weights_only=True)
    return [state[f"lin{number}.model.1.weight"] for number in range(5)]
