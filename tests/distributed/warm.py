"""The check of an export without its start-up: a process that has diffusers imported, and nothing of this project.

Importing diffusers takes longer than all that most tests do, and each export is checked in a process of its own. Here
that process is a fork of one that waits with everything imported; what it then runs is the same.
"""

import json
import subprocess
import sys
from functools import lru_cache
from typing import Any

SERVER = """
import json, os, sys, traceback
import diffusers, safetensors.torch, torch
diffusers.AutoencoderKL, diffusers.AsymmetricAutoencoderKL  # imported on first use

for line in sys.stdin:
    words, folder, environment, errors = json.loads(line)
    child = os.fork()
    if not child:
        status = 1
        try:
            os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(environment)
            code, sys.argv = words[2], ["-c", *words[3:]]
            exec(code, {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@lru_cache(maxsize=1)
def _server() -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run(words: list[str], *, cwd: str, env: dict[str, str], **_: Any) -> "subprocess.CompletedProcess[str]":
    """Stands for subprocess.run([python, "-c", code, *words]) in `latent_ae.export.write`."""
    server, errors = _server(), f"{cwd}/stderr"
    assert server.stdin is not None and server.stdout is not None
    print(json.dumps([words, cwd, dict(env), errors]), file=server.stdin, flush=True)
    code = int(server.stdout.readline())
    with open(errors, errors="replace") as stream:
        return subprocess.CompletedProcess(words, code, "", stream.read())
