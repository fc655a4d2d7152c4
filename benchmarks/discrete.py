"""Codes with a distribution (DiscreteVAE) beside nearest codes (VQModel), in networks of one size, on held-out images.

    python -m benchmarks.discrete --photos /data/bsds500 --scratch /tmp/scratch

Each contestant has its recipe without a GAN, but the same images, order, steps and learning rate. Reconstructions and
codes are those of the averaged weights; of a DiscreteVAE they are measured of its most likely codes and of codes drawn
from its distribution, as in training. Killed, it goes on when started again with the same scratch folder.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.family import held_out
from benchmarks.machine import save
from benchmarks.runs import evaluate, folder_name, seconds_of, train
from latent_ae.data.rng import posterior_noise
from latent_ae.models.codes import nearest_codes
from latent_ae.models.discrete import DiscreteVAE
from latent_ae.models.loading import load_first_stage
from latent_ae.models.reconstruct import Reconstructor
from latent_ae.objectives.codebook import code_counts, perplexity

SAME = ["loss.pixel=l1", "loss.perceptual=1", "loss.perceptual_every=2"]
CONTESTANTS = {
    "VQModel": ["vqgan", "gan.weight=0"],
    "DiscreteVAE, losses of vqgan": ["dvae", *SAME],
    "DiscreteVAE": ["dvae"],
    "DiscreteVAE, KL weight 6.6": ["dvae", "loss.kl=6.6"],
}
PX, BATCH, SEED, IMAGES = 64, 4, 0, 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder with BSDS500's folders train, test")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    words = parser.parse_args()
    torch.set_num_threads(1)
    tests = words.photos / "test"
    common = [f"data.source={words.photos / 'train'}", f"data.eval_source={tests}", f"data.resolution={PX}"]
    common += [f"validate.crop_px={PX}", f"batch_size={BATCH}", f"steps={words.steps}", f"seed={SEED}"]
    common += ["checkpoint.every=100000", "validate.every=100000", "validate.images=20"]
    rows = {}
    for name, (recipe, *settings) in CONTESTANTS.items():
        run = words.scratch / folder_name(name)
        train(run, recipe, *common, *settings)
        rows[name] = {"settings": [recipe, *settings]} | measured(run, tests)
    save(
        "discrete",
        {"steps": words.steps, "batch": BATCH, "px": PX, "seed": SEED, "images": IMAGES, "contestants": rows},
    )


@torch.no_grad()
def measured(run: Path, tests: Path) -> dict[str, Any]:
    """Reconstructions, and codes of held-out images: the most likely ones, and drawn ones if there are any."""
    judged = [f"crop_px={PX}", f"limit={IMAGES}", "frechet=[]", "batch_size=20"]
    result = evaluate(run / "recon", "recon", run / "export", tests, *judged)
    module = load_first_stage(str(run / "export")).module
    assert module is not None
    images = held_out(str(tests), PX, IMAGES)
    passes = [Reconstructor(module)(some) for some in images.split(20)]
    row: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in module.parameters())}
    likely = torch.cat([one.codes[0].indices for one in passes])
    row |= of_kind(result, "mode", likely, len(passes[0].codes[0].codebook))
    row |= {"kl_per_position": None, "drawn": None, "processor_seconds": seconds_of(run)}
    if isinstance(module, DiscreteVAE):
        noise = posterior_noise(SEED, range(len(images)), passes[0].latent.shape[1:])
        pairs = zip(images.split(20), noise.split(20), strict=True)
        latents = torch.cat([module.draw(some, own).latent for some, own in pairs])
        row["drawn"] = of_kind(result, "sample", nearest_codes(module, latents)[0], row["codes"])
        row["kl_per_position"] = float(torch.cat([one.rates[0] for one in passes]).mean())
    return row


def of_kind(result: dict[str, Any], kind: str, indices: Tensor, codes: int) -> dict[str, Any]:
    """Metrics of one kind of reconstruction, and the use of its codes."""
    counts = code_counts(indices, codes)
    return {
        "metrics": {key: result["metrics"][kind][key] for key in ("psnr", "ssim", "lpips_vgg")},
        "codes": codes,
        "used": int((counts > 0).sum()),
        "perplexity": float(perplexity(counts)),
    }


if __name__ == "__main__":
    main()
