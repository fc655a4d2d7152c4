"""What the recipes need from their user besides images."""

FOLDER = {name: ["alignment.model=."] for name in ("va-vae-f16d32", "va-vae-f16d32-long")}
"""Words with a folder in place of the vision model for which a recipe asks, by the recipe's name."""
