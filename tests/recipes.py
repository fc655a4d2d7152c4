"""What the recipes need from their user besides images."""

FOLDER = {
    "va-vae-f16d32": ["alignment.model=."],
    "va-vae-f16d32-long": ["alignment.model=."],
    "rae-dinov2-b": ["gan.dino_model=."],
}
"""Words with a folder in place of the vision model for which a recipe asks, by the recipe's name."""
