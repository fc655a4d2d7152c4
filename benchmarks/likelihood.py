"""Variational autoencoders that differ in the likelihood of their pixels, by the bits that each needs for CIFAR-10.

python -m benchmarks.likelihood --data /data/cifar10 --scratch /tmp/scratch
Killed, it goes on when started again with the same scratch folder.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import save

RUNS = {
    "logistic, learned scale": [],
    "gaussian, learned scale": ["loss.pixel=gaussian"],
    "gaussian, scale 0.1": ["loss.pixel=gaussian", "loss.scale=0.1", "loss.learned_logvar=false"],
    "bernoulli": ["loss.pixel=bernoulli", "loss.learned_logvar=false", "loss.scale=0.1"],
    "logistic, latent of 4 x 4 x 4": ["model.block_out_channels=[16,16,32,64]", "model.latent_channels=4"],
    "logistic, default start": ["model.init=default"],
}
"""What sets a run apart from the recipe `vae`."""
STEPS, BATCH = 200, 32
COMMON = (
    f"seed=0 steps={STEPS} batch_size={BATCH} validate.images=200 validate.every=1000 checkpoint.every=1000".split()
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with CIFAR-10 as train.parquet, test.parquet")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=RUNS)
    parser.add_argument("--images", type=int, default=300, help="of the test images, to measure")
    parser.add_argument("--samples", type=int, default=32)
    words = parser.parse_args()
    rows: dict[str, Any] = {}
    for name in words.runs:
        run = words.scratch / name.replace(",", "").replace(" ", "-")
        out = run / "likelihood"
        sources = [f"data.source={words.data / 'train.parquet'}", f"data.eval_source={words.data / 'test.parquet'}"]
        if not (run / "processor_seconds.json").exists():
            seconds = _run("train", "vae", f"output_dir={run}", *sources, *COMMON, *RUNS[name])
            (run / "processor_seconds.json").write_text(json.dumps(seconds))
        if not (out / "result.json").exists():
            settings = [f"limit={words.images}", f"samples={words.samples}", "batch_size=64"]
            _run("eval", "likelihood", str(run), str(words.data / "test.parquet"), *settings, "--out", str(out))
        result = json.loads((out / "result.json").read_text())
        log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        rows[name] = {
            "likelihood": result["likelihood"],
            "metrics": result["metrics"],
            "curve": result["curve"],
            "effective_samples": result["effective_samples"],
            "latent_dimensions": result["latent_dimensions"],
            "parameters": result["model"]["parameters"],
            "psnr": [event["psnr"] for event in log if event["event"] == "validate"][-1],
            "processor_seconds": json.loads((run / "processor_seconds.json").read_text()),
        }
    about = {"data": "CIFAR-10, 20,000 images to train on", "steps": STEPS, "batch_size": BATCH}
    save("likelihood", about | {"images": words.images, "samples": words.samples, "runs": rows})


def _run(*words: str) -> float:
    """Processor seconds."""
    print("latent-ae", *words, file=sys.stderr)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "latent_ae", *words], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1)


if __name__ == "__main__":
    main()
