"""A vision transformer small enough for a test, in a folder as the hub has them."""

import json
from pathlib import Path

import torch

PATCH = 2
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]


def save_vision_model(folder: Path, kind: str = "Dinov2", **changes: int) -> Path:
    """Untrained weights, two layers of 16 features, patches of 2 px."""
    import transformers

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "patch_size": PATCH, "image_size": 12}
    sizes |= changes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**sizes)
        model = getattr(transformers, f"{kind}Model")(config)
        with torch.no_grad():
            for parameter in model.parameters():  # far from what they start from, or features would hardly differ
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return folder


def save_convnext(folder: Path) -> Path:
    """A classifier of ten classes with untrained weights, as transformers saves it."""
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.ConvNextConfig(hidden_sizes=[4, 6, 8, 8], depths=[1, 1, 2, 1], num_labels=10)
        model = transformers.ConvNextForImageClassification(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return folder


def save_clip(folder: Path) -> Path:
    """A CLIP of untrained weights, both of its towers, which sees 32 px and embeds into 12 numbers."""
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = sizes | {"image_size": 32, "patch_size": 8, "projection_dim": 12}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.CLIPConfig(text_config=sizes, vision_config=vision, projection_dim=12)
        model = transformers.CLIPModel(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return folder
