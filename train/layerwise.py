"""AdamW's steps made independent of the network's width: a learning rate for each layer, and centred inputs.

AdamW's first steps move every weight by about the learning rate, in the direction of its gradient's sign. The inputs of
a layer mostly have means that are not 0 (SiLU's outputs are positive; the linear start has constant channels), so the
changes of a layer's weights add up: its outputs move by up to lr A, where A is the sum of the inputs' sizes |x| over
the layer's receptive field, in all channels, positions and images alike. A grows with the width, and all layers of a
residual network push the same mean colour. It overshoots, and a start that reconstructs images is lost
(docs/linear-start.md).

Two measures, both from one pass of the new network:

* The learning rate of a layer's weights is divided by A, as muP (Yang et al. 2022) divides it by the fan-in.
* Weights move as if the layer were W (x - a) + b, where a is the mean of its inputs: their gradient is that of this
  layer, and after the update the bias makes up for what W a has changed. So only the bias moves the mean output, by one
  learning rate in a step. The network and its files stay what they are. LeCun et al. 1998 ("Efficient BackProp", 4.3)
  tell why inputs should be centred.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latent_ae.models.build import channels_of
from latent_ae.models.reconstruct import Reconstructor

USUAL_SIZE = 200.0
"""A for which the learning rate is used as written: about that of a convolution of 64 channels behind SiLU."""


class Layerwise(nn.Module):
    """What AdamW needs to know of the layers of a new autoencoder.

    What was measured is kept in buffers, which belong into checkpoints: a resumed run may run on another processor, or
    find other weights where it began.

    Args:
        reconstructor: The autoencoder before its first step.
        size_px: Height and width of an image that it takes.
    """

    def __init__(self, reconstructor: Reconstructor, size_px: tuple[int, int]):
        super().__init__()
        sizes, means = _measured(reconstructor, size_px)
        names = {layer: name.replace(".", "/") for name, layer in reconstructor.autoencoder.named_modules()}
        self.means = {layer: mean for layer, mean in means.items() if layer.weight.requires_grad and _has_bias(layer)}
        """Mean of each input channel by layer, (C,)."""
        self.sizes = {id(layer.weight): size for layer, size in sizes.items()}
        """The A of a layer by its weight's id, scalars."""
        for layer, mean in self.means.items():
            self.register_buffer(f"{names[layer]}/mean", mean)
        for layer, size in sizes.items():
            self.register_buffer(f"{names[layer]}/size", size)

    def groups(self, parameters: list[nn.Parameter]) -> list[dict[str, object]]:
        """Return parameter groups of an optimizer, one for each factor of the learning rate, from the largest on."""
        scales = [self.scale(parameter) for parameter in parameters]
        return [
            {"params": [p for p, own in zip(parameters, scales, strict=True) if own == scale], "lr_scale": scale}
            for scale in sorted(set(scales), reverse=True)
        ]

    def scale(self, parameter: nn.Parameter) -> float:
        """Return the factor of a parameter's learning rate, at most 1."""
        size = self.sizes.get(id(parameter))
        return 1.0 if size is None else _power_of_two(USUAL_SIZE / max(float(size), 1.0))

    @contextmanager
    def centred(self) -> Iterator[None]:
        """Centre the gradients before, and the layers' outputs after what the `with` block does to the weights."""
        with torch.no_grad():
            for layer, mean in self.means.items():
                if layer.weight.grad is not None and layer.bias.grad is not None:
                    change = layer.bias.grad.outer(mean)
                    layer.weight.grad.sub_(change.view(*change.shape, *[1] * (layer.weight.ndim - 2)))
            before = [_mean_output(layer, mean) for layer, mean in self.means.items()]
        yield
        with torch.no_grad():
            for (layer, mean), old in zip(self.means.items(), before, strict=True):
                layer.bias.add_(old - _mean_output(layer, mean))


def _measured(
    reconstructor: Reconstructor, size_px: tuple[int, int]
) -> tuple[dict[nn.Module, Tensor], dict[nn.Module, Tensor]]:
    """Return for each linear layer the sum of its inputs' sizes over the receptive field, and their means."""
    sizes, means = dict[nn.Module, Tensor](), dict[nn.Module, Tensor]()

    def look(layer: nn.Module, inputs: tuple[Tensor, ...], _: object) -> None:
        x = inputs[0].float()
        x = x.transpose(0, 1).flatten(1) if isinstance(layer, nn.Conv2d) else x.flatten(0, -2).mT
        sizes[layer], means[layer] = x.abs().mean() * layer.weight[0].numel(), x.mean(1)

    layers = [one for one in reconstructor.autoencoder.modules() if isinstance(one, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(look) for layer in layers]
    weight = next(reconstructor.parameters())
    # any images do, and these are the same everywhere: smooth noise
    noise = torch.rand(2, channels_of(reconstructor.autoencoder), 4, 4, generator=torch.Generator().manual_seed(0))
    images = F.interpolate(2 * noise - 1, size_px, mode="bicubic").clamp(-1, 1)
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            reconstructor(images.to(weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for value in (*sizes.values(), *means.values()):  # all processes must take the same steps, to the last bit
            torch.distributed.broadcast(value, src=0)
    return sizes, means


def _mean_output(layer: nn.Module, mean: Tensor) -> Tensor:
    """Return what a layer without its bias makes of its mean input, far from the image's edges."""
    weight = layer.weight
    return (weight.flatten(2).sum(2) if weight.ndim > 2 else weight) @ mean


def _has_bias(layer: nn.Module) -> bool:
    return layer.bias is not None and layer.bias.requires_grad and getattr(layer, "groups", 1) == 1


def _power_of_two(scale: float) -> float:
    """Return the nearest power of 2, at most 1: so that rounding does not decide in which group a weight is."""
    return 2.0 ** min(0, round(math.log2(scale)))
