"""What the recipes need from their user besides images."""

FOLDER = {
    "va-vae-f16d32": ["alignment.model=."],
    "va-vae-f16d32-long": ["alignment.model=."],
    "rae-dinov2-b": ["gan.dino_model=."],
    "new-decoder": ["init_from=."],
    "flow-decoder": ["init_from=."],
}
"""Words with a folder in place of the vision model or the first stage for which a recipe asks, by the recipe's name."""
