"""Named settings after which others measured their first stages. docs/evaluation.md says more on each.

`remarks` states what a source leaves open. No protocol changes these: the reference is framed and rounded exactly as
the input, PSNR is computed per image and then averaged, and convolutions run in full float32.
"""

from typing import Literal

from latent_ae.config import Positive, Settings
from latent_ae_eval.settings import Net

Latent = Literal["mode", "sample"]
Resample = Literal["adm", "bicubic", "bilinear", "tensor", "linear"]
Rounding = Literal["up", "even", "cut", "cut32"]
Extractor = Literal["torch-fidelity", "pytorch-fid"]
Name = Literal[
    "default", "ldm", "vavae", "titok", "rae", "dcae", "lavinal712", "uae", "coco5k", "omnidoc", "tokenbench"
]


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
    similarity_of: Literal["levels", "floats", "unit floats"] = "levels"
    """What SSIM, MS-SSIM and LPIPS compare: 8-bit levels or floats; SSIM those in [-1, 1], or in [0, 1]."""
    psnr_of: Literal["levels", "floats"] = "levels"
    """What PSNR compares: 8-bit levels or clamped floats."""
    ssim_window: Literal["gaussian", "mirrored", "uniform"] = "gaussian"
    """Windows of SSIM: Gaussian of 11 px inside the image; the same also over mirrored borders, as torchmetrics takes
    them; or uniform of 7 px with the sample covariance, as scikit-image does by default."""
    latents: tuple[Latent, ...] = ("mode", "sample")
    """What is decoded: the posterior's mode, or a sample that depends on the seed and the image's number only."""
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
        remarks="there SSIM and LPIPS are averaged over batches of 8, the last one smaller; here over images",
        resample="tensor",
        crop_rounds="nearest",
        similarity_of="floats",
        ssim_window="mirrored",
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
        ssim_window="mirrored",
        latents=("mode",),
        lpips=("vgg",),
    ),
    "dcae": Protocol(
        source="mit-han-lab/efficientvit de7d773: applications/dc_ae/eval_dc_ae_model.py, aecore/evaluator.py, "
        "apps/metrics/fid/fid.py",
        resize_px=512,
        crop_px=512,
        ssim_window="mirrored",
        latents=("mode",),
        lpips=("alex",),
        extractor="pytorch-fid",
    ),
    "lavinal712": Protocol(
        source="lavinal712/AutoencoderKL 26dff75: eval.py (Resize, CenterCrop, scikit-image 0.22, pytorch-fid 0.3)",
        remarks="there the noise of the posterior depends on the number of GPUs; only FID is of 8-bit files",
        resample="bilinear",
        crop_rounds="nearest",
        rounding="cut32",
        similarity_of="unit floats",
        psnr_of="floats",
        ssim_window="uniform",
        latents=("sample",),
        lpips=("vgg",),
        extractor="pytorch-fid",
    ),
    "uae": Protocol(
        source="WeichenFan/UAE 3c2fde4: src/stage1_sample_ddp.py, src/eval/fid.py, src/eval/ref_iqa.py; on ImageNet's "
        "validation set, or on COCO 2017's",
        remarks="there originals are read from val_ImageNet.npz and val_COCO2017.npz, of which the repository does not "
        "say how they were made; here they are framed as the inputs; there TF32 is on, and LPIPS is not measured",
        rounding="cut",
        ssim_window="mirrored",
        latents=("mode",),
        lpips=(),
    ),
    "coco5k": Protocol(
        source="model card of stabilityai/sd-vae-ft-mse: COCO 2017 (256x256, val, 5000 images)",
        remarks="put together: no code was published; the card says neither how images become 256 px, nor rounding, "
        "latent, SSIM or extractor, which are those of the protocol ldm here; its PSIM is not the LPIPS measured here",
        resample="linear",
        rounding="cut",
        latents=("sample",),
        lpips=("vgg",),
    ),
    "omnidoc": Protocol(
        source="alibaba/OmniDoc-TokenBench f2815a7: example_recon.py, eval_metrics.py (piq, lpips, pytorch-fid); on "
        "its 3,042 images of 256 px",
        remarks="there 1e-8 is added to the squared error of PSNR, so that it ends at 80 dB; the text part (NED) is "
        "not measured",
        resize_px=None,
        crop_px=None,
        rounding="even",
        latents=("mode",),
        lpips=("vgg",),
        extractor="pytorch-fid",
    ),
    "tokenbench": Protocol(
        source="NVlabs/TokenBench dcbb7d5: token_bench/metrics_cli.py; files as NVIDIA/Cosmos-Tokenizer 3584ae7 writes "
        "them: cosmos_tokenizer/utils.py",
        remarks="the image part, on frames of the benchmark's videos; there they are MP4 files, sides are padded to "
        "multiples of 16 (here cut to multiples of the factor), and FID is not measured",
        resize_px=None,
        crop_px=None,
        ssim_window="uniform",
        latents=("mode",),
        lpips=("vgg",),
    ),
}
