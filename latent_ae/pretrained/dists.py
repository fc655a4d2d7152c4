"""DISTS, the distance of images in structure and texture: the VGG16 of LPIPS with weights that torchmetrics ships."""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from latent_ae.config import UserError
from latent_ae.pretrained.frozen import IMAGENET_MEAN, IMAGENET_STD
from latent_ae.pretrained.lpips import TRUNKS
from latent_ae.pretrained.weights import weight_file

EPS = 1e-6
ROOT_EPS = 1e-12
CHANNELS = (3, 64, 128, 256, 512, 512)
"""Channels of the image and of each stage."""
MIN_PX = TRUNKS["vgg"].min_px
NEEDS_TORCHMETRICS = "needs torchmetrics 1.8 or later, which ships its weights: pip install '.[dists]' in the checkout"


class DISTS(nn.Module):
    """Deep image structure and texture similarity (Ding et al. 2020, arXiv:2004.07728), frozen; 0 for equal images.

    VGG16 with L2 pooling in place of maxima; of the image and of each stage's last features the means (texture) and the
    correlations (structure) over all positions are compared, channel by channel. The learned weights of the channels
    are those of dingkeyan93/DISTS (MIT), which torchmetrics holds in a file; its code is not imported. The original's
    script first reduces larger images to 256 px; here they are compared as they are.

    Raises:
        UserError: If the weights of VGG16 or of the channels are not available.
    """

    mean: Tensor
    std: Tensor
    window: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, tensor in load_file(weight_file("vgg16")).items():
            self._keep(name.replace("features.", "conv").replace(".", "_"), tensor)
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self._keep(name, torch.tensor(values).view(1, 3, 1, 1))
        hann = torch.tensor([0.5, 1.0, 0.5])
        self._keep("window", (hann[:, None] * hann / 4)[None, None])
        for name, tensor in _channel_weights().items():
            for number, part in enumerate(tensor.flatten().split(CHANNELS)):
                self._keep(f"{name}{number}", part)

    @torch.no_grad()
    def compare(self, x: Tensor, others: Sequence[Tensor]) -> list[Tensor]:
        """Return the distances of x to each of several image batches.

        Args:
            x: (N, C, H, W) float in [-1, 1]; C is 3, or 1, which is repeated to 3. Sides have 16 px or more.
            others: Batches of the same shape.

        Returns:
            A (N,) float32 tensor of distances for each of `others`.
        """
        count = 1 + len(others)
        images = (torch.cat([x, *others]).expand(-1, 3, -1, -1) + 1) / 2
        similarities = [x.new_zeros(len(x)) for _ in others]
        for number, features in enumerate(self._features(images)):
            first, *rest = features.flatten(2).chunk(count)
            for position, other in enumerate(rest):
                similarities[position] = similarities[position] + self._similarity(number, first, other)
        return [1 - similarity for similarity in similarities]

    def _features(self, images: Tensor) -> Iterator[Tensor]:
        """Yield images in [0, 1], and the last features of each stage of VGG16."""
        yield images
        features = (images - self.mean) / self.std
        for number, stage in enumerate(TRUNKS["vgg"].stages):
            if number:
                channels = features.shape[1]
                window = self.window.expand(channels, -1, -1, -1)
                squares = F.conv2d(features.square(), window, stride=2, padding=1, groups=channels)
                features = (squares + ROOT_EPS).sqrt()
            for conv in stage:
                weight, bias = (self.get_buffer(f"conv{conv.position}_{kind}") for kind in ("weight", "bias"))
                features = F.conv2d(features, weight, bias, conv.stride, conv.padding).relu()
            yield features

    def _similarity(self, number: int, a: Tensor, b: Tensor) -> Tensor:
        """Return the part of the similarity that features, (N, C, positions), of the image or of a stage have: (N,)."""
        mean_a, mean_b = a.mean(2, keepdim=True), b.mean(2, keepdim=True)
        # the covariance of centred features: a difference of large means would lose digits where images are similar
        a, b = a - mean_a, b - mean_b
        texture = (2 * mean_a * mean_b + EPS) / (mean_a.square() + mean_b.square() + EPS)
        spread = a.square().mean(2) + b.square().mean(2)
        structure = (2 * (a * b).mean(2) + EPS) / (spread + EPS)
        weights = self.get_buffer(f"alpha{number}"), self.get_buffer(f"beta{number}")
        return (weights[0] * texture[..., 0] + weights[1] * structure).sum(1)

    def _keep(self, name: str, tensor: Tensor) -> None:
        self.register_buffer(name, tensor, persistent=False)


def _channel_weights() -> dict[str, Tensor]:
    """Return `alpha` and `beta`, which sum to 1 together, from the file that torchmetrics ships."""
    spec = find_spec("torchmetrics")
    path = Path(str(spec.origin)).parent / "functional/image/dists_models/weights.pt" if spec else None
    if path is None or not path.is_file():
        raise UserError(f"dists: {NEEDS_TORCHMETRICS}")
    state = torch.load(path, map_location="cpu", weights_only=True)
    total = state["alpha"].sum() + state["beta"].sum()
    return {name: state[name] / total for name in ("alpha", "beta")}
