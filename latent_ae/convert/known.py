"""The scaling of published first stages, each with its source. Messages show it; it is never applied by itself."""

from typing import NamedTuple


class Known(NamedTuple):
    """A published model."""

    model: str
    layouts: tuple[str, ...]
    factor: int
    channels: int
    words: str
    """The arguments to give on the command line."""
    source: str


KL = ("ldm", "flux", "diffusers")
KNOWN = (
    Known(
        "Stable Diffusion 1 and 2, their fine-tunes sd-vae-ft-ema and -mse",
        KL,
        8,
        4,
        "scaling_factor=0.18215 shift_factor=0",
        "CompVis/stable-diffusion `configs/stable-diffusion/v1-inference.yaml`",
    ),
    Known(
        "Stable Diffusion XL",
        KL,
        8,
        4,
        "scaling_factor=0.13025 shift_factor=0",
        "Stability-AI/generative-models `configs/inference/sd_xl_base.yaml`",
    ),
    Known(
        "Stable Diffusion 3 and 3.5",
        KL,
        8,
        16,
        "scaling_factor=1.5305 shift_factor=0.0609",
        "Stability-AI/sd3.5 `sd3_impls.py`",
    ),
    Known(
        "FLUX.1",
        KL,
        8,
        16,
        "scaling_factor=0.3611 shift_factor=0.1159",
        "black-forest-labs/flux `src/flux/util.py`",
    ),
    Known(
        "VA-VAE f16 d32",
        KL,
        16,
        32,
        "--statistics latents_stats.pt (which its authors publish beside it; without it FID is far off)",
        "hustvl/LightningDiT `datasets/img_latent_dataset.py`, LightningDiT#34",
    ),
    Known(
        "DC-AE f32c32 of Sana",
        ("dc-ae",),
        32,
        32,
        "scaling_factor=0.41407",
        "mit-han-lab/efficientvit `efficientvit/models/efficientvit/dc_ae.py`",
    ),
    *(
        Known(
            f"DC-AE {name}",
            ("dc-ae",),
            factor,
            channels,
            f"scaling_factor={value}",
            "diffusers `scripts/convert_dcae_to_diffusers.py`",
        )
        for name, factor, channels, value in (
            ("f32c32 in-1.0", 32, 32, "0.3189"),
            ("f32c32 mix-1.0", 32, 32, "0.4552"),
            ("f64c128 in-1.0", 64, 128, "0.2889"),
            ("f64c128 mix-1.0", 64, 128, "0.4538"),
            ("f128c512 in-1.0", 128, 512, "0.4883"),
            ("f128c512 mix-1.0", 128, 512, "0.3620"),
        )
    ),
)


def published(layout: str, factor: int, channels: int) -> list[Known]:
    """Return the published models that have a layout and a shape.

    Args:
        layout: A key of LAYOUTS.
        factor: Image px per latent px along one side.
        channels: Latent channels.
    """
    return [row for row in KNOWN if layout in row.layouts and (row.factor, row.channels) == (factor, channels)]
