"""Our training against others' own programs, unmodified: held-out quality after the same time on one core.

    python -m benchmarks.against --data TRAIN_FOLDER --held-out TEST_FOLDER --python THEIR_PYTHON \\
        --diffusers CHECKOUT --latent-diffusion CHECKOUT --taming CHECKOUT --lavinal CHECKOUT --old-lightning FOLDER

Every program trains the same architecture, at two sizes, on the same tiles of 64 px, cut from the photographs, in
batches of 8, on one thread of one core. Time is the processor's, so that other work on the machine counts little; of a
program that has its core alone it is that of the clock, which is in the result, too. A rival gets `--minutes` from the
end of its first step on, once with its own learning rate and once with ours. Ours gets a fifth, two fifths and all of
that time, in a run of its own each, because its learning rate decays over the run, and all of it from the start that
rivals have, too; untrained, the linear start shows what training adds. Rivals and ours take turns. What a rival has
saved when its time is up is converted, and measured on centre crops of the held-out photographs by `latent-ae eval
recon` and by torchmetrics and lpips around a stock AutoencoderKL.

Each result is written into benchmarks/results/against.json when it is there. The same command again makes what is
missing or has failed. What a program needs to run at all is in `programs` of the file; THEIR_PYTHON is an interpreter
with the packages named there, and --old-lightning the folder with those that must be old.
"""

import argparse
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import lpips
import numpy as np
import psutil
import torch
import torchvision
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from benchmarks.against_programs.programs import AS_PUBLISHED, NEEDED, RIVALS, Places, Program, ours
from benchmarks.machine import earlier, save
from benchmarks.plain_evaluation import levels, lpips_network
from benchmarks.runs import evaluate, folder_name, latent_ae
from benchmarks.widths import WIDTHS
from latent_ae.config import load_settings
from latent_ae.models.build import build_autoencoder
from latent_ae.pretrained.weights import weight_file
from latent_ae_train.settings import TrainSettings

NAME = "against"
SIZES = {"f4": "", "f8": f"{WIDTHS['12M']} model.latent_channels=16"}
"""Settings of the model beyond the recipe quickstart."""
SHORT_RUN_RATE = 3e-4
"""A learning rate for rivals beside their own, which are for runs a thousand times as long: the quickstart's."""
PARTS = (0.2, 0.4, 1.0)
"""Of a rival's time that ours gets."""
OURS, PLAIN, UNTRAINED = "ours", "ours from the default start", "ours, untrained"
"""The recipe, the same without its linear start and steps by layer, which only goes with it, and the linear start."""
TARGETS = {"f4": PARTS[0], "f8": PARTS[1]}
"""The part at which ours should have a rival's quality."""
TILE_PX = 64
EVALUATION = ["resize_px=null", "crop_px=null", "latents=[mode]", "lpips=[vgg]", "frechet=[]", "baseline=false"]
POLL_S = 0.5
PATIENCE_S = 600.0
"""Until the first step, and from the end of the time until weights are there."""


class Failed(RuntimeError):
    """A program that did not start, or ended without weights."""


class Entry(NamedTuple):
    """One training: of a rival with a learning rate (None: its own), or of ours with a part of the time."""

    program: str
    size: str
    rate: float | None = None
    part: float = 1.0

    def name(self, minutes: float) -> str:
        if self.program == UNTRAINED:
            return f"{self.program}, {self.size}"
        if self.program in (OURS, PLAIN):
            return f"{self.program}, {minutes * self.part:g} min, {self.size}"
        return f"{self.program}, {'its own rate' if self.rate is None else f'lr {self.rate:g}'}, {self.size}"


class Moment(NamedTuple):
    """Of a program: steps done, the clock, processor seconds, and the most memory until then."""

    steps: int
    clock_s: float
    processor_s: float
    peak_gb: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of photographs to train on")
    parser.add_argument("--held-out", type=Path, required=True, help="a folder of photographs to measure on")
    parser.add_argument("--python", type=Path, required=True, help="an interpreter with the packages of the rivals")
    for name in ("diffusers", "latent-diffusion", "taming", "lavinal"):
        parser.add_argument(f"--{name}", type=Path, required=True, help="a checkout")
    parser.add_argument("--old-lightning", type=Path, required=True, help="a folder with pytorch-lightning 1.4.2")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training, for each rival")
    parser.add_argument(
        "--rates", type=float, nargs="*", default=[SHORT_RUN_RATE], help="learning rates of rivals beside their own"
    )
    parser.add_argument("--images", type=int, default=32, help="held-out crops that are measured")
    parser.add_argument("--crop", type=int, default=256, help="their side, px")
    parser.add_argument("--only", metavar="WORD", help="make only entries whose name contains this")
    parser.add_argument("--work", type=Path, default=Path("runs") / NAME, help="a folder for runs, several GB")
    parser.add_argument("--name", default=NAME, help="of the result")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    on_one_core()
    found = {name: getattr(arguments, name).absolute() for name in Places._fields if name != "work"}
    places = Places(**found, work=arguments.work.absolute())
    prepare(places, arguments.data, arguments.held_out, arguments.images, arguments.crop)
    facts: dict[str, Any] = {
        "minutes": arguments.minutes,
        "data": "/".join(arguments.data.absolute().parts[-2:]),
        "tiles": len(list(places.photographs.iterdir())),
        "tile_px": TILE_PX,
        "held_out": "/".join(arguments.held_out.absolute().parts[-2:]),
        "held_out_images": arguments.images,
        "crop_px": arguments.crop,
        "sizes": {size: f"quickstart {words}".strip() for size, words in SIZES.items()},
        "programs": {name: {"settings": AS_PUBLISHED[name], "needed": NEEDED[name]} for name in NEEDED},
    }
    rows = earlier(arguments.name, {key: fact for key, fact in facts.items() if key != "programs"}, "entries")
    for entry in entries(arguments.rates):
        name = entry.name(arguments.minutes)
        if (arguments.only or "") not in name or "latent_ae" in rows.get(name, {}):
            continue
        print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr, flush=True)
        try:
            rows[name] = measure(entry, name, places, 60 * arguments.minutes)
        except (RuntimeError, ValueError, OSError, subprocess.CalledProcessError) as error:
            rows[name] = {"failed": without_folders(str(error))}
        print(f"  {rows[name]}", file=sys.stderr, flush=True)
        save(arguments.name, {**facts, "entries": rows, "target": targets(rows)}, added=True)


def entries(rates: Sequence[float]) -> list[Entry]:
    """In the order in which they are made: rivals and ours in turns, size after size."""
    made: list[Entry] = []
    for size in SIZES:
        rivals = [Entry(program, size, rate) for rate in (None, *rates) for program in RIVALS]
        mine = [*(Entry(OURS, size, part=part) for part in PARTS), Entry(PLAIN, size), Entry(UNTRAINED, size, part=0.0)]
        made += [entry for entry in chain(*zip_longest(rivals, mine)) if entry is not None]
    return made


def measure(entry: Entry, name: str, places: Places, limit_s: float) -> dict[str, Any]:
    """Trains, and measures what came of it.

    Raises:
        Failed: With the end of the program's log.
    """
    folder = fresh(places.work / "runs" / folder_name(name))
    settings = settings_of(entry.size)
    row: dict[str, Any] = {"steps": 0}
    if entry.program == UNTRAINED:
        model = folder / "untrained"
        build_autoencoder(settings.model, sample_size=TILE_PX, seed=settings.seed).save_pretrained(model)
    elif entry.program in (OURS, PLAIN):
        row, model = train_ours(entry, places, folder, limit_s * entry.part)
    else:
        program = RIVALS[entry.program](places, folder, settings, entry.rate)
        row, weights = run(program, folder, places, limit_s, settings.batch_size)
        assert weights is not None
        model = weights
        if program.convert is not None:
            model = folder / "converted"
            latent_ae("convert", str(weights), str(model), *program.convert)
    held_out = places.work / "held-out"
    result = evaluate(folder / "evaluation", "recon", model, held_out, *EVALUATION)
    means = result["metrics"]["mode"]
    row["parameters"] = result["model"]["parameters"]
    row["latent_ae"] = {"psnr": means["psnr"], "ssim": means["ssim"], "lpips": means["lpips_vgg"]}
    row["independent"] = independent(model, held_out)
    return {"program": entry.program, "size": entry.size, "part": entry.part, **row}


def settings_of(size: str) -> TrainSettings:
    return load_settings(TrainSettings, "quickstart", SIZES[size].split())


def train_ours(entry: Entry, places: Places, folder: Path, limit_s: float) -> tuple[dict[str, Any], Path]:
    """A run of as many steps as fit, by a short trial before it; it is made again where it took longer after all."""
    settings = settings_of(entry.size)
    words = [*words_of(entry.size, places), *(["model.init=default"] if entry.program == PLAIN else [])]
    steps = steps_within(0.97 * limit_s, *step_seconds(entry.size, places), settings.gan.start)
    while True:
        shutil.rmtree(folder / "run", ignore_errors=True)
        every = [f"steps={steps}", f"checkpoint.every={steps}", f"validate.every={steps}"]
        row, _ = run(ours(places, folder, [*words, *every]), folder, places, math.inf, settings.batch_size)
        if row["processor_seconds"] <= 1.01 * limit_s:
            return row, folder / "run" / "export"
        steps = int(steps * 0.97 * limit_s / row["processor_seconds"])


def words_of(size: str, places: Places) -> list[str]:
    data = [f"data.source={places.photographs}", f"data.eval_source={places.work / 'held-out'}"]
    return [*SIZES[size].split(), *data, "validate.images=1", "log.every=1"]


@cache
def step_seconds(size: str, places: Places) -> tuple[float, float]:
    """Processor seconds of our steps without and with the GAN: medians of a short run."""
    folder = fresh(places.work / "runs" / f"trial-{size}")
    gan = ["gan.start=8", "gan.discriminator_warmup=2", "gan.warmup=2"]
    every = ["steps=20", "checkpoint.every=20", "validate.every=20"]
    row, _ = run(ours(places, folder, [*words_of(size, places), *gan, *every]), folder, places, math.inf, 1)
    log = (folder / "run" / "log.jsonl").read_text().splitlines()
    rates = [line["images_per_second"] for line in map(json.loads, log) if "images_per_second" in line]
    share = row["processor_seconds"] / row["clock_seconds"]
    batch = settings_of(size).batch_size
    # the lines begin at the second step
    plain, adversarial = (share * batch / statistics.median(part) for part in (rates[:6], rates[-8:]))
    return plain, adversarial


def steps_within(seconds: float, plain_s: float, adversarial_s: float, start: int) -> int:
    """Steps that fit into a time if those after the first `start` have an adversary and take longer."""
    steps = seconds / plain_s
    return max(2, int(steps if steps <= start else start + (seconds - start * plain_s) / adversarial_s))


def run(
    program: Program, folder: Path, places: Places, limit_s: float, batch_size: int
) -> tuple[dict[str, Any], Path | None]:
    """Trains until the program ends or its time is up, and then until its weights are there.

    Args:
        program: What is started.
        folder: Where it is started, and its log.txt is written.
        places: What all programs share.
        limit_s: Processor seconds from the end of the first step on; infinite for a program that ends by itself.
        batch_size: Images in a step.

    Returns:
        What was measured from the end of the first step to that of the last one before weights were there, the most
        memory of all processes of the program until then, the seconds to the end of the first step, and the command;
        and the weights, None of a program that ended by itself.

    Raises:
        Failed: If it ends on its own with an error, makes no first step, or does not save.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_HOME": str(places.torch_home), "HF_HUB_OFFLINE": "1"}
    with (folder / "log.txt").open("wb") as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            program.command,
            cwd=folder,
            env={**environment, **program.environment},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    watch = psutil.Process(process.pid)
    first: Moment | None = None
    last = now = Moment(0, started, 0.0, 0.0)
    asked: Moment | None = None
    weights: Path | None = None
    try:
        while process.poll() is None and weights is None:
            time.sleep(POLL_S)
            now = look(watch, program.steps(), now)
            if now.steps > last.steps:
                first, last = first or now, now
            if first is None and now.clock_s - started > PATIENCE_S:
                raise Failed(f"it made no first step in {PATIENCE_S:.0f} s: {tail(folder)}")
            if asked is not None:
                weights = program.weights(asked.steps)
                if now.clock_s - asked.clock_s > PATIENCE_S:
                    raise Failed(f"it saved nothing in {PATIENCE_S:.0f} s: {tail(folder)}")
            elif first is not None and now.processor_s - first.processor_s >= limit_s:
                asked = now
                program.ask(process)
        if first is None or (weights is None and (limit_s != math.inf or process.returncode)):
            raise Failed(f"it ended with {process.returncode}: {tail(folder)}")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = last.processor_s - first.processor_s
    return {
        "steps": last.steps,
        "processor_seconds": round(seconds, 1),
        "clock_seconds": round(last.clock_s - first.clock_s, 1),
        "images_per_processor_second": round((last.steps - first.steps) * batch_size / max(seconds, 1e-9), 2),
        "peak_memory_gb": round(last.peak_gb, 2),
        "processor_seconds_to_first_step": round(first.processor_s, 1),
        "started": without_folders(" ".join(program.command)),
    }, weights


def look(process: psutil.Process, steps: int, before: Moment) -> Moment:
    """A process and its descendants now; as before once it has ended."""
    seconds = memory = 0.0
    try:
        for one in (process, *process.children(recursive=True)):
            times = one.cpu_times()
            seconds += times.user + times.system
            memory += one.memory_info().rss / 1e9
    except psutil.Error:
        pass
    processor_s, peak = max(before.processor_s, seconds), max(before.peak_gb, memory)
    return Moment(steps, time.perf_counter(), processor_s, peak)


def without_folders(text: str) -> str:
    """A path says something on this machine only: its last part is enough."""
    return re.sub(r"(?<![\w.])/(?:[^\s/'\"]+/)+", "", text)


def tail(folder: Path) -> str:
    """The end of a log, without terminal bars."""
    text = (folder / "log.txt").read_bytes()[-6000:].decode(errors="replace")
    lines = [line.split("\r")[-1].rstrip() for line in text.splitlines()]
    return "\n".join([line for line in lines if line][-8:])


def independent(model: Path, folder: Path) -> dict[str, float]:
    """PSNR and SSIM by torchmetrics and LPIPS by its authors' package, of posterior means, over an image each."""
    vae, network = AutoencoderKL.from_pretrained(model).eval(), lpips_network("vgg")
    values: dict[str, list[float]] = {"psnr": [], "ssim": [], "lpips": []}
    for path in sorted(folder.iterdir()):
        image = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.inference_mode():
            image_of_latent = vae.decode(vae.encode(image).latent_dist.mode()).sample
            a, b = levels(image) / 255, levels(image_of_latent) / 255
            values["psnr"].append(float(peak_signal_noise_ratio(b, a, data_range=1.0)))
            values["ssim"].append(float(structural_similarity_index_measure(b, a, data_range=1.0)))
            values["lpips"].append(float(network(2 * a - 1, 2 * b - 1)))
    return {name: sum(parts) / len(parts) for name, parts in values.items()}


def targets(rows: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each rival that was measured: whether ours, in its part of the time, is at least as good."""
    measured = {name: row for name, row in rows.items() if "failed" not in row}
    made: list[dict[str, Any]] = []
    for rival, theirs in measured.items():
        for name, mine in measured.items():
            asked = theirs["program"] in RIVALS and mine["program"] == OURS and mine["size"] == theirs["size"]
            if asked and mine["part"] == TARGETS[theirs["size"]]:
                better = {
                    by: {
                        "psnr": mine[by]["psnr"] >= theirs[by]["psnr"],
                        "lpips": mine[by]["lpips"] <= theirs[by]["lpips"],
                    }
                    for by in ("latent_ae", "independent")
                }
                made.append({"rival": rival, "ours": name, "at_least_as_good": better})
    return made


def prepare(places: Places, data: Path, held_out: Path, images: int, crop_px: int) -> None:
    """What all programs share: tiles, held-out crops, VGG16 as torchvision's file, LPIPS's linear heads as files."""
    cut_tiles(data, fresh(places.photographs))
    cut_centres(held_out, fresh(places.work / "held-out"), images, crop_px)
    write_vgg16(fresh(places.torch_home / "hub" / "checkpoints"))
    heads = Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth"
    for place in ("taming/modules/autoencoder/lpips", "sgm/modules/autoencoding/lpips/loss"):
        shutil.copy(heads, fresh(places.linear_heads / place) / "vgg.pth")


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def cut_tiles(data: Path, folder: Path) -> None:
    for path in sorted(data.iterdir()):
        image = Image.open(path).convert("RGB")
        for top in range(0, image.height - TILE_PX + 1, TILE_PX):
            for left in range(0, image.width - TILE_PX + 1, TILE_PX):
                tile = image.crop((left, top, left + TILE_PX, top + TILE_PX))
                tile.save(folder / f"{path.stem}-{top}-{left}.png")


def cut_centres(data: Path, folder: Path, images: int, crop_px: int) -> None:
    for path in sorted(data.iterdir())[:images]:
        image = Image.open(path).convert("RGB")
        left, top = (image.width - crop_px) // 2, (image.height - crop_px) // 2
        image.crop((left, top, left + crop_px, top + crop_px)).save(folder / f"{path.stem}.png")


def write_vgg16(folder: Path) -> None:
    """The trunk in the file that torchvision would download; the classifier stays as it is initialised."""
    network = torchvision.models.vgg16(weights=None).state_dict()
    torch.save({**network, **load_file(weight_file("vgg16"))}, folder / "vgg16-397923af.pth")


def on_one_core() -> None:
    """This process and those that it starts, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


if __name__ == "__main__":
    main()
