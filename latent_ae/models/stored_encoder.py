"""Stands in place of an encoder that is not in memory, because a decoder trains on stored latents."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from latent_ae.models.family import LatentScaling


class StoredEncoder(nn.Module):
    """Has no parameters. Its `state_dict` has the encoder's all the same, so checkpoints and exports are complete.

    Args:
        load: Loads the encoder, with frozen weights, on the CPU.
        encoder_sha256: Digest of what encodes, see `encoder_digest`.
        scalings: How the decoder takes stored latents, by the digests of the first stages that may have made them.
        num_parameters: Number of the encoder's parameters.
        num_borrowed: Number of parameters of the first stage in a BorrowedEncoder.
    """

    def __init__(
        self,
        load: Callable[[], nn.Module],
        encoder_sha256: str,
        scalings: Mapping[str, LatentScaling],
        num_parameters: int,
        num_borrowed: int = 0,
    ):
        super().__init__()
        self.load, self.encoder_sha256, self.scalings = load, encoder_sha256, scalings
        self.num_parameters, self.num_borrowed = num_parameters, num_borrowed
        self.loaded: list[nn.Module] = []
        """The encoder while it is in memory; in a list, so that it does not become a part of this module."""

    def forward(self, images: Tensor) -> Tensor:
        """Encode like the encoder. Call it within `encoder_in_memory` only."""
        assert self.loaded, "the encoder is not in memory"
        encoded: Tensor = self.loaded[0](images)
        return encoded

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination |= {prefix + name: weight for name, weight in self.load().state_dict().items()}

    def _load_from_state_dict(self, *arguments: Any) -> None:
        """Load nothing: the weights of the encoder are always those that `load` brings."""


def out_of_memory_parameters(autoencoder: nn.Module) -> int:
    """Return the number of parameters that checkpoints hold and the memory does not."""
    encoder = getattr(autoencoder, "encoder", None)
    return encoder.num_parameters if isinstance(encoder, StoredEncoder) else 0


@contextmanager
def encoder_in_memory(autoencoder: nn.Module) -> Iterator[None]:
    """Load an autoencoder's StoredEncoder for the time of a `with` block; any other encoder is there already."""
    encoder = getattr(autoencoder, "encoder", None)
    if not isinstance(encoder, StoredEncoder) or encoder.loaded:
        yield
        return
    weight = next(autoencoder.parameters())
    encoder.loaded.append(encoder.load().eval().to(weight.device))
    try:
        yield
    finally:
        encoder.loaded.clear()
