"""The small recipes, each trained by its own command and measured by every evaluation on the same held-out photographs.

    python -m benchmarks.zoo --held-out /data/bsds500/test --scratch /tmp/zoo

Trained is on the photographs that scikit-image ships, as the recipes say; a recipe that builds on the quickstart takes
that of the same seed. Each recipe takes 5 to 10 processor minutes for each seed, half of them for the evaluations.
Killed, it goes on when started again with the same scratch folder. What each training gives is added to
benchmarks/results/zoo.json, whose seeds may have been measured elsewhere but must answer the same questions.

Recipes that are not here: beta-vae, whose images are made (docs/vaes.md), and rae, whose frozen encoder has to be
downloaded.
"""

import argparse
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.machine import alternate, earlier, save
from benchmarks.runs import evaluate, peak_gb_of, seconds_of, train
from latent_ae.config import load_settings
from latent_ae.models.loading import load_first_stage
from latent_ae.models.registry import family_of
from latent_ae_train.phases import phases_of
from latent_ae_train.settings import TrainSettings


class Member(NamedTuple):
    """A recipe, the setting that names the quickstart it builds on, and the size of its images."""

    builds_on: str = ""
    measured: str = "whole"


MEMBERS = {
    "quickstart": Member(),
    "flux2": Member(),
    "asymmetric": Member(),
    "tiny": Member(),
    "vqgan": Member(),
    "dvae": Member(),
    "vqvae2": Member(),
    "dc-ae": Member(),
    "tiny-distilled": Member("distillation.teacher"),
    "new-decoder": Member("init_from"),
    "flow-decoder": Member("init_from"),
    "vae": Member(measured="32 px"),
    "factor-vae": Member(measured="32 px"),
    "beta-tcvae": Member(measured="32 px"),
    "flow-vae": Member(measured="32 px"),
    "hierarchical-vae": Member(measured="32 px"),
    "deep-vae": Member(measured="32 px"),
}
FRAMING = {
    "whole": {"recon": "resize_px=null crop_px=256", "latents": "", "ifid": "resize_px=null crop_px=64"},
    "32 px": dict.fromkeys(("recon", "latents", "ifid"), "resize_px=64 crop_px=32"),
}
"""Of the held-out photographs. A vector of latents belongs to images of one size."""
SIDES_PX = {"whole": 256, "32 px": 32}
ROUNDS = 5
QUESTIONS = {
    "recon": "limit=50 latents=[mode] lpips=[vgg] frechet=[vgg16] baseline=false batch_size=1",
    "latents": "limit=50 num_decoded=0 lpips=null",
    "ifid": "frechet=[vgg16]",
    "text": "scripts=[latin] sizes_px=[8,12,16,24,32]",
}
"""What is measured, and how much of it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--held-out", type=Path, required=True, help="a folder of photographs to measure on")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", default=list(MEMBERS), choices=MEMBERS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--name", default="zoo", help="of the result")
    words = parser.parse_args()
    torch.set_num_threads(1)
    reads = shutil.which("tesseract") is not None and find_spec("pytesseract") is not None
    if not reads:
        print("text is left out: tesseract or pytesseract is not installed", file=sys.stderr)
    facts = {"held_out": words.held_out.parent.name, "framing": FRAMING, "questions": QUESTIONS}
    earlier(words.name, facts)  # ends here rather than after a training
    for seed in words.seeds:
        for recipe in words.recipes:
            run = words.scratch / f"{recipe}-{seed}"
            own = [f"seed={seed}"]
            if on := MEMBERS[recipe].builds_on:
                train(base := words.scratch / f"quickstart-{seed}", "quickstart", f"seed={seed}")
                own.append(f"{on}={base / 'export'}")
            train(run, recipe, *own)
            found = measured(recipe, run, words.held_out, reads)
            rows = earlier(words.name, facts)
            known = rows.get(recipe, {"seeds": {}})
            seeds = known["seeds"] | {str(seed): found}
            rows[recipe] = known | about(recipe, own, run / "export") | {"seeds": dict(sorted(seeds.items()))}
            save(words.name, {**facts, "rows": rows}, added=True)
    # by processor seconds, in turns: times of the evaluations are the clock's, which other work disturbs
    found = speeds({recipe: words.scratch / f"{recipe}-{words.seeds[0]}" for recipe in words.recipes})
    rows = earlier(words.name, facts)
    for recipe, milliseconds in found.items():
        rows[recipe] |= milliseconds
    save(words.name, {**facts, "rows": rows}, added=True)


@torch.no_grad()
def speeds(runs: Mapping[str, Path]) -> dict[str, dict[str, float]]:
    """Processor milliseconds in which each first stage encodes and decodes one image."""
    calls: dict[str, Callable[[], object]] = {}
    for recipe, run in runs.items():
        stage = load_first_stage(str(run / "export"))
        side = SIDES_PX[MEMBERS[recipe].measured]
        image = torch.rand(1, stage.channels or 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
        latent = stage.encode(image).mean
        calls[f"{recipe} encode_ms"] = partial(stage.encode, image)
        calls[f"{recipe} decode_ms"] = partial(stage.decode, latent)
    found: dict[str, dict[str, float]] = {}
    for name, times in alternate(calls, ROUNDS, torch.device("cpu")).items():
        recipe, key = name.split()
        found.setdefault(recipe, {})[key] = 1e3 * times["median_s"]
    return found


def about(recipe: str, words: Sequence[str], export: Path) -> dict[str, Any]:
    """What a recipe makes with these words, and the command that repeats it."""
    stage = load_first_stage(str(export))
    phases = [phase.settings for phase in phases_of(load_settings(TrainSettings, recipe, words))]
    return {
        "command": f"latent-ae train {recipe}",
        "class": stage.name,
        "parameters": stage.describe()["parameters"],
        "factor": stage.factor,
        "steps": sum(phase.steps for phase in phases),
        "images": sum(phase.steps * phase.batch_size for phase in phases),
        "measured": MEMBERS[recipe].measured,
    }


def measured(recipe: str, run: Path, held_out: Path, reads: bool) -> dict[str, Any]:
    """All figures of one training."""
    found: dict[str, Any] = {"processor_seconds": seconds_of(run), "peak_gb": peak_gb_of(run)}
    framing = FRAMING[MEMBERS[recipe].measured]

    def ask(kind: str, data: Path | None = None) -> dict[str, Any]:
        question = f"{framing.get(kind, '')} {QUESTIONS[kind]} num_workers=0".split()
        return evaluate(run / kind, kind, run / "export", data, *question)

    module: Any = load_first_stage(str(run / "export")).module
    family = family_of(module)
    recon = ask("recon", held_out)
    found |= {key: recon["metrics"]["mode"][key] for key in ("psnr", "ssim", "lpips_vgg", "frechet_vgg16")}
    bits = recon["cost"]["bits_per_pixel"]
    found["bits_per_pixel"] = bits["indices"] or bits["fp16"]
    if family.one_grid:  # others are not measured
        health = ask("latents", held_out)["health"]
        found |= {key: health.get(key) for key in ("effective_rank", "kl_nats_per_dim")}  # a posterior has a KL
    if family.one_grid and not family.codes(module.config):  # there is nothing between codes
        found["midpoints"] = ask("ifid", held_out)["metrics"]["midpoints"]["frechet_vgg16"]
    if reads and MEMBERS[recipe].measured == "whole":
        found["text"] = ask("text")["metrics"]
    return found


if __name__ == "__main__":
    main()
