"""Every class of first stage by one recipe, its export measured on held-out images.

python -m benchmarks.family --data /data/cifar10 --photos /data/bsds500 --scratch /tmp/scratch
Killed, it goes on when started again with the same scratch folder.
"""

import argparse
import json
import time
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks.fresh_step import first_batch, fresh_step
from benchmarks.machine import save
from benchmarks.runs import evaluate, events, folder_name, train
from latent_ae.arithmetic import training_memory_format
from latent_ae.config import load_settings
from latent_ae.data.held_out import held_out_images
from latent_ae.data.images import to_uint8
from latent_ae.data.loader import open_images
from latent_ae.data.settings import DataSettings
from latent_ae.metrics.similarity import psnr
from latent_ae.models.loading import FirstStage, load_first_stage
from latent_ae.models.quantize import quantised
from latent_ae.objectives.codebook import code_counts, perplexity
from latent_ae.pretrained.lpips import LPIPS
from latent_ae_train.settings import TrainSettings


class Member(NamedTuple):
    recipe: str
    words: str = ""
    photos: bool = False
    """Crops of photographs, 64 px, in place of CIFAR-10: at 32 px a factor of 32 leaves one place."""
    teacher: str = ""
    """Another member, whose latents it learns or is set beside."""
    learns: bool = False


F32 = "model.block_out_channels=[16,32,64,64,128,128] model.latent_channels=128"
MEMBERS = {
    "AutoencoderKL": Member("quickstart", "model.init=default"),
    "VQModel": Member("vqgan"),
    "AutoencoderTiny": Member("tiny", teacher="AutoencoderKL"),
    "AutoencoderTiny, distilled": Member("tiny-distilled", teacher="AutoencoderKL", learns=True),
    "AsymmetricAutoencoderKL": Member("asymmetric"),
    "AutoencoderKLFlux2": Member("flux2"),
    "AutoencoderDC": Member("dc-ae", photos=True),
    "AutoencoderKL, factor 32": Member("quickstart", f"model.init=default {F32}", photos=True),
}
COMMON = (
    "seed=0 loss.perceptual_every=4 gan.weight=0 ema.decay=0.99 optim.lr=1e-3 optim.warmup=50 validate.every=100000 "
    "validate.images=500 checkpoint.every=100000 log.every=50"
)
SIZES = {False: {"px": 32, "batch": 16}, True: {"px": 64, "batch": 4}}
"""By `Member.photos`; as many pixels in a batch of either."""
ROUNDS = 5
"""Of what is timed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with CIFAR-10 as train.parquet, test.parquet")
    parser.add_argument("--photos", type=Path, required=True, help="folder with BSDS500's folders train, test")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--members", nargs="+", default=list(MEMBERS), choices=MEMBERS)
    parser.add_argument("--steps", type=int, default=200)
    words = parser.parse_args()
    torch.set_num_threads(1)
    for name in words.members:
        run, teacher = (words.scratch / folder_name(part) for part in (name, MEMBERS[name].teacher))
        if not (run / "measured.json").exists():
            measured = measure(MEMBERS[name], run, teacher / "export", words.data, words.photos, words.steps)
            (run / "measured.json").write_text(json.dumps(measured, indent=2))
    rows = {
        name: json.loads((words.scratch / folder_name(name) / "measured.json").read_text()) for name in words.members
    }
    save("family", {"steps": words.steps, "recipe": COMMON, "sizes": [SIZES[False], SIZES[True]], "members": rows})


def measure(member: Member, run: Path, teacher: Path, data: Path, photos: Path, steps: int) -> dict[str, Any]:
    """Trains one, and what is to be known of it."""
    size = SIZES[member.photos]
    parts = ("train", "test") if member.photos else ("train.parquet", "test.parquet")
    training, tests = (str((photos if member.photos else data) / part) for part in parts)
    changes = [f"data.source={training}", f"data.eval_source={tests}", f"data.resolution={size['px']}"]
    changes += [f"validate.crop_px={size['px']}", f"batch_size={size['batch']}", f"steps={steps}"]
    changes += [*COMMON.split(), *member.words.split()]
    changes += [f"distillation.teacher={teacher}"] if member.learns else []
    train(run, member.recipe, *changes)
    judged = [f"crop_px={size['px']}", "limit=1000", "frechet=[vgg16]", "latents=[mode]", "batch_size=32"]
    result = evaluate(run / "recon", "recon", run / "export", Path(tests), *judged)
    stage = load_first_stage(str(run / "export"))
    images = held_out(tests, size["px"])
    with torch.no_grad():
        latents = torch.cat([stage.encode(part).mean for part in images.split(32)])
    measured = {
        "photos": member.photos,
        "parameters": stage.describe()["parameters"],
        "factor": stage.factor,
        "latent_shape": list(latents.shape[1:]),
        "images": result["data"]["num_images"],
        "metrics": result["metrics"],
        "kl_per_dimension": events(run, "train")[-1].get("kl_per_dimension"),
        "speed": speed(load_settings(TrainSettings, member.recipe, changes), stage, images, latents),
    }
    if member.teacher:
        measured["beside_the_teacher"] = beside(stage, load_first_stage(str(teacher)), images, latents)
    if stage.name == "VQModel":
        assert stage.module is not None
        codebook = stage.module.quantize.embedding.weight.detach()
        counts = code_counts(quantised(latents, codebook)[1].indices, len(codebook))
        measured["codebook"] = {
            "codes": len(codebook),
            "used": int((counts > 0).sum()),
            "perplexity": float(perplexity(counts)),
        }
    return measured


def held_out(tests: str, crop_px: int, count: int = 1000) -> Tensor:
    """The first of them, N x 3 x crop_px x crop_px in [-1, 1]."""
    data = DataSettings(eval_source=tests, num_workers=0)
    crops = held_out_images(open_images(data, "held_out"), data, channels=3, crop_px=crop_px)
    return torch.stack([image for _, _, image in islice(crops, count)])


@torch.no_grad()
def beside(stage: FirstStage, teacher: FirstStage, images: Tensor, latents: Tensor) -> dict[str, float]:
    """How far its scaled latents are from the teacher's, and its images of the latter, decoded as a pipeline does."""
    taught = scaled(teacher, torch.cat([teacher.encode(part).mean for part in images.split(32)]))
    assert stage.module is not None
    config, lpips = stage.module.config, LPIPS("vgg")
    decoded = [stage.decode(part / config.scaling_factor + config.shift_factor) for part in taught.split(32)]
    distances = [lpips(ours.clamp(-1, 1), image) for ours, image in zip(decoded, images.split(32), strict=True)]
    pairs = zip(decoded, images.split(32), strict=True)
    return {
        "latent_mse": float((scaled(stage, latents) - taught).square().mean()),
        "teacher_latent_variance": float(taught.var()),
        "psnr": float(torch.cat([psnr(to_uint8(ours), to_uint8(image)) for ours, image in pairs]).mean()),
        "lpips_vgg": float(torch.cat(distances).mean()),
    }


def scaled(stage: FirstStage, latents: Tensor) -> Tensor:
    assert stage.module is not None
    return (latents - stage.module.config.shift_factor) * stage.module.config.scaling_factor


def speed(settings: TrainSettings, stage: FirstStage, images: Tensor, latents: Tensor) -> dict[str, float]:
    """Images per second of processor time."""
    step, layout = fresh_step(settings, Accelerator(cpu=True)), training_memory_format(torch.device("cpu"))
    part = images[: settings.batch_size].to(memory_format=layout)
    noise = torch.randn(latents[: settings.batch_size].shape, generator=torch.Generator().manual_seed(0))
    batch = first_batch(step, part, noise)
    step(0, iter([batch]))
    times = {"training": [0.0], "decoding": [0.0]}
    assert stage.module is not None
    stage.module.to(memory_format=torch.channels_last)
    with torch.no_grad():
        stage.decode(latents[: settings.batch_size])
    for number in range(1, ROUNDS + 1):
        begun = time.process_time()
        step(number, iter([batch]))
        times["training"].append(time.process_time() - begun)
        begun = time.process_time()
        with torch.no_grad():
            stage.decode(latents[: settings.batch_size])
        times["decoding"].append(time.process_time() - begun)
    return {name: settings.batch_size * ROUNDS / sum(seconds) for name, seconds in times.items()}


if __name__ == "__main__":
    main()
