"""Measurements of latents of a few small photographs."""

from latent_ae_eval.latents.settings import LatentsSettings

SETTINGS = LatentsSettings(
    resize_px=None,
    crop_px=32,
    num_decoded=6,
    noise=(0.0, 0.1, 0.5),
    lpips=None,
    num_workers=0,
    max_bad_fraction=0.1,
)


def settings_with(**changes) -> LatentsSettings:
    return SETTINGS.model_copy(update=changes)
