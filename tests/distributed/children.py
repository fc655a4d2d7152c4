"""Training runs in children of a process that has everything imported and has trained nothing.

So a run costs no start-up, may have several processes, and can be killed with SIGKILL, which no clean-up code survives.
"""

import contextlib
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import latent_ae_train.loop
from latent_ae.__main__ import main
from latent_ae.files import write_json
from latent_ae_train.checkpoint import complete_checkpoints, load_weights
from latent_ae_train.finish import RESULTS
from latent_ae_train.phases import Phase
from latent_ae_train.validate import Validator
from tests import economy

WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
context = multiprocessing.get_context("forkserver")


def start(kept_open: Sequence[int]) -> None:
    """Forks the process whose children the runs are, before this one trains anything or has more threads.

    multiprocessing would start it as a new process, which would import all of it again. `kept_open`: descriptors that
    it keeps of this one's.
    """

    def forked(path: bytes, words: Sequence[Any], kept: Sequence[int]) -> int:
        if process := os.fork():
            return process
        try:
            os.dup2(silent := os.open(os.devnull, os.O_RDWR), 0)  # the three streams are pytest's
            os.dup2(silent, 1), os.dup2(silent, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            for number in map(int, os.listdir("/proc/self/fd")):
                if number not in (0, 1, 2, *kept, *kept_open):
                    with contextlib.suppress(OSError):
                        os.close(number)
            exec(words[-1], {})  # multiprocessing.forkserver.main(...)
        finally:
            os._exit(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("multiprocessing.util.spawnv_passfds", forked)
        forkserver.ensure_running()


def run(
    words: list[str],
    folder: Path,
    processes: int = 1,
    kill_at: int | None = None,
    copies: Mapping[int, Path] | None = None,
) -> tuple[int, str]:
    """Exit code of the first process (-9: killed) and what all said on stderr, which lies in `folder` for a while.

    Changes of files under the run's folder are numbered; `folder/writes.json` lists them after a run that was not
    killed. Before the change `kill_at` the first process is killed. `copies`: number of a change -> where a copy of the
    run's folder goes, as it is before that change and as a kill would have left it.
    """
    return call(processes, _train, words, folder, kill_at, copies or {}, folder=folder)


def call(processes: int, function: Callable[..., None], *arguments: Any, folder: Path) -> tuple[int, str]:
    """Calls function(rank, *arguments) on so many processes that talk through gloo; returns as `run` does."""
    codes = call_all(processes, function, *arguments, folder=folder)
    return codes[0], "".join(path.read_text() for path in sorted(folder.glob("stderr.*")))


def call_all(processes: int, function: Callable[..., None], *arguments: Any, folder: Path) -> list[int | None]:
    """As `call`; returns the exit code of each process."""
    children = start_all(processes, function, *arguments, folder=folder)
    children[0].join(120)
    for child in children:
        if children[0].exitcode == -signal.SIGKILL:
            child.kill()  # as the launcher does
        child.join(20)
        if child.exitcode is None:
            child.kill()
            child.join()
    return [child.exitcode for child in children]


def start_command(words: Sequence[str], folder: Path) -> ForkServerProcess:
    """Starts `latent-ae WORDS` on a process that a test may signal; its stderr is `folder`/stderr.0."""
    return start_all(1, run_command, tuple(words), str(folder), folder=folder)[0]


def start_all(processes: int, function: Callable[..., None], *arguments: Any, folder: Path) -> list[ForkServerProcess]:
    """Starts function(rank, *arguments) on processes that talk through gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(exist_ok=True)
    children = []
    for rank in range(processes):
        # what the launcher sets; one process has none of it
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {name: str(value) for name, value in names.items()} if processes > 1 else {}
        children.append(context.Process(target=_child, args=(function, arguments, folder, environment, rank)))
        children[-1].start()
    return children


def run_command(rank: int, words: tuple[str, ...], folder: str) -> None:
    """Runs `latent-ae WORDS`; what it prints goes into `folder`/stdout.RANK."""
    with open(f"{folder}/stdout.{rank}", "w") as stream:
        os.dup2(stream.fileno(), 1)
    sys.exit(main(list(words)))


def run_script(rank: int, script: str, arguments: tuple[str, ...], folder: str) -> None:
    """Runs a file as `python SCRIPT ARGUMENTS` does; what it prints goes into `folder`/stdout.RANK."""
    with open(f"{folder}/stdout.{rank}", "w") as stream:
        os.dup2(stream.fileno(), 1)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def _child(
    function: Callable[..., None], arguments: tuple[Any, ...], folder: Path, environment: dict[str, str], rank: int
) -> None:
    with open(folder / f"stderr.{rank}", "w") as stream:
        os.dup2(stream.fileno(), 2)
    os.environ |= environment | {"ACCELERATE_USE_CPU": "1"}
    torch.set_num_threads(1)
    economy.apply()
    multiprocessing.set_start_method("fork", force=True)  # of the loader's workers, as in any other run
    function(rank, *arguments)


def _train(rank: int, words: list[str], folder: Path, kill_at: int | None, copies: Mapping[int, Path]) -> None:
    latent_ae_train.loop.finish_run = finish_quickly  # it is long, and not what the tests are about
    _measure_a_distance()
    run = next(word.removeprefix("output_dir=") for word in words if word.startswith("output_dir="))
    writes: list[str] = []
    copying = False

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal copying
        if copying:
            return
        if event == "open":
            path, _, flags = arguments
            changes = bool(flags & (os.O_WRONLY | os.O_RDWR)) and str(path).startswith(run)
        else:
            path = arguments[0] if event in WRITES else ""
            # what shutil removes it names relative to an open folder
            changes = str(path).startswith(run) or (event in ("os.remove", "os.rmdir") and arguments[1] >= 0)
        if changes and rank == 0:
            if len(writes) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if (copy := copies.get(len(writes))) is not None:
                copying = True
                shutil.copytree(run, copy)
                copying = False
            writes.append(f"{event} {str(path).removeprefix(run)}")

    sys.addaudithook(watch)
    code = main(words)
    if rank == 0:
        (folder / "writes.json").write_text(json.dumps(writes))
    sys.exit(code)


def finish_quickly(phase: Phase, accelerator: Accelerator, *_: Any) -> dict[str, Any]:
    """Stands for finish_run. A phase gets an export and results, which are not measured, and another run nothing."""
    if phase.alone or not accelerator.is_main_process:
        return {}
    newest = complete_checkpoints(phase.folder)[-1]
    load_weights(newest.folder).save_pretrained(phase.folder / "export")
    export = {"scaling_factor": None, "shift_factor": None, "max_abs_difference": 0.0}
    results = {"step": newest.step, "held_out": {"after": {"psnr": 20.0}}, "export": export}
    write_json(phase.folder / RESULTS, results)
    return results


def _measure_a_distance() -> None:
    """Stands for LPIPS, whose weights are not everywhere: lowest at step 4, high enough at 6 for an alarm."""
    measure = Validator.measure_model

    def measured(self: Validator, model: torch.nn.Module, preview: Path) -> dict[str, Any]:
        step = int(preview.stem.removeprefix("step-"))
        return measure(self, model, preview) | {"lpips_vgg": {4: 0.1, 6: 0.5}.get(step, 0.3)}

    Validator.measure_model = measured  # type: ignore[assignment, method-assign]
