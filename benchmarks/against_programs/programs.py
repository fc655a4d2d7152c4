"""The training programs of benchmarks/against.py: commands, progress, weights, and what each needs to run at all."""

import json
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from latent_ae_train.settings import TrainSettings

LAUNCH = Path(__file__).parent / "launch.py"
NEVER = 10**6
"""Steps that no program reaches here."""


class Places(NamedTuple):
    """Folders: checkouts and packages of others, and what `against.py` made for all programs."""

    python: Path
    diffusers: Path
    latent_diffusion: Path
    taming: Path
    lavinal: Path
    old_lightning: Path
    work: Path

    @property
    def tiles(self) -> Path:
        return self.work / "tiles"

    @property
    def photographs(self) -> Path:
        """A folder of a class below `train`, as torchvision's ImageFolder wants it."""
        return self.tiles / "train" / "photographs"

    @property
    def torch_home(self) -> Path:
        return self.work / "torch_home"

    @property
    def linear_heads(self) -> Path:
        """LPIPS's, below the paths at which both programs of latent-diffusion's line look for them."""
        return self.work / "lpips"


class Program(NamedTuple):
    """One training, to be stopped from outside."""

    command: list[str]
    environment: dict[str, str]
    steps: Callable[[], int]
    """Steps done, as its log says."""
    ask: Callable[[subprocess.Popen[bytes]], object]
    """Called once, when the time is up."""
    weights: Callable[[int], Path | None]
    """What was saved after so many steps or later, when it is there."""
    convert: list[str] | None
    """Settings of `latent-ae convert`; None where the weights are a diffusers folder already."""


NEEDED: dict[str, list[str]] = {
    "diffusers": [
        "taming-transformers on PYTHONPATH, for its discriminator",
        "the packages datasets, lpips, torchvision and wandb",
        "VGG16 as torchvision's file in TORCH_HOME; its classifier, which LPIPS does not use, is random",
        "a validation image, without which it stops after its first step",
        "--report_to wandb with WANDB_MODE=offline: with its default, tensorboard, it stops before its first step, "
        "because a list of validation images is no hyperparameter for tensorboard",
        "--validation_steps and --max_train_steps larger than the run, and --checkpointing_steps, whose first "
        "checkpoint after the limit is taken",
        "crops as files: it resizes whole photographs to the resolution",
    ],
    "latent-diffusion": [
        "pytorch-lightning 1.4.2, as its environment.yaml says, with torchmetrics 0.6.0, pyDeprecate 0.3.2 and "
        "setuptools below 70, in a folder of their own; omegaconf, einops",
        "taming-transformers on PYTHONPATH, and LPIPS's linear heads at taming/modules/autoencoder/lpips/vgg.pth of "
        "the folder it is started in",
        "VGG16 as torchvision's file in TORCH_HOME; its classifier, which LPIPS does not use, is random",
        "names that NumPy 2, Pillow 10 and Python's format of enumerations no longer have, added by launch.py",
        "8 instead of 32 groups as the default of its norms, by launch.py, so that the network is the same",
        "its configuration: attention type none, ldm.data.lsun.LSUNBase as data, CSVLogger instead of test-tube, no "
        "image logger, and a plain callback instead of the one that asks CUDA for its memory",
        "the signal USR1, at which it saves a checkpoint",
    ],
    "lavinal712/AutoencoderKL": [
        "pytorch-lightning 2, omegaconf, einops, kornia, natsort, matplotlib, wandb (imported, not used)",
        "LPIPS's linear heads at sgm/modules/autoencoding/lpips/loss/vgg.pth of the folder it is started in",
        "VGG16 as torchvision's file in TORCH_HOME; its classifier, which LPIPS does not use, is random",
        "8 instead of 32 groups as the default of its norms, by launch.py, so that the network is the same",
        "its configuration: attention type none (its default wants xformers), one CPU device instead of DDP over four "
        "GPUs, float32 instead of bf16, no worker processes, no image logger, and lightning's plain progress bar",
        "the signal USR1, at which it saves a checkpoint",
    ],
    "ours": ["VGG16 and LPIPS's linear heads, which it finds by itself"],
}

AS_PUBLISHED: dict[str, str] = {
    "diffusers": "learning rate 4.5e-6, constant; L2 + 0.5 LPIPS (which it computes without a gradient) + 1e-6 KL; "
    "GAN from step 50,001, whose adaptive weight is computed from the first step on",
    "latent-diffusion": "learning rate 4.5e-6 times the batch of 8, constant; L1 + LPIPS + 1e-6 KL; GAN from step "
    "50,001, whose discriminator and adaptive weight are computed from the first step on",
    "lavinal712/AutoencoderKL": "learning rate 4.5e-6 times the batch of 8, constant; L1 + LPIPS + 1e-6 KL; GAN from "
    "step 50,001",
    "ours": "the recipe quickstart, with as many steps as fit into the time; L1 + LPIPS of every second image + 1e-6 "
    "KL; GAN from step 100",
}
"""What they train with where no learning rate is given. No rival's GAN starts within the time."""


def diffusers(places: Places, folder: Path, settings: TrainSettings, rate: float | None) -> Program:
    """diffusers examples/research_projects/autoencoderkl; `rate` None is its default."""
    script = places.diffusers / "examples/research_projects/autoencoderkl/train_autoencoderkl.py"
    model, out = settings.model, folder / "run"
    blocks = len(model.block_out_channels)
    config = {
        "_class_name": "AutoencoderKL",
        "block_out_channels": list(model.block_out_channels),
        "layers_per_block": model.layers_per_block,
        "latent_channels": model.latent_channels,
        "norm_num_groups": model.norm_num_groups,
        "mid_block_add_attention": model.mid_block_add_attention,
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "sample_size": settings.data.resolution,
    }
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    words = {
        "model_config_name_or_path": folder / "vae",
        "train_data_dir": places.tiles,
        "resolution": settings.data.resolution,
        "train_batch_size": settings.batch_size,
        "validation_image": next(places.photographs.iterdir()),
        "validation_steps": NEVER,
        "max_train_steps": NEVER,
        "checkpointing_steps": 10 if factor(settings) == 4 else 4,
        "checkpoints_total_limit": 3,
        "report_to": "wandb",
        "output_dir": out,
        "seed": 0,
        **({} if rate is None else {"learning_rate": rate}),
    }
    arguments = [part for name, value in words.items() for part in (f"--{name}", str(value))]

    def newest(at_least: int) -> Path | None:
        # random_states_0.pkl is the last file of a checkpoint
        whole = [path.parent for path in out.glob("checkpoint-*/random_states_0.pkl")]
        after = [path for path in whole if int(path.name.split("-")[1]) >= at_least]
        return max(after, key=lambda path: int(path.name.split("-")[1])) / "autoencoderkl" if after else None

    return Program(
        [str(places.python), str(script), *arguments],
        {"PYTHONPATH": str(places.taming), "HF_HOME": str(folder / "hf"), "WANDB_MODE": "offline"},
        lambda: progress(folder, r"Steps: .*?\| (\d+)/\d+ \["),
        lambda process: None,
        newest,
        None,
    )


def latent_diffusion(places: Places, folder: Path, settings: TrainSettings, rate: float | None) -> Program:
    """CompVis/latent-diffusion main.py; `rate` None is that of its configurations."""
    (folder / "files.txt").write_text("\n".join(sorted(path.name for path in places.photographs.iterdir())))
    loss = {"disc_start": 50001, "kl_weight": 1e-6, "disc_weight": 0.5}
    data = {"txt_file": str(folder / "files.txt"), "data_root": str(places.photographs)}
    config = {
        "model": {
            "base_learning_rate": 4.5e-6 if rate is None else rate / settings.batch_size,
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": {
                "embed_dim": settings.model.latent_channels,
                "lossconfig": {"target": "ldm.modules.losses.LPIPSWithDiscriminator", "params": loss},
                "ddconfig": ddconfig(settings),
            },
        },
        "data": {
            "target": "main.DataModuleFromConfig",
            "params": {
                "batch_size": settings.batch_size,
                "num_workers": 0,
                "wrap": True,
                "train": {
                    "target": "ldm.data.lsun.LSUNBase",
                    "params": {**data, "size": settings.data.resolution},
                },
            },
        },
        "lightning": {
            "logger": {"target": "pytorch_lightning.loggers.CSVLogger", "params": {"name": "csv"}},
            "modelcheckpoint": {"params": {"every_n_train_steps": NEVER}},
            "callbacks": {
                "image_logger": {"params": {"disabled": True}},
                "cuda_callback": {"target": "pytorch_lightning.callbacks.Callback"},
            },
            "trainer": {"benchmark": True, "accumulate_grad_batches": 1, "max_epochs": NEVER},
        },
    }
    return of_latent_diffusions_line(
        places,
        folder,
        config,
        settings,
        places.latent_diffusion / "main.py",
        "ldm.modules.diffusionmodules.model",
        [places.old_lightning, places.taming],
        ["--scale_lr", "True"],
    )


def lavinal(places: Places, folder: Path, settings: TrainSettings, rate: float | None) -> Program:
    """lavinal712/AutoencoderKL main.py; `rate` None is that of its configurations with its --scale_lr."""
    params = {"perceptual_weight": 1.0, "disc_start": 50001, "disc_weight": 0.5, "learn_logvar": False}
    loss = "sgm.modules.autoencoding.losses.GeneralLPIPSWithDiscriminator"
    config = {
        "model": {
            "base_learning_rate": 4.5e-6 if rate is None else rate / settings.batch_size,
            "target": "sgm.models.autoencoder.AutoencoderKL",
            "params": {
                "input_key": "jpg",
                "disc_start_iter": 50001,
                "embed_dim": settings.model.latent_channels,
                "ddconfig": ddconfig(settings),
                "lossconfig": {
                    "target": loss,
                    "params": {**params, "regularization_weights": {"kl_loss": 1e-6}},
                },
            },
        },
        "data": {
            "target": "sgm.data.imagenet.ImageNetLoader",
            "params": {
                "batch_size": settings.batch_size,
                "num_workers": 0,
                "prefetch_factor": None,
                "shuffle": True,
                "train": {"root_dir": str(places.tiles), "size": settings.data.resolution, "transform": True},
            },
        },
        "lightning": {
            "strategy": {
                "target": "pytorch_lightning.strategies.SingleDeviceStrategy",
                "params": {"device": "cpu"},
            },
            "modelcheckpoint": {"params": {"every_n_train_steps": NEVER}},
            "callbacks": {
                "image_logger": {"params": {"disabled": True}},
                "progress": {"target": "pytorch_lightning.callbacks.TQDMProgressBar", "params": {"refresh_rate": 1}},
            },
            "trainer": {
                "benchmark": True,
                "accumulate_grad_batches": 1,
                "max_epochs": NEVER,
                "limit_val_batches": 0,
            },
        },
    }
    return of_latent_diffusions_line(
        places,
        folder,
        config,
        settings,
        places.lavinal / "main.py",
        "sgm.modules.diffusionmodules.model",
        [],
        ["--scale_lr", "True", "--wandb", "False", "--accelerator", "cpu"],
    )


def of_latent_diffusions_line(
    places: Places,
    folder: Path,
    config: dict[str, Any],
    settings: TrainSettings,
    script: Path,
    module: str,
    paths: list[Path],
    words: list[str],
) -> Program:
    """A main.py of Lightning that saves `last.ckpt` at the signal USR1, started in `folder`."""
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for name in ("taming", "sgm"):
        (folder / name).symlink_to(places.linear_heads / name)
    launched = [str(LAUNCH), module, str(settings.model.norm_num_groups), str(script)]

    def ask(process: subprocess.Popen[bytes]) -> None:
        for old in (folder / "logs").rglob("last.ckpt"):
            old.unlink()
        process.send_signal(signal.SIGUSR1)

    def saved(_: int) -> Path | None:
        # the directory of a zip file is written last
        return next((path for path in (folder / "logs").rglob("last.ckpt") if zipfile.is_zipfile(path)), None)

    return Program(
        [str(places.python), *launched, "--base", "config.yaml", "--train", "--logdir", "logs", *words],
        {"PYTHONPATH": ":".join(str(path) for path in [*paths, script.parent])},
        lambda: progress(folder, r"Epoch (\d+): .*?\| (\d+)/(\d+) \["),
        ask,
        saved,
        [f"norm_num_groups={settings.model.norm_num_groups}", "scaling_factor=1", "shift_factor=0"],
    )


def ours(places: Places, folder: Path, words: list[str]) -> Program:
    """`latent-ae train quickstart` with `words`, which ends by itself."""
    log = folder / "run" / "log.jsonl"
    return Program(
        [sys.executable, "-m", "latent_ae", "train", "quickstart", f"output_dir={folder / 'run'}", *words],
        {},
        lambda: log.read_text().count('"event": "train"') if log.exists() else 0,
        lambda process: None,
        lambda _: None,
        None,
    )


RIVALS: dict[str, Callable[[Places, Path, TrainSettings, float | None], Program]] = {
    "diffusers": diffusers,
    "latent-diffusion": latent_diffusion,
    "lavinal712/AutoencoderKL": lavinal,
}


def ddconfig(settings: TrainSettings) -> dict[str, Any]:
    """The architecture in latent-diffusion's words."""
    model = settings.model
    channels = list(model.block_out_channels)
    return {
        "double_z": True,
        "z_channels": model.latent_channels,
        "resolution": settings.data.resolution,
        "in_channels": 3,
        "out_ch": 3,
        "ch": channels[0],
        "ch_mult": [width // channels[0] for width in channels],
        "num_res_blocks": model.layers_per_block,
        "attn_resolutions": [],
        "attn_type": "none",
        "dropout": 0.0,
    }


def factor(settings: TrainSettings) -> int:
    """Of downsampling."""
    return int(2 ** (len(settings.model.block_out_channels) - 1))


def progress(folder: Path, bar: str) -> int:
    """Steps that the last progress bar in log.txt shows: of `done`, or of `epoch`, `done` and `steps of an epoch`."""
    path = folder / "log.txt"
    end = path.read_bytes()[-4000:].decode(errors="replace") if path.exists() else ""
    found = list(re.finditer(bar, end))
    if not found:
        return 0
    numbers = [int(number) for number in found[-1].groups()]
    return numbers[0] if len(numbers) == 1 else numbers[0] * numbers[2] + numbers[1]
