"""What a figure was measured on, and how results are kept."""

import json
import platform
import resource
import shlex
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import Any

import psutil
import torch

RESULTS = Path(__file__).parent / "results"


def describe_machine() -> dict[str, Any]:
    """Processor, memory and versions, JSON-ready."""
    cuda = torch.cuda.is_available()
    return {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "accelerate", "latent-ae")},
    }


def matmul_peak(dtype: torch.dtype, device: torch.device, seconds: float = 2.0) -> float:
    """FLOP/s of the fastest of many large square matrix products."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        started = time.perf_counter()
        a @ b
        synchronise(device)
        best = min(best, time.perf_counter() - started)
        if time.perf_counter() > end:
            return 2 * size**3 / best


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def alternate(calls: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """Median seconds and peak memory of each call, taken in turns so that a slow minute meets all of them.

    On a CPU with one thread these are processor seconds, which other work on the machine hardly disturbs; otherwise
    the clock's. Memory: allocated on a GPU; on a CPU the process's resident memory, which holds every contestant's
    weights.
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    peaks = dict.fromkeys(calls, 0.0)
    for _ in range(rounds):
        for name, call in calls.items():
            with _Peak(device) as peak:
                started = clock()
                call()
                synchronise(device)
                seconds[name].append(clock() - started)
            peaks[name] = max(peaks[name], peak.gigabytes)
            print(f"  {name:<45} {seconds[name][-1]:8.2f} s", file=sys.stderr)
    return {
        name: {"median_s": statistics.median(values), "all_s": values, "peak_memory_gb": round(peaks[name], 2)}
        for name, values in seconds.items()
    }


def peak_memory_gb() -> float:
    """The most resident memory of this process since it started.

    Linux's own mark where there is one: getrusage's is inherited from the process that started this one.
    """
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else []:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e9
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9


def save(name: str, result: dict[str, Any], *, added: bool = False) -> Path:
    """Writes benchmarks/results/NAME.json with machine, date and command; `added` keeps those of the calls before."""
    # a path says something on this machine only: its name is enough
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    command = f"python -m benchmarks.{Path(sys.argv[0]).stem} {shlex.join(words)}".rstrip()
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    head = {"command": command, "date": time.strftime("%Y-%m-%d"), "machine": describe_machine()}
    before: list[dict[str, Any]] = []
    if added and path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        before = [one for one in (*old.get("before", []), {key: old[key] for key in head}) if one != head]
    path.write_text(json.dumps(head | ({"before": before} if before else {}) | result, indent=2) + "\n")
    print(f"wrote {path}", file=sys.stderr)
    return path


def earlier(name: str, facts: Mapping[str, Any], part: str = "rows") -> dict[str, Any]:
    """The figures in benchmarks/results/NAME.json, to add to; {} if there is no such file.

    Ends the program if they are of other facts than these.
    """
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return {}
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if other := [key for key, value in facts.items() if result.get(key) != json.loads(json.dumps(value))]:
        sys.exit(f"{path} holds figures of other {', '.join(other)}: move it to begin anew")
    found: dict[str, Any] = result[part]
    return found


def with_run(runs: Sequence[dict[str, Any]], run: dict[str, Any], key: str = "seed") -> list[dict[str, Any]]:
    """Runs of a row with one more, in the order of their `key`; it replaces an earlier one with the same."""
    return sorted([*(one for one in runs if one[key] != run[key]), run], key=itemgetter(key))


class _Peak:
    """The most memory used inside a `with` block."""

    def __init__(self, device: torch.device):
        self.device, self.gigabytes = device, 0.0

    def __enter__(self) -> "_Peak":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            self.done = threading.Event()
            self.thread = threading.Thread(target=self._watch)
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.gigabytes = torch.cuda.max_memory_allocated() / 1e9
        else:
            self.done.set()
            self.thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while not self.done.wait(0.02):
            self.gigabytes = max(self.gigabytes, process.memory_info().rss / 1e9)


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def machines(result: dict[str, Any]) -> str:
    """In words: the machines of a result."""
    found = [
        f"{one['machine']['gpu'] or one['machine']['cpu']}, {one['machine']['threads']} threads, "
        f"torch {one['machine']['versions']['torch']}"
        for one in (result, *result.get("before", []))
    ]
    return " and ".join(dict.fromkeys(found))


def where(result: dict[str, Any]) -> str:
    """In words: the machines of a result, and the command that made it, or the newest of those."""
    commands = list(dict.fromkeys(one["command"] for one in (result, *result.get("before", []))))
    more = f" and {len(commands) - 1} more" if len(commands) > 1 else ""
    return f"{machines(result)}; `{commands[0]}`{more}"
