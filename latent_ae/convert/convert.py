"""Converts a first stage from one layout into another.

from latent_ae.convert.convert import convert_first_stage
convert_first_stage("ae.safetensors", "flux-vae", ConvertSettings(scaling_factor=0.3611, shift_factor=0.1159))
convert_first_stage("runs/mine", "vae.safetensors", to="ldm")
"""

from pathlib import Path
from typing import Any

from latent_ae.config import UserError
from latent_ae.convert import scaling
from latent_ae.convert.checkpoint import PICKLED, dtypes_of
from latent_ae.convert.read import FirstStage, build, read_first_stage
from latent_ae.convert.registry import LAYOUTS, WRITTEN
from latent_ae.convert.settings import MEASURING, ConvertSettings
from latent_ae.convert.write import in_float32, write_files, write_folder
from latent_ae.data.settings import without_section
from latent_ae.distributed import refuse_several_processes
from latent_ae.export.pipelines import PIPELINES, before_measuring, refuse_misfit
from latent_ae.progress import now


def convert_first_stage(
    source: str | Path,
    out: str | Path,
    settings: ConvertSettings | None = None,
    *,
    to: str | None = None,
    encoder: str | Path | None = None,
    statistics: str | Path | None = None,
    measure: str | None = None,
    pipeline: Any = None,
) -> dict[str, Any]:
    """Convert a first stage, read the result again and compare it with the source.

    Args:
        source: A file of weights of a known layout, a diffusers folder, a pipeline's folder or a run of this project.
        out: The folder to write, or with `to` the file; nothing is overwritten.
        settings: The facts that no shape tells.
        to: Layout of the file to write, one of `WRITTEN`. None writes a folder.
        encoder: File or folder of the encoder, if `source` holds only the decoder.
        statistics: File of the tensors mean and std (or var) by which latents are scaled.
        measure: Images on which scaling and shift are measured, like DATA on the command line.
        pipeline: A family of diffusers pipelines, a key of PIPELINES, that must be able to use the result.

    Returns:
        A description of the result, JSON-ready. "max_abs_difference" holds the differences of all tensors and of the
        reconstruction of a test image in [-1, 1]; both are 0 if the copy is exact.

    Raises:
        UserError: If the source is not known or not complete, no class of diffusers (or no file of the layout `to`)
            can hold it, the scaling is not known or unusable, `pipeline` is not known, several processes were
            launched, or `out` exists or cannot be written.
    """
    refuse_several_processes("convert")
    if pipeline is not None and pipeline not in PIPELINES:
        raise UserError(f"pipeline: there is no family {pipeline!r}; known are {', '.join(PIPELINES)}")
    settings, source, out = settings or ConvertSettings(), Path(source).expanduser(), Path(out).expanduser()
    _refuse_words(source, out, settings, to, statistics, measure)
    now(f"reading {source}")
    stage = read_first_stage(source, settings, None if encoder is None else Path(encoder).expanduser())
    model: Any = build(stage, source)
    if pipeline is not None:  # before anything is measured
        known = before_measuring(model.config, keep_scaling=False, latents_mean_std=False)
        refuse_misfit(pipeline, known, stage.kind)
    found = scaling.Scaling({}, "")
    if to is None:
        found = _scaling(stage, model, settings, statistics, measure, source)
        scaling.refuse_unusable(found)
        scaling.apply(model, found)
    if pipeline is not None:
        refuse_misfit(pipeline, model.config, stage.kind)
    if to is None:
        written, difference = [str(out)], write_folder(model, stage, out)
    else:
        written, difference = write_files(model, stage, out, to)
    return {
        "from": stage.layout,
        "to": to or "diffusers",
        "class": stage.kind,
        "written": written,
        "weights": stage.weights,
        "parameters": sum(tensor.numel() for tensor in model.parameters()),
        "dtype": dtypes_of(stage.state),
        "scaling": found.source or None,
        "config": {key: value for key, value in model.config.items() if not key.startswith("_")},
        "max_abs_difference": difference,
    }


def _scaling(
    stage: FirstStage,
    model: Any,
    settings: ConvertSettings,
    statistics: str | Path | None,
    measure: str | None,
    source: Path,
) -> scaling.Scaling:
    """Return the scaling. Raise UserError if no source gives it, or the user gives two."""
    layout = LAYOUTS[stage.layout]
    said = scaling.said(settings, model)
    if sum(given is not None for given in (said, statistics, measure)) > 1:
        raise UserError("scaling is given twice: take one of scaling_factor=..., --statistics and --measure")
    if said is not None:
        return said
    if statistics is not None:
        return scaling.read_statistics(Path(statistics).expanduser(), model.config)
    if measure is not None and stage.kind == "AutoencoderKLFlux2":
        raise UserError("--measure: the latents of FLUX.2 are scaled by the batch norm in the file; leave it out")
    if measure is not None:
        try:
            found = scaling.measured(in_float32(model), measure, layout.factor(stage.config), settings)
        except UserError as error:  # the settings have other names in training
            raise UserError(without_section(str(error))) from error
        return scaling.measured_scaling(found, model.config, measure)
    if stage.kept is None:
        raise UserError(scaling.question(stage.layout, model.config, layout.factor(stage.config), source))
    return stage.kept._replace(config={key: value for key, value in stage.kept.config.items() if key in model.config})


def _refuse_words(
    source: Path, out: Path, settings: ConvertSettings, to: str | None, statistics: Any, measure: str | None
) -> None:
    """Raise UserError if the arguments contradict each other, or `out` exists or is of the wrong kind."""
    layouts = "|".join(WRITTEN)
    if source.is_dir() and to is None:
        raise UserError(f"{source} is a folder already; name the layout of the file to write: --to {layouts}")
    idle = [key for key in MEASURING if key in settings.model_fields_set]
    if measure is None and idle:
        raise UserError(f"{idle[0]}: nothing is measured; leave it out, or give --measure DATA")
    if to is not None and (measure or statistics or any(getattr(settings, key) is not None for key in scaling.KEYS)):
        raise UserError("a file of an original layout holds no scaling; leave the words about scaling out")
    is_file = out.suffix in (".safetensors", *PICKLED)
    if to is None and is_file:
        raise UserError(f"{out} is the name of a file: give a new folder, or the layout of the file, --to {layouts}")
    if to is not None and not is_file:
        raise UserError(f"{out}: the file that --to {to} writes ends in .safetensors, or in {', '.join(PICKLED)}")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} exists; give a new name, so that nothing is overwritten")
