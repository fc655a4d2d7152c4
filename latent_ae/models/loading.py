"""Loads first stages of all classes in `registry`, and encodes, decodes and reconstructs images with them.

stage = load_first_stage("madebyollin/taesdxl")
encoded = stage.encode(images)                # images: NCHW float in [-1, 1]
reconstructions = stage.decode(encoded.mean)
"""

import copy
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import diffusers
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from latent_ae.arithmetic import lay_out
from latent_ae.config import UserError, looks_like_path, made_by
from latent_ae.models.borrowed_encoder import FOLDER, borrow_, borrowed_encoder, borrowed_parameters, encodes_nothing
from latent_ae.models.encoder_digest import encoder_sha256
from latent_ae.models.hub import file_on_hub, subfolder_on_hub
from latent_ae.models.likelihood import FILE as LIKELIHOOD
from latent_ae.models.likelihood import Likelihood, read_likelihood
from latent_ae.models.posterior import draw, moments_of
from latent_ae.models.registry import FAMILIES, Family, class_of, config_of, family_name, family_of, untrained
from latent_ae.models.run_checkpoint import checkpoint_at

Dtype = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# subfolders in which pipelines keep their first stage
PIPELINE_FOLDERS = ("vae", "vqvae", "movq")
EMA_FOLDERS = ("{}_ema", "ema")
WEIGHTS = re.compile(
    r"diffusion_pytorch_model(\.(?P<variant>(?!bin|safetensors)\w+))?(-\d+-of-\d+)?\.(safetensors|bin)"
)
"""Names of files of weights, whole or in parts."""
FROM_CONFIG = re.compile(r".*num_batches_tracked|_latents_mean|_latents_std|encoder_mean|encoder_std")
"""Tensors of diffusers' classes that follow from the config or have no effect; files need not hold them."""
CPU_BATCH_PX = 256 * 256
"""Pixels of all images of a batch on a CPU: the allocator returns the memory of larger feature maps to the system after
each layer and requests it again for the next, which takes a fifth of the time and twice the memory."""
ImageFunction = Callable[[Tensor], Tensor]


class Encoded(NamedTuple):
    """Raw latents (without scaling factor), float32."""

    mean: Tensor
    """Mean of the posterior, or the latent of a deterministic model, (N, c, h, w); a VQModel's is not quantised yet."""
    std: Tensor | None
    """Standard deviation of the posterior, shaped like `mean`; None if there is no Gaussian posterior."""


@dataclass(frozen=True)
class FirstStage:
    """A first stage in evaluation mode, or any function from images to images."""

    module: nn.Module | None
    """None for a plain function."""
    function: ImageFunction | None
    name: str
    """Name of the class or function."""
    factor: int
    """Image px per latent px along one side."""
    channels: int | None
    """Channels of the images; None for a function."""
    latent_channels: int | None
    has_posterior: bool
    location: str | None = None
    weights: str = "as stored"
    sha256: str | None = None
    """Digest of the class, the config, and the names, shapes and bytes of all tensors as they were loaded."""
    encoder_sha256: str | None = None
    """Digest of what encodes, see `encoder_digest`."""
    likelihood: Likelihood | None = None
    """Likelihood that the model was trained with, if the folder names one."""

    @property
    def family(self) -> Family | None:
        """The record of the class; None for a function."""
        return family_of(self.module) if self.function is None else None

    @property
    def side(self) -> int | None:
        """The only side of images, px, that the model takes; None if it takes all multiples of the factor."""
        return None if self.family is None or self.module is None else self.family.side(self.module.config)

    @property
    def random(self) -> bool:
        """Whether latents are sampled from a posterior."""
        return self.family is not None and self.family.random

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the posterior's mean and log-variance, or the latent and None if there is no Gaussian posterior.

        Args:
            images: (N, C, H, W) in [-1, 1], whose sides are multiples of the factor.

        Returns:
            (N, c, h, w) float32 each, raw.

        Raises:
            UserError: If the device cannot compute in the model's dtype.
        """
        assert self.module is not None
        with self._arithmetic():
            return moments_of(self.module, images.to(self.dtype))

    def encode(self, images: Tensor) -> Encoded:
        """Encode images.

        Args:
            images: (N, C, H, W) in [-1, 1], whose sides are multiples of the factor.

        Raises:
            UserError: If the device cannot compute in the model's dtype.
        """
        mean, logvar = self.moments(images)
        return Encoded(mean, None if logvar is None else torch.exp(0.5 * logvar))

    def decode(self, latents: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Decode latents.

        Args:
            latents: (N, c, h, w), raw.
            generators: One for each latent, with which a decoder that begins with noise draws it
                (`rng.decoder_generators`); other decoders ignore them. None takes the same noise for all latents, so
                that an image depends on its latent alone; a distance between sets of images is then too large.

        Returns:
            (N, C, H, W) float32, nominally in [-1, 1], not clamped.

        Raises:
            UserError: If the device cannot compute in the model's dtype.
        """
        assert self.module is not None
        with self._arithmetic():
            family = family_of(self.module)
            how = {"generator": generators} if family.decodes_noise else {}
            return family.decode(self.module, latents.to(self.dtype), **how).float()

    def decode_distribution(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Decode latents with a class whose decoder states a likelihood (`family.Family.states`).

        Args:
            latents: (N, c, h, w), raw.

        Returns:
            The images as from `decode`, and the likelihood's parameters, (N, P, H, W) float32.

        Raises:
            UserError: If the device cannot compute in the model's dtype.
        """
        assert self.module is not None
        with self._arithmetic():
            images, stated = self.module.decode_distribution(latents.to(self.dtype))
        return images.float(), stated.float()

    def reconstruct(
        self, images: Tensor, noise: Tensor | None = None, generators: Sequence[torch.Generator] | None = None
    ) -> Tensor:
        """Return reconstructions from the posterior's mode, or from a sample.

        Sides that are not multiples of the factor are padded with the last row or column, and cropped afterwards.

        Args:
            images: (N, C, H, W) in [-1, 1].
            noise: Standard normal, shaped like the latent, to sample the posterior; None takes the mean.
            generators: See `decode`.

        Returns:
            (N, C, H, W) float32, nominally in [-1, 1], not clamped.

        Raises:
            UserError: If a function returns another shape, or the device cannot compute in the model's dtype.
        """
        if self.function is not None:
            made = self.function(images)
            if not isinstance(made, Tensor) or made.shape != images.shape:
                given = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
                raise UserError(f"the function {self.name} gives {given} for images of {tuple(images.shape)}")
            return made.float()
        height, width = images.shape[-2:]
        padded = nn.functional.pad(images, (0, -width % self.factor, 0, -height % self.factor), mode="replicate")
        assert self.module is not None
        with self._arithmetic():
            latent = draw(self.module, padded.to(self.dtype), noise).latent
        return self.decode(latent, generators)[..., :height, :width]

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """Raise UserError if PyTorch lacks a layer of the `with` block in this dtype on this device."""
        try:
            yield
        except RuntimeError as error:
            if "not implemented for" not in str(error):
                raise
            raise UserError(
                f"dtype: {self.name} cannot compute in it on this device ({error}); set dtype=fp32"
            ) from error

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the model computes; float32 for a function."""
        parameter = None if self.module is None else next(self.module.parameters(), None)
        return torch.float32 if parameter is None else parameter.dtype

    def describe(self) -> dict[str, Any]:
        """Return how a result describes the model, JSON-ready."""
        return {
            "location": self.location,
            "class": self.name,
            "weights": self.weights,
            "dtype": str(self.dtype).removeprefix("torch."),
            "factor": self.factor,
            "channels": self.channels,
            "latent_channels": self.latent_channels,
            "parameters": None if self.module is None else _num_parameters(self.module),
            "sha256": self.sha256,
        }


def first_stage(
    model: nn.Module | ImageFunction,
    *,
    location: str | None = None,
    weights: str = "as stored",
    dtype: Dtype = "fp32",
    likelihood: Likelihood | None = None,
) -> FirstStage:
    """Wrap an instance of one of FAMILIES, which is put into evaluation mode, or a function.

    Args:
        model: The instance, or a function from (N, C, H, W) images in [-1, 1] to their reconstructions.
        location: Where the model comes from, for results and messages.
        weights: Which weights they are, for results.
        dtype: Precision of the computations; an instance of another dtype is copied.
        likelihood: Likelihood that the model was trained with.

    Raises:
        UserError: If the model cannot be measured, or its output has other channels than its input.
        ValueError: If `model` is neither an instance nor a function.
    """
    original = getattr(model, "_orig_mod", model)  # torch.compile wraps the module
    name = family_name(original) or type(original).__name__
    if name not in FAMILIES:
        if not callable(model) or isinstance(original, diffusers.ModelMixin):
            raise ValueError(f"a first stage of diffusers or a function is needed, not {name}")
        module = model.eval() if isinstance(model, nn.Module) else None
        label = getattr(model, "__name__", name)
        return FirstStage(module, model, label, 1, None, None, has_posterior=False, location=location)
    assert isinstance(original, nn.Module)
    family, config, model = family_of(original), original.config, original
    if refusal := family.refusal(config):
        raise UserError(f"{location or 'the model'} is a {name} that cannot be measured: {refusal}")
    channels = family.channels(config)
    out_channels = family.out_channels(config) or channels
    if channels != out_channels:
        raise UserError(
            f"{location or 'the model'} takes images of {channels} channels and gives {out_channels}, "
            "so its reconstructions cannot be compared with its inputs"
        )
    if encodes_nothing(model):
        raise UserError(
            f"{location or 'the model'} is an AutoencoderTiny whose encoder is zero, so it only decodes: give the "
            f"folder or hub id from which it was loaded, whose {FOLDER}/ encodes"
        )
    sha256, encodes = _sha256(model), encoder_sha256(model)
    return FirstStage(
        module=_in(model, DTYPES[dtype]).eval(),
        function=None,
        name=name,
        factor=family.factor(config),
        channels=channels,
        latent_channels=family.latent_channels(config),
        has_posterior=family.latent == "posterior",
        location=location,
        weights=weights,
        sha256=sha256,
        encoder_sha256=encodes,
        likelihood=likelihood,
    )


def load_first_stage(
    location: str,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    ema: bool | None = None,
    dtype: Dtype = "fp32",
) -> FirstStage:
    """Load a first stage.

    Args:
        location: A diffusers folder, a pipeline's folder, a hub id, or a run or checkpoint of this project.
        subfolder: Subfolder that holds the model; a pipeline's first stage is found without it.
        revision: Commit or tag of a hub model.
        variant: Variant of the weight files as diffusers names it (fp16, non_ema, ...).
        ema: Whether to load averaged (True) or raw (False) weights: those of a run or checkpoint, or those in the
            folders and variants of diffusers' scripts (`vae_ema/`, `ema/`, variant non_ema). None loads the averaged
            weights of a run or checkpoint if it has them, and the default weights of other models.
        dtype: Precision of the computations.

    Raises:
        UserError: If there is no such model, or it cannot be read or measured.
    """
    folder = Path(location).expanduser()
    if folder.is_file():
        raise UserError(f"{location} is a file: latent-ae convert {location} OUT writes the folder to give here")
    if folder.exists():
        exported = (folder / "export/config.json").is_file()
        if (ema is not None or not exported) and (checkpoint := checkpoint_at(folder)) is not None:
            return _load_checkpoint(checkpoint, location, ema, dtype)
        if exported and not (folder / "config.json").is_file():
            folder = folder / "export"
        subfolder = _subfolder_in(folder, subfolder, ema, location)
        if ema is False and variant is None:
            variant = "non_ema"
            if not any((folder / (subfolder or "")).glob("*.non_ema.*")):
                raise UserError(f"ema: {location} holds no weights besides those it loads by default (*.non_ema.*)")
        resolved = str(folder)
    elif looks_like_path(location):
        raise UserError(f"no such model folder: {location} (from {Path.cwd()}){made_by(location)}")
    else:
        resolved = location
        subfolder = subfolder or (EMA_FOLDERS[0].format("vae") if ema else None)
        variant = variant or ("non_ema" if ema is False else None)
    model = _from_pretrained(resolved, location, subfolder, revision, variant)
    words = [text for text in (variant and f"variant {variant}", subfolder and f"subfolder {subfolder}") if text]
    holds = Path(resolved) / (subfolder or "")
    if not folder.exists():
        stored = file_on_hub(resolved, f"{subfolder}/{LIKELIHOOD}" if subfolder else LIKELIHOOD, revision)
        holds = stored.parent if stored else holds
    likelihood = read_likelihood(holds)
    weights = ", ".join(words) or "as stored"
    return first_stage(model, location=location, weights=weights, dtype=dtype, likelihood=likelihood)


def load(model: Any, *, device: torch.device | str = "auto", dtype: Dtype = "fp32", **where: Any) -> FirstStage:
    """Load or wrap a first stage in evaluation mode.

    Args:
        model: Run, checkpoint, diffusers folder, pipeline's folder or hub id; or an instance of a known class, or a
            function from (N, C, H, W) images in [-1, 1] to their reconstructions.
        device: Where the model computes; `auto` takes a GPU if there is one.
        dtype: Precision of the computations. An instance of another dtype is copied.
        **where: `subfolder`, `revision`, `variant` and `ema` of `load_first_stage`.

    Returns:
        The first stage; its `encode`, `decode` and `reconstruct` work with images in [-1, 1] and raw latents.

    Raises:
        UserError: If there is no such model, or its class is not known.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(model, (str, Path)):
        stage = load_first_stage(str(model), dtype=dtype, **where)
    else:
        stage = first_stage(model, dtype=dtype)
    if stage.module is not None:
        lay_out(stage.module.to(device), torch.channels_last)
    return stage


def _subfolder_in(folder: Path, subfolder: str | None, ema: bool | None, location: str) -> str | None:
    """Return the subfolder that holds the model; None if the folder itself holds it. Raise UserError if none does."""
    if subfolder is None and not (folder / "config.json").is_file():
        subfolder = next((name for name in PIPELINE_FOLDERS if (folder / name / "config.json").is_file()), None)
    if ema:
        places = [pattern.format(subfolder or "vae") for pattern in EMA_FOLDERS]
        found = next((name for name in places if (folder / name / "config.json").is_file()), None)
        if found is None:
            raise UserError(f"ema: {location} holds no averaged weights (looked for {', '.join(places)})")
        return found
    if not (folder / (subfolder or "") / "config.json").is_file():
        raise UserError(
            f"{location}: no config.json in {subfolder or 'it'}, so this is not a diffusers model folder. "
            "Give the folder that save_pretrained or `latent-ae export` wrote, a pipeline's, or a run's"
        )
    return subfolder


def _from_pretrained(
    resolved: str, location: str, subfolder: str | None, revision: str | None, variant: str | None
) -> nn.Module:
    base = diffusers.AutoencoderKL
    try:
        if subfolder is None and not Path(resolved).exists():
            subfolder = subfolder_on_hub(resolved, PIPELINE_FOLDERS, revision)
        name = base.load_config(resolved, subfolder=subfolder, revision=revision).get("_class_name", "AutoencoderKL")
        if name not in FAMILIES:
            raise UserError(f"{location} holds a {name}, which is not a first stage known here: {', '.join(FAMILIES)}")
        model = whole_model(
            class_of(name), resolved, subfolder=subfolder, revision=revision, variant=variant, torch_dtype=torch.float32
        )
        borrow_(model, lambda: _borrowed_from(resolved, location, subfolder, revision))
        return model
    except UserError:
        raise
    except Exception as error:  # diffusers raises many kinds for a missing, truncated or foreign file
        reason = " ".join(str(error).split())[:400]
        raise UserError(f"cannot load a first stage from {location}: {reason}") from error


def _only_variant(folder: Path) -> str | None:
    """Return the variant of a folder's weights, such as fp16, if it has that one alone; else None."""
    names = [match for path in folder.iterdir() if (match := WEIGHTS.fullmatch(path.name))]
    variants = {match["variant"] for match in names}
    return variants.pop() if len(variants) == 1 else None


def whole_model(kind: Any, location: str | Path, **words: Any) -> nn.Module:
    """Load a model with its `from_pretrained`, which by itself makes up weights that the files lack.

    Args:
        kind: The class, a ModelMixin.
        location: Its folder or hub id.
        **words: Further arguments of `from_pretrained`.

    Raises:
        ValueError: If weights are missing.
        Exception: What diffusers raises for files that cannot be read.
    """
    place = Path(location) / (words.get("subfolder") or "")
    if words.get("variant") is None and place.is_dir() and (variant := _only_variant(place)) is not None:
        print(f"{place} has weights of the variant {variant} only: loading these", file=sys.stderr)
        words["variant"] = variant
    model, loaded = kind.from_pretrained(location, output_loading_info=True, **words)
    # those that follow from the config, or have no effect
    missing = [key for key in loaded["missing_keys"] if not FROM_CONFIG.fullmatch(key)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"its files lack the weights {missing[0]}{more}, which its config.json asks for")
    whole: nn.Module = model
    return whole


def _load_checkpoint(folder: Path, location: str, ema: bool | None, dtype: Dtype) -> FirstStage:
    """Return the first stage in a training checkpoint, with averaged or raw weights."""
    has_average = (folder / "ema.safetensors").is_file()
    if ema and not has_average:
        raise UserError(f"ema: {folder} was trained without an average; give ema=false or leave it out")
    averaged = has_average and ema is not False
    path = folder / ("ema.safetensors" if averaged else "autoencoder.safetensors")
    try:
        model = untrained(config_of(folder))
        model.load_state_dict(load_file(path))
        borrow_(model, lambda: borrowed_from(folder))
    except UserError:
        raise
    except Exception as error:  # diffusers and safetensors raise many kinds for a damaged or foreign file
        raise UserError(f"cannot load {path}: {' '.join(str(error).split())[:400]}") from error
    which = "averaged" if averaged else "raw"
    weights = f"{which}, {folder.name}"
    return first_stage(model, location=location, weights=weights, dtype=dtype, likelihood=read_likelihood(folder))


def borrowed_from(checkpoint: Path) -> nn.Module:
    """Return the first stage with which a checkpoint's AutoencoderTiny encodes. Raises UserError if there is none."""
    return _borrowed_from(str(checkpoint), str(checkpoint), None, None)


def _borrowed_from(resolved: str, location: str, subfolder: str | None, revision: str | None) -> nn.Module:
    place = f"{subfolder}/{FOLDER}" if subfolder else FOLDER
    name = f"{location}/{place}"
    if Path(resolved).exists():
        if not (Path(resolved) / place / "config.json").is_file():
            raise UserError(f"{location}: its own encoder is zero, and the one that encodes is missing ({name})")
        # given the subfolder of a local folder, diffusers prefers the weights above it
        return _from_pretrained(f"{resolved}/{place}", name, None, revision, None)
    return _from_pretrained(resolved, name, place, revision, None)


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters()) + borrowed_parameters(module)


def _in(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return the module if it has the dtype, else a copy that has it: the caller's module does not change."""
    if all(parameter.dtype == dtype for parameter in module.parameters()):
        return module
    return copy.deepcopy(module).to(dtype)


def _sha256(module: nn.Module) -> str:
    digest = hashlib.sha256(type(module).__name__.encode())
    config = {key: value for key, value in dict(module.config).items() if not key.startswith("_")}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    if (borrowed := borrowed_encoder(module)) is not None:
        digest.update(_sha256(borrowed.original).encode())
    return digest.hexdigest()
