"""A small transformer that predicts codes one after another, level by level: a prior over the codes of images."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from latent_ae_eval.generation.settings import HEAD_CHANNELS

Past = tuple[Tensor, Tensor]
"""Keys and values of the positions before, (N, heads, positions, channels)."""


class CodeTransformer(ModelMixin, ConfigMixin):
    """A decoder-only transformer over the codes of all levels, the coarsest first, each in raster order.

    p(codes) is the product over positions of p(code | codes before it). At each position of a finer level the coarser
    codes that cover the same place are added to the input, beside the code before it. The priors of VQ-VAE-2 (Razavi
    et al. 2019, section 3.2) are PixelSNAILs, one for each level.

    Args:
        codes: Number of codes of each level.
        sides: Side of each level's grid, from the coarsest; each divides the next.
        width: Width, a multiple of HEAD_CHANNELS.
        depth: Number of blocks.
    """

    places: Tensor

    @register_to_config
    def __init__(self, codes: int, sides: Sequence[int], width: int = 128, depth: int = 4):
        super().__init__()
        sizes = [side**2 for side in sides]
        self.sizes, self.codes, self.above = sizes, codes, len(sizes) - 1
        self.tokens = nn.Embedding(len(sizes) * codes + 1, width)  # the codes of each level, and the start
        self.coarser = nn.Embedding(self.above * codes + 1, width)  # the codes of all levels but the finest, and none
        self.positions = nn.Parameter(torch.empty(sum(sizes), width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleList(nn.Linear(width, codes) for _ in sizes)
        level = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        self.register_buffer("offsets", codes * level, persistent=False)
        self.register_buffer("places", coarser_places(sides), persistent=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        for head in self.heads:  # every code is equally likely before training
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, sequence: Tensor) -> Tensor:
        """Return the logits of each code given those before it, (N, P, codes), for sequences, (N, P) int64."""
        hidden = self._inputs(sequence, 0, sequence.shape[1])
        for block in self.blocks:
            hidden, _ = block(hidden)
        parts = self.norm(hidden).split(self.sizes, 1)
        return torch.cat([head(part) for head, part in zip(self.heads, parts, strict=True)], 1)

    def sample(self, uniform: Tensor) -> Tensor:
        """Return sequences of codes, (N, P) int64: each code is where a random number lies among the probabilities.

        Args:
            uniform: (N, P) random numbers in [0, 1), one for each code.
        """
        sequence = torch.zeros(uniform.shape, dtype=torch.int64, device=self.positions.device)
        pasts: list[Past | None] = [None] * len(self.blocks)
        for place, level in enumerate((self.offsets // self.codes).tolist()):
            hidden = self._inputs(sequence, place, place + 1)
            for number, block in enumerate(self.blocks):
                hidden, pasts[number] = block(hidden, pasts[number])
            shares = self.heads[level](self.norm(hidden))[:, 0].double().softmax(1).cumsum(1)
            drawn = torch.searchsorted(shares, uniform[:, place : place + 1].to(shares), right=True)
            sequence[:, place] = drawn[:, 0].clamp(max=self.codes - 1)  # the sum of the shares may round below 1
        return sequence

    def _inputs(self, sequence: Tensor, first: int, last: int) -> Tensor:
        """Return the inputs at positions `first` to `last` - 1, which no code from there on changes, (N, n, width)."""
        tokens = sequence + self.offsets
        start, none = (tokens.new_full((len(tokens), 1), size * self.codes) for size in (len(self.sizes), self.above))
        before = torch.cat([start, tokens], 1)[:, first:last]
        above = torch.cat([tokens, none], 1)[:, self.places[first:last]]
        hidden: Tensor = self.tokens(before) + self.positions[first:last] + self.coarser(above).sum(2)
        return hidden

    def grids(self, sequence: Tensor) -> list[Tensor]:
        """Split sequences, (N, P), into the grid of each level, (N, side, side)."""
        return [part.unflatten(1, (math.isqrt(part.shape[1]), -1)) for part in sequence.split(self.sizes, 1)]


def coarser_places(sides: Sequence[int]) -> Tensor:
    """Return where the coarser codes over each position stand in the sequence, (P, levels - 1); P where there is none.

    Args:
        sides: Side of each level's grid, from the coarsest.
    """
    firsts = [sum(side**2 for side in sides[:level]) for level in range(len(sides) + 1)]
    places = torch.full((firsts[-1], len(sides) - 1), firsts[-1])
    for level, side in enumerate(sides):
        for above, coarse in enumerate(sides[:level]):
            number = torch.arange(coarse**2).view(coarse, coarse) + firsts[above]
            whole = number.repeat_interleave(side // coarse, 0).repeat_interleave(side // coarse, 1)
            places[firsts[level] : firsts[level + 1], above] = whole.flatten()
    return places


class Block(nn.Module):
    """Attention to the positions before, and a network for each position, both behind a norm."""

    def __init__(self, width: int):
        super().__init__()
        self.norm_attention, self.norm_network = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.network = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: Tensor, past: Past | None = None) -> tuple[Tensor, Past]:
        """Return the new state, (N, n, width), and the keys and values so far.

        Args:
            hidden: (N, n, width); one position if there is a past.
            past: Keys and values of the positions before.
        """
        qkv = self.qkv(self.norm_attention(hidden)).unflatten(2, (3, -1, HEAD_CHANNELS))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        if past is not None:
            key, value = (torch.cat([before, new], 2) for before, new in zip(past, (key, value), strict=True))
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=past is None)
        hidden = hidden + self.out(attended.transpose(1, 2).flatten(2))
        return hidden + self.network(self.norm_network(hidden)), (key, value)
