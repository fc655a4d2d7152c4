"""The folder of a run in phases: what may lie there already, and what the whole run shows of its phases."""

import json
import os
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from latent_ae.config import UserError
from latent_ae.export.write import refuse_foreign, take_place
from latent_ae.files import write_json, writing
from latent_ae.models.run_checkpoint import finished_checkpoints, phase_folders
from latent_ae.report import page

from .build import planned_autoencoder
from .finish import RESULTS, finished_results
from .phases import Phase
from .report import decline, remarks_on, result_rows


def refuse_other_phases(run: Path, phases: Sequence[Phase]) -> None:
    """Raise UserError if the run folder does not belong to these phases. One process calls this.

    Args:
        run: The folder of the whole run.
        phases: All phases of the settings.
    """
    there = [folder.name for folder in phase_folders(run)]
    if phases[0].alone:
        if there:
            raise UserError(
                f"{run} holds a run in phases ({', '.join(there)}), and these settings have none: restore them, or "
                f"choose another output_dir (init_from={run} starts from its weights)"
            )
        if (run / RESULTS).is_file() and not finished_checkpoints(run):
            raise UserError(
                f"{run} holds a finished run that has lost its checkpoints, so it cannot be resumed, and training anew "
                f"would replace it: choose another output_dir (init_from={run / 'export'} starts from its weights), or "
                f"remove {run / RESULTS}"
            )
        return
    if finished_checkpoints(run):
        raise UserError(
            f"{run} holds a run without phases: choose another output_dir (init_from={run} starts from its weights)"
        )
    names = [phase.folder.name for phase in phases]
    if strange := [name for name in there if name not in names]:
        raise UserError(
            f"{run} holds the phase {strange[0]}, and the settings have {', '.join(names)}: only new phases at the end "
            "may be added. Restore the phases, or choose another output_dir"
        )
    for phase, following in pairwise(phases):
        end, steps = max(finished_checkpoints(phase.folder), default=None), phase.settings.steps
        if finished_checkpoints(following.folder) and end != steps:
            fate = "has lost its checkpoints" if end is None else f"ended at step {end:,} and now has {steps:,} steps"
            raise UserError(
                f"{following.folder} has begun from the weights of {phase.folder.name}, which {fate}: restore that "
                "phase, or choose another output_dir"
            )
    refuse_foreign(run / "export")


def refuse_later_misfits(phases: Sequence[Phase]) -> None:
    """Raise UserError if a phase that has not begun does not go with the autoencoder of the first phase."""
    for phase in phases[1:]:
        if not finished_checkpoints(phase.folder):
            with phase.named_in_errors():
                planned_autoencoder(phase.first_start)


def publish(phases: Sequence[Phase], phase: Phase, results: dict[str, Any]) -> dict[str, Any]:
    """Show in the folder of the whole run what a finished phase has reached. One process calls this.

    It gets a copy of the phase's export, a report on the phases so far, and after the last phase results.json. Nothing
    is done for a phase that a later one has taken over from.

    Args:
        phases: All phases.
        phase: The finished phase.
        results: Its results.

    Returns:
        The results, with a summary of the phases so far under "phases".

    Raises:
        UserError: If the files cannot be written.
    """
    run, number = phase.whole, phase.number
    if phase.alone or (not phase.last and finished_checkpoints(phases[number].folder)):
        return results
    every = [finished_results(one.folder, one.settings.steps) or {} for one in phases[:number]]
    summaries = [
        {"name": one.folder.name, "step": one.settings.steps, "held_out": own.get("held_out", {})}
        for one, own in zip(phases, every, strict=False)
    ]
    whole = results | {"phases": summaries}
    if phase.last and _read(run / RESULTS) == whole and (run / "export/config.json").is_file():
        return whole
    scratch = run / ".export"
    with writing(run):
        shutil.rmtree(scratch, ignore_errors=True)  # left by a process that was killed
        shutil.copytree(phase.folder / "export", scratch / "export")
        take_place(scratch / "export", run / "export", scratch / "previous")
        shutil.rmtree(scratch)
    _write_report(run, phases[:number], summaries)
    if phase.last:
        write_json(run / RESULTS, whole)
    return whole


def _write_report(run: Path, phases: Sequence[Phase], summaries: Sequence[dict[str, Any]]) -> None:
    """Write report.html of the whole run: the held-out table of each finished phase, and where its own report lies."""
    sections = []
    for phase, summary in zip(phases, summaries, strict=True):
        rows = result_rows(summary["held_out"], phase.settings.validation.also_px)
        notes = page.notes([*remarks_on(summary["held_out"]), *filter(None, [decline(rows)])])
        place = os.path.relpath(phase.folder / "report.html", run)
        link = f'<p><a href="{page.escape(place)}">Report of this phase, with pictures and curves</a></p>'
        entry = phase.recipe.phases[phase.number - 1]
        settings = page.preformatted(yaml.safe_dump(entry, sort_keys=False, default_flow_style=None))
        sections.append(page.section(phase.title.capitalize(), page.table(rows), notes, link, settings))
    steps = " + ".join(f"{phase.settings.steps:,}" for phase in phases)
    done = f"{len(phases)} of {len(phases[0].recipe.phases)} phases are finished, {steps} steps"
    page.write(run / "report.html", page.page(f"Training report: {run.name}", sections, subtitle=done))


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
