"""What a step's arithmetic loses: bfloat16 at the posterior, and Adam's eps at small gradients.

python -m benchmarks.small_numbers --data /data/train --held-out /data/test
Trains the quickstart's model once for each eps, with a GAN from half of the run on, then looks at both.
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
from benchmarks.time_to_quality import DEVICE, Batches, data_name, measure, step_and_average
from latent_ae.config import load_settings
from latent_ae.data import open_images
from latent_ae.held_out import held_out_images
from latent_ae.models import keep_posterior_precise_
from latent_ae.perceptual import LPIPS
from latent_ae_train.config import TrainSettings
from latent_ae_train.step import TrainStep

SPARED = ("encoder.conv_out", "quant_conv", "post_quant_conv", "decoder.conv_in")


class Float32GroupNorm(nn.GroupNorm):
    """As under CUDA's autocast; the CPU's leaves it in bfloat16."""

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(features.float())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="photos")
    parser.add_argument("--held-out", metavar="DATA", help="default: photographs held out of --data")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--eps", type=float, nargs="+", default=[1e-8, TrainSettings().optim.eps])
    parser.add_argument("--images", type=int, default=16, help="held-out crops of 64 px that are measured")
    arguments = parser.parse_args()
    words = [f"data.source={arguments.data}", f"steps={arguments.steps}", f"gan.start={arguments.steps // 2}"]
    words += ["gan.discriminator_warmup=5", "gan.warmup=5"]
    words += [f"data.eval_source={arguments.held_out}"] if arguments.held_out else []
    perceptual = LPIPS("vgg").to(DEVICE)
    data = load_settings(TrainSettings, "quickstart", words).data
    crops = held_out_images(open_images(data, "held_out"), data, channels=3, crop_px=64, multiple_of=4)
    images = [image for _, _, image in islice(crops, arguments.images)]
    result: dict[str, Any] = {"data": data_name(data), "held_out_images": len(images), "eps": {}}
    for eps in arguments.eps:
        settings = load_settings(TrainSettings, "quickstart", [*words, f"optim.eps={eps}"])
        step, averaged = step_and_average(settings, perceptual)
        batches, norms, unused = Batches(settings), list[float](), list[float]()
        first = unused_channel_gradient(step)
        for number in range(settings.steps):
            norms.append(float(step(number, batches)["grad_norm"]))
            unused += first if number == 0 else []
        row = measure(lambda batch, averaged=averaged: averaged(batch).image, images, perceptual)
        row |= {"share_below": shares_below(step, arguments.eps)}
        row |= {"grad_norm": [round(min(norms), 2), round(max(norms), 2)]}
        row |= {"clipped": sum(norm > settings.optim.clip for norm in norms) / len(norms)}
        row |= {"unused_channel": {"gradient": unused[0], "step_over_lr": unused[0] / (unused[0] + eps)}}
        result["eps"][f"{eps:g}"] = row
        print(f"{eps:g}: {row}", file=sys.stderr, flush=True)
    result["posterior"] = posterior_errors(averaged.autoencoder, torch.stack(images[:4]))
    print(result["posterior"], file=sys.stderr)
    save("small-numbers", result)


def unused_channel_gradient(step: TrainStep) -> list[float]:
    """Fills with what Adam gets, after clipping, at the log-variance's bias of a channel that is not decoded."""
    seen: list[float] = []
    autoencoder = step.bare_reconstructor.autoencoder
    with torch.no_grad():
        autoencoder.post_quant_conv.weight[:, 0] = 0.0
    bias = autoencoder.quant_conv.bias

    def look(*_: object) -> None:
        if not seen:
            seen.append(float(bias.grad[autoencoder.config.latent_channels].abs()))

    step.optimizer.register_step_pre_hook(look)
    return seen


def shares_below(step: TrainStep, every_eps: list[float]) -> dict[str, dict[str, float]]:
    """Share of each network's parameters whose root mean square gradient is less than 10 eps."""
    found: dict[str, dict[str, float]] = {}
    optimizers = {"autoencoder": step.optimizer, "discriminator": step.discriminator_optimizer}
    for name, optimizer in optimizers.items():
        assert optimizer is not None
        roots = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                debias = 1.0 - group["betas"][1] ** float(state["step"])
                roots.append((state["exp_avg_sq"] / debias).sqrt().flatten())
        values = torch.cat(roots)
        found[name] = {f"{eps:g}": float((values < 10 * eps).float().mean()) for eps in every_eps}
        found[name]["smallest"] = float(values.min())
        found[name]["hundredth"] = float(values.quantile(0.01))
        found[name]["median"] = float(values.median())
    return found


@torch.no_grad()
def posterior_errors(trained: AutoencoderKL, images: Tensor) -> dict[str, Any]:
    """Errors under bf16 autocast against float32, in posterior standard deviations.

    `mean`: of the posterior's mean, for each channel. `entered`: of what the decoder's first convolution makes of a
    sample, relative to what one standard deviation in every latent number changes there.
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
        rows["mean"][name] = per_channel((moments(model, bf16=True)[0] - mean) / std)
        rows["entered"][name] = round(
            float((entered(model, sample, bf16=True) - exact).square().mean().sqrt() / unit), 4
        )
    return rows


def per_channel(error: Tensor) -> list[float]:
    return [round(float(value), 4) for value in error.square().mean((0, 2, 3)).sqrt()]


if __name__ == "__main__":
    main()
