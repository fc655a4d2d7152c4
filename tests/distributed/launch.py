"""Runs a script on several CPU processes that talk through gloo, or `latent-ae` as accelerate's launcher starts it."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.distributed import children

DISTRIBUTED = Path(__file__).parent
ROOT = DISTRIBUTED.parents[1]
STREAMS = "stdout", "stderr"


def launch(processes: int, script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The finished script on so many processes, which start with everything imported; output is that of all.

    The exit code is the first process's, or else another's that is not 0.
    """
    with tempfile.TemporaryDirectory() as folder:
        codes = children.call_all(processes, children.run_script, str(script), arguments, folder, folder=Path(folder))
        said = [
            "".join(path.read_text() for path in sorted(Path(folder).glob(f"{name}.*")))
            for name in ("stdout", "stderr")
        ]
        return subprocess.CompletedProcess([str(script), *arguments], next(filter(None, codes), 0), *said)


def launch_module(processes: int, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """`latent-ae ARGUMENTS` on so many processes, as `accelerate launch -m latent_ae` starts it."""
    command = [sys.executable]
    if processes > 1:
        # --multi_gpu is accelerate's word for several processes on one machine; without a GPU they talk through gloo
        command += ["-m", "accelerate.commands.launch", "--multi_gpu", f"--num_processes={processes}"]
        command += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "1"}
    words = ["-m", "latent_ae", *arguments]
    return subprocess.run([*command, *words], env=environment, capture_output=True, text=True, timeout=timeout)
