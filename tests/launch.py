"""Runs a script on one process, or on several CPU processes that talk through gloo."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def launch(processes: int, script: Path, *arguments: str, timeout: float = 180) -> subprocess.CompletedProcess[str]:
    """The finished process, with its output as text. `script` is a file; `-m` modules go through `launch_module`."""
    return _run(processes, [str(script), *arguments], timeout)


def launch_module(processes: int, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """`latent-ae ARGUMENTS` on so many processes, as `accelerate launch -m latent_ae` starts it."""
    return _run(processes, ["-m", "latent_ae", *arguments], timeout)


def _run(processes: int, words: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
    command = [sys.executable]
    if processes > 1:
        # --multi_gpu is accelerate's word for several processes on one machine; without a GPU they talk through gloo
        command += ["-m", "accelerate.commands.launch", "--multi_gpu", f"--num_processes={processes}"]
        command += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "1"}
    return subprocess.run([*command, *words], env=environment, capture_output=True, text=True, timeout=timeout)
