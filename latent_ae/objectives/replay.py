"""Earlier reconstructions from which the discriminator goes on learning (gan.replay), as in Bohan's seraena (2024)."""

import torch
from torch import Tensor, nn

from latent_ae.data.rng import replay_slot


class Replay(nn.Module):
    """Stores one reconstruction of each step, with its latent, in the state that checkpoints hold.

    It is the step's first sample, which is the same however the batch is split. A full store replaces one at random, by
    seed and step. Reconstructions that are not finite count as absent.

    Args:
        size: Number of reconstructions.
        image_shape: (C, H, W) of one.
        latent_shape: (c, h, w) of its latent.
    """

    rolled_back = False
    """`store` leaves out a skipped step itself, because a copy of all that is stored would cost too much memory."""

    images: Tensor
    latents: Tensor
    present: Tensor

    def __init__(self, size: int, image_shape: tuple[int, ...], latent_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("images", torch.zeros(size, *image_shape))
        self.register_buffer("latents", torch.zeros(size, *latent_shape))
        self.register_buffer("present", torch.zeros(size))

    def store(self, image: Tensor, latent: Tensor, seed: int, number: int, skipped: Tensor) -> None:
        """Store a reconstruction; every process calls this, and the first one's is stored.

        Args:
            image: (C, H, W).
            latent: (c, h, w).
            seed: Seed of the run.
            number: How many were stored before.
            skipped: Bool scalar; True stores nothing.
        """
        if torch.distributed.is_initialized():
            image, latent = image.contiguous(), latent.contiguous()
            for tensor in (image, latent):
                torch.distributed.broadcast(tensor, src=0)  # the first process has the first sample
        slot = number if number < self.size else replay_slot(seed, number, self.size)
        finite = image.isfinite().all() & latent.isfinite().all()
        new = image.nan_to_num(), latent.nan_to_num(), finite.float()
        for stored, value in zip((self.images, self.latents, self.present), new, strict=True):
            stored[slot] = torch.where(skipped, stored[slot], value)

    def chosen(self, drawn: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return stored reconstructions and their latents, and whether each is there.

        Args:
            drawn: (N,) uniform numbers in [0, 1), each sample's own.
            number: How many have been stored, at least 1.

        Returns:
            (N, C, H, W), (N, c, h, w), and (N,) bool.
        """
        filled = min(number, self.size)
        slots = (drawn * filled).long()
        return self.images[slots], self.latents[slots], self.present[slots] > 0
