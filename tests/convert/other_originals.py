"""The originals that are no latent-diffusion: FLUX.2, LlamaGen, DC-AE, TAESD and RAE, stated anew.

As in originals.py: the names and the arithmetic of their modules, and no more.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.convert.originals import LDM, Attention, Decoder, Downsample, Encoder, Resnet, Upsample, norm, parts


class Flux2(nn.Module):
    """Quant convolutions inside encoder and decoder; latents in patches of 2 x 2, normalised by a batch norm."""

    def __init__(
        self, widths: Sequence[int] = (32, 64), small: Sequence[int] | None = None, latents: int = 4, layers: int = 1
    ) -> None:
        super().__init__()
        none = [False] * len(widths)
        self.encoder = Encoder(widths, 2 * latents, layers, none, mid=True)
        self.encoder.quant_conv = nn.Conv2d(2 * latents, 2 * latents, 1)
        self.decoder = Decoder(small or widths, latents, layers, none, mid=True)
        self.decoder.post_quant_conv = nn.Conv2d(latents, latents, 1)
        self.bn = nn.BatchNorm2d(4 * latents, eps=1e-4, affine=False)
        self.bn.running_mean.copy_(torch.linspace(-1, 1, 4 * latents))
        self.bn.running_var.copy_(torch.linspace(0.5, 2, 4 * latents))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.encoder.quant_conv(self.encoder(x)).chunk(2, dim=1)[0]
        return mean, self.decoder(self.decoder.post_quant_conv(mean))


class LlamaGen(nn.Module):
    """Codes of length 1; attention on the coarsest level; a decoder whose levels stand in the order of their use."""

    def __init__(self, widths: Sequence[int] = (32, 64), codes: int = 50, code_channels: int = 8, layers: int = 1):
        super().__init__()
        last, inner = len(widths) - 1, 32
        self.encoder = parts(conv_in=nn.Conv2d(3, widths[0], 3, padding=1), conv_blocks=nn.ModuleList())
        self.decoder = parts(conv_in=nn.Conv2d(inner, widths[-1], 3, padding=1), conv_blocks=nn.ModuleList())
        for coder, order, count, resample in (
            (self.encoder, list(range(last + 1)), layers, Downsample),
            (self.decoder, list(reversed(range(last + 1))), layers + 1, Upsample),
        ):
            width = widths[order[0]]
            for level in order:
                made = widths[level]
                res = nn.ModuleList([Resnet(width if number == 0 else made, made) for number in range(count)])
                attn = nn.ModuleList([Attention(made) for _ in range(count if level == last else 0)])
                holder, width = parts(res=res, attn=attn), made
                if level != order[-1]:
                    setattr(holder, resample.__name__.lower(), resample(width))
                coder.conv_blocks.append(holder)
            middle = widths[-1]
            coder.mid = nn.ModuleList([Resnet(middle, middle), Attention(middle), Resnet(middle, middle)])
        self.encoder.norm_out, self.decoder.norm_out = norm(widths[-1]), norm(widths[0])
        self.encoder.conv_out = nn.Conv2d(widths[-1], inner, 3, padding=1)
        self.decoder.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)
        self.quantize = parts(embedding=nn.Embedding(codes, code_channels))
        self.quantize.register_buffer("codebook_used", torch.zeros(65536))
        self.quant_conv, self.post_quant_conv = nn.Conv2d(inner, code_channels, 1), nn.Conv2d(code_channels, inner, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The numbers of the codes, B x h x w, and the image."""
        h = self.levels(self.encoder, self.encoder.conv_in(x))
        for block in self.encoder.mid:
            h = block(h)
        z = self.quant_conv(self.encoder.conv_out(F.silu(self.encoder.norm_out(h))))
        book = F.normalize(self.quantize.embedding.weight, dim=-1)
        numbers = torch.einsum("bchw,nc->bnhw", F.normalize(z, dim=1), book).argmax(1)  # the largest cosine
        h = self.decoder.conv_in(self.post_quant_conv(book[numbers].movedim(-1, 1)))
        for block in self.decoder.mid:
            h = block(h)
        h = self.levels(self.decoder, h)
        return numbers, self.decoder.conv_out(F.silu(self.decoder.norm_out(h)))

    def levels(self, coder: nn.Module, h: Tensor) -> Tensor:
        for level in coder.conv_blocks:
            for number, block in enumerate(level.res):
                h = block(h)
                h = level.attn[number](h) if len(level.attn) else h
            for name in ("downsample", "upsample"):
                h = getattr(level, name)(h) if hasattr(level, name) else h
        return h


class Taming(LDM):
    """latent-diffusion's coder around a codebook: no variances, and the nearest code by distance."""

    def __init__(self, codes: int = 40, code_channels: int = 3, latents: int = 8, **shape: object) -> None:
        super().__init__(latents=latents, quant=False, **shape)  # type: ignore[arg-type]
        self.encoder.conv_out = nn.Conv2d(self.encoder.norm_out.num_channels, latents, 3, padding=1)
        self.quantize = parts(embedding=nn.Embedding(codes, code_channels))
        self.quant_conv, self.post_quant_conv = (
            nn.Conv2d(latents, code_channels, 1),
            nn.Conv2d(code_channels, latents, 1),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.quant_conv(self.encoder(x))
        book = self.quantize.embedding.weight
        distances = (z[:, None] - book[None, :, :, None, None]).square().sum(2)
        numbers = distances.argmin(1)
        return numbers, self.decoder(self.post_quant_conv(book[numbers].movedim(-1, 1)))


class TrmsNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        scaled = x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt()
        return scaled * self.weight[:, None, None] + self.bias[:, None, None]


def conv(given: int, made: int, kernel: int = 3, bias: bool = True, **more: int) -> nn.Module:
    """efficientvit's ConvLayer, without its norm and activation."""
    return parts(conv=nn.Conv2d(given, made, kernel, padding=kernel // 2, bias=bias, **more))


def normed(layer: nn.Module, batch: bool, channels: int) -> nn.Module:
    layer.norm = nn.BatchNorm2d(channels) if batch else TrmsNorm(channels)
    return layer


class Residual(nn.Module):
    def __init__(self, main: nn.Module) -> None:
        super().__init__()
        self.main = main


class Stages(nn.Module):
    """`op_list`, as efficientvit's OpSequential calls it."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.op_list = nn.ModuleList(modules)


class DCAE(nn.Module):
    """DC-AE: residual blocks, blocks of linear attention, and resampling by pixels moved between channels."""

    def __init__(
        self,
        widths: Sequence[int] = (8, 16, 32),
        down: Sequence[int] = (0, 1, 2),
        up: Sequence[int] = (0, 2, 1),
        latents: int = 4,
        scales: Sequence[int] = (),
        strided: bool = False,
        batch: Sequence[bool] = (True, True, False),
        transformer: Sequence[bool] = (False, False, True),
        lite: bool = False,
        shortcuts: bool = True,
    ) -> None:
        super().__init__()
        self.batch, self.transformer, self.scales, self.strided = batch, transformer, scales, strided
        self.lite, self.shortcuts = lite, shortcuts
        enlarging = strided and not lite
        shuffled = parts(conv=conv(3, widths[1] // 4))
        encoder = parts(project_in=conv(3, widths[0]) if down[0] else shuffled, stages=nn.ModuleList())
        entry = conv(latents, widths[-1])
        decoder = parts(project_in=Residual(entry) if shortcuts else entry, stages=nn.ModuleList())
        for level, width in enumerate(widths):
            deeper = widths[level + 1] if level + 1 < len(widths) else 0
            blocks = [self.block(level, width, False) for _ in range(down[level])]
            if deeper and down[level]:
                inner = conv(width, deeper, stride=2) if strided else parts(conv=conv(width, deeper // 4))
                blocks.append(Residual(inner))
            encoder.stages.append(Stages(blocks))
            blocks = [self.block(level, width, batch[level], plain=lite) for _ in range(up[level])]
            if deeper and up[level]:
                blocks.insert(0, Residual(parts(conv=conv(deeper, width if enlarging else 4 * width))))
            decoder.stages.append(Stages(blocks))
        out = Stages([conv(widths[-1], latents)])
        encoder.project_out = Residual(out) if shortcuts else out
        last = conv(widths[0], 3) if up[0] else parts(conv=conv(widths[1], 3 if enlarging else 12))
        decoder.project_out = Stages([TrmsNorm(widths[0 if up[0] else 1]), nn.ReLU(), last])
        self.encoder, self.decoder = encoder, decoder

    def block(self, level: int, width: int, batch: bool, plain: bool = False) -> nn.Module:
        if plain or not self.transformer[level]:
            second = normed(conv(width, width, bias=False), batch, width)
            return Residual(parts(conv1=conv(width, width), conv2=second))
        aggreg = nn.ModuleList()
        for scale in self.scales:
            depthwise = nn.Conv2d(3 * width, 3 * width, scale, padding=scale // 2, groups=3 * width, bias=False)
            aggreg.append(nn.Sequential(depthwise, nn.Conv2d(3 * width, 3 * width, 1, groups=3, bias=False)))
        out = normed(conv((1 + len(self.scales)) * width, width, 1, bias=False), batch, width)
        attention = parts(qkv=conv(width, 3 * width, 1, bias=False), aggreg=aggreg, proj=out)
        mixed = parts(inverted_conv=conv(width, 8 * width, 1), depth_conv=conv(8 * width, 8 * width, groups=8 * width))
        mixed.point_conv = normed(conv(4 * width, width, 1, bias=False), False, width)
        return parts(context_module=Residual(attention), local_module=Residual(mixed))

    def run_block(self, block: nn.Module, h: Tensor, activation: nn.Module) -> Tensor:
        if not hasattr(block, "context_module"):
            second = block.main.conv2
            return h + second.norm(second.conv(activation(block.main.conv1.conv(h))))
        main = block.context_module.main
        qkv = main.qkv.conv(h)
        qkv = torch.cat([qkv, *(layer(qkv) for layer in main.aggreg)], dim=1)
        heads = qkv.unflatten(1, (-1, 3, 32)).flatten(4)  # B x heads x 3 x 32 x HW
        q, k, v = F.relu(heads[:, :, 0]), F.relu(heads[:, :, 1]), heads[:, :, 2]
        weights = torch.einsum("bnci,bncj->bnij", k, q)  # keys x queries
        weights = weights / (weights.sum(2, keepdim=True) + 1e-15)
        attended = torch.einsum("bnci,bnij->bncj", v, weights).flatten(1, 2).unflatten(2, h.shape[2:])
        h = h + main.proj.norm(main.proj.conv(attended))
        main = block.local_module.main
        inner, gate = main.depth_conv.conv(F.silu(main.inverted_conv.conv(h))).chunk(2, dim=1)
        return h + main.point_conv.norm(main.point_conv.conv(inner * F.silu(gate)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        encoder, decoder = self.encoder, self.decoder
        entry = encoder.project_in.conv
        h = entry(x) if isinstance(entry, nn.Conv2d) else F.pixel_unshuffle(entry.conv(x), 2)
        for stage in encoder.stages:
            for block in stage.op_list:
                if hasattr(block, "context_module") or hasattr(block.main, "conv1"):
                    h = self.run_block(block, h, nn.SiLU())
                else:
                    inner = block.main.conv
                    made = inner(h) if self.strided else F.pixel_unshuffle(inner.conv(h), 2)
                    moved = F.pixel_unshuffle(h, 2)
                    h = made + moved.unflatten(1, (made.shape[1], -1)).mean(2)
        if self.shortcuts:
            out = encoder.project_out.main.op_list[0].conv(h)
            latent = out + h.unflatten(1, (out.shape[1], -1)).mean(2)
            h = decoder.project_in.main.conv(latent)
            h = h + latent.repeat_interleave(h.shape[1] // latent.shape[1], dim=1)
        else:
            latent = encoder.project_out.op_list[0].conv(h)
            h = decoder.project_in.conv(latent)
        for level in reversed(range(len(decoder.stages))):
            for block in decoder.stages[level].op_list:
                if hasattr(block, "context_module") or hasattr(block.main, "conv1"):
                    h = self.run_block(block, h, nn.ReLU() if self.batch[level] else nn.SiLU())
                else:
                    h = self.enlarged(block.main.conv.conv, h, shortcut=True)
        scale, _, last = decoder.project_out.op_list
        h = F.silu(scale(h)) if self.lite else F.relu(scale(h))
        return latent, last.conv(h) if isinstance(last.conv, nn.Conv2d) else self.enlarged(last.conv.conv, h)

    def enlarged(self, layer: nn.Module, h: Tensor, shortcut: bool = False) -> Tensor:
        enlarging = self.strided and not self.lite
        made = layer(F.interpolate(h, scale_factor=2)) if enlarging else F.pixel_shuffle(layer(h), 2)
        if shortcut:
            made = made + F.pixel_shuffle(h.repeat_interleave(4 * made.shape[1] // h.shape[1], dim=1), 2)
        return made


class TinyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(64, 64, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


def taesd(latents: int = 4) -> tuple[nn.Sequential, nn.Sequential]:
    """Encoder and decoder of TAESD, of images in [0, 1]."""
    encoder: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1), TinyBlock()]
    decoder: list[nn.Module] = [Clamp(), nn.Conv2d(latents, 64, 3, padding=1), nn.ReLU()]
    for _ in range(3):
        encoder += [nn.Conv2d(64, 64, 3, padding=1, stride=2, bias=False), *(TinyBlock() for _ in range(3))]
        decoder += [*(TinyBlock() for _ in range(3)), nn.Upsample(scale_factor=2)]
        decoder += [nn.Conv2d(64, 64, 3, padding=1, bias=False)]
    encoder += [nn.Conv2d(64, latents, 3, padding=1)]
    decoder += [TinyBlock(), nn.Conv2d(64, 3, 3, padding=1)]
    return nn.Sequential(*encoder), nn.Sequential(*decoder)


def positions(channels: int, grid: int) -> Tensor:
    """Sines and cosines of the column, then of the row, after MAE; a row of zeros for the class token."""
    frequencies = 1 / 10000 ** (torch.arange(channels // 4, dtype=torch.float64) / (channels / 4))
    rows, columns = (axis.flatten().double() for axis in torch.meshgrid(2 * [torch.arange(grid)], indexing="ij"))
    angles = [place[:, None] * frequencies for place in (columns, rows)]
    table = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return torch.cat([torch.zeros(1, channels), table.float()])[None]


class RAELayer(nn.Module):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        own = parts(**{name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.attention = parts(attention=own, output=parts(dense=nn.Linear(width, width)))
        self.intermediate, self.output = parts(dense=nn.Linear(width, inner)), parts(dense=nn.Linear(inner, width))
        self.layernorm_before, self.layernorm_after = (nn.LayerNorm(width, eps=1e-12) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h, own = self.layernorm_before(x), self.attention.attention
        q, k, v = (
            layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (own.query, own.key, own.value)
        )
        weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
        x = x + self.attention.output.dense((weights @ v).transpose(1, 2).flatten(2))
        return x + self.output.dense(F.gelu(self.intermediate.dense(self.layernorm_after(x))))


class RAEDecoder(nn.Module):
    """RAE's decoder: tokens of an encoder -> patches of an image, still normalised as the encoder's input."""

    def __init__(self, latents: int, width: int = 32, heads: int = 2, inner: int = 64, grid: int = 16, patch: int = 2):
        super().__init__()
        self.patch, self.grid = patch, grid
        self.decoder_embed = nn.Linear(latents, width)
        self.decoder_pos_embed = nn.Parameter(positions(width, grid), requires_grad=False)
        self.decoder_layers = nn.ModuleList([RAELayer(width, heads, inner) for _ in range(2)])
        self.decoder_norm, self.decoder_pred = nn.LayerNorm(width, eps=1e-12), nn.Linear(width, 3 * patch**2)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, width))

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.cat([self.trainable_cls_token.expand(len(tokens), -1, -1), self.decoder_embed(tokens)], dim=1)
        x = x + self.decoder_pos_embed
        for layer in self.decoder_layers:
            x = layer(x)
        pixels = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        pixels = pixels.unflatten(2, (self.patch, self.patch, 3)).unflatten(1, (self.grid, self.grid))
        return torch.einsum("bhwpqc->bchpwq", pixels).flatten(4).flatten(2, 3)
