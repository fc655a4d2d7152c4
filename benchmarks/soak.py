"""Whether a long run keeps its memory, open files and threads.

    python -m benchmarks.soak

Trains a tiny first stage for 3,000 steps on one thread, with its discriminator, two loader workers, a checkpoint every
25 steps, validation with pictures every 50, a tracker, and one unreadable file among the images. Looks at the training
process and all its children after every fifth step, from outside. Writes benchmarks/results/soak.json; exits with 1
when something grew.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from benchmarks.machine import save

WARM_UP = 1 / 3
"""Of the samples: caches fill, memory pools find their size."""
MEMORY_MB = 5
"""So much more resident memory at the end than after the warm-up is growth; from then on it breathes by less."""


def pictures(folder: Path) -> None:
    """48 small pictures of two formats, and a file that only looks like one."""
    rng = np.random.default_rng(0)
    for index in range(48):
        small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        picture = small.resize((96, 72), Image.Resampling.BICUBIC)
        picture.save(folder / f"{index:02}.{'png' if index % 2 else 'jpg'}")
    (folder / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n not really")


def look(process: psutil.Process) -> dict[str, Any]:
    """Of the process and its children together; raises psutil.Error when one of them has just ended."""
    family = [process, *process.children(recursive=True)]
    return {
        "memory_mb": round(sum(each.memory_info().rss for each in family) / 1e6, 1),
        "files": sum(each.num_fds() for each in family),
        "threads": sum(each.num_threads() for each in family),
        "processes": len(family),
    }


class Training:
    """A run as users start it."""

    def __init__(self, words: list[str], folder: Path) -> None:
        self.output = open(folder / "output", "w+")  # noqa: SIM115
        command, environment = [sys.executable, "-m", "latent_ae", *words], os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, env=environment, stdout=self.output, stderr=self.output)
        self.pid = self.process.pid

    def exit_code(self) -> int | None:
        """The exit code, or None while it runs."""
        return self.process.poll()

    def said(self) -> str:
        """All that it printed."""
        self.output.seek(0)
        return self.output.read()


def soak(steps: int, folder: Path, start: Callable[[list[str], Path], Any] = Training) -> list[dict[str, Any]]:
    """Trains, and returns what was seen, with the step that was the newest then. Raises RuntimeError when it fails.

    `start` starts `latent-ae WORDS` and returns something like `Training`.
    """
    images, run = folder / "images", folder / "run"
    images.mkdir()
    pictures(images)
    words = [
        *("train", "quickstart", f"output_dir={run}", f"data.source={images}"),
        *("data.eval_fraction=0.2", "data.resolution=16", "data.num_workers=2", "data.max_bad_fraction=0.1"),
        *(f"steps={steps}", "batch_size=2", "optim.warmup=0", "loss.perceptual=0", "validate.crop_px=16"),
        *("model.block_out_channels=[16,16]", "model.norm_num_groups=4", "model.latent_channels=4", "gan.start=20"),
        *("gan.channels=4", "gan.layers=1", "gan.discriminator_warmup=5", "gan.warmup=5", "gan.lecam=0.01"),
        *("checkpoint.every=25", "validate.every=50", "log.every=5"),
        *(["report_to=[tensorboard]"] if find_spec("tensorboard") else []),
    ]
    log, seen = run / "log.jsonl", list[dict[str, Any]]()
    training = start(words, folder)
    process = psutil.Process(training.pid)
    while training.exit_code() is None:
        time.sleep(0.05)
        lines = log.read_text().splitlines() if log.is_file() else []
        done = max((event["step"] for line in lines if (event := _event(line)).get("event") == "train"), default=0)
        if done > (seen[-1]["step"] if seen else 0) and done < steps:
            try:
                seen.append({"step": done} | look(process))
            except psutil.Error:
                continue
    if training.exit_code():
        raise RuntimeError(training.said()[-3000:])
    return seen


def _event(line: str) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except ValueError:  # it is being written
        return {}


def growth(seen: list[dict[str, Any]]) -> dict[str, float]:
    """Median of the last tenth of the samples less that of the tenth after the warm-up, by what was counted."""
    tenth = max(3, len(seen) // 10)
    start = int(len(seen) * WARM_UP)
    parts = seen[start : start + tenth], seen[-tenth:]
    return {
        key: round(float(np.median([one[key] for one in parts[1]]) - np.median([one[key] for one in parts[0]])), 1)
        for key in ("memory_mb", "files", "threads", "processes")
    }


def grew(found: dict[str, float]) -> list[str]:
    """What of `growth` is more than breathing."""
    limits = {"memory_mb": MEMORY_MB, "files": 0, "threads": 0, "processes": 0}
    return [f"{key} by {found[key]:g}" for key, limit in limits.items() if found[key] > limit]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    arguments = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        seen = soak(arguments.steps, Path(folder))
    found = growth(seen)
    largest = {key: max(one[key] for one in seen) for key in found}
    shown = seen[:: max(1, len(seen) // 60)]
    result = {"steps": arguments.steps, "seconds": round(time.perf_counter() - started), "growth": found}
    save("soak", result | {"largest": largest, "samples": len(seen), "every_nth_sample": shown})
    print(json.dumps(result | {"largest": largest}, indent=2))
    if what := grew(found):
        print(f"grew: {', '.join(what)}", file=sys.stderr)
    return 1 if what else 0


if __name__ == "__main__":
    sys.exit(main())
