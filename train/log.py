"""The training log: log.jsonl, trackers, and lines on stderr."""

import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from tqdm import tqdm

from latent_ae.config import UserError
from latent_ae.data.loader import ImageSource
from latent_ae.data.mixture import Mixture
from latent_ae.data.rng import buckets_at
from latent_ae.files import writing
from latent_ae.objectives import OBJECTIVES
from latent_ae.objectives.base import Objective
from latent_ae.progress import progress_bar
from latent_ae.text import printable

from .agreement import Agreed, on_main
from .checkpoint import before_gan, checkpoint_folder, complete_checkpoints
from .optim import Skipped, lr_scale_at
from .report import held_out_distances, read_log
from .run import flatten
from .settings import TrainSettings
from .validate import Validator

SHOWN = ("l1", "l2", "charbonnier", "bits_per_dimension", "lpips", "convnext", "dino", "discriminator")
"""Values shown next to the progress bar."""

LAST_ROW = 3
"""Number of steps in a row at the end of a run that mean it has diverged; fewer may be the fault of their images."""


class Log:
    """Writes log.jsonl, the requested trackers and notes on stderr, all from the main process.

    Args:
        run: The run folder.
        accelerator: Connects the processes, and holds the trackers.
        settings: The run's settings.
        objectives: Classes whose `diagnose` is logged.
        source: The training images; of a mixture, the samples of each source are logged.
        label: What the progress bar says before the step.

    Raises:
        UserError: If a tracker does not start.
    """

    def __init__(
        self,
        run: Path,
        accelerator: Accelerator,
        settings: TrainSettings,
        objectives: Sequence[type[Objective[Any]]] = OBJECTIVES,
        source: ImageSource | None = None,
        label: str = "",
    ):
        self.objectives, self.source, self.label = objectives, source, label
        self.path, self.accelerator, self.settings = run / "log.jsonl", accelerator, settings
        self.last = (time.perf_counter(), -1)
        before = read_log(run) if accelerator.is_main_process else []  # lines of a run that is resumed
        lines = [event for event in before if event["event"] == "train"]
        self.lines: deque[dict[str, Any]] = deque(lines, maxlen=20)
        self.verdict: str = lines[-1]["verdict"] if lines else ""
        self.num_skipped = sum(event["event"] == "skipped" for event in before)
        self.not_finite: list[str] = []
        if accelerator.is_main_process:
            _drop_torn_line(self.path)
        self.progress: tqdm | None = None
        if settings.report_to:
            try:
                accelerator.init_trackers(
                    "latent-ae",
                    config={
                        name: str(value)
                        for name, value in flatten(settings.model_dump(mode="json", by_alias=True)).items()
                    },
                    init_kwargs={"wandb": {"dir": str(run), "name": run.absolute().name}},
                )
            except Exception as error:  # each tracker raises its own kinds of errors
                raise UserError(f"report_to: {', '.join(settings.report_to)} does not start: {error}") from error

    def say(self, text: str) -> None:
        """Print a note on stderr, above the progress bar."""
        if self.accelerator.is_main_process:
            tqdm.write(printable(text, lines=True), file=sys.stderr)

    def write(self, event: str, step: int, values: dict[str, Any]) -> None:
        """Append a line to log.jsonl and send its numbers to the trackers. Every process calls this.

        Args:
            event: Kind of the line: train, validate, ...
            step: Number of updates made.
            values: JSON-ready values.

        Raises:
            UserError: If the file cannot be written.
        """
        with Agreed(self.accelerator):
            if self.accelerator.is_main_process:
                with writing(self.path), open(self.path, "a", encoding="utf-8") as stream:
                    stream.write(json.dumps({"event": event, "step": step} | values) + "\n")
                self._track(event, step, values)

    def _track(self, event: str, step: int, values: dict[str, Any]) -> None:
        numbers = {f"{event}/{name}": value for name, value in values.items() if isinstance(value, (int, float))}
        try:
            self.accelerator.log(numbers, step=step)
        except Exception as error:  # an unreachable server must not end a run of weeks; log.jsonl has everything
            self.accelerator.trackers = []
            self.say(
                f"report_to: logging to {', '.join(self.settings.report_to)} ends: {error or type(error).__name__}"
            )

    def sync(self) -> None:
        """Flush all lines to the disk. The main process calls this before it saves a checkpoint."""
        with open(self.path, "a", encoding="utf-8") as stream:
            os.fsync(stream.fileno())

    def has(self, event: str, step: int) -> bool:
        """Return whether the log has a line of this event and step, on all processes. Every process calls this."""
        run = self.path.parent
        return on_main(
            self.accelerator,
            lambda: any((line["event"], line["step"]) == (event, step) for line in read_log(run)),
        )

    def begin(self, first_step: int, changes: dict[str, list[Any]] | None, validator: Validator) -> None:
        """Log how a run begins: the baseline, or that it is resumed.

        Args:
            first_step: The step to begin with.
            changes: What has changed since the checkpoint, {name: [before, now]}; None for a new run.
            validator: Measures the baseline.
        """
        size, steps = self.settings.batch_size, self.settings.steps
        disable = not self.accelerator.is_main_process
        self.progress = progress_bar(None, steps * size, "img", initial=first_step * size, disable=disable)
        if validator.chosen[1]["method"] == "first":
            self.say(
                f"held-out images come as a stream: its first {self.settings.validation.images:,} are measured, not "
                "images spread over all of it"
            )
        if changes is None:
            self.write("baseline", 0, validator.measure_baseline())
        else:
            self.resumed(first_step, changes)

    def advance(self, samples: int) -> None:
        """Advance the progress bar by a number of samples."""
        if self.progress is not None:
            self.progress.update(samples)

    def close(self) -> None:
        """Close the progress bar."""
        if self.progress is not None:
            self.progress.close()

    def resumed(self, step: int, changes: dict[str, list[Any]]) -> None:
        """Log that a run is resumed, and what has changed: {name: [before, now]}."""
        self.say(f"resuming {self.path.parent} at step {step:,} of {self.settings.steps:,}")
        for name, (before, now) in changes.items():
            self.say(f"changed since step {step:,}: {name} from {before} to {now}")
        self.write("resume", step, {"changed": changes})

    def gan_alarm(self, done: int, run: Path) -> None:
        """Warn if the held-out LPIPS is worse than before the adversarial term, and name the checkpoint to go back to.

        Every process calls this.

        Args:
            done: Number of updates made.
            run: The run folder.
        """
        gan = self.settings.gan
        distances = on_main(self.accelerator, lambda: held_out_distances(run))
        before = before_gan(distances, gan)
        if before is None or done <= gan.start + gan.discriminator_warmup or done not in distances:
            return
        if distances[done] > gan.alarm * distances[before] and not self.has("alarm", done):
            checkpoint = before_gan((checkpoint.step for checkpoint in complete_checkpoints(run)), gan)
            place = checkpoint_folder(run, checkpoint) if checkpoint is not None else "none is left; checkpoint.every"
            self.write("alarm", done, {"lpips": distances[done], "lpips_before_gan": distances[before]})
            self.say(
                f"step {done:,}: held-out LPIPS is {distances[done]:.3f} and was {distances[before]:.3f} at step "
                f"{before:,}, before the adversarial term: the GAN makes it worse. To go back, copy that checkpoint "
                f"into a new run's checkpoints/ and lower gan.weight: {place}"
            )

    def restart_clock(self, done: int) -> None:
        """Measure the next line's images per second from now on, so that time spent otherwise does not count."""
        self.last = (time.perf_counter(), done)

    def skipped(self, done: int, newest: Callable[[], Skipped]) -> int:
        """Log the steps since the last call that changed nothing. Waits for the device; every process calls this.

        Args:
            done: Number of updates made.
            newest: Returns these steps.

        Returns:
            How many of the newest steps in a row changed nothing.

        Raises:
            UserError: If there are too many in a row.
        """
        found, optim, size = newest(), self.settings.optim, self.settings.batch_size
        for step in sorted([*found.not_finite, *found.too_large]):
            self.num_skipped += 1
            which = {"first_sample": step * size, "last_sample": (step + 1) * size - 1}
            self.write("skipped", step + 1, {"grad_norm_above": optim.skip_above} if step in found.too_large else which)
        if steps := found.not_finite:
            shown = ", ".join(f"{step + 1:,}" for step in steps[:5]) + (" ..." if len(steps) > 5 else "")
            self.say(f"gradients were not finite and changed nothing: step {shown} ({self.num_skipped:,} so far)")
        ends_diverged = done == self.settings.steps and bool(found.not_finite) and not found.too_large
        if found.in_a_row < (min(optim.max_skipped, LAST_ROW, done) if ends_diverged else optim.max_skipped):
            return found.in_a_row
        if found.too_large and not found.not_finite:
            raise UserError(
                f"the gradient norms of the last {found.in_a_row:,} steps to {done:,} were above optim.skip_above "
                f"{optim.skip_above:g}, so nothing is learned any more: raise it, lower optim.lr, or resume from an "
                "earlier checkpoint"
            )
        terms = f" (not finite: {', '.join(self.not_finite)})" if self.not_finite else ""
        above = " or above optim.skip_above" if found.too_large else ""
        raise UserError(
            f"the gradients of the last {found.in_a_row:,} steps to {done:,} were not finite{above}{terms}: training "
            "has diverged. Resume from an earlier checkpoint with a lower optim.lr, gan.weight or gan.adaptive_cap, or "
            "with optim.clip; samples of skipped steps are in log.jsonl"
        )

    def train(self, done: int, means: dict[str, torch.Tensor]) -> None:
        """Log the means of a step over processes. Waits for the device.

        Args:
            done: Number of updates made.
            means: Scalars on the device by name, the same names on all processes.
        """
        stacked = self.accelerator.reduce(torch.stack([value.float() for value in means.values()]), "mean")
        values = dict(zip(means, stacked.tolist(), strict=True))
        self.not_finite = [name for name, value in values.items() if not math.isfinite(value)]
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        now, (then, before) = time.perf_counter(), self.last
        if 0 <= before < done:
            values["images_per_second"] = (done - before) * self.settings.batch_size / (now - then)
        self.last = now, done
        values["lr"] = self.settings.optim.lr * lr_scale_at(done - 1, self.settings.steps, self.settings.optim)
        shown = [name for name in SHOWN if name in values]
        if self.progress is not None:
            self.progress.set_description(f"{self.label}step {done:,}/{self.settings.steps:,}")
            self.progress.set_postfix({name: f"{values[name]:.3f}" for name in shown}, refresh=False)
        if "logits_real" in values:
            values["logit_gap"] = values["logits_real"] - values["logits_fake"]
        values["memory_gb"] = memory_gb(self.accelerator.device)
        values |= {"skipped_steps": self.num_skipped} if self.num_skipped else {}
        if isinstance(self.source, Mixture):
            taken = self.source.samples_before(self.settings.seed, done * self.settings.batch_size)
            values |= {f"samples/{label}": count for label, count in zip(self.source.labels, taken, strict=True)}
        values |= samples_per_bucket(self.settings, done)
        self.lines.append({"step": done} | values)
        text = diagnosis(list(self.lines), self.settings, self.objectives)
        self.write("train", done, values | {"verdict": text})
        # the numbers in it change all the time, so only a change of the words before them is printed
        if text.split(":")[0] != self.verdict.split(":")[0]:
            self.say(f"step {done:,}: {text}")
        self.verdict = text


def diagnosis(
    lines: Sequence[dict[str, Any]],
    settings: TrainSettings,
    objectives: Sequence[type[Objective[Any]]] = OBJECTIVES,
) -> str:
    """Return in words how training goes, for people who do not read twelve curves: the objectives' diagnoses.

    Args:
        lines: The newest training lines of log.jsonl, oldest first, at least one.
        settings: The run's settings.
        objectives: Classes of objectives.
    """
    run = settings.facts()
    clauses = (objective.diagnose(settings.section_of(objective), run, lines) for objective in objectives)
    return "; ".join(filter(None, clauses))


def samples_per_bucket(settings: TrainSettings, steps: int) -> dict[str, int]:
    """Return how many samples the first `steps` steps took at each size, by name; empty without buckets."""
    buckets = settings.data.buckets
    if not buckets:
        return {}
    taken = buckets_at(settings.seed, np.arange(steps), [bucket.weight for bucket in buckets])
    counts = np.bincount(taken, minlength=len(buckets)) * settings.batch_size
    return {f"samples/{bucket.title}": int(count) for bucket, count in zip(buckets, counts, strict=True)}


def _drop_torn_line(path: Path) -> None:
    """Remove a last line that a kill or a full disk cut short, because it would spoil the next line."""
    if path.is_file():
        with writing(path), open(path, "rb+") as stream:
            content = stream.read()
            stream.truncate(content.rfind(b"\n") + 1)


def memory_gb(device: torch.device) -> float:
    """Return the peak GPU memory of this process in GB; on a CPU its resident memory now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9
