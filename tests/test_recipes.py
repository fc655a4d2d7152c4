"""The recipes of the literature against the values that were published, and two steps of each, made narrow.

The table was written from the files that the recipes name as their sources, not from the recipes.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from latent_ae.config import recipe_folders
from latent_ae.models.build import factor_of, latent_channels_of
from latent_ae.pretrained.lpips import LPIPS
from latent_ae_train.phases import merged, phases_of
from latent_ae_train.settings import TrainSettings
from tests.recipes import FOLDER
from tests.teacher import save_teacher
from tests.tiny import build_step, drawn_batch
from tests.tiny_vision import save_vision_model

PX = 256
CLAMP_OF_SUMS = pytest.approx(1e4 / (3 * PX * PX), rel=1e-3)
"""Latent diffusion's clamp of 1e4 on a ratio whose numerator is a sum over an image; here it is a mean."""
EPS_OF_SUMS = pytest.approx(1e-8 / (3 * PX * PX), rel=0.01)
"""Adam's 1e-8 in trainers whose loss is a sum over an image."""
IMAGENET = 1_281_167


def widths(*multipliers: int) -> tuple[int, ...]:
    return tuple(128 * multiplier for multiplier in multipliers)


def epochs(count: int, batch: int) -> Any:
    return pytest.approx(count * IMAGENET / batch, abs=1)


def attention(levels: int, last: int) -> dict[str, Any]:
    down = ["DownEncoderBlock2D"] * (levels - last) + ["AttnDownEncoderBlock2D"] * last
    return {
        "down_block_types": tuple(down),
        "up_block_types": tuple(one.replace("Down", "Up").replace("Encoder", "Decoder") for one in down[::-1]),
    }


def ldm(base_batch: int) -> dict[str, Any]:
    """What all first stages of latent diffusion share; Adam's rate is 4.5e-6 for each of the batch's images."""
    batch = 8 * base_batch
    return {
        "batch_size": batch,
        "micro_batch_size": base_batch,
        "data.resize_px": 384,
        "data.resolution": PX,
        "loss.pixel": "l1",
        "loss.perceptual": 1.0,
        "optim.lr": pytest.approx(4.5e-6 * batch),
        "optim.betas": (0.5, 0.9),
        "optim.discriminator_betas": (0.5, 0.9),
        "optim.discriminator_lr": None,
        "optim.weight_decay": 0.0,
        "optim.schedule": "constant",
        "optim.warmup": 0,
        "optim.clip": 0.0,
        "ema.decay": 0.0,
        "gan.loss": "hinge",
        "gan.channels": 64,
        "gan.adaptive": True,
        "gan.adaptive_smoothing": 0.0,
        "gan.discriminator_warmup": 0,
        "gan.warmup": 0,
    }


def kl(base_batch: int, channels: int, *multipliers: int) -> dict[str, Any]:
    return ldm(base_batch) | {
        "model.block_out_channels": widths(*multipliers),
        "model.layers_per_block": 2,
        "model.latent_channels": channels,
        "model.norm_num_groups": 32,
        "model.mid_block_add_attention": True,
        "loss.kl": 1e-6,
        "optim.eps": EPS_OF_SUMS,
        "gan.weight": 0.5,
        "gan.start": 50_001,
        "gan.layers": 3,
        "gan.adaptive_cap": CLAMP_OF_SUMS,
    }


def vq(
    base_batch: int, codes: int, channels: int, weight: float, start: int, layers: int, *multipliers: int
) -> dict[str, Any]:
    return ldm(base_batch) | {
        "model.kind": "VQModel",
        "model.config.block_out_channels": list(widths(*multipliers)),
        "model.config.latent_channels": channels,
        "model.config.num_vq_embeddings": codes,
        "loss.commitment": 1.0,
        "optim.eps": 1e-8,
        "gan.weight": weight,
        "gan.start": start,
        "gan.layers": layers,
        "gan.adaptive_cap": 1e4,
    }


VA_VAE = {
    "data.resize_px": 256,
    "data.flip": False,  # taming's ImagePaths: resized, cropped at random
    "model.block_out_channels": widths(1, 1, 2, 2, 4),
    "model.latent_channels": 32,
    "batch_size": 256,
    "loss.kl": 1e-6,
    "loss.perceptual": 1.0,
    "gan.weight": 0.5,
    "gan.start": 2500,
    "gan.adaptive_cap": CLAMP_OF_SUMS,
    "optim.lr": 1e-4,
    "optim.betas": (0.5, 0.9),
    "optim.eps": EPS_OF_SUMS,
    "optim.clip": 0.0,
    **{f"model.{key}": value for key, value in attention(5, 1).items()},
}
MARGINS = {"alignment.weight": 0.1, "alignment.cosine_margin": 0.5, "alignment.distance_margin": 0.25}
NO_MARGINS = {"alignment.cosine_margin": 0.0, "alignment.distance_margin": 0.0}
DECODER_ONLY = {
    "train": "decoder",
    "batch_size": 16 * 12,
    "gan.weight": 0.0,
    "optim.lr": pytest.approx(4.5e-6 * 192),
    "optim.eps": EPS_OF_SUMS,
}
DC_AE = {
    "model.kind": "AutoencoderDC",
    "loss.perceptual": 0.25,
    "loss.pixel": "l1",
    "precision": "bf16",
    "optim.clip": 0.0,
    "data.flip": False,  # lavinal712/AutoencoderKL, branch dc-ae, sgm/data/imagenet.py
}
DC_PHASES = [
    DC_AE
    | {
        "train": "all",
        "steps": epochs(20, 4 * 24),
        "batch_size": 4 * 24,
        "data.resolution": 256,
        "gan.weight": 0.0,
        "optim.eps": EPS_OF_SUMS,
        "optim.lr": 6.4e-5,
        "optim.weight_decay": 0.1,
        "optim.betas": (0.9, 0.999),
    },
    DC_AE
    | {
        "train": ("encoder.conv_out", "decoder.conv_in"),
        "steps": epochs(4, 4 * 4),
        "batch_size": 4 * 4,
        "data.resolution": 512,
        "gan.weight": 0.0,
        "optim.lr": 1.6e-5,
        "optim.betas": (0.9, 0.999),
        "optim.weight_decay": 1e-3,
        "optim.eps": pytest.approx(1e-8 / (3 * 512 * 512), rel=0.03),
    },
    DC_AE
    | {
        "train": ("decoder.norm_out", "decoder.conv_out"),
        "steps": epochs(4, 4 * 24),
        "batch_size": 4 * 24,
        "data.resolution": 256,
        "gan.weight": 0.5,
        "gan.start": 1,
        "gan.adaptive_cap": CLAMP_OF_SUMS,
        "optim.lr": 5.4e-5,
        "optim.betas": (0.5, 0.9),
        "optim.weight_decay": 0.01,  # AdamW's default
        "optim.eps": EPS_OF_SUMS,
    },
]
DC_32 = {
    "model.config.latent_channels": 32,
    "model.config.encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "model.config.encoder_layers_per_block": [0, 4, 8, 2, 2, 2],
    "model.config.decoder_layers_per_block": [0, 5, 10, 2, 2, 2],
}
DC_64 = {
    "model.config.latent_channels": 128,
    "model.config.encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024, 2048],
    "model.config.encoder_layers_per_block": [0, 4, 8, 2, 2, 2, 2],
    "model.config.decoder_layers_per_block": [0, 5, 10, 2, 2, 2, 2],
}
DC_15 = {
    # dc-ai-projects/DC-Gen, dc_gen/aecore/models/dc_ae.py: dc_ae_f64_1_5
    "model.config.latent_channels": 128,
    "model.config.encoder_block_types": "ResBlock",
    "model.config.decoder_block_types": "ResBlock",
    "model.config.encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024, 1024],
    "model.config.decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024, 1024],
    "model.config.encoder_layers_per_block": [0, 5, 10, 4, 4, 4, 4],
    "model.config.decoder_layers_per_block": [0, 5, 10, 4, 4, 4, 4],
    "model.config.encoder_out_shortcut": False,
    "model.config.decoder_in_shortcut": False,
    "model.config.decoder_norm_types": "rms_norm",
    "model.config.decoder_act_fns": "silu",
    "model.config.decoder_conv_act_fn": "silu",
    "latents.min_channels": 128 // 8,
}
TINY = {
    "model.kind": "AutoencoderTiny",
    "batch_size": 32,
    "distillation.decode": "teacher",
    "gan.conditional": True,
    "optim.lr": 3e-4,
    "optim.discriminator_betas": (0.9, 0.99),
}
PUBLISHED: dict[str, list[dict[str, Any]]] = {
    "kl-f4": [kl(10, 3, 1, 2, 4) | {"model.down_block_types": None}],
    "kl-f8": [kl(4, 4, 1, 2, 4, 4) | {"steps": 246_803, "model.down_block_types": None}],
    "kl-f16": [kl(6, 16, 1, 1, 2, 2, 4) | {f"model.{key}": value for key, value in attention(5, 1).items()}],
    "kl-f32": [kl(6, 64, 1, 1, 2, 2, 4, 4) | {f"model.{key}": value for key, value in attention(6, 2).items()}],
    "vq-f4": [vq(8, 8192, 3, 0.75, 0, 3, 1, 2, 4)],
    "vq-f8": [vq(10, 16384, 4, 0.6, 1, 2, 1, 2, 2, 4)],
    "vq-f16": [vq(14, 16384, 8, 0.75, 250_001, 2, 1, 1, 2, 2, 4)],
    "sd-vae-ft-ema": [DECODER_ONLY | {"steps": 313_198, "loss.pixel": "l1", "loss.perceptual": 1.0}],
    "sd-vae-ft-mse": [DECODER_ONLY | {"steps": 280_000, "loss.pixel": "l2", "loss.perceptual": 0.1}],
    "ldm-f16d32": [VA_VAE | {"steps": epochs(50, 256)}],
    "va-vae-f16d32": [VA_VAE | MARGINS | {"steps": epochs(50, 256), "alignment.adaptive": True}],
    "va-vae-f16d32-long": [
        VA_VAE | NO_MARGINS | {"steps": epochs(100, 256), "alignment.weight": 0.5},
        VA_VAE | NO_MARGINS | {"steps": epochs(15, 256), "alignment.weight": 0.1, "gan.start": 1},
        VA_VAE | MARGINS | {"steps": epochs(15, 256), "gan.start": 1},
    ],
    "eq-vae": [
        {
            "init_from": "CompVis/stable-diffusion-v1-4",
            "latents.equivariance": 0.5,
            "batch_size": 10 * 8 * 2,
            "optim.lr": pytest.approx(4.5e-6 * 160),
            "optim.eps": EPS_OF_SUMS,
            "gan.start": 0,
            "gan.adaptive_cap": CLAMP_OF_SUMS,
            "data.scale": (0.5, 1.0),  # train_eqvae/ldm/data/dataset.py
            "data.resize_px": None,
            "data.flip": False,
        }
    ],
    "dc-ae-f32c32": [phase | DC_32 for phase in DC_PHASES],
    "dc-ae-f64c128": [phase | DC_64 for phase in DC_PHASES],
    "dc-ae-1.5": [phase | DC_15 for phase in DC_PHASES],
    "taming-vqgan": [
        vq(12, 16384, 256, 0.8, 250_001, 3, 1, 1, 2, 2, 4)
        | {"data.resize_px": 256, "data.flip": False, "model.config.vq_embed_dim": 256}
    ],
    "llamagen-vq16": [
        {
            "steps": epochs(40, 128),
            "batch_size": 128,
            "precision": "bf16",
            "model.config.num_vq_embeddings": 16384,
            "model.config.vq_embed_dim": 8,
            "model.config.latent_channels": 256,
            "codebook.normalised": True,
            "loss.pixel": "l2",
            "loss.perceptual": 1.0,
            "loss.commitment": 0.25,
            "gan.weight": 0.5,
            "gan.start": 20_000,
            "gan.adaptive": False,
            "optim.lr": 1e-4,
            "optim.betas": (0.9, 0.95),
            "optim.eps": 1e-8,
            "optim.discriminator_betas": (0.9, 0.95),
            "optim.weight_decay": 0.0,  # vq_train.py:110 gives Adam no --weight-decay
            "optim.clip": 1.0,
            "data.scale": (0.8, 1.0),  # dataset/augmentation.py: random_crop_arr
            "data.resize_px": None,
            "data.flip": True,
        }
    ],
    "rae-dinov2-b": [
        {
            "train": "decoder",
            "steps": epochs(16, 512),
            "batch_size": 512,
            "data.resize_px": 384,
            "data.flip": False,  # train_stage1.py:261
            "model.config.decoder_hidden_size": 1152,
            "model.config.decoder_num_hidden_layers": 28,
            "model.config.decoder_num_attention_heads": 16,
            "model.config.decoder_intermediate_size": 4096,
            "model.config.noise_tau": 0.8,
            "loss.pixel": "l1",
            "loss.pixel_weight": 1 / 2,  # 1 of images in [0, 1]
            "loss.perceptual": 1.0,
            "gan.network": "dino",
            "gan.weight": 0.75,
            "gan.start": epochs(6, 512),
            "gan.felt_from": epochs(8, 512),
            "gan.loss": "hinge",
            "gan.diffaug": ("color", "translation"),
            "gan.dino_kernel": 9,
            "gan.adaptive_cap": 1e4,
            "optim.lr": 2e-4,
            "optim.betas": (0.9, 0.95),
            "optim.eps": 1e-8,
            "optim.schedule": "cosine",
            "optim.final_lr": 2e-5 / 2e-4,
            "optim.warmup": epochs(1, 512),
            "optim.clip": 0.0,
            "ema.decay": 0.9978,
        }
    ],
    "taesd": [
        TINY | {"data.resolution": 96, "gan.replay": 1024},
        TINY | {"data.resolution": 256, "gan.replay": 256},
    ],
    "mosaic": [
        {
            "batch_size": 256,
            "model.block_out_channels": widths(1, 2, 4, 4),
            "model.mid_block_add_attention": False,
            "data.flip": False,
            "loss.kl": 0.1,  # of means there, too
            "loss.learned_logvar": True,  # models.py: build_autoencoder's default, and train.py:37
            "loss.perceptual": 1.0,
            "gan.weight": 0.1 / 2,
            "gan.adaptive": True,  # autoencoder.py: calc_discriminator_adaptive_weight
            "gan.adaptive_cap": 1e4,
            "gan.adaptive_smoothing": 0.0,
            "gan.start": 0,
            "optim.lr": 4.5e-5,
            "optim.betas": (0.9, 0.95),
            "optim.eps": 1e-8,
            "optim.weight_decay": 0.01,
            "optim.warmup": 100,
        }
    ],
}
HIERARCHICAL = {
    # NVAE: two cells for each group; vdvae: for the prior's block and the one after the latent of each level
    "model.config.blocks": 2,
    # the last layers of posteriors begin as PyTorch's, with biases of about 0: neither fixed means nor small variances
    "model.config.open_posteriors": True,
    "model.config.open_log_std": 0,
    "precision": "fp32",
}
PUBLISHED |= {
    "vdvae-cifar10": [
        {
            # 1x1,4m1,4x2,8m4,8x5,16m8,16x10,32m16,32x21 and 32x11,32d2,16x6,16d2,8x6,8d2,4x3,4d4,1x3
            "model.config.level_sides": [1, *[4] * 3, *[8] * 6, *[16] * 11, *[32] * 22],
            "model.config.level_channels": [16] * 43,
            "model.config.encoder_blocks": [3, 3 + 1, 6 + 1, 6 + 1, 11 + 1],
            "model.config.width": 384,
            "model.config.cell": "bottleneck",
            "model.config.mixtures": 10,
            **HIERARCHICAL,
            "model.config.side_bias": True,  # vae.py: bias_xs
            "model.config.encoder_cell": None,  # as the decoder's
            "steps": 1_000_000,  # README: ~1M iterations with early stopping
            **{"batch_size": 2 * 16, "data.flip": False, "ema.decay": 0.9999, "loss.kl": 1.0, "loss.kl_warmup": 0},
            **{"optim.lr": 2e-4, "optim.betas": (0.9, 0.9), "optim.weight_decay": 0.01, "optim.warmup": 100},
            **{"optim.schedule": "constant", "optim.clip": 200.0, "optim.skip_above": 400.0, "optim.eps": 1e-8},
        }
    ],
    "nvae-cifar10": [
        {
            "model.config.level_sides": [*[16] * 30, 32],
            "model.config.level_channels": [*[20] * 30, 0],
            "model.config.encoder_blocks": [2 * 30, 2],
            "model.config.width": [2 * 128, 128],
            "model.config.cell": "depthwise",
            "model.config.encoder_cell": "residual",  # utils.py: res_mbconv
            "model.config.side_bias": None,
            "model.config.mixtures": 10,
            **HIERARCHICAL,
            **{"steps": 400 * (50_000 // 256), "batch_size": 8 * 32, "optim.warmup": 5 * (50_000 // 256)},
            **{"loss.kl_warmup": int(0.3 * 400 * (50_000 // 256)), "loss.kl_balance": True, "data.flip": True},
            **{"optim.schedule": "cosine", "optim.final_lr": pytest.approx(1e-4 / 1e-2), "optim.clip": 0.0},
            "loss.spectral": pytest.approx(1e-2 / (3 * 32 * 32), rel=1e-3),
        }
    ],
}
FLIPS_UNKNOWN = {
    *(f"{kind}-f{factor}" for kind, factors in (("kl", (4, 8, 16, 32)), ("vq", (4, 8, 16))) for factor in factors),
    *("sd-vae-ft-ema", "sd-vae-ft-mse", "taesd"),
}
"""Whose sources do not show whether they mirror images."""
STEPS_ELSEWHERE = {"rae-dinov2-b"}
"""An AutoencoderRAE takes steps in tests/models/test_representation.py, where its encoder is."""
FULL_SIZE = sorted({*recipe_folders()["published"], *recipe_folders()["shapes"]} - STEPS_ELSEWHERE)


def value_of(settings: TrainSettings, key: str) -> Any:
    value: Any = settings
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else getattr(value, part)
    return value


def test_each_published_recipe_is_in_the_table() -> None:
    assert PUBLISHED.keys() == recipe_folders()["published"].keys()
    without = {name for name, phases in PUBLISHED.items() if any("data.flip" not in phase for phase in phases)}
    assert without == FLIPS_UNKNOWN


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_published_values(name: str) -> None:
    phases = phases_of(TrainSettings.load(name, *FOLDER.get(name, [])))
    assert len(phases) == len(PUBLISHED[name])
    for phase, published in zip(phases, PUBLISHED[name], strict=True):
        for key, value in published.items():
            assert value_of(phase.settings, key) == value, (phase.title, key)


def test_full_size_recipes_compile_on_gpus_only() -> None:
    """All whose class and losses allow it."""
    not_compiled = {"eq-vae", "rae-dinov2-b"}  # images of changing size; no blocks that are known here
    texts = {name: file.read_text() for folder in recipe_folders().values() for name, file in folder.items()}
    compiled = {name for name, text in texts.items() if "\ncompile: cuda\n" in text}
    assert compiled == texts.keys() - recipe_folders()["small"].keys() - not_compiled
    searching = {name for name, text in texts.items() if "\ncudnn_benchmark: true\n" in text}
    assert searching == compiled | {"rae-dinov2-b"}
    facts = TrainSettings.load("sd-vae").facts()
    assert facts.compiles_on(torch.device("cuda", 1)) and not facts.compiles_on(torch.device("cpu"))


def test_recipes_with_this_projects_defaults_have_the_linear_start() -> None:
    """All whose class has one (docs/linear-start.md), with steps by layer; no published recipe."""
    recipes = {name: TrainSettings.load(name) for name in ("quickstart", *recipe_folders()["shapes"])}
    linear = {name for name, settings in recipes.items() if settings.model.init == "linear" and settings.layerwise}
    assert linear == recipes.keys() - {"flux2-shape"}
    texts = [file.read_text() for file in recipe_folders()["published"].values()]
    assert not any("init: linear" in text for text in texts)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_narrow_copy_makes_two_steps(name: str, lpips_vgg: LPIPS, tmp_path: Path) -> None:
    whole = TrainSettings.load(name, *FOLDER.get(name, []))
    for phase in phases_of(whole):
        settings = narrow(phase.settings, tmp_path)
        step = build_step(settings, lpips_vgg if settings.loss.perceptual else None)
        model = step.bare_reconstructor.autoencoder
        before = [one.detach().clone() for one in model.parameters() if one.requires_grad]
        for number in range(2):
            means = step(number, batches(settings, number, step))
            assert all(value.isfinite().all() for value in means.values())
        assert step.skipped_steps()[0] == []
        after = [one for one in model.parameters() if one.requires_grad]
        assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
        assert ("discriminator" in means) == bool(settings.gan.weight)


def narrow(settings: TrainSettings, folder: Path) -> TrainSettings:
    """Return less than a tenth of the width on images of a few latent px, all terms from the first step on."""
    values = settings.model_dump(mode="json", by_alias=True)
    model = values["model"]
    if settings.model.gives_shape:
        # a linear start needs four channels for each colour, and as many in each group of the norm
        part, groups = (3 / 32, 3) if settings.model.init == "linear" else (1 / 16, 4)
        widths = [int(width * part) for width in model["block_out_channels"]]
        model |= {"block_out_channels": widths, "norm_num_groups": groups}
        factor = settings.model.factor
    else:
        config = model["config"]
        for key in config:
            if key.endswith("block_out_channels"):
                factor = 2 ** (len(config[key]) - 1)
                config[key] = [width // 32 for width in config[key]]
        if settings.model.kind == "HierarchicalVAE":
            factor = 32
            grids = dict(zip(config["level_sides"], config["level_channels"], strict=True))
            config |= {"level_sides": list(grids), "level_channels": [min(2, count) for count in grids.values()]}
            config |= {"width": 8, "blocks": 1, "encoder_blocks": 1}
        if settings.model.kind == "AutoencoderDC":
            config |= {"attention_head_dim": 4, "latent_channels": config["latent_channels"] // 8}
            if settings.latents.min_channels is not None:
                values["latents"]["min_channels"] = 2
        else:
            config["norm_num_groups"] = 4
        if "num_vq_embeddings" in config:
            config["num_vq_embeddings"] = 32
    if settings.model.kind == "AutoencoderTiny":
        factor, tiny = 8, {"num_encoder_blocks": [1, 1, 1, 1], "num_decoder_blocks": [1, 1, 1, 1]}
        model["config"] = tiny | {f"{part}_block_out_channels": [4] * 4 for part in ("encoder", "decoder")}
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        teacher = save_teacher(folder / "teacher", block_out_channels=(8,) * 4, **blocks)
        values["distillation"]["teacher"] = str(teacher)
        values["gan"]["replay"] = 3
    if settings.alignment.model is not None:
        values["alignment"]["model"] = str(save_vision_model(folder / "vision"))
    changes = {
        "init_from": None,
        "precision": "fp32",  # bf16 is slow on many CPUs
        "steps": 2,
        "batch_size": 4,
        "micro_batch_size": 2,
        "data": {"resolution": max(factor, 32), "resize_px": None},
        "gan": {"start": 0, "init_from": None, "channels": 8},
        "optim": {"warmup": 0},
    }
    return TrainSettings.model_validate(merged(values, changes))


def batches(settings: TrainSettings, number: int, step: Any) -> Any:
    side = settings.data.resolution
    generator = torch.Generator().manual_seed(number)
    for index in range(settings.accumulation):
        first = number * settings.batch_size + index * settings.micro_batch
        images = torch.rand(settings.micro_batch, 3, side, side, generator=generator) * 2 - 1
        model = step.bare_reconstructor.autoencoder
        latent = side // factor_of(model)
        noise = torch.randn(len(images), latent_channels_of(model), latent, latent, generator=generator)
        numbers = range(first, first + settings.micro_batch)
        yield drawn_batch(images, noise, numbers, list(step.objectives.values()))
