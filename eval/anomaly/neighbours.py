"""Distances of an image's patches to those of normal images, in features of VGG16 and without a first stage."""

import torch
from torch import Tensor
from torch.nn import functional as F

from latent_ae.pretrained.lpips import LPIPS

STAGES = (2, 3)
"""Stages of VGG16 whose last ReLU is taken: relu3_3 and relu4_3, 1/4 and 1/8 of the image."""
BLOCK = 1024


class Neighbours:
    """The distance of each patch to the nearest one of normal images, in the manner of PatchCore (Roth et al. 2022).

    The features of two middle stages are averaged over 3 x 3 positions and joined on the grid of the second one. As in
    the paper an image's score is the largest distance of its patches. Unlike there and in the reference implementation:

    - the network is VGG16, not WideResNet50;
    - the bank of patches is a random choice, not a greedy coreset;
    - the score is not reweighted by the neighbourhood in the bank;
    - the finer grid is averaged to the coarser one, not the coarser one resized to the finer;
    - the map is not smoothed;
    - the channels of both stages are joined as they are, not pooled to fixed and equal numbers first;
    - averages over 3 x 3 positions do not count the padding.

    Args:
        network: LPIPS on VGG16, whose trunk is used.
        size: Largest number of patches in the bank.
        seed: Seed of the choice.
    """

    def __init__(self, network: LPIPS, size: int, seed: int):
        self.network, self.size = network, size
        self.generator = torch.Generator().manual_seed(seed)
        self.seen, self.bank, self.ranks = 0, torch.empty(0), torch.empty(0)

    @torch.no_grad()
    def patches(self, images: Tensor) -> Tensor:
        """Return the features of patches, (N, 768, H / 8, W / 8), of images, (N, 1 or 3, H, W) in [-1, 1]."""
        first, second = (
            F.avg_pool2d(part, 3, 1, 1, count_include_pad=False) for part in self.network.activations(images, STAGES)
        )
        return torch.cat([F.adaptive_avg_pool2d(first, second.shape[2:]), second], 1)

    def learn(self, images: Tensor) -> None:
        """Add the patches of normal images to the bank; each of all patches is in it with the same probability."""
        new = self.patches(images).movedim(1, -1).flatten(0, 2)
        # the patches with the smallest of random numbers, one for each: a uniform choice, however they arrive
        ranks = torch.cat([self.ranks, torch.rand(len(new), generator=self.generator)])
        patches = torch.cat([self.bank.to(new.device), new]) if self.seen else new
        kept = ranks.argsort()[: self.size]
        self.bank, self.ranks, self.seen = patches[kept.to(new.device)], ranks[kept], self.seen + len(new)

    @torch.no_grad()
    def score(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the largest distance of each image, (N,), and the map of distances, (N, H, W).

        Args:
            images: (N, 1 or 3, H, W) in [-1, 1].
        """
        patches = self.patches(images)
        flat = patches.movedim(1, -1).flatten(0, 2)
        nearest = torch.cat([torch.cdist(block, self.bank).amin(1) for block in flat.split(BLOCK)])
        distances = nearest.view(len(images), 1, *patches.shape[2:])
        resized = F.interpolate(distances, images.shape[2:], mode="bilinear", align_corners=False)
        return distances.amax((1, 2, 3)), resized[:, 0]
