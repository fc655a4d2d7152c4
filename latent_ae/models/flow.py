"""A variational autoencoder whose posterior is a Gaussian behind a normalising flow."""

from collections.abc import Iterable

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, EncoderOutput
from torch import Tensor, nn

from latent_ae.models.posterior import Drawn

LARGEST_LOG_SCALE = 2.0
"""A tanh limits the logarithms of scales to +- this value, as in real NVP."""


class FlowAutoencoderKL(AutoencoderKL):
    """An AutoencoderKL whose posterior need not be Gaussian or factorised: z = f(z0; x), z0 = mean + std * noise.

    f is a stack of affine coupling layers (real NVP: Dinh et al. 2017, section 3). The encoder's moments are their
    context, as in inverse autoregressive flow (Kingma et al. 2016), so that log q(z | x) = log N(z0; mean, std) -
    log |det df/dz0|. Before training f is the identity. Like an autoregressive layer, a coupling layer samples in one
    pass, which also gives its determinant; in addition, its inverse takes one pass.

    Args:
        flow_layers: Number of coupling layers; their masks alternate between halves of the channels and a checkerboard.
        flow_width: Channels of their networks.

    The other arguments are those of AutoencoderKL.

    Raises:
        ValueError: If `flow_layers` or `flow_width` is less than 1.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: Iterable[str] = ("DownEncoderBlock2D",),
        up_block_types: Iterable[str] = ("UpDecoderBlock2D",),
        block_out_channels: Iterable[int] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int = 32,
        scaling_factor: float = 1.0,
        shift_factor: float | None = None,
        latents_mean: Iterable[float] | None = None,
        latents_std: Iterable[float] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
        flow_layers: int = 4,
        flow_width: int = 64,
    ):
        if flow_layers < 1 or flow_width < 1:
            raise ValueError(f"flow_layers {flow_layers} and flow_width {flow_width} must be at least 1")
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            act_fn=act_fn,
            latent_channels=latent_channels,
            norm_num_groups=norm_num_groups,
            sample_size=sample_size,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
            latents_mean=latents_mean,
            latents_std=latents_std,
            force_upcast=force_upcast,
            use_quant_conv=use_quant_conv,
            use_post_quant_conv=use_post_quant_conv,
            mid_block_add_attention=mid_block_add_attention,
        )
        self.flow = nn.ModuleList(Coupling(latent_channels, flow_width, number) for number in range(flow_layers))

    def draw(self, images: Tensor, noise: Tensor | None) -> Drawn:
        """Sample the posterior, as `posterior.draw` does.

        `rates` split log q(z | x) - log p(z) of this sample among the dimensions, by the positions of noise, scales and
        z. Their sum is exact; a single one is not the KL of its dimension and may be negative.

        Args:
            images: (N, C, H, W) in [-1, 1].
            noise: (N, c, h, w) standard normal; None gives z = f(mean).
        """
        posterior = super().encode(images).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        # before the flow, -log q at z0 = mean + std * noise is (noise^2 + logvar) / 2 + a constant that p(z) has, too
        latent = mean if noise is None else mean + torch.exp(0.5 * logvar) * noise
        surprise = 0.5 * (logvar if noise is None else logvar + noise.square())
        context = torch.cat([mean, logvar], 1)
        with torch.autocast(images.device.type, enabled=False):  # bfloat16 would round z
            for coupling in self.flow:
                latent, log_scale = coupling(latent, context)
                surprise = surprise + log_scale
        rates = 0.5 * latent.square() - surprise
        log_ratio = -rates.detach().flatten(1).sum(1, dtype=torch.float64).float()
        return Drawn(latent, latent, None, (rates,), log_ratio)

    def encode(self, images: Tensor) -> EncoderOutput:
        """Return f(mean) for images, (N, C, H, W) in [-1, 1]: (N, c, h, w)."""
        return EncoderOutput(latent=self.draw(images, None).latent)

    def forward(self, images: Tensor) -> DecoderOutput:
        """Return the images decoded from f(mean), (N, C, H, W)."""
        return self.decode(self.encode(images).latent.to(self.dtype))


class Coupling(nn.Module):
    """Maps z to exp(s) z + t where the mask is 0; s and t are functions of the rest of z and of a context.

    Args:
        channels: Channels of z.
        width: Channels of the network that computes s and t.
        number: Position of the layer, which chooses the mask: 0 and 1 keep one half of the channels and the other
            half, 2 and 3 one colour of a checkerboard and the other colour (halves again if the latent has one
            position), and so on.
    """

    def __init__(self, channels: int, width: int, number: int):
        super().__init__()
        self.number = number
        self.network = nn.Sequential(
            nn.Conv2d(3 * channels, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * channels, 1),
        )
        for parameter in self.network[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, latent: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Transform a latent.

        Args:
            latent: (N, c, h, w).
            context: (N, 2c, h, w), the mean and log-variance of the Gaussian.

        Returns:
            The transformed latent and its log-scales, which are 0 where the mask keeps z; both (N, c, h, w) float32.
        """
        kept = self.mask(latent)
        dtype = self.network[0].weight.dtype
        given = torch.cat([kept * latent, context], 1).to(dtype)
        raw, shift = self.network(given).float().chunk(2, 1)
        log_scale = (1.0 - kept) * LARGEST_LOG_SCALE * torch.tanh(raw / LARGEST_LOG_SCALE)
        return torch.exp(log_scale) * latent + (1.0 - kept) * shift, log_scale

    def mask(self, latent: Tensor) -> Tensor:
        """Return the mask for a latent, (N, c, h, w): (c, h, w), 1 where z is kept."""
        channels, height, width = latent.shape[1:]
        kind, parity = divmod(self.number % 4, 2)
        if kind == 0 or height * width == 1:
            first = torch.arange(channels, device=latent.device) < channels // 2
            kept = first[:, None, None].expand(channels, height, width)
        else:
            rows, columns = (torch.arange(side, device=latent.device) for side in (height, width))
            kept = ((rows[:, None] + columns) % 2 == 0).expand(channels, height, width)
        return (kept != bool(parity)).to(latent.dtype)
