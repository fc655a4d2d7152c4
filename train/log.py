"""log.jsonl, trackers, and the lines on stderr."""

import json
import math
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from tqdm import tqdm

from latent_ae.config import UserError

from .config import TrainSettings
from .run_folder import flatten
from .schedule import lr_scale_at
from .verdict import verdict


class Log:
    """log.jsonl always, trackers when asked for, notes on stderr; all from the main process."""

    def __init__(self, run: Path, accelerator: Accelerator, settings: TrainSettings):
        self.path, self.accelerator, self.settings = run / "log.jsonl", accelerator, settings
        self.last = (time.perf_counter(), -1)
        self.lines: deque[dict[str, Any]] = deque(maxlen=20)
        self.verdict = ""
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
            except Exception as error:  # each tracker has kinds of its own
                raise UserError(f"report_to: {', '.join(settings.report_to)} does not start: {error}") from error

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(text, file=sys.stderr)

    def write(self, event: str, step: int, values: dict[str, Any]) -> None:
        """One line of log.jsonl; numbers go to the trackers too."""
        if self.accelerator.is_main_process:
            with open(self.path, "a", encoding="utf-8") as stream:
                stream.write(json.dumps({"event": event, "step": step} | values) + "\n")
        numbers = {f"{event}/{name}": value for name, value in values.items() if isinstance(value, (int, float))}
        self.accelerator.log(numbers, step=step)

    def restart_clock(self, done: int) -> None:
        """Counts the next line's rate from here: what took the time was not training."""
        self.last = (time.perf_counter(), done)

    def train(self, done: int, means: dict[str, torch.Tensor], progress: tqdm) -> None:
        """The losses of the step just made, averaged over processes; the only place where they leave the device."""
        stacked = self.accelerator.reduce(torch.stack([value.float() for value in means.values()]), "mean")
        values = dict(zip(means, stacked.tolist(), strict=True))
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise UserError(
                f"after step {done:,} {', '.join(bad)} is not finite: training has diverged. "
                "Lower optim.lr, gan.weight or gan.adaptive_cap, or set optim.clip"
            )
        now, (then, before) = time.perf_counter(), self.last
        if 0 <= before < done:
            values["images_per_second"] = (done - before) * self.settings.batch_size / (now - then)
        self.last = now, done
        values["lr"] = self.settings.optim.lr * lr_scale_at(done - 1, self.settings.steps, self.settings.optim)
        shown = [name for name in ("l1", "l2", "charbonnier", "lpips", "discriminator") if name in values]
        progress.set_description(f"step {done:,}/{self.settings.steps:,}")
        progress.set_postfix({name: f"{values[name]:.3f}" for name in shown}, refresh=False)
        if "logits_real" in values:
            values["logit_gap"] = values["logits_real"] - values["logits_fake"]
        values["memory_gb"] = memory_gb(self.accelerator.device)
        self.lines.append({"step": done} | values)
        judged = verdict(list(self.lines), self.settings)
        self.write("train", done, values | {"verdict": judged})
        # numbers in it change all the time; what stands before them is the news
        if judged.split(":")[0] != self.verdict.split(":")[0]:
            self.say(f"step {done:,}: {judged}")
        self.verdict = judged


def memory_gb(device: torch.device) -> float:
    """The most that this process has held on a GPU so far; on a CPU its resident memory now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9
