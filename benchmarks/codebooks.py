"""How the settings of codes begin: PSNR and use of the codes in the first steps of a tiny model.

    python -m benchmarks.codebooks --scratch /tmp/scratch

Rows are short runs of a smaller `vqgan` without a GAN and LPIPS, and differ in the words beside them alone. The
photographs are those that scikit-image ships, three of them held out. PSNR is of the averaged weights. Killed, it goes
on when started again with the same scratch folder.
"""

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.machine import save
from benchmarks.runs import events, folder_name, train

ROWS = {
    "plain": "",
    "length 1": "codebook.normalised=true",
    "rotation": "codebook.gradient=rotation",
    "running means": "codebook.ema_decay=0.99",
    "length 1, entropy penalty": "codebook.normalised=true codebook.entropy=0.05",
    "fixed levels": "codebook.levels=[8,5,5,5] model.config.num_vq_embeddings=1000 loss.revive_after=100",
}
"""Settings by name."""
STEPS, SEEDS = 300, (0, 1, 2)
COMMON = [
    *("gan.weight=0", "loss.perceptual=0", "model.config.block_out_channels=[16,32,32]"),
    *(f"{key}={STEPS}" for key in ("steps", "checkpoint.every", "validate.every")),
]
LAST = 5
"""Lines of the log over which the use of codes is averaged."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True)
    words = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, Any] = {name: {"settings": settings, "runs": []} for name, settings in ROWS.items()}
    for seed in SEEDS:
        for name, settings in ROWS.items():
            run = words.scratch / folder_name(f"{name} {seed}")
            train(run, "vqgan", *COMMON, *settings.split(), f"seed={seed}")
            rows[name]["runs"].append({"seed": seed} | measured(run))
    save("codebooks", {"steps": STEPS, "common": COMMON, "rows": rows})


def measured(run: Path) -> dict[str, float]:
    """PSNR of held-out photographs at the end, and the use of codes in the last steps that were logged."""
    lines = events(run, "train")[-LAST:]
    used = {key: mean(line[f"codebook_{key}"] for line in lines) for key in ("perplexity", "used")}
    return {"psnr": events(run, "validate")[-1]["psnr"]} | used


if __name__ == "__main__":
    main()
