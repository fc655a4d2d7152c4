"""From nothing to a trained, measured and compared first stage in Python; docs/python.md explains it.

    python examples/first_stage.py OUT [STEPS]

Two minutes on two CPU cores, on the photographs that scikit-image ships.
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import skimage
import torch

import latent_ae as lae
from latent_ae_eval import evaluate
from latent_ae_eval.compare.measure import compare
from latent_ae_train import TrainSettings, train

out = Path(sys.argv[1] if len(sys.argv) > 1 else "first-stage")
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 40

# train
settings = TrainSettings.load("quickstart", f"output_dir={out}/run", f"steps={steps}", "gan.weight=0", "log.every=1")
results = train(settings)
print(results["held_out"]["after"]["psnr"], "dB")

# the loss curve
lines = [json.loads(line) for line in (out / "run/log.jsonl").read_text().splitlines()]
lines = [line for line in lines if line["event"] == "train"]
for term in ("l1", "lpips"):
    plt.plot([line["step"] for line in lines], [line[term] for line in lines], label=term)
plt.xlabel("step")
plt.legend()
plt.savefig(out / "losses.png")

# encode and decode
vae = lae.load(out / "run")
image = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1)[None] / 127.5 - 1
with torch.no_grad():
    z = vae.encode(image)
    reconstruction = vae.decode(z.mean)
print(z.mean.shape, lae.psnr(lae.to_uint8(image), lae.to_uint8(reconstruction)))

# what a diffusion model scales latents by
statistics = lae.LatentStatistics()
statistics.update(z.mean)
print(statistics.scaling_factor, statistics.shift_factor)

# LPIPS as a loss: its gradients are finite everywhere, also where both images are equal
lpips = lae.LPIPS("vgg")
target = image[..., :64, :64]
mine = target.clone().requires_grad_()
lpips(mine, target).mean().backward()

# measure it beside something else, and compare
evaluate("recon", out / "run", "photos", out=out / "ours", crop_px=64)
evaluate("recon", lambda images: images.round(decimals=1), "photos", out=out / "rounded", crop_px=64)
comparison = compare([out / "ours", out / "rounded"], out=out / "comparison")
print(comparison["differences"])
