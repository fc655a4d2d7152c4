"""Writes the folder that stock diffusers loads, with measured latent statistics and a model card, and checks it."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import load_file, save_file
from torch import Tensor

from latent_ae.arithmetic import float32_arithmetic
from latent_ae.config import UserError
from latent_ae.export.model_card import CardFacts, loading_lines, model_card
from latent_ae.export.pipelines import PipelineName, refuse_misfit, remarks
from latent_ae.export.precision import probe_precision, probe_tiling
from latent_ae.files import write_json, writing
from latent_ae.latents.statistics import LatentStatistics
from latent_ae.models.borrowed_encoder import FOLDER, BorrowedEncoder, borrowed_encoder, save_borrowed
from latent_ae.models.build import count_parameters
from latent_ae.models.density import FOLDER as DENSITY
from latent_ae.models.discriminator import FILE as DISCRIMINATOR
from latent_ae.models.discriminator import Discriminator, save_network
from latent_ae.models.label_model import FOLDER as LABEL_MODEL
from latent_ae.models.likelihood import FILE, Likelihood
from latent_ae.models.reconstruct import Reconstructor
from latent_ae.models.registry import family_of, module_of
from latent_ae.progress import now

__all__ = ["CardFacts", "export_autoencoder", "loading_lines", "push_to_hub", "verify_export"]

TOLERANCE = 1e-5
"""Largest difference, in [-1, 1], between the trained model's reconstruction and the exported one's."""
ROUNDINGS = 10.0
"""Largest difference where that is larger, in changes that the last bits of the images bring about."""

WRITTEN = re.compile(
    rf"config\.json|README\.md|diffusion_pytorch_model[.-].*|{re.escape(FILE)}|{re.escape(DISCRIMINATOR)}|"
    rf"{FOLDER}|{LABEL_MODEL}|{DENSITY}"
)
"""Names of what an export holds; a folder with anything else is not replaced."""
STD_EPSILON = 1e-5
"""RAE adds it to the variance, and AutoencoderRAE to the deviation."""
TILES_ON_CPU_PX = 512
"""Largest tile that is tried on a CPU: decoding an image of larger ones whole takes minutes and many gigabytes."""

# The fresh process knows nothing of this project: it is what a user of the folder has.
FRESH_PROCESS = """
import importlib
import sys
import torch
from safetensors.torch import load_file, save_file

folder, module, kind, encode, decode, images, result, threads, device = sys.argv[1:]
torch.set_num_threads(int(threads))
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.deterministic = True
kind = getattr(importlib.import_module(module), kind)
vae = kind.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True).eval().to(device)


def reconstructed(images):
    z = eval(encode, {"vae": vae, "images": images, "torch": torch})
    return eval(decode, {"vae": vae, "z": z, "torch": torch})


with torch.no_grad():
    rows = [reconstructed(image[None].to(device)) for image in load_file(images)["images"]]
save_file({"images": torch.cat(rows).cpu().contiguous()}, result)  # AutoencoderDC gives channels-last
if module == "diffusers":
    assert not any(name.startswith("latent_ae") for name in sys.modules), "the check must not see this project"
"""


def export_autoencoder(
    autoencoder: ModelMixin,
    folder: str | Path,
    *,
    statistics: LatentStatistics,
    sample_size: int,
    card: CardFacts,
    check_images: Tensor,
    keep_scaling: bool = False,
    pipeline: PipelineName | None = None,
    latents_mean_std: bool = False,
    likelihood: Likelihood | None = None,
    discriminator: Discriminator | None = None,
    companions: Mapping[str, ModelMixin] | None = None,
) -> dict[str, Any]:
    """Write an export: config.json, diffusion_pytorch_model.safetensors (float32) and README.md.

    The config carries the measured scaling_factor and shift_factor, sample_size, and the force_upcast that a trial of
    `check_images` in half precision gives. Everything is written beside `folder` and checked there by `verify_export`
    before it replaces an older export, so a failed export leaves the older one whole. The model passed in is left
    unchanged.

    Args:
        autoencoder: The trained model, of a supported diffusers class.
        folder: The folder to write; it must be new, empty or an export.
        statistics: Statistics of the raw latents, from which the scaling is taken.
        sample_size: Side of the training images, px.
        card: Facts for the model card.
        check_images: (N, C, H, W) float in [-1, 1], sides multiples of the downsampling factor.
        keep_scaling: Keep the scaling in the autoencoder's config. This is right if only the decoder was trained,
            because diffusion models of these latents know them scaled so.
        pipeline: Family of pipelines that must be able to use the model; None checks none.
        latents_mean_std: Write latents_mean and latents_std of each channel, with a scaling_factor of 1 and a
            shift_factor of 0: each channel of (z - latents_mean) / latents_std has unit variance. A class whose config
            has no scaling_factor beside them always gets them, unless its scaling is kept.
        likelihood: The likelihood that the model was trained with, written as likelihood.json; None writes none.
        discriminator: The discriminator that the model was trained against, written as discriminator.safetensors with
            its shape in the metadata; diffusers ignores the file. None writes none.
        companions: Networks that were trained with the model and are no part of it, by the folder into which each is
            written: `label_model`, `density`.

    Returns:
        What was written, JSON-ready. "remarks" says what is not ideal for `pipeline`.

    Raises:
        UserError: If `folder` holds something else or cannot be written, the latents cannot be scaled, or `pipeline`
            cannot use the model.
        RuntimeError: If the check fails.
    """
    if latents_mean_std and keep_scaling:
        raise UserError("latents_mean and latents_std cannot be measured again if the latents keep their scaling")
    folder = Path(os.path.abspath(Path(folder).expanduser()))
    refuse_foreign(folder)
    exported = _twin(autoencoder)
    config = exported.config
    measured: dict[str, Any] = {"sample_size": sample_size}
    if keep_scaling:
        measured["shift_factor"] = config.get("shift_factor") or 0.0  # pipelines that read it fail on null
    else:
        measured |= {"scaling_factor": statistics.scaling_factor, "shift_factor": statistics.shift_factor}
        # a loaded config may carry those of other latents, which some pipelines would apply
        measured |= {"latents_mean": None, "latents_std": None}
    # no class has all of these keys
    by_positions = family_of(exported).scaled_by_positions and not keep_scaling
    if by_positions:
        _normalise_positions(exported, statistics)
    else:
        exported.register_to_config(**{key: value for key, value in measured.items() if key in config})
    if family_of(exported).scaled_by_patches and not keep_scaling:
        _normalise_patches(exported, statistics)
    # some classes know no other scaling
    if latents_mean_std and by_positions:
        kind = type(exported).__name__
        raise UserError(f"a {kind} scales each value of its latents already: leave --latents-mean-std out")
    per_channel = latents_mean_std or (not keep_scaling and "latents_mean" in config and "scaling_factor" not in config)
    if per_channel:
        _normalise_channels(exported, statistics)
    if pipeline is not None:
        refuse_misfit(pipeline, exported.config, type(exported).__name__)
    precision = _tried(exported, check_images, autoencoder.device)
    if precision is not None:
        exported.register_to_config(force_upcast=precision["force_upcast"])
    facts = {
        "folder": str(folder),
        "class": type(exported).__name__,
        "scaling_factor": exported.config.get("scaling_factor"),
        "shift_factor": exported.config.get("shift_factor"),
        "sample_size": sample_size,
        **({key: exported.config[key] for key in ("latents_mean", "latents_std")} if per_channel else {}),
        "parameters": count_parameters(exported),
        "precision": precision,
    }
    if discriminator is not None:
        facts["discriminator"] = discriminator.shape
    companions = companions or {}
    for name, network in companions.items():
        facts[name] = {"class": type(network).__name__, "parameters": count_parameters(network)}
    if pipeline is not None:
        facts["pipeline"] = pipeline
        facts["remarks"] = remarks(pipeline, exported.config, statistics.mean, statistics.std)
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            fresh = Path(scratch) / "export"
            exported.save_pretrained(fresh, safe_serialization=True)
            save_borrowed(exported, fresh)
            if discriminator is not None:
                save_network(discriminator, fresh / DISCRIMINATOR)
            for name, network in companions.items():
                network.save_pretrained(fresh / name, safe_serialization=True)
            for file in fresh.rglob("*.safetensors"):
                shutil.copymode(fresh / "config.json", file)  # safetensors writes for the owner's eyes only
            difference = verify_export(fresh, autoencoder, check_images, autoencoder.device)
            facts["max_abs_difference"] = difference
            location = card.hub_id or folder.name
            text = model_card(exported, card, statistics, location, difference, precision, discriminator, companions)
            text.save(fresh / "README.md")
            if likelihood is not None:
                write_json(fresh / FILE, likelihood._asdict())
            take_place(fresh, folder, Path(scratch) / "previous")
    return facts


def verify_export(
    folder: str | Path, autoencoder: ModelMixin, images: Tensor, device: torch.device | str = "cpu"
) -> float:
    """Load an export with stock diffusers in a fresh process and compare its reconstructions with the trained model's.

    Both sides decode the posterior's mode, one image at a time, in float32 (not TF32). The fresh process gets the
    latents if another first stage encodes (`BorrowedEncoder`). If the check fails on another device it is repeated on
    the CPU, where the arithmetic is the same on both sides: the device may lack memory for two processes, or choose
    other kernels in the second one.

    Args:
        folder: The export.
        autoencoder: The trained model.
        images: (N, C, H, W) float in [-1, 1], sides multiples of the downsampling factor.
        device: Where both models run.

    Returns:
        The largest absolute difference of the reconstructions, images in [-1, 1].

    Raises:
        RuntimeError: If the difference is above 1e-5 and above ten times what the last bits of the images change, a
            reconstruction is not finite, or the folder does not load.
    """
    place = torch.device(device)
    now(f"check of the export in a fresh process, on {len(images)} images ({place})")
    if place.type == "cpu":
        return _largest_difference(Path(folder), autoencoder, images, place)
    try:
        if place.type == "cuda":
            torch.cuda.empty_cache()  # the other process needs some, too
        return _largest_difference(Path(folder), autoencoder, images, place)
    except RuntimeError as error:
        print(f"the check does not pass on {place}: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        return verify_export(folder, autoencoder, images)


def _largest_difference(folder: Path, autoencoder: ModelMixin, images: Tensor, device: torch.device) -> float:
    given = images = images.detach().to("cpu", torch.float32).contiguous()
    trained = Reconstructor(_twin(autoencoder)).to(device)
    with torch.no_grad(), torch.autocast(device.type, enabled=False), float32_arithmetic(repeatable=True):
        passes = [trained(image[None].to(device)) for image in images]
        expected = torch.cat([done.image.cpu() for done in passes])
        if borrowed_encoder(trained.autoencoder) is not None:  # the folder's own encoder is zero
            images = torch.cat([done.latent.cpu() for done in passes]).contiguous()
    if not expected.isfinite().all():
        raise RuntimeError("the trained model itself reconstructs images with NaN or infinity; export an earlier one")
    actual = _reconstruct_in_fresh_process(folder, trained.autoencoder, images, device)
    if actual.shape != expected.shape:
        raise RuntimeError(
            f"the exported model in {folder} gives images of {tuple(actual.shape)}, "
            f"the trained one {tuple(expected.shape)}"
        )
    difference, allowed = float((actual - expected).abs().max()), TOLERANCE
    if difference > TOLERANCE:  # as few models do: how much of it may be rounding?
        with torch.no_grad(), torch.autocast(device.type, enabled=False), float32_arithmetic(repeatable=True):
            moved = [trained(torch.nextafter(image, -image)[None].to(device)).image.cpu() for image in given]
        allowed = max(TOLERANCE, ROUNDINGS * float((torch.cat(moved) - expected).abs().max()))
    if not difference <= allowed:  # also when it is nan
        raise RuntimeError(
            f"the exported model in {folder} does not reconstruct like the trained one: they differ by up to "
            f"{difference:.3g} (allowed: {allowed:.3g}, images in [-1, 1])"
        )
    return difference


def push_to_hub(folder: str | Path, repo_id: str, *, token: str | None = None, private: bool = False) -> str:
    """Upload an exported folder to the Hugging Face hub. The folder stays as it is, so a failed upload can be repeated.

    Args:
        folder: The export.
        repo_id: `user/name` on the hub.
        token: Access token; None takes the stored one.
        private: Create a private repository.

    Returns:
        The address of the repository.

    Raises:
        UserError: If the folder is no export or the upload fails.
    """
    folder = Path(folder).expanduser()
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json, so it is not an export; `latent-ae export` writes one")
    try:
        return _upload(HfApi(token=token), folder, repo_id, private)
    except Exception as error:  # the hub's client raises its HTTP library's own kinds, which differ by version
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(
            f"cannot upload {folder} to {repo_id}: {reason}. The export is complete on this machine; check the "
            f"network, the token (`hf auth login`) and the name, then: hf upload {repo_id} {shlex.quote(str(folder))}"
        ) from error


def check_upload(repo_id: str) -> None:
    """Check that this user may upload to `repo_id`, without changing anything on the hub.

    Raises:
        UserError: If the hub cannot be reached or refuses, or the token may not write there.
    """
    owner = repo_id.partition("/")[0] if "/" in repo_id else None
    try:
        validate_repo_id(repo_id)
        user = HfApi().whoami()
    except Exception as error:  # no network, offline mode, no token, an expired one, no such name
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"push_to_hub: nothing can be uploaded to {repo_id}: {reason}. Log in with `hf auth login` on a machine "
            "that reaches the hub, or leave push_to_hub out and upload the export later"
        ) from error
    owners = [user["name"], *(group["name"] for group in user.get("orgs") or [])]
    if owner is not None and owner not in owners:
        raise UserError(f"push_to_hub: {repo_id} does not belong to {', '.join(owners)}, whose token this is")
    if ((user.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise UserError(f"push_to_hub: the token of {user['name']} may only read; make one that may write")


def _twin(autoencoder: ModelMixin) -> ModelMixin:
    """Return a copy of the model: float32 on the CPU, in evaluation mode, in the plain memory format."""
    # without the path from which the weights were once loaded, which means nothing elsewhere
    config = {key: value for key, value in autoencoder.config.items() if key != "_name_or_path"}
    # without memory, except for classes that make buffers which are not saved with the weights
    saved = autoencoder.state_dict().keys()
    place = "meta" if all(name in saved for name, _ in autoencoder.named_buffers()) else "cpu"
    with torch.device(place), torch.random.fork_rng(devices=[]):
        twin = type(autoencoder).from_config(config)
    # plain strides, as in a file: a 1x1 kernel in channels-last is "contiguous" either way, and would choose
    # another convolution algorithm
    state = {
        name: torch.empty(tensor.shape, dtype=torch.float32 if tensor.is_floating_point() else tensor.dtype).copy_(
            tensor.detach()
        )
        for name, tensor in autoencoder.state_dict().items()
    }
    twin.load_state_dict(state, assign=True)
    if (borrowed := borrowed_encoder(autoencoder)) is not None:
        twin.encoder = BorrowedEncoder(_twin(borrowed.original), borrowed.zeros)
    return twin.eval().requires_grad_(False)


def _normalise_channels(autoencoder: ModelMixin, statistics: LatentStatistics) -> None:
    """Write latents_mean and latents_std of each channel, and a scaling beside them that changes nothing."""
    if "latents_mean" not in autoencoder.config:
        kind = type(autoencoder).__name__
        raise UserError(f"{kind} has no latents_mean and latents_std in its config: leave --latents-mean-std out")
    if 0.0 in statistics.channel_std:
        flat = statistics.channel_std.index(0.0)
        raise UserError(
            f"channel {flat} of the latents is constant, its latents_std would be 0: leave --latents-mean-std out"
        )
    neutral = {"scaling_factor": 1.0, "shift_factor": 0.0}
    autoencoder.register_to_config(
        latents_mean=statistics.channel_mean,
        latents_std=statistics.channel_std,
        **{key: value for key, value in neutral.items() if key in autoencoder.config},
    )


def _normalise_positions(autoencoder: ModelMixin, statistics: LatentStatistics) -> None:
    """Write mean and deviation of each value of a latent into the config and the buffers with which the class computes.

    RAE divides by sqrt(var + 1e-5) (bytetriper/RAE `src/stage1/rae.py`), and AutoencoderRAE by std + 1e-5.
    """
    positions = statistics.positions
    # what was measured has passed the class's own scaling, which divides by 1 + 1e-5 even where it knows no statistics
    scale = (autoencoder._latents_std.double() + STD_EPSILON) / autoencoder.config.scaling_factor
    mean = (positions.mean * scale + autoencoder._latents_mean.double()).float()
    std = ((positions.variance * scale.square() + STD_EPSILON).sqrt() - STD_EPSILON).float()
    autoencoder.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist(), scaling_factor=1.0)
    autoencoder._latents_mean, autoencoder._latents_std = mean, std


def _normalise_patches(autoencoder: ModelMixin, statistics: LatentStatistics) -> None:
    """Write the scaling of Flux.2: batch norm statistics for each channel and place in a patch of 2 x 2 latents.

    Each place gets the statistics of its channel, because latents have the same distribution everywhere.
    """
    places = autoencoder.bn.num_features // len(statistics.channel_mean)
    mean, std = torch.tensor(statistics.channel_mean), torch.tensor(statistics.channel_std)
    autoencoder.bn.running_mean.copy_(mean.repeat_interleave(places))
    autoencoder.bn.running_var.copy_(std.square().repeat_interleave(places))


def _tried(autoencoder: ModelMixin, images: Tensor, device: torch.device) -> dict[str, Any] | None:
    """Return the result of the trials in half precision and in tiles; None for a class that is not tried."""
    if not family_of(autoencoder).tried_in_half_precision:
        return None
    try:
        result = probe_precision(autoencoder, images, device)
    except torch.OutOfMemoryError:  # the training may still hold the memory
        return _tried(autoencoder, images[:1], torch.device("cpu"))
    if device.type == "cpu" and autoencoder.config.sample_size > TILES_ON_CPU_PX:
        return result
    now("trial in tiles")
    try:
        return result | {"tiling": probe_tiling(autoencoder, images[0], device)}
    except torch.OutOfMemoryError as error:
        print(f"decoding in tiles was not tried: {' '.join(str(error).split())[:200]}", file=sys.stderr)
        return result


def refuse_foreign(folder: Path) -> None:
    """Raise UserError if `folder` holds something that an export may not replace."""
    if folder.is_file():
        raise UserError(f"{folder} exists and is not an export; give a new or empty folder")
    if folder.is_dir() and (os.path.ismount(folder) or folder.resolve() == Path.cwd()):
        what = "a mount point" if os.path.ismount(folder) else "the folder in which this command runs"
        raise UserError(f"{folder} is {what}, which an export cannot take the place of; give a folder in it")
    entries = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if entries and "config.json" not in entries:
        raise UserError(f"{folder} exists and is not an export; give a new or empty folder")
    if foreign := [name for name in entries if not WRITTEN.fullmatch(name)]:
        raise UserError(
            f"{folder} holds {foreign[0]}, which no export has and a new one would delete: move it, or give a new or "
            "empty folder"
        )


def take_place(fresh: Path, folder: Path, previous: Path) -> None:
    """Put `fresh` in the place of `folder` by two renames; a failure of the second one undoes the first."""
    had_previous = folder.exists()
    if had_previous:
        os.replace(folder, previous)
    try:
        os.replace(fresh, folder)
    except BaseException:
        if had_previous:
            os.replace(previous, folder)
        raise


def _reconstruct_in_fresh_process(
    folder: Path, autoencoder: ModelMixin, images: Tensor, device: torch.device
) -> Tensor:
    family, kind = family_of(autoencoder), type(autoencoder).__name__
    # the lines of the model card, with the mode in place of a sample
    lines = [family.encoded.replace("latent_dist.sample()", "latent_dist.mode()"), family.decoded]
    if borrowed_encoder(autoencoder) is not None:
        lines[0] = "images"  # latents
    with tempfile.TemporaryDirectory() as scratch:
        inputs, result = Path(scratch) / "images.safetensors", Path(scratch) / "result.safetensors"
        save_file({"images": images}, inputs)
        words = [str(folder.resolve()), module_of(kind), kind, *lines, str(inputs), str(result)]
        words += [str(torch.get_num_threads()), str(device)]
        # offline, because the folder must be enough
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", FRESH_PROCESS, *words],
            cwd=scratch,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
        )
        if done.returncode != 0:
            tail = "\n".join(done.stderr.strip().splitlines()[-5:])
            raise RuntimeError(f"stock diffusers cannot load the exported model in {folder}:\n{tail}")
        return load_file(result)["images"]


def _upload(api: HfApi, folder: Path, repo_id: str, private: bool) -> str:
    address = api.create_repo(repo_id, private=private, exist_ok=True)
    api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message="Upload first stage")
    return str(address)
