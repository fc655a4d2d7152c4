"""Which losses a short run should have: the quickstart with and without LPIPS and the GAN.

    python -m benchmarks.short_runs --held-out /data/bsds500/test --scratch /tmp/scratch

Rows differ in the words beside them alone. Measured by `eval recon` on photographs that no training saw, as in
`benchmarks.zoo`. Killed, it goes on when started again with the same scratch folder.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import save
from benchmarks.runs import evaluate, folder_name, seconds_of, train
from benchmarks.zoo import FRAMING, QUESTIONS

ROWS = {
    "the quickstart": "",
    "no GAN": "gan.weight=0",
    "a tenth of LPIPS": "gan.weight=0 loss.perceptual=0.1",
    "L1 alone": "gan.weight=0 loss.perceptual=0",
    "squared error alone": "gan.weight=0 loss.perceptual=0 loss.pixel=l2",
    "squared error, a tenth of LPIPS": "gan.weight=0 loss.perceptual=0.1 loss.pixel=l2",
}
"""Settings by name."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--held-out", type=Path, required=True, help="a folder of photographs to measure on")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    words = parser.parse_args()
    torch.set_num_threads(1)
    question = f"{FRAMING['whole']['recon']} {QUESTIONS['recon']} num_workers=0".split()
    rows: dict[str, Any] = {name: {"settings": settings, "runs": []} for name, settings in ROWS.items()}
    for seed in words.seeds:
        for name, settings in ROWS.items():
            run = words.scratch / folder_name(f"{name} {seed}")
            train(run, "quickstart", *settings.split(), f"seed={seed}")
            figures = evaluate(run / "recon", "recon", run / "export", words.held_out, *question)["metrics"]["mode"]
            found = {key: figures[key] for key in ("psnr", "ssim", "lpips_vgg", "frechet_vgg16")}
            rows[name]["runs"].append({"seed": seed, "processor_seconds": seconds_of(run)} | found)
    save("short-runs", {"held_out": words.held_out.parent.name, "question": question, "rows": rows})


if __name__ == "__main__":
    main()
