"""A reconstruction's evaluation beside a plain loop over the same model and metrics, and beside torch-fidelity.

    python -m benchmarks.evaluate --data FOLDER

Whole evaluation: the quickstart's autoencoder as it starts (linear; 0.9 M parameters), so that the metrics dominate;
mode and sample; protocol `default` without the baseline; Inception with random weights. `plain loop` is
benchmarks/plain_evaluation.py with one object for each metric; `plain loop, shared features` puts FID and KID into
torchmetrics' FeatureShare. `ours` runs once with nothing kept and once with Inception's features of the originals in
the cache. All must agree.

FID part: the same PNG files of originals and reconstructions through torch-fidelity's command (--fid --kid) and through
evaluate_reconstruction of a function that reads the reconstructions, with no LPIPS; ours also measures PSNR, SSIM and
MS-SSIM there. Both FIDs must agree to 1e-3.

Every run is a process of its own with one thread and two loader workers (torch-fidelity's own choice there), in turns.
Counted: from the call to its result, loading of weights and reading of files included, imports not. `pass`: up to the
last batch; what follows (covariances, their square roots, subsets, intervals) does not grow with the images once there
are more than 2,048. `cpu`: seconds of processor time, the loader's workers included, which other work on the machine
changes less: images/s are those of the fastest round, ratios medians over the rounds. Peak memory: of the process,
without the workers. Writes benchmarks/results/evaluate.json.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from benchmarks.machine import peak_memory_gb, save

WORKERS = 2
AGREEMENT = {"psnr": 1e-5, "ssim": 2e-2, "ms_ssim": 1e-3, "lpips_vgg": 1e-4, "lpips_alex": 1e-4, "fid": 1e-3}
"""Relative, between the plain loop and ours, of the posterior's mode. torchmetrics' SSIM differs: it also counts
windows that stick out of the image, over mirrored edges."""
Timed = tuple[dict[str, Any], float]
"""Metrics by kind, and the seconds of the pass over the images."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="of photographs; the first ones are taken")
    parser.add_argument("--images", type=int, default=16, help="for the whole evaluation")
    parser.add_argument("--fid-images", type=int, default=48, help="for the FID part")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--worker", nargs=2, metavar=("NAME", "SCRATCH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.worker:
        work(arguments.worker[0], Path(arguments.worker[1]), arguments.batch)
        return
    if arguments.data is None:
        parser.error("--data is needed")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        parameters = prepare(scratch, arguments.data, arguments.images, arguments.fid_images)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
        launch("ours, cached originals", scratch, arguments.batch)  # fills the cache
        for _ in range(arguments.rounds):
            for name in CONTESTANTS:
                runs[name].append(launch(name, scratch, arguments.batch))
                figures = runs[name][-1]
                print(f"{name:<30} {figures['seconds']:7.1f} s  {figures['cpu_s']:7.1f} s of cpu", file=sys.stderr)
            report(runs, arguments, parameters)  # after each round: a run that is cut short keeps the earlier ones
    check_agreement({name: many[0]["metrics"] for name, many in runs.items()})


def report(runs: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace, parameters: int) -> None:
    rows = {}
    for name, many in runs.items():
        rows[name] = summary(many, arguments.fid_images if name.startswith("FID") else arguments.images)
        rows[name] |= ratios(rows[name], rows["FID part, torch-fidelity" if name.startswith("FID") else "plain loop"])
    counts = {"images": arguments.images, "fid_images": arguments.fid_images, "batch": arguments.batch}
    rounds = len(runs["plain loop"])
    save("evaluate", counts | {"rounds": rounds, "parameters": parameters, "contestants": rows})


def launch(name: str, scratch: Path, batch: int) -> dict[str, Any]:
    words = [sys.executable, "-m", "benchmarks.evaluate", "--batch", str(batch), "--worker", name, str(scratch)]
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(words, env=os.environ | one_thread, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def work(name: str, scratch: Path, batch: int) -> None:
    """Runs one contestant and prints its figures as JSON."""
    call = CONTESTANTS[name](scratch, batch)
    started, used = time.perf_counter(), sum(os.times()[:4])
    metrics, pass_s = call()
    figures = {"seconds": time.perf_counter() - started, "pass_s": pass_s, "cpu_s": sum(os.times()[:4]) - used}
    print(json.dumps(figures | {"memory_gb": peak_memory_gb(), "metrics": metrics}))


def summary(runs: list[dict[str, Any]], images: int) -> dict[str, Any]:
    every = {key: [round(run[key], 2) for run in runs] for key in ("seconds", "pass_s", "cpu_s")}
    return {
        "images_per_second": round(images / min(every["seconds"]), 4),
        "images_per_cpu_second": round(images / statistics.median(every["cpu_s"]), 4),
        "peak_memory_gb": round(max(run["memory_gb"] for run in runs), 2),
        "all": every,
        "metrics": runs[0]["metrics"],
    }


def ratios(row: dict[str, Any], against: dict[str, Any]) -> dict[str, float]:
    """Medians over the rounds: a slow minute, if it meets both, leaves the ratio of a round as it is."""
    names = {"seconds": "speedup", "pass_s": "speedup_of_pass", "cpu_s": "speedup_by_cpu_time"}
    return {
        name: round(statistics.median(b / a for a, b in zip(row["all"][key], against["all"][key], strict=True)), 3)
        for key, name in names.items()
    }


def check_agreement(metrics: dict[str, dict[str, Any]]) -> None:
    plain, fidelity = metrics["plain loop"]["mode"], metrics["FID part, torch-fidelity"]["mode"]
    pairs = [("ours", plain, key, bound) for key, bound in AGREEMENT.items()]
    pairs += [("FID part, ours", fidelity, key, 1e-3) for key in ("fid", "kid")]
    for name, expected, key, bound in pairs:
        found = metrics[name]["mode"][key]
        if abs(found - expected[key]) > bound * abs(expected[key]):
            raise RuntimeError(f"{name}: {key} is {found}, elsewhere {expected[key]}")


def prepare(scratch: Path, data: Path, images: int, fid_images: int) -> int:
    """The model (whose parameters are counted), Inception's weights, and the files that the contestants read."""
    from benchmarks.plain_evaluation import Folder, levels
    from latent_ae.config import load_settings
    from latent_ae.models.build import build_autoencoder, count_parameters
    from latent_ae.pretrained.weights import cache_folder
    from latent_ae_train.settings import TrainSettings
    from tests.inception import random_inception

    random_inception(scratch / "inception.pth")
    model = build_autoencoder(load_settings(TrainSettings, "quickstart", []).model, sample_size=256).eval()
    model.save_pretrained(scratch / "model")
    for part in ("files", "originals", "made", "cache/latent-ae"):
        (scratch / part).mkdir(parents=True)
    for path in cache_folder().glob("*.safetensors"):
        (scratch / "cache/latent-ae" / path.name).symlink_to(path)
    paths = sorted(path for path in data.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if len(paths) < max(images, fid_images):
        raise SystemExit(f"--data: {len(paths)} images, {max(images, fid_images)} are needed")
    for path in paths[:images]:
        shutil.copy(path, scratch / "files")
    (scratch / "more").mkdir()
    for path in paths[:fid_images]:
        shutil.copy(path, scratch / "more")
    for number, image in enumerate(Folder(scratch / "more")):
        with torch.no_grad():
            made = model(image[None]).sample
        for folder, pixels in (("originals", levels(image)), ("made", levels(made)[0])):
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(scratch / folder / f"{number:05}.png")
    return count_parameters(model)


def plain(scratch: Path, batch: int, *, shared: bool) -> Callable[[], Timed]:
    from benchmarks.plain_evaluation import plain_evaluation

    folders = scratch / "model", scratch / "files", scratch / "inception.pth"
    return partial(plain_evaluation, *folders, batch_size=batch, workers=WORKERS, shared=shared)


def ours(scratch: Path, batch: int, *, cached: bool) -> Callable[[], Timed]:
    if cached:
        os.environ["XDG_CACHE_HOME"] = str(scratch / "cache")
    return partial(our_evaluation, scratch, scratch / "model", scratch / "files", batch, reference_cache=cached)


def our_fid_part(scratch: Path, batch: int) -> Callable[[], Timed]:
    paths = iter(sorted((scratch / "made").iterdir()))

    def stored(images: torch.Tensor) -> torch.Tensor:
        """The reconstructions of the next images; evaluate_reconstruction asks for them in order."""
        pixels = np.stack([np.asarray(Image.open(next(paths))) for _ in images])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1

    folder = scratch / "originals"
    return partial(our_evaluation, scratch, stored, folder, batch, lpips=(), latents=("mode",), resize_px=None)


def our_evaluation(scratch: Path, model: Any, folder: Path, batch: int, **changes: Any) -> Timed:
    from latent_ae_eval.recon import measure as recon
    from latent_ae_eval.recon.settings import ReconSettings

    settings = ReconSettings(
        inception_weights=str(scratch / "inception.pth"),
        baseline=False,
        num_pictures=0,
        num_workers=WORKERS,
        batch_size=batch,
        **{"reference_cache": False, **changes},
    )
    started, ends = time.perf_counter(), []
    measure = recon._measure

    def noting_the_end(*words: Any) -> int:
        count = measure(*words)
        ends.append(time.perf_counter())
        return count

    with patch.object(recon, "_measure", noting_the_end):
        metrics = recon.evaluate_reconstruction(model, folder, settings)["metrics"]
    names = {"frechet_inception": "fid", "kernel_inception": "kid"}  # random weights make no FID
    return {
        kind: {names.get(key.rpartition("_")[0], key): value for key, value in values.items()}
        for kind, values in metrics.items()
    }, ends[0] - started


def fidelity(scratch: Path, batch: int) -> Callable[[], Timed]:
    from torch_fidelity import fidelity
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    count = len(list((scratch / "made").iterdir()))
    words = ["--input1", str(scratch / "made"), "--input2", str(scratch / "originals"), "--cpu", "--fid", "--kid"]
    words += ["--json", "--kid-subset-size", str(min(1000, count)), "--batch-size", str(batch)]
    words += ["--feature-extractor-weights-path", str(scratch / "inception.pth")]
    ends, forward = [0.0], FeatureExtractorInceptionV3.forward

    def noting_the_end(network: Any, images: torch.Tensor) -> Any:
        features = forward(network, images)
        ends.append(time.perf_counter())
        return features

    FeatureExtractorInceptionV3.forward = noting_the_end

    def command() -> Timed:
        sys.argv[1:] = words
        started, printed = time.perf_counter(), io.StringIO()
        with contextlib.redirect_stdout(printed):
            fidelity.main()
        found = json.loads(printed.getvalue()[printed.getvalue().index("{") :])
        names = {"fid": "frechet_inception_distance", "kid": "kernel_inception_distance_mean"}
        return {"mode": {key: found[name] for key, name in names.items()}}, ends[-1] - started

    return command


CONTESTANTS: dict[str, Callable[[Path, int], Callable[[], Timed]]] = {
    "plain loop": partial(plain, shared=False),
    "plain loop, shared features": partial(plain, shared=True),
    "ours": partial(ours, cached=False),
    "ours, cached originals": partial(ours, cached=True),
    "FID part, torch-fidelity": fidelity,
    "FID part, ours": our_fid_part,
}

if __name__ == "__main__":
    main()
