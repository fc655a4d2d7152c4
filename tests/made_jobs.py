"""Every command of `latent-ae eval`, run once on a terminal: a pseudo-terminal in the place of stdout."""

import contextlib
import io
import os
import threading
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from latent_ae.__main__ import main
from latent_ae.models.build import build_autoencoder
from latent_ae.models.settings import ModelSettings
from tests.economy import drawn
from tests.made_results import HOSTILE

NAME = HOSTILE.replace("/", "")
FLOW = ["width=64", "depth=1", "steps=2", "batch_size=8", "sampling_steps=2", "validations=2", "validation_images=4"]
GENERATED = ["resolution=16", "samples=4", "frechet=[vgg16,inception]", "eval_fraction=0.5"]
COMMANDS = {
    "recon": ["{model}", "{data}", "resize_px=null", "crop_px=16", "lpips=[]", "num_pictures=1"],
    "recon-other": ["{other}", "{data}", "resize_px=null", "crop_px=16", "lpips=[]", "num_pictures=1"],
    "compare": ["{recon}", "{recon-other}"],
    "latents": ["{model}", "{data}", "resize_px=null", "crop_px=16", "lpips=null"],
    "likelihood": ["{model}", "{data}", "samples=3", "num_pictures=1"],
    "anomaly": ["{model}", "{data}", "normal={data}", f"normal_class={'b' * 200}", "lpips=null", "num_pictures=1"],
    "probe": ["{model}", "{data}", "labels_per_class=[2]", "draws=2"],
    "interpolate": ["{model}", "{data}", "steps=3", "frames=1", "num_images=2", "lpips=null"],
    "sample": ["{model}", "resolution=16", "samples=4"],
    "factors": ["{model}", "{table}", "steps=3"],
    # these need the trunk of LPIPS
    "sample-compared": ["{model}", "{data}", "prior=gaussian", *GENERATED],
    "ifid": ["{model}", "{data}", "num_pictures=1"],
    "diffusion": ["{model}", "{data}", *GENERATED, *FLOW],
}
"""By name; what follows a hyphen tells two runs of one command apart."""
NO_WORKERS = set(COMMANDS) - {"compare"}
DOWNLOADS = {"sample-compared", "ifid", "diffusion"}


class Ended(NamedTuple):
    """A command that has ended."""

    code: int
    out: str
    err: str
    folder: Path

    @property
    def page(self) -> str:
        (path,) = self.folder.glob("*.html")
        return path.read_text(encoding="utf-8")


def on_a_terminal(*words: str) -> tuple[int, str, str]:
    """The exit code of `latent-ae WORDS` without a network, what the terminal showed, and what went to stderr."""
    reader, writer = os.openpty()
    shown = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # the other end was closed
            while part := os.read(reader, 4096):
                shown.extend(part)

    thread = threading.Thread(target=read)
    thread.start()
    error = io.StringIO()
    with (
        open(writer, "w", encoding="utf-8") as terminal,
        contextlib.redirect_stdout(terminal),
        contextlib.redirect_stderr(error),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("LATENT_AE_OFFLINE", "1")  # so that FID is missing
        code = main(list(words))
    thread.join()
    os.close(reader)
    return code, shown.decode().replace("\r\n", "\n"), error.getvalue()


class Jobs:
    """Runs each command once, when it is first asked for, without a network."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ended = folder, dict[str, Ended]()
        random = np.random.default_rng(0)
        for name in (f"{NAME} a", "b" * 200):
            (folder / "data" / name).mkdir(parents=True)
            for number in range(8):
                pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "data" / name / f"{number} {NAME}{'x' * 150}.png")
        columns = {
            "image": [Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(12)],
            NAME: [number % 3 for number in range(12)],
        }
        datasets.Dataset.from_dict(columns).to_parquet(folder / "table.parquet")
        with torch.random.fork_rng():
            for seed, name in enumerate((f"model {NAME}", "other")):
                torch.manual_seed(seed)
                settings = ModelSettings(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
                build_autoencoder(settings, sample_size=16).save_pretrained(folder / name)
        self.places: dict[str, str] = {
            "model": str(folder / f"model {NAME}"),
            "other": str(folder / "other"),
            "data": str(folder / "data"),
            "table": str(folder / "table.parquet"),
        }

    def words(self, name: str) -> list[str]:
        workers = ["num_workers=0"] if name in NO_WORKERS else []
        filled = [word.replace("{", "\0{") for word in COMMANDS[name]]
        known = self.places | {job: str(done.folder) for job, done in self.ended.items()}
        for place, value in known.items():
            filled = [word.replace(f"\0{{{place}}}", value) for word in filled]
        return ["eval", name.partition("-")[0], *filled, *workers]

    def __call__(self, name: str) -> Ended:
        if name == "compare":
            for other in ("recon", "recon-other"):
                self(other)
        if name not in self.ended:
            out = self.folder / f"out-{name}"
            with drawn():
                self.ended[name] = Ended(*on_a_terminal(*self.words(name), "--out", str(out)), out)
        return self.ended[name]
