"""The evaluation of a first stage as it is written by hand, for benchmarks only: a DataLoader, diffusers, torchmetrics.

With torch.inference_mode, whole batches through every network, the loader's workers decoding meanwhile, and the pixels
of the protocol `default` (guided-diffusion's crop, rounding to the nearest of 256 levels), so that its numbers can be
held against ours.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lpips
import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from torchmetrics.wrappers import FeatureShare

from latent_ae.pretrained.weights import weight_file

SIDE_PX = 256


class Folder(Dataset):
    """CHW float32 in [-1, 1] of a folder's files."""

    def __init__(self, folder: Path):
        self.paths = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        pixels = center_crop_arr(Image.open(self.paths[index]).convert("RGB"), SIDE_PX)
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1


def center_crop_arr(picture: Image.Image, size_px: int) -> np.ndarray:
    """HWC uint8: the function of openai/guided-diffusion guided_diffusion/image_datasets.py."""
    while min(*picture.size) >= 2 * size_px:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size_px / min(*picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    array = np.array(picture)
    top, left = (array.shape[0] - size_px) // 2, (array.shape[1] - size_px) // 2
    return array[top : top + size_px, left : left + size_px]


def plain_evaluation(
    model: Path, folder: Path, inception: Path, *, batch_size: int, workers: int, shared: bool
) -> tuple[dict[str, dict[str, float]], float]:
    """Means by kind of latent, and the seconds from the start to the end of the last batch.

    For mode and for sample: FrechetInceptionDistance and KernelInceptionDistance (each updated with the real and the
    fake images; with `shared` in a FeatureShare, so that both use the features of one pass), lpips.LPIPS of VGG and of
    AlexNet, SSIM, MS-SSIM and PSNR.
    """
    started = time.perf_counter()
    vae = AutoencoderKL.from_pretrained(model).eval()
    loader = DataLoader(Folder(folder), batch_size=batch_size, num_workers=workers)
    perceptual = {"lpips_vgg": lpips_network("vgg"), "lpips_alex": lpips_network("alex")}
    kinds = {kind: Metrics(inception, len(loader.dataset), shared) for kind in ("mode", "sample")}
    torch.manual_seed(0)
    with torch.inference_mode():
        for images in loader:
            posterior = vae.encode(images).latent_dist
            real = levels(images)
            for kind, metrics in kinds.items():
                latent = posterior.mode() if kind == "mode" else posterior.sample()
                metrics.update(real, levels(vae.decode(latent).sample), perceptual)
    pass_s = time.perf_counter() - started
    return {kind: metrics.compute() for kind, metrics in kinds.items()}, pass_s


class Metrics:
    """torchmetrics' objects of one kind, and the values of each image that have no object."""

    def __init__(self, inception: Path, num_images: int, shared: bool):
        fid = FrechetInceptionDistance(feature_extractor_weights_path=str(inception), antialias=False)
        # KID takes no path to weights, but another metric's network
        kid = KernelInceptionDistance(feature=fid.inception, subset_size=min(1000, num_images))
        self.distances: list[Any] = [FeatureShare({"fid": fid, "kid": kid})] if shared else [fid, kid]
        self.psnr = PeakSignalNoiseRatio(data_range=1.0, dim=(1, 2, 3))
        self.ssim = StructuralSimilarityIndexMeasure(data_range=1.0)
        self.values: dict[str, list[Tensor]] = {"lpips_vgg": [], "lpips_alex": [], "ms_ssim": []}

    def update(self, real: Tensor, fake: Tensor, perceptual: dict[str, Callable[..., Tensor]]) -> None:
        """uint8 NCHW, twice."""
        for distance in self.distances:
            distance.update(real, real=True)
            distance.update(fake, real=False)
        a, b = real / 255, fake / 255
        self.psnr.update(b, a)
        self.ssim.update(b, a)
        self.values["ms_ssim"].append(ms_ssim(b, a, data_range=1.0, reduction="none"))
        for name, network in perceptual.items():
            self.values[name].append(network(2 * a - 1, 2 * b - 1).flatten())

    def compute(self) -> dict[str, float]:
        values = {name: float(torch.cat(parts).mean()) for name, parts in self.values.items()}
        values |= {"psnr": float(self.psnr.compute()), "ssim": float(self.ssim.compute())}
        computed = [distance.compute() for distance in self.distances]
        fid, (kid, _) = (computed[0]["fid"], computed[0]["kid"]) if len(computed) == 1 else computed
        return values | {"fid": float(fid), "kid": float(kid)}


def lpips_network(net: str) -> lpips.LPIPS:
    """The package's own network, with the trunk that it would download."""
    network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).eval()
    trunk = load_file(weight_file({"vgg": "vgg16", "alex": "alexnet"}[net]))
    names = network.net.state_dict()
    network.net.load_state_dict({name: trunk["features." + name.split(".", 1)[1]] for name in names})
    return network


def levels(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8."""
    return (images.clamp(-1, 1) * 127.5 + 128).to(torch.uint8)
