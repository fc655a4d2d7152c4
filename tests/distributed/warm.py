"""The check of an export without its start-up: a process that has diffusers imported, and nothing of this project.

Importing diffusers takes longer than all that most tests do, and each export is checked in a process of its own. Here
that process is a fork of one that waits with everything imported; what it then runs is the same. `start` forks the
waiting process, before anything of this project is imported; tests/conftest.py calls it first.
"""

import fcntl
import itertools
import json
import os
import subprocess
import sys
import tempfile
import traceback
from typing import IO, Any, NamedTuple

import diffusers
import safetensors.torch
import torch


class Server(NamedTuple):
    """The streams of the waiting process, and the file that is locked by whoever asks it, this process or a fork."""

    requests: IO[str]
    answers: IO[str]
    lock: Any


_server: Server
_numbers = itertools.count()


def start() -> None:
    """Forks the process that waits. It ends when this process does."""
    global _server
    assert not {"latent_ae", "latent_ae_train", "latent_ae_eval"} & set(sys.modules)
    diffusers.AutoencoderKL, diffusers.AsymmetricAutoencoderKL  # noqa: B018  # imported on first use
    assert safetensors.torch and torch
    theirs, requests = os.pipe()
    answers, ours = os.pipe()
    if not os.fork():
        try:
            os.close(requests), os.close(answers)
            _serve(open(theirs), open(ours, "w"))  # noqa: SIM115
        finally:
            os._exit(0)
    os.close(theirs), os.close(ours)
    _server = Server(open(requests, "w"), open(answers), tempfile.NamedTemporaryFile())  # noqa: SIM115


def _serve(requests: IO[str], answers: IO[str]) -> None:
    silent = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # those are pytest's
        os.dup2(silent, stream)
    for line in requests:
        number, words, folder, environment, errors = json.loads(line)
        child = os.fork()
        if not child:
            status = 1
            try:
                os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
                sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
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
        print(number, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


def streams() -> list[int]:
    """The descriptors that a fork of this process must keep to ask the waiting one."""
    return [_server.requests.fileno(), _server.answers.fileno()]


def run(words: list[str], *, cwd: str, env: dict[str, str], **_: Any) -> "subprocess.CompletedProcess[str]":
    """Stands for subprocess.run([python, "-c", code, *words]) in `latent_ae.export.write`."""
    errors, number = f"{cwd}/stderr", f"{os.getpid()}-{next(_numbers)}"
    with open(_server.lock.name) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        print(json.dumps([number, words, cwd, dict(env), errors]), file=_server.requests, flush=True)
        answer = ""
        while answer != number:  # others are for processes that were killed while they waited
            answer, code = _server.answers.readline().split()
    with open(errors, errors="replace") as stream:
        return subprocess.CompletedProcess(words, int(code), "", stream.read())
