"""Decoding a large image whole, in tiles and in slices: what it costs and what it changes.

    python -m benchmarks.tiling --model EXPORT

Crops of scikit-image's retina photograph, encoded by the given model; the latents are decoded whole, in tiles of
`sample_size` px and of 256 px (vae.enable_tiling), and as a batch of two with and without vae.enable_slicing. Each in a
process of its own with one thread, which has encoded nothing. The memory is the peak while decoding less what the
process held before, in another process that gives back at once what it frees, else it varies twofold; so it needs
Linux with glibc. The difference is that to whole decoding. Writes benchmarks/results/tiling.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.machine import peak_memory_gb, save
from latent_ae.export.precision import tile_differences
from latent_ae.models.build import factor_of

WAYS = {
    "whole": (1, None, False),
    "tiles of sample_size": (1, 0, False),
    "tiles of 256 px": (1, 256, False),
    "two images, whole": (2, None, False),
    "two images, sliced": (2, None, True),
}
"""Images, tile in px (0: the model's own) or none, slicing."""

EAGER = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Memory is given back when it is freed, which takes time of its own: such a process measures memory only."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="EXPORT", required=True)
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--worker", nargs=2, metavar=("LATENTS", "WAY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.worker:
        latents, way = arguments.worker
        print(json.dumps(work(arguments.model, load_file(latents)["latents"], way)))
        return
    command = [sys.executable, "-m", "benchmarks.tiling", "--model", str(arguments.model), "--worker"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for side in arguments.sides:
            latents = Path(folder) / f"{side}.safetensors"
            save_file({"latents": encode(arguments.model, side)}, latents)
            for way in WAYS:
                row: dict[str, Any] = {"side_px": side, "way": way}
                for extra in ({}, EAGER):
                    environment = os.environ | {"OMP_NUM_THREADS": "1"} | extra
                    words = [*command, str(latents), way]
                    done = subprocess.run(words, env=environment, capture_output=True, text=True)
                    if done.returncode:
                        raise RuntimeError(f"{way}: {done.stderr[-3000:]}")
                    row |= json.loads(done.stdout.strip().splitlines()[-1])
                rows.append(row)
                print(rows[-1], file=sys.stderr)
    save("tiling", {"rows": rows})


@torch.no_grad()
def encode(model: Path, side: int) -> Tensor:
    import skimage

    pixels = skimage.data.retina()[190 : 190 + side, 190 : 190 + side]
    image = torch.from_numpy(pixels / 127.5 - 1).float().permute(2, 0, 1)[None]
    latents: Tensor = AutoencoderKL.from_pretrained(model).eval().encode(image).latent_dist.mode()
    return latents.contiguous()


@torch.no_grad()
def work(model: Path, latents: Tensor, way: str) -> dict[str, Any]:
    """`latents` (1CHW) decoded in one of WAYS by a process that has encoded nothing."""
    count, tile_px, slicing = WAYS[way]
    vae, latents = AutoencoderKL.from_pretrained(model).eval(), latents.repeat(count, 1, 1, 1)
    if tile_px is not None:
        vae.enable_tiling()
        vae.tile_sample_min_size = tile_px or int(vae.config.sample_size)
        vae.tile_latent_min_size = vae.tile_sample_min_size // factor_of(vae)
    if slicing:
        vae.enable_slicing()
    # proc(5): from now on the peak is what the process holds now; loading had its own
    Path("/proc/self/clear_refs").write_text("5")
    before, started = peak_memory_gb(), time.process_time()
    made = vae.decode(latents).sample
    found: dict[str, Any] = {"cpu_s": round(time.process_time() - started, 2)}
    if EAGER.items() <= os.environ.items():
        return {"memory_gb": round(peak_memory_gb() - before, 3)}
    if tile_px is not None:
        vae.disable_tiling()
        whole = vae.decode(latents).sample
        found |= tile_differences(whole, made, vae.tile_sample_min_size, vae.tile_overlap_factor)
    elif slicing:
        vae.disable_slicing()
        found["max_abs"] = round(float((made - vae.decode(latents).sample).abs().max()), 7)
    return found


if __name__ == "__main__":
    main()
