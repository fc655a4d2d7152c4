"""Trouble that strikes one of several processes: each writes its exit codes and messages to OUT/rankN."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from latent_ae.__main__ import main
from latent_ae.objectives import reconstruction
from latent_ae_train import log
from tests.runs import words

out, pictures, rank = Path(sys.argv[1]), Path(sys.argv[2]), int(os.environ["RANK"])
replace, answers = os.replace, list[str]()


def run(name: str, *more: str) -> None:
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        code = main(words(pictures, out / name, "micro_batch_size=2", *more))
    lines = [line for line in error.getvalue().splitlines() if line.startswith("latent-ae ")]
    answers.append(f"{name} {code} {' / '.join(lines)}")


def over_quota(end: str) -> Callable[[Any, Any], None]:
    def refusing(source: Any, target: Any) -> None:
        if str(target).endswith(end):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        replace(source, target)

    return refusing


def no_log(path: Any, mode: str = "r", **how: Any) -> Any:
    if mode == "a" and (Path(path).parent / "checkpoints").is_dir():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return open(path, mode, **how)


# each process has a disk of its own, and on the second one's there are neither images nor weights
machine = out / f"machine{rank}"
(machine / "held-out").mkdir(parents=True)
(machine / "held-out" / ("a.txt" if rank else "a.png")).write_bytes((pictures / "00.png").read_bytes())
os.chdir(machine)
run("held-out", "data.eval_source=./held-out")

os.environ |= {"LATENT_AE_OFFLINE": "1", "XDG_CACHE_HOME": f"{machine}/cache", "TORCH_HOME": f"{machine}/torch"}
if not rank:
    reconstruction.LPIPS = lambda *_, **__: torch.nn.Identity()  # type: ignore[misc, assignment]
run("weights", "loss.perceptual=1", "data.resolution=32", "validate.crop_px=32")

# only the first one writes
os.replace = over_quota("step-00000002")
run("quota")
os.replace = over_quota("step-00000003.png")
run("preview")
os.replace = replace
log.open = no_log  # type: ignore[attr-defined]
run("log")
(out / f"rank{rank}").write_text("\n".join(answers) + "\n")
PartialState().destroy_process_group()
