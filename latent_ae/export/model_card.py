"""The model card (README.md) of an exported first stage: use, metrics, precision, and the metadata a hub reads."""

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import ModelMixin
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import Tensor

from latent_ae.config import looks_like_path
from latent_ae.export.precision import verdict
from latent_ae.latents.statistics import LatentStatistics
from latent_ae.metrics.labels import NAMES, short_name
from latent_ae.models.borrowed_encoder import FOLDER, borrowed_encoder
from latent_ae.models.build import channels_of, count_parameters, factor_of, latent_channels_of
from latent_ae.models.density import FOLDER as DENSITY
from latent_ae.models.discriminator import Discriminator
from latent_ae.models.label_model import FOLDER as LABEL_MODEL
from latent_ae.models.label_model import LabelModel
from latent_ae.models.registry import family_of, module_of, scaling_of
from latent_ae.text import printable


@dataclass(frozen=True)
class CardFacts:
    """Facts about the training of a first stage for its model card. None is unknown and left out of the card."""

    name: str
    data_name: str
    steps: int | None = None
    num_images: int | None = None
    """Number of held-out images over which the metrics are means."""
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    """Means by the keys of `ReconstructionMetrics.summary`; other keys are ignored."""
    baseline: Mapping[str, float | None] = field(default_factory=dict)
    """The same metrics for bicubic down- and upsampling by the downsampling factor."""
    split: str | None = None
    base_model: str | None = None
    """Where its first weights come from: a hub id, or a folder, of which a card has the name alone."""
    license: str | None = None
    settings_yaml: str | None = None
    hub_id: str | None = None
    """The repository to which the export is uploaded."""


def loading_lines(folder: str | Path, kind: str = "AutoencoderKL") -> str:
    """Return the lines of Python that load an export in `folder` of the diffusers class `kind`."""
    return (
        "import torch\n"
        f"from {module_of(kind)} import {kind}\n"
        f"vae = {kind}.from_pretrained({str(folder)!r}, torch_dtype=torch.float32).eval()"
    )


def _public(location: str) -> str:
    """Return a hub id as it is, and of a path on this machine the name alone."""
    return short_name(location) if looks_like_path(location) or Path(location).exists() else location


def _public_settings(text: str) -> str:
    """Return settings in YAML in which paths of this machine are names."""

    def public(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: public(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [public(inner) for inner in value]
        return _public(value) if isinstance(value, str) and "/" in value else value

    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:  # no settings of ours
        return text
    return yaml.safe_dump(public(values), sort_keys=False, allow_unicode=True)


def model_card(
    autoencoder: ModelMixin,
    facts: CardFacts,
    statistics: LatentStatistics,
    location: str,
    difference: float,
    precision: Mapping[str, Any] | None = None,
    discriminator: Discriminator | None = None,
    companions: Mapping[str, ModelMixin] | None = None,
) -> ModelCard:
    """Return the model card of an export, with a valid model-index.

    Args:
        autoencoder: The exported model, with the config that is written.
        facts: How the model was trained.
        statistics: Statistics of the latents from which the scaling comes.
        location: Folder or hub id that the lines of code load.
        difference: Largest difference between the reconstructions of the trained and the exported model, images in [-1,
            1].
        precision: Result of `probe_precision`, with that of `probe_tiling` under "tiling" if it was run.
        discriminator: The discriminator in the export, if there is one.
        companions: The networks that were trained with the model, by their folders in the export.
    """
    measured = {key: facts.metrics[key] for key in NAMES if facts.metrics.get(key) is not None}
    results = [
        EvalResult(
            task_type="image-to-image",
            task_name="Image reconstruction",
            dataset_type=_public(facts.data_name),
            dataset_name=_public(facts.data_name),
            dataset_split=facts.split,
            metric_type=key.removesuffix("_vgg").removesuffix("_alex"),
            metric_name=NAMES[key],
            metric_value=value,
        )
        for key, value in measured.items()
    ]
    data = ModelCardData(
        library_name="diffusers",
        license=facts.license,
        base_model=facts.base_model if facts.base_model == _public(facts.base_model or "") else None,
        pipeline_tag="image-to-image",
        tags=["autoencoder", "vae", "latent-diffusion", "latent-ae"],
        model_name=facts.name,
        eval_results=results or None,
    )
    text = _card_text(autoencoder, facts, statistics, location, difference, precision, discriminator, companions or {})
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def _card_text(
    autoencoder: ModelMixin,
    facts: CardFacts,
    statistics: LatentStatistics,
    location: str,
    difference: float,
    precision: Mapping[str, Any] | None,
    discriminator: Discriminator | None,
    companions: Mapping[str, ModelMixin],
) -> str:
    factor, kind = factor_of(autoencoder), type(autoencoder).__name__
    borrowed = borrowed_encoder(autoencoder)
    trained = [f"on {_plain(_public(facts.data_name))}"]
    if facts.steps is not None:
        trained.append(f"for {facts.steps:,} steps")
    if facts.base_model:
        trained.append(f"from {_plain(_public(facts.base_model))}")
    family, channels, latent_channels = (
        family_of(autoencoder),
        channels_of(autoencoder),
        latent_channels_of(autoencoder),
    )
    setup, scaled, unscaled = _scaling_code(autoencoder if borrowed is None else borrowed.original)
    encoded = family.encoded
    if borrowed is not None:  # the decoder takes what a diffusion model sees
        name = type(borrowed.original).__name__
        load = f"{name}.from_pretrained({f'{location}/{FOLDER}'!r}, torch_dtype=torch.float32).eval()"
        setup = f"from diffusers import {name}\noriginal = {load}\n{setup.replace('vae.', 'original.')}"
        scaled, unscaled = scaled.replace("vae.", "original."), ""
        encoded = family_of(borrowed.original).encoded.replace("vae.", "original.")
    scaling_lines = "" if scaled == "z" else f"    z = {scaled}  # what a diffusion model sees\n"
    scaling_lines += f"    z = {unscaled}\n" if scaling_lines and unscaled else ""
    side = family.side(autoencoder.config)
    sides = f"multiples of {factor}" if side is None else f"always {side}"
    loader = "stock diffusers" if module_of(kind) == "diffusers" else module_of(kind)
    parts = [
        f"# {_plain(facts.name)}\n\n{'An' if kind.startswith('A') else 'A'} `{kind}`: images of "
        f"{channels} channels in [-1, 1] to latents of {latent_channels} channels, "
        f"each side divided by {factor}. {count_parameters(autoencoder):,} parameters, float32. "
        f"Trained {' '.join(trained)}.",
        f"""## Use

```python
{loading_lines(location, kind)}
{setup}with torch.no_grad():
    z = {encoded}  # images: N x {channels} x H x W in [-1, 1]
{scaling_lines}    images = {family.decoded}
```

H and W are {sides}. {_scaling_text(autoencoder, statistics)}
{_pipeline_text(autoencoder)}""",
        _metric_text(facts, factor),
        f"## Check\n\nLoaded by {loader} in a fresh process, these weights "
        f"{'reconstruct' if borrowed is None else 'decode latents'} like the trained model: largest difference "
        f"{difference:.1e} in [-1, 1].",
        _precision_text(precision) if precision else "",
        discriminator_text(discriminator, location) if discriminator is not None else "",
        *(COMPANIONS[name](network, location, family.latent == "codebook") for name, network in companions.items()),
    ]
    if facts.settings_yaml:
        text = _public_settings(facts.settings_yaml)
        longest = max(map(len, re.findall("`+", text)), default=0)
        fence = "`" * max(3, longest + 1)
        parts.append(f"## Settings\n\n{fence}yaml\n{printable(text.rstrip(), lines=True)}\n{fence}")
    return "\n\n".join(part for part in parts if part) + "\n"


def _scaling_code(autoencoder: ModelMixin) -> tuple[str, str, str]:
    """Return lines of Python that prepare the scaling of latents z, and expressions that scale and unscale them."""
    config, scaling = autoencoder.config, scaling_of(autoencoder)
    if family_of(autoencoder).scaled_by_patches:
        setup = "norm = vae.bn  # of patches of 2 x 2 latents: channel after channel, each with its four places\n"
        return setup, "z", "z"
    if scaling.mean is not None:
        setup = (
            f"mean, std = (torch.tensor(vae.config[key]).view(1, {latent_channels_of(autoencoder)}, -1, 1)[:, :, :1]\n"
            "             for key in ('latents_mean', 'latents_std'))\n"
        )
        if scaling.factor != 1.0:
            return setup, "(z - mean) / std * vae.config.scaling_factor", "z / vae.config.scaling_factor * std + mean"
        return setup, "(z - mean) / std", "z * std + mean"
    if scaling.inside or "scaling_factor" not in config:
        return "", "z", "z"
    if config.get("shift_factor") is None:
        return "", "z * vae.config.scaling_factor", "z / vae.config.scaling_factor"
    unscaled = "z / vae.config.scaling_factor + vae.config.shift_factor"
    return "", "(z - vae.config.shift_factor) * vae.config.scaling_factor", unscaled


def _scaling_text(autoencoder: ModelMixin, statistics: LatentStatistics) -> str:
    measured = (
        f"measured over\n{statistics.count:,} latent values (mean {statistics.mean:.4g}, "
        f"standard deviation {statistics.std:.4g})."
    )
    if borrowed_encoder(autoencoder) is not None:
        return (
            "Its own encoder is zero and encodes nothing: the first stage in\n"
            f"`{FOLDER}/` does, and this decoder takes its scaled latents. On this data they were {measured}"
        )
    if (
        autoencoder.config.get("latents_mean") is not None
        and autoencoder.config.latents_mean == statistics.channel_mean
    ):
        return f"`latents_mean` and `latents_std` of each channel were {measured}"
    if family_of(autoencoder).scaled_by_patches:
        return f"The means and variances in `vae.bn` were {measured}"
    scaling, kept = scaling_of(autoencoder), "those of the model that this one's decoder was tuned from: its\n"
    kept += f"latents are the same. On this data they were {measured}"
    if scaling.mean is not None:
        return f"`latents_mean` and `latents_std` are {kept}"
    if statistics.positions.count and _scaled_by(autoencoder.config.latents_mean, statistics.positions.mean):
        return (
            "It scales its latents itself, each value by a mean and a standard\n"
            f"deviation of its own in `latents_mean` and `latents_std`; the encoder's features were {measured}"
        )
    if scaling.inside:
        return f"It scales its latents itself. On this data they were {measured}"
    if "scaling_factor" not in autoencoder.config:
        return f"Its config has no scaling. On this data the latents were {measured}"
    if "shift_factor" not in autoencoder.config and autoencoder.config.scaling_factor == statistics.scaling_factor:
        return f"`scaling_factor` was {measured}"
    if autoencoder.config.scaling_factor == statistics.scaling_factor:
        return f"`scaling_factor` and `shift_factor` were {measured}"
    if "shift_factor" not in autoencoder.config:
        return f"`scaling_factor` is {kept.replace('those', 'that', 1)}"
    return f"`scaling_factor` and `shift_factor` are {kept}"


def _scaled_by(stated: Any, mean: Tensor) -> bool:
    """Return whether the mean in a config is a measured one, (C, H, W), up to a small constant of its class."""
    if stated is None or (known := torch.tensor(stated)).shape != mean.shape:
        return False
    return torch.allclose(known, mean.float(), rtol=1e-4, atol=1e-4)


def discriminator_text(discriminator: Discriminator, location: str) -> str:
    """Return the section on the discriminator in an export, with the command that trains on with it.

    Args:
        discriminator: The discriminator.
        location: The export's folder or hub id.
    """
    settings = ("network", *type(discriminator).settings)
    words = [f"gan.{key}={str(value).lower()}" for key, value in discriminator.shape.items() if key in settings]
    words += ["gan.dino_model=FOLDER"] if "dino_model" in settings else []
    words += ["gan.conditional=true"] if "latent_channels" in discriminator.shape else []
    place = shlex.quote(location)
    return (
        "## Discriminator\n\n"
        f"`discriminator.safetensors` holds the {discriminator.title} of the adversarial loss "
        f"({count_parameters(discriminator):,} parameters), from which training can go on. Diffusers ignores it.\n\n"
        f"```\nlatent-ae train sd-vae init_from={place} gan.init_from={place} gan.start=0 {' '.join(words)}\n```"
    )


def label_model_text(label_model: LabelModel, location: str, codes: bool = False) -> str:
    """Return the section on the label model in an export.

    Args:
        label_model: The label model.
        location: The export's folder or hub id.
        codes: Whether latents as encoded are not yet those of codes.
    """
    given = "vae.quantize(z)[0]" if codes else "z"
    return (
        "## Labels\n\n"
        f"`label_model` holds a model of latents and {label_model.num_classes} labels "
        f"({count_parameters(label_model):,} parameters; M2 of Kingma et al. 2014), which was trained with the "
        "autoencoder. `latent-ae eval probe` measures how well it classifies. Diffusers ignores it.\n\n"
        "```python\nfrom latent_ae.models.label_model import LabelModel\n\n"
        f"labels = LabelModel.from_pretrained({str(Path(location) / LABEL_MODEL)!r})\n"
        f"probabilities = labels.classify({given}).exp()  # z as encoded above, without scaling\n```"
    )


def density_text(density: Any, location: str, codes: bool = False) -> str:
    """Return the section on the density in an export; arguments as for `label_model_text`."""
    given = "vae.quantize(z)[0]" if codes else "z"
    return (
        "## Density\n\n"
        f"`density` holds a mixture of {density.config.components} Gaussians on latents and reconstruction errors (in "
        "the manner of DAGMM, Zong et al. 2018), which was trained with the autoencoder. `latent-ae eval anomaly` "
        "measures it. Diffusers ignores it.\n\n"
        "```python\nfrom latent_ae.models.density import Density\n\n"
        f"density = Density.from_pretrained({str(Path(location) / DENSITY)!r})\n"
        f"energies = density(density.features({given}, images, reconstructions))  # z as encoded, without scaling\n```"
    )


COMPANIONS: dict[str, Callable[..., str]] = {LABEL_MODEL: label_model_text, DENSITY: density_text}
"""Makers of the sections on networks that were trained with the model, by their folders."""


def _pipeline_text(autoencoder: ModelMixin) -> str:
    if "shift_factor" not in autoencoder.config:
        return ""
    if autoencoder.config.get("latents_mean") is not None:
        return "Pipelines of the Stable Diffusion XL kind apply `latents_mean` and `latents_std`; others do not."
    return "Pipelines of the Stable Diffusion 1 and 2 kind apply `scaling_factor` only."


def _precision_text(precision: Mapping[str, Any]) -> str:
    rows = []
    for name in ("bf16", "fp16"):
        row = precision[name]
        psnr = "–" if row["psnr"] is None else f"{row['psnr']:.1f}"
        emulated = ", emulated" if row["emulated"] else ""
        rows.append(f"| {name}{emulated} | {psnr} | {row['not_finite']:,} |")
    tiling, upcast = precision.get("tiling"), precision["force_upcast"]
    meaning = "fp16 pipelines run it in fp32" if upcast else "fp16 pipelines run it in fp16"
    tiles = "Tiles of `sample_size` px are no multiple of 4 latent px, which diffusers cannot put together: do not "
    tiles += "`enable_tiling`."
    if "tiling" not in precision:
        tiles = "Decoding in tiles was not tried: they are large for the memory, or for a processor without a GPU."
    if tiling is not None:
        tiles = (
            f"An image of {tiling['side_px']} px decoded in tiles of {tiling['tile_px']} px (`enable_tiling`) is "
            f"{tiling['psnr']:.1f} dB from the same decoded whole (largest difference {tiling['max_abs']:.3f})."
        )
    return "\n".join(
        [
            f"## Precision and tiling\n\nReconstructions of {precision['images']} held-out images, against fp32:\n",
            "| | PSNR (dB) | values not finite |\n|---|---:|---:|",
            *rows,
            f"\n{verdict(dict(precision))}. So `force_upcast` is {str(upcast).lower()}: {meaning}.\n",
            tiles,
        ]
    )


def _metric_text(facts: CardFacts, factor: int) -> str:
    measured = [key for key in NAMES if facts.metrics.get(key) is not None]
    if not measured:
        return ""
    rows = [("this model", facts.metrics)]
    if facts.baseline:
        rows.append((f"bicubic, {factor}x down and up", facts.baseline))
    lines = [
        "| " + " | ".join(["", *(NAMES[key] for key in measured)]) + " |",
        "|---" + "|---:" * len(measured) + "|",
        *(
            "| " + " | ".join([name, *(_figure_text(values.get(key)) for key in measured)]) + " |"
            for name, values in rows
        ),
    ]
    count = f"{facts.num_images:,} held-out images" if facts.num_images is not None else "held-out images"
    return (
        f"## Reconstruction\n\nMeans per image over {count} of {_plain(_public(facts.data_name))}, on 8-bit pixels.\n\n"
        + "\n".join(lines)
    )


def _plain(name: str) -> str:
    """Return a name on one line, with all characters escaped that have a meaning in Markdown or HTML."""
    return re.sub(r"([\\`*<>\[\]|&!$~])", r"\\\1", printable(name))


def _figure_text(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
