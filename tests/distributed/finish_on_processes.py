"""A run of two processes, OUT and PICTURES, whose collectives wait for three seconds only, while the first process
takes four for each thing that it does alone. Started twice: the first time its export is refused. What was seen is
written to OUT.rankN.json."""

import contextlib
import io
import json
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

import latent_ae.export.write
import latent_ae_train.finish as finish
import latent_ae_train.loop as loop
import latent_ae_train.validate as validate
from latent_ae.__main__ import main
from latent_ae.config import UserError
from tests.runs import words

out, pictures = sys.argv[1:]
state = PartialState(cpu=True, timeout=timedelta(seconds=3))  # as the Accelerator, which takes over this one
seen: dict[str, Any] = {"slow": []}
refused = True


def slowly(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
    def slow(*arguments: Any, **options: Any) -> Any:
        if state.is_main_process and name not in seen["slow"]:
            seen["slow"].append(name)
            time.sleep(4)
        return work(*arguments, **options)

    return slow


def export(*arguments: Any, **options: Any) -> Any:
    if refused:
        raise UserError("this export is refused")
    return slowly("export", latent_ae.export.write.export_autoencoder)(*arguments, **options)


def upload(*_: Any) -> str:
    """Nobody waits for it: the processes have left each other."""
    seen["upload"] = [torch.distributed.is_initialized(), (Path(out) / "results.json").is_file()]
    raise ConnectionError("the hub is away")


loop.open_images = slowly("start", loop.open_images)  # type: ignore[attr-defined]
validate.picture_grid = slowly("preview", validate.picture_grid)  # type: ignore[attr-defined]
loop.save_checkpoint = slowly("checkpoint", loop.save_checkpoint)  # type: ignore[attr-defined]
loop.prune_checkpoints = slowly("prune", loop.prune_checkpoints)  # type: ignore[attr-defined]
finish.export_autoencoder = export  # type: ignore[attr-defined]
latent_ae.export.write._upload = upload
latent_ae.export.write.verify_export = lambda *_: 0.0  # in a process of its own, slow to start
loop.preflight = lambda *_: None  # type: ignore[attr-defined]  # it would ask the hub

for refused in (True, False):
    with contextlib.redirect_stderr(io.StringIO()) as error, contextlib.redirect_stdout(io.StringIO()):
        code = main(words(Path(pictures), Path(out), "steps=2", "validate.every=2", "push_to_hub=ada/vae"))
    seen["refused" if refused else "whole"] = [code, error.getvalue()]
Path(f"{out}.rank{state.process_index}.json").write_text(json.dumps(seen))
