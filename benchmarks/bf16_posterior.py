"""What bfloat16 does to the latents of a trained first stage, with and without the posterior in float32.

python -m benchmarks.bf16_posterior MODEL --held-out /data/test
"""

import argparse
import copy
import sys
from itertools import islice
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from benchmarks.machine import save
from benchmarks.time_to_quality import DEVICE, data_name
from latent_ae.config import load_settings
from latent_ae.data.held_out import held_out_images
from latent_ae.data.loader import open_images
from latent_ae.models.build import load_autoencoder
from latent_ae.models.reconstruct import keep_posterior_precise_
from latent_ae_train.settings import TrainSettings

SPARED = ("encoder.conv_out", "quant_conv", "post_quant_conv", "decoder.conv_in")


class Float32GroupNorm(nn.GroupNorm):
    """As under CUDA's autocast; the CPU's leaves it in bfloat16."""

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(features.float())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an AutoencoderKL")
    parser.add_argument("--held-out", metavar="DATA", default="photos")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--crop-px", type=int, default=64)
    arguments = parser.parse_args()
    data = load_settings(TrainSettings, "quickstart", [f"data.eval_source={arguments.held_out}"]).data
    crops = held_out_images(open_images(data, "held_out"), data, channels=3, crop_px=arguments.crop_px, multiple_of=8)
    images = torch.stack([image for _, _, image in islice(crops, arguments.images)])
    errors = posterior_errors(load_autoencoder(arguments.model).eval().to(DEVICE), images.to(DEVICE))
    print(errors, file=sys.stderr)
    held_out = data_name(data.model_copy(update={"source": arguments.held_out}))
    save("bf16-posterior", {"held_out": held_out, "images": len(images), "crop_px": arguments.crop_px} | errors)


@torch.no_grad()
def posterior_errors(trained: AutoencoderKL, images: Tensor) -> dict[str, Any]:
    """Errors under bf16 autocast against float32, in posterior standard deviations.

    `mean`: of the posterior's mean, for each channel, and the same given the features that enter the encoder's last
    convolution. `entered`: of what the decoder's first convolution makes of a sample, relative to what one standard
    deviation in every latent number changes there.
    """
    kinds: dict[str, AutoencoderKL] = {}
    for name in ("bf16", "posterior in float32"):
        for norm, normalised in (("", False), (", GroupNorm in float32", True)):
            model = copy.deepcopy(trained)
            for layer in SPARED:
                model.get_submodule(layer).__class__ = nn.Conv2d
            if name != "bf16":
                keep_posterior_precise_(model)
            for layer in model.modules() if normalised else ():
                if isinstance(layer, nn.GroupNorm):
                    layer.__class__ = Float32GroupNorm
            kinds[name + norm] = model

    def moments(model: AutoencoderKL, bf16: bool) -> tuple[Tensor, Tensor]:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
            posterior = model.encode(images).latent_dist
        return posterior.mean.float(), posterior.logvar.float()

    def entered(model: AutoencoderKL, latent: Tensor, bf16: bool) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
            return model.decoder.conv_in(model.post_quant_conv(latent)).float()

    mean, logvar = moments(trained, bf16=False)
    std = (0.5 * logvar).exp()
    sample = mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    exact = entered(trained, sample, bf16=False)
    unit = (exact - entered(trained, mean, bf16=False)).square().mean().sqrt()
    rows: dict[str, Any] = {
        "std": [round(float(value), 5) for value in std.mean((0, 2, 3))],
        "mean": {"rounding to bf16 alone": per_channel((mean.bfloat16().float() - mean) / std)},
        "entered": {},
    }
    for name, model in kinds.items():
        features: list[Tensor] = []
        handle = model.encoder.conv_out.register_forward_pre_hook(lambda _, args, seen=features: seen.append(args[0]))
        rounded = moments(model, bf16=True)[0]
        handle.remove()
        exact_mean = trained.quant_conv(trained.encoder.conv_out(features[0].float())).chunk(2, 1)[0]
        rows["mean"][name] = per_channel((rounded - mean) / std)
        rows["mean"][f"{name}, given its features"] = per_channel((rounded - exact_mean) / std)
        rows["entered"][name] = round(
            float((entered(model, sample, bf16=True) - exact).square().mean().sqrt() / unit), 4
        )
    return rows


def per_channel(error: Tensor) -> list[float]:
    return [round(float(value), 6) for value in error.square().mean((0, 2, 3)).sqrt()]


if __name__ == "__main__":
    main()
