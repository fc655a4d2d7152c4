"""The original repositories' first stages, stated anew: the names and the arithmetic of their modules, and no more.

Each was written from the module's definition (latent-diffusion `ldm/modules/diffusionmodules/model.py`, FLUX.2
`src/flux2/autoencoder.py`, LlamaGen `tokenizer/tokenizer_image/vq_model.py`), apart from the tables that are tested.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


def parts(**modules: nn.Module) -> nn.Module:
    """A module that only holds others."""
    holder = nn.Module()
    for name, module in modules.items():
        setattr(holder, name, module)
    return holder


class Resnet(nn.Module):
    def __init__(self, given: int, made: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(given), nn.Conv2d(given, made, 3, padding=1)
        self.norm2, self.conv2 = norm(made), nn.Conv2d(made, made, 3, padding=1)
        if given != made:
            self.nin_shortcut = nn.Conv2d(given, made, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))  # B x C x HW
        weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) * x.shape[1] ** -0.5, dim=2)
        return x + self.proj_out(torch.einsum("bij,bcj->bci", weights, v).view_as(x))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Encoder(nn.Module):
    """latent-diffusion's: `attention` says at which levels, from the finest on; `out` counts what it gives."""

    def __init__(self, widths: Sequence[int], out: int, layers: int, attention: Sequence[bool], mid: bool) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down, width = nn.ModuleList(), widths[0]
        for level, (made, attends) in enumerate(zip(widths, attention, strict=True)):
            blocks = [Resnet(width if number == 0 else made, made) for number in range(layers)]
            attn = [Attention(made) for _ in range(layers if attends else 0)]
            holder, width = parts(block=nn.ModuleList(blocks), attn=nn.ModuleList(attn)), made
            if level < len(widths) - 1:
                holder.downsample = Downsample(width)
            self.down.append(holder)
        self.mid = parts(block_1=Resnet(width, width), attn_1=Attention(width) if mid else nn.Identity())
        self.mid.block_2 = Resnet(width, width)
        self.norm_out, self.conv_out = norm(width), nn.Conv2d(width, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            for number, block in enumerate(level.block):
                h = block(h)
                h = level.attn[number](h) if len(level.attn) else h
            h = level.downsample(h) if hasattr(level, "downsample") else h
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """latent-diffusion's; its list `up` begins with the finest level, which is the last to be used."""

    def __init__(self, widths: Sequence[int], latents: int, layers: int, attention: Sequence[bool], mid: bool) -> None:
        super().__init__()
        width = widths[-1]
        self.conv_in = nn.Conv2d(latents, width, 3, padding=1)
        self.mid = parts(block_1=Resnet(width, width), attn_1=Attention(width) if mid else nn.Identity())
        self.mid.block_2 = Resnet(width, width)
        levels = []
        for level, (made, attends) in reversed(list(enumerate(zip(widths, attention, strict=True)))):
            blocks = [Resnet(width if number == 0 else made, made) for number in range(layers + 1)]
            attn = [Attention(made) for _ in range(layers + 1 if attends else 0)]
            holder, width = parts(block=nn.ModuleList(blocks), attn=nn.ModuleList(attn)), made
            if level:
                holder.upsample = Upsample(width)
            levels.insert(0, holder)
        self.up = nn.ModuleList(levels)
        self.norm_out, self.conv_out = norm(width), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        for level in reversed(self.up):
            for number, block in enumerate(level.block):
                h = block(h)
                h = level.attn[number](h) if len(level.attn) else h
            h = level.upsample(h) if hasattr(level, "upsample") else h
        return self.conv_out(F.silu(self.norm_out(h)))


class LDM(nn.Module):
    """AutoencoderKL of latent-diffusion; without quant convolutions FLUX.1's and Stable Diffusion 3's."""

    def __init__(
        self,
        widths: Sequence[int] = (32, 32, 64),
        latents: int = 4,
        layers: int = 1,
        attention: Sequence[bool] = (False, False, False),
        up_attention: Sequence[bool] | None = None,
        mid: bool = True,
        quant: bool = True,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(widths, 2 * latents, layers, attention, mid)
        self.decoder = Decoder(widths, latents, layers, up_attention or attention, mid)
        if quant:
            self.quant_conv = nn.Conv2d(2 * latents, 2 * latents, 1)
            self.post_quant_conv = nn.Conv2d(latents, latents, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The posterior's mean, and the image that it decodes to."""
        moments = self.encoder(x)
        mean = (self.quant_conv(moments) if hasattr(self, "quant_conv") else moments).chunk(2, dim=1)[0]
        return mean, self.decoder(self.post_quant_conv(mean) if hasattr(self, "post_quant_conv") else mean)


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """With parameters that all matter: those of norms are not 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            shift = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            scale = 0.3 if tensor.ndim < 2 else tensor[0].numel() ** -0.5
            tensor.copy_(shift + scale * torch.randn(tensor.shape, generator=generator))
    return module.eval()


def image(side: int = 16, seed: int = 1) -> Tensor:
    """One image in [-1, 1]."""
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1
