"""A variational autoencoder whose posterior is a Gaussian behind a normalising flow."""

from collections.abc import Iterable

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, EncoderOutput
from torch import Tensor, nn

from latent_ae.models.posterior import Drawn

LARGEST_LOG_SCALE = 2.0
"""Logarithms of scales are drawn into +- this by a tanh, as in real NVP."""


class FlowAutoencoderKL(AutoencoderKL):
    """An AutoencoderKL whose posterior need not be Gaussian nor factorise: z = f(z0; x), z0 = mean + std * noise.

    f is a stack of affine coupling layers (real NVP: Dinh et al. 2017, section 3) given the encoder's moments, as
    inverse autoregressive flow is given a context (Kingma et al. 2016), so that log q(z | x) = log N(z0; mean, std) -
    log |det df/dz0|. Before training f is the identity. A coupling layer is drawn and differentiated in one pass like
    an autoregressive one, and has an inverse in one pass besides.
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
        """`flow_layers`: couplings, by turns of channel halves and of a checkerboard; `flow_width`: channels of their
        networks. The rest is AutoencoderKL's.

        Raises ValueError for no layer.
        """
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
        """As `posterior.draw`, N x c x h x w; without noise z is f(mean).

        Of this sample: `rates` are log q(z | x) - log p(z), shared out among the dimensions by where noise, scales and
        z lie. Their sum is exact, one of them is no KL of its dimension and may be negative.
        """
        posterior = super().encode(images).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        # before the flow, -log q at z0 = mean + std * noise is (noise^2 + logvar) / 2 + a constant that p(z) has, too
        latent = mean if noise is None else mean + torch.exp(0.5 * logvar) * noise
        surprise = 0.5 * (logvar if noise is None else logvar + noise.square())
        context = torch.cat([mean, logvar], 1)
        with torch.autocast(images.device.type, enabled=False):  # in bfloat16 it would round what it moves
            for coupling in self.flow:
                latent, log_scale = coupling(latent, context)
                surprise = surprise + log_scale
        rates = 0.5 * latent.square() - surprise
        log_ratio = -rates.detach().flatten(1).sum(1, dtype=torch.float64).float()
        return Drawn(latent, latent, None, (rates,), log_ratio)

    def encode(self, images: Tensor) -> EncoderOutput:
        """f of the Gaussian's mean, N x c x h x w."""
        return EncoderOutput(latent=self.draw(images, None).latent)

    def forward(self, images: Tensor) -> DecoderOutput:
        """Reconstructions of that."""
        return self.decode(self.encode(images).latent.to(self.dtype))


class Coupling(nn.Module):
    """z -> exp(s) z + t where the mask is 0, s and t functions of the rest of z and of a context."""

    def __init__(self, channels: int, width: int, number: int):
        """`number` of the layer: 0 and 1 keep one half of the channels and the other, 2 and 3 (where the latent has
        more than one place) one colour of a checkerboard and the other, and so on."""
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
        """N x c x h x w and N x 2c x h x w -> the moved latent, and its log-scales, 0 where it is kept; float32."""
        kept = self.mask(latent)
        dtype = self.network[0].weight.dtype
        given = torch.cat([kept * latent, context], 1).to(dtype)
        raw, shift = self.network(given).float().chunk(2, 1)
        log_scale = (1.0 - kept) * LARGEST_LOG_SCALE * torch.tanh(raw / LARGEST_LOG_SCALE)
        return torch.exp(log_scale) * latent + (1.0 - kept) * shift, log_scale

    def mask(self, latent: Tensor) -> Tensor:
        """1 where z is kept: c x h x w."""
        channels, height, width = latent.shape[1:]
        kind, parity = divmod(self.number % 4, 2)
        if kind == 0 or height * width == 1:
            first = torch.arange(channels, device=latent.device) < channels // 2
            kept = first[:, None, None].expand(channels, height, width)
        else:
            rows, columns = (torch.arange(side, device=latent.device) for side in (height, width))
            kept = ((rows[:, None] + columns) % 2 == 0).expand(channels, height, width)
        return (kept != bool(parity)).to(latent.dtype)
