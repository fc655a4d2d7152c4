"""Named settings after which others measured their first stages. docs/evaluation.md says more on each.

`remarks` states what a source leaves open. No protocol changes these: the reference is framed and rounded exactly as
the input, PSNR is computed on 8-bit pixels per image and then averaged, and convolutions run in full float32.
"""

from typing import Literal

from latent_ae.config import Positive, Settings
from latent_ae_eval.settings import Net

Latent = Literal["mode", "sample"]
Resample = Literal["adm", "bicubic", "tensor", "linear"]
Rounding = Literal["up", "even", "cut"]
Extractor = Literal["torch-fidelity", "pytorch-fid"]
Name = Literal["default", "ldm", "vavae", "titok", "rae", "dcae"]


class Protocol(Settings):
    """All steps from an image's file to its metrics."""

    source: str
    """Where the protocol comes from."""
    remarks: str = ""
    resize_px: Positive | None = 256
    """Shorter side to which an image is resized before the crop, px; null keeps its size."""
    crop_px: Positive | None = 256
    """Side of the centre crop, px; null takes whole images, cut to a multiple of the factor."""
    resample: Resample = "adm"
    """Resampling method; see latent_ae.data.transforms.resize_shorter."""
    crop_rounds: Literal["down", "nearest"] = "down"
    """Rounding of odd margins; nearest is that of torchvision's CenterCrop."""
    rounding: Rounding = "up"
    """How a float becomes one of 256 levels; see latent_ae.data.images.to_uint8."""
    similarity_of: Literal["levels", "floats"] = "levels"
    """What SSIM, MS-SSIM and LPIPS compare: 8-bit levels or floats."""
    latents: tuple[Latent, ...] = ("mode", "sample")
    """What is decoded: the posterior's mean, or a sample that depends on the seed and the image's number only."""
    lpips: tuple[Net, ...] = ("vgg", "alex")
    extractor: Extractor = "torch-fidelity"
    """How Inception resizes to 299 px and normalises."""
    extractor_dtype: Literal["fp32", "fp64"] = "fp32"


PROTOCOLS: dict[str, Protocol] = {
    "default": Protocol(
        source="latent-ae: the crop of guided-diffusion, rounding to the nearest level, torch-fidelity's Inception",
    ),
    "ldm": Protocol(
        source="CompVis/latent-diffusion a506df5: ldm/data/imagenet.py, taming/data/base.py (SmallestMaxSize, "
        "CenterCrop), scripts/sample_diffusion.py; torch-fidelity by the paper's appendix E.3",
        remarks="put together: the repository holds no code for its reconstruction table; rounding, posterior sample "
        "and validation set are inferred",
        resample="linear",
        rounding="cut",
        latents=("sample",),
        lpips=("vgg",),
    ),
    "vavae": Protocol(
        source="hustvl/LightningDiT 2725fed: evaluate_tokenizer.py, tools/calculate_fid.py",
        remarks="there SSIM and LPIPS are averaged over batches of 8, the last one smaller, and SSIM also counts "
        "windows over mirrored borders; here over images and windows inside",
        resample="tensor",
        crop_rounds="nearest",
        similarity_of="floats",
        latents=("sample",),
        lpips=("vgg",),
        extractor="pytorch-fid",
    ),
    "titok": Protocol(
        source="bytedance/1d-tokenizer 942a96f: evaluator/evaluator.py, evaluator/inception.py, "
        "data/webdataset_reader.py",
        remarks="there images were re-encoded as JPEG, and PSNR, SSIM and LPIPS are not measured",
        resample="bicubic",
        crop_rounds="nearest",
        rounding="even",
        latents=("sample",),
        lpips=(),
        extractor_dtype="fp64",
    ),
    "rae": Protocol(
        source="bytetriper/RAE a4d18c4: src/stage1_sample_ddp.py, src/eval/fid.py, src/eval/ref_iqa.py",
        rounding="cut",
        latents=("mode",),
        lpips=("vgg",),
    ),
    "dcae": Protocol(
        source="mit-han-lab/efficientvit de7d773: applications/dc_ae/eval_dc_ae_model.py, aecore/evaluator.py, "
        "apps/metrics/fid/fid.py",
        resize_px=512,
        crop_px=512,
        latents=("mode",),
        lpips=("alex",),
        extractor="pytorch-fid",
    ),
}
