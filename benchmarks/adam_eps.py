"""Adam's eps beside gradients of losses that are means: which parameters it holds back, and what that does to quality.

python -m benchmarks.adam_eps --data /data/train --held-out /data/test [--save /tmp/model]
Trains the quickstart's model for each eps and seed, with a GAN from half of the run on.
"""

import argparse
import sys
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import save
from benchmarks.time_to_quality import DEVICE, Batches, data_name, measure, step_and_average
from latent_ae.config import load_settings
from latent_ae.data.held_out import held_out_images
from latent_ae.data.loader import open_images
from latent_ae.models.reconstruct import Reconstructor
from latent_ae.pretrained.lpips import LPIPS
from latent_ae_train.settings import TrainSettings
from latent_ae_train.step import TrainStep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="photos")
    parser.add_argument("--held-out", metavar="DATA", help="default: photographs held out of --data")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--eps", type=float, nargs="+", default=[1e-8, TrainSettings().optim.eps])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--images", type=int, default=16, help="held-out crops of 64 px that are measured")
    parser.add_argument("--save", type=Path, help="folder for the averaged weights of the last run")
    arguments = parser.parse_args()
    words = [f"data.source={arguments.data}", f"steps={arguments.steps}", f"batch_size={arguments.batch_size}"]
    words += [f"gan.start={arguments.steps // 2}", "gan.discriminator_warmup=5", "gan.warmup=5"]
    words += [f"data.eval_source={arguments.held_out}"] if arguments.held_out else []
    perceptual = LPIPS("vgg").to(DEVICE)
    data = load_settings(TrainSettings, "quickstart", words).data
    crops = held_out_images(open_images(data, "held_out"), data, channels=3, crop_px=64, multiple_of=4)
    images = [image for _, _, image in islice(crops, arguments.images)]
    result: dict[str, Any] = {
        "data": data_name(data),
        "held_out_images": len(images),
        "settings": [word for word in words if not word.startswith("data.")],
        "eps": {},
    }
    for eps in arguments.eps:
        runs = list[dict[str, Any]]()
        for seed in arguments.seeds:
            settings = load_settings(TrainSettings, "quickstart", [*words, f"optim.eps={eps}", f"seed={seed}"])
            row: dict[str, Any] = {"seed": seed, "unused_channel": unused_channel(settings, perceptual)}
            step, averaged = step_and_average(settings)
            batches = Batches(settings)
            norms = [float(step(number, batches)["grad_norm"]) for number in range(settings.steps)]
            row |= measure(partial(image_of, averaged), images, perceptual)
            row |= {"share_below": shares_below(step, arguments.eps)}
            row |= {"grad_norm": [round(min(norms), 2), round(max(norms), 2)]}
            row |= {"clipped": sum(norm > settings.optim.clip for norm in norms) / len(norms)}
            runs.append(row)
            print(f"{eps:g}: {row}", file=sys.stderr, flush=True)
            if arguments.save is not None:
                averaged.autoencoder.save_pretrained(arguments.save)
        result["eps"][f"{eps:g}"] = runs
    save("adam-eps", result)


def image_of(network: Reconstructor, batch: torch.Tensor) -> torch.Tensor:
    return network(batch).image


def unused_channel(settings: TrainSettings, perceptual: LPIPS) -> dict[str, float]:
    """What Adam gets, after clipping, at the log-variance's bias of a channel that is not decoded, and makes of it."""
    step, _ = step_and_average(settings)
    autoencoder, seen = step.bare_reconstructor.autoencoder, list[float]()
    with torch.no_grad():
        autoencoder.post_quant_conv.weight[:, 0] = 0.0
    place = autoencoder.config.latent_channels
    step.optimizers.autoencoder.register_step_pre_hook(
        lambda *_: seen.append(float(autoencoder.quant_conv.bias.grad[place].abs()))
    )
    step(0, Batches(settings))
    return {"gradient": seen[0], "step_over_lr": seen[0] / (seen[0] + settings.optim.eps)}


def shares_below(step: TrainStep, every_eps: list[float]) -> dict[str, dict[str, float]]:
    """Share of each network's parameters whose root mean square gradient is less than 10 eps."""
    found: dict[str, dict[str, float]] = {}
    optimizers = {"autoencoder": step.optimizers.autoencoder, "discriminator": step.optimizers.adversaries["gan"]}
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


if __name__ == "__main__":
    main()
