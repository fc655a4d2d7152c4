"""Lets an AutoencoderTiny encode with another first stage, whose latents its decoder decodes.

A folder of such a model is an AutoencoderTiny that stock diffusers loads and whose `decode` takes the scaled latents
that diffusion models see, as TAESD's does. Its own encoder is zero, so that nobody takes it for a trained one; the
first stage that encodes is in the subfolder `encoder`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from latent_ae.arithmetic import lay_out
from latent_ae.models.family import SIDES
from latent_ae.models.posterior import Drawn, draw
from latent_ae.models.reconstruct import keep_posterior_precise_
from latent_ae.models.registry import scaling_of
from latent_ae.models.stored_encoder import StoredEncoder

FOLDER = "encoder"
"""Subfolder of the first stage that encodes."""


class BorrowedEncoder(nn.Module):
    """Encodes to the scaled latents of a frozen first stage; it has no parameters, and its `state_dict` has zeros.

    Args:
        original: The first stage, which is frozen and laid out in channels-last.
        own: The weights of the AutoencoderTiny's own encoder by name, for their shapes.
    """

    def __init__(self, original: nn.Module, own: Mapping[str, Tensor]):
        super().__init__()
        lay_out(original.eval().requires_grad_(False), torch.channels_last)
        keep_posterior_precise_(original)
        self._original = [original]  # in a list, so that its weights do not become a part of this module
        self.zeros = {name: torch.zeros(weight.shape) for name, weight in own.items()}

    @property
    def original(self) -> Any:
        """The first stage that encodes."""
        return self._original[0]

    @property
    def num_borrowed(self) -> int:
        """Number of parameters of the first stage that encodes."""
        return sum(parameter.numel() for parameter in self.original.parameters())

    def forward(self, images: Tensor) -> Tensor:
        """Return the scaled mode of the posterior, (N, c, h, w) float32, of images, (N, C, H, W) in [-1, 1]."""
        return self.draw(images, None).latent

    @torch.no_grad()
    def draw(self, images: Tensor, noise: Tensor | None) -> Drawn:
        """Return a scaled sample of the posterior as a latent that is not random; arguments as in `posterior.draw`."""
        drawn, scaling = draw(self.original, images, noise), scaling_of(self.original)
        latent, mean = scaling.scaled(drawn.latent), scaling.scaled(drawn.mean)
        return Drawn(latent, mean, None, (), mean.new_zeros(len(mean)))

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> "BorrowedEncoder":
        """Move what encodes of the first stage, too; its decoder is only saved."""
        for name, part in self.original.named_children():
            if name not in SIDES["decoder"]:
                part._apply(function, recurse)
        super()._apply(function, recurse)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination |= {prefix + name: zero for name, zero in self.zeros.items()}

    def _load_from_state_dict(self, *arguments: Any) -> None:
        """Load nothing: the encoder is the original's."""


def borrowed_encoder(autoencoder: nn.Module) -> BorrowedEncoder | None:
    """Return an autoencoder's BorrowedEncoder, which is loaded if it is not in memory; None if it has its own."""
    encoder = getattr(autoencoder, "encoder", None)
    if isinstance(encoder, StoredEncoder) and encoder.num_borrowed:
        encoder = encoder.loaded[0] if encoder.loaded else encoder.load()
    return encoder if isinstance(encoder, BorrowedEncoder) else None


def borrowed_parameters(autoencoder: nn.Module) -> int:
    """Return the number of parameters of the first stage with which an autoencoder encodes; 0 if it has its own."""
    encoder = getattr(autoencoder, "encoder", None)
    return encoder.num_borrowed if isinstance(encoder, (BorrowedEncoder, StoredEncoder)) else 0


def save_borrowed(autoencoder: nn.Module, folder: Path) -> None:
    """Write the first stage with which an autoencoder encodes beside it; nothing if it has an encoder of its own."""
    if (borrowed := borrowed_encoder(autoencoder)) is not None:
        borrowed.original.save_pretrained(folder / FOLDER)


def encodes_nothing(autoencoder: nn.Module) -> bool:
    """Return whether an AutoencoderTiny's own encoder is zero, and none is borrowed."""
    own = isinstance(autoencoder, diffusers.AutoencoderTiny) and not borrowed_parameters(autoencoder)
    return own and not any(map(torch.any, autoencoder.encoder.parameters()))


def borrow_(autoencoder: nn.Module, load: Callable[[], nn.Module]) -> None:
    """Give an AutoencoderTiny whose encoder is zero the one that `load` returns, in place; leave any other as it is."""
    if encodes_nothing(autoencoder):
        autoencoder.encoder = BorrowedEncoder(load(), autoencoder.encoder.state_dict())
