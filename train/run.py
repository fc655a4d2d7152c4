"""The run folder: its lock, changes of settings since its checkpoint, and truncation of its log to the checkpoint."""

import itertools
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from latent_ae.config import UserError, resume_marks, to_yaml, validated
from latent_ae.files import replacing, writing
from latent_ae.objectives.gan import shape_of
from latent_ae.only_writer import only_writer
from latent_ae.provenance import versions

from .agreement import Agreed
from .checkpoint import Checkpoint, set_damaged_aside
from .phases import Phase
from .settings import TrainSettings, micro_batch_of


@contextmanager
def only_training_in(run: Path, accelerator: Accelerator) -> Iterator[None]:
    """Keep other trainings out of the run folder during the block. Every process calls this.

    Raises:
        UserError: On all processes, if another training writes into it.
    """
    with ExitStack() as stack:
        with Agreed(accelerator):
            if accelerator.is_main_process:
                refusal = (
                    f"output_dir: another training is writing into {run}; wait for it, end it, or give another folder"
                )
                stack.enter_context(only_writer(run / ".lock", refusal))
        yield


def changes_since(checkpoint: Checkpoint, settings: TrainSettings, phase: Phase | None = None) -> dict[str, list[Any]]:
    """Compare settings, processes and versions with those that wrote the checkpoint.

    Args:
        checkpoint: The checkpoint.
        settings: The settings of the run now.
        phase: The phase of a run in phases to which the settings belong.

    Returns:
        What has changed, {name: [before, now]}.

    Raises:
        UserError: If a setting that may not change has changed; the message names the keys and how to start a new
            phase.
    """
    state = checkpoint.state()
    batch_size, processes = settings.batch_size, state["num_processes"]
    try:
        before = flatten(state["settings"])
        micro_batch = micro_batch_of(batch_size, processes, before["micro_batch_size"])
        accumulation = batch_size // (processes * micro_batch)
        trained = before["gan.weight"] and checkpoint.step > before["gan.start"]
    except (KeyError, TypeError, ZeroDivisionError, RecursionError) as error:
        raise UserError(f"{checkpoint.folder}/state.json does not hold the settings of a run: {error}") from error
    now = flatten(settings.model_dump(mode="json", by_alias=True))
    if phase is not None and "init_from" in phase.implied:
        before["init_from"] = now["init_from"]  # the phase before, wherever the run's folder lies by now
    marks = resume_marks(TrainSettings)
    differing = [key for key in now if key in before and before[key] != now[key]]
    changed = [key for key in differing if mark_of(key, marks) != "silent"]
    refused = [key for key in changed if _is_fixed(key, mark_of(key, marks), before, now)]
    run = checkpoint.folder.parent.parent
    if refused:
        lines = "\n".join(f"  {key}: {before[key]} in {checkpoint.folder.name}, now {now[key]}" for key in refused)
        if phase is not None and not phase.alone:
            raise UserError(
                f"{run} was begun with another recipe:\n{lines}\n"
                "Restore these settings to go on, or choose another output_dir to train all phases anew"
            )
        raise UserError(
            f"{run} holds a run with another recipe:\n{lines}\n"
            "Restore these settings to resume it. Or start a new phase from its weights: give the same command "
            f"with\n  {' '.join(_new_phase(run, trained, state['settings'], settings, refused))}"
        )
    fresh = now["gan.weight"] and not trained and now["gan.init_from"] is None
    if fresh and now["gan.start"] < checkpoint.step:
        raise UserError(
            f"gan.start: {now['gan.start']:,} is before step {checkpoint.step:,}, from which the run goes on, and its "
            "discriminator has not trained: it would act untrained and without warm-up. Set "
            f"gan.start={checkpoint.step} or later"
        )
    split: dict[str, tuple[Any, Any]] = {
        "processes": (processes, settings.processes),
        "micro_batch_size": (micro_batch, settings.micro_batch),
        "accumulation": (accumulation, settings.accumulation),
    }
    installed = versions()
    split |= {f"version of {name}": (state["versions"].get(name), installed[name]) for name in installed}
    return {key: [before[key], now[key]] for key in changed} | {
        name: [then, today] for name, (then, today) in split.items() if then != today
    }


def _new_phase(
    run: Path, trained: bool, old: Mapping[str, Any], settings: TrainSettings, refused: Sequence[str]
) -> list[str]:
    """Return the words that start a run from this one's weights, and from its trained discriminator if it fits."""
    before = flatten(dict(old))
    folder = next(name for number in itertools.count(2) if not os.path.exists(name := f"{run}-{number}"))
    words = [f"output_dir={folder}", f"init_from={run}"]
    if any(key.startswith("model.") for key in refused):
        words.append("model={}")
    decoder = settings.decoder
    if decoder.wanted:
        shape = flatten(decoder.model_dump(mode="json", exclude={"latents"}), "decoder.")
        if all(before.get(key) == value for key, value in shape.items()):
            # the trained decoder stays; with decoder.* it would be replaced by a fresh one
            words += ["decoder={}", "train=decoder"]
            words += [f"decoder.latents={decoder.latents}"] if decoder.latents is not None else []
        elif before.get("decoder.kind") is not None:  # which is the class of the run's first stage by now
            words.append("decoder.kind=null")
    then = validated(TrainSettings, dict(old))[0]
    if then is not None and then.layerwise and settings.optim.layerwise is None:
        words += ["optim.layerwise=true"] if settings.optim.kind == "adamw" and not decoder.wanted else []
    if trained and settings.gan.weight and not shape_of(settings).keys() & set(refused):
        words += [f"gan.init_from={run}", "gan.start=0"]
    return [shlex.quote(word) for word in words]


def write_config(phase: Phase) -> None:
    """Make the folder of a run and of its phase, each with its config.yaml. One process calls this.

    Raises:
        UserError: If they cannot be written.
    """
    for run, settings in {phase.whole: phase.recipe, phase.folder: phase.settings}.items():
        with writing(run):
            run.mkdir(parents=True, exist_ok=True)
        with replacing(run / "config.yaml") as part:
            part.write_text(to_yaml(settings), encoding="utf-8")


def cut_back(run: Path, step: int) -> None:
    """Truncate the run folder to the step of its checkpoint. One process calls this.

    Later lines of the log move to log.previous.jsonl, and previews of later steps are removed, because those steps are
    run again. An existing results.json is set aside.

    Args:
        run: The run folder.
        step: Step of the checkpoint; -1 if there is none.

    Raises:
        UserError: If the log cannot be written.
    """
    set_damaged_aside(run, step)
    log, kept, later = run / "log.jsonl", "", ""
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if log.is_file() else []:
        at = _step_of(line)
        if at is None or at > step:
            later += line.rstrip("\n") + "\n"
        else:
            kept += line
    if later:
        previous = run / "log.previous.jsonl"
        with writing(previous), open(previous, "a", encoding="utf-8") as stream:
            stream.write(later)
        with replacing(log) as part:
            part.write_text(kept, encoding="utf-8")
    for picture in (run / "previews").glob("step-*.png"):
        number = picture.stem.removeprefix("step-")
        if number.isdigit() and int(number) > step:
            picture.unlink()
    set_results_aside(run)


def set_results_aside(run: Path) -> None:
    """Rename results.json to results.previous.json: only a finished run has results.json."""
    if (results := run / "results.json").is_file():
        results.replace(run / "results.previous.json")


def _step_of(line: str) -> int | None:
    """Return the step of a line of log.jsonl; None for a line that was cut short when the process was killed."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one dict by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def mark_of(key: str, marks: Mapping[str, str]) -> str:
    """Return the mark of a setting; a key inside a field that holds a dictionary has the mark of that field."""
    while key not in marks:
        key = key.rpartition(".")[0]
    return marks[key]


def _is_fixed(key: str, mark: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    if mark == "switch":
        return bool(before[key]) != bool(now[key])
    fixed, _, other = mark.partition(" with ")
    return fixed == "fixed" and (not other or bool(now[f"{key.rpartition('.')[0]}.{other}"]))
