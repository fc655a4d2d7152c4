"""The benchmark against other programs: how a program is stopped, its progress is read, and results are compared."""

import signal
import sys
import zipfile
from pathlib import Path

import psutil
import pytest
from tqdm import tqdm

from benchmarks.against import Failed, run, steps_within, targets
from benchmarks.against_programs.programs import Places, Program, progress

EPOCHS = r"Epoch (\d+): .*?\| (\d+)/(\d+) \["
SAVES_WHEN_ASKED = """
import signal, time, zipfile
signal.signal(signal.SIGUSR1, lambda *_: zipfile.ZipFile("last.ckpt", "w").close())
print("Epoch 0:   4%|1   | 3/70 [00:01<00:20]", flush=True)
while True:
    time.sleep(0.01)
"""


def test_ours_is_held_against_each_rival_of_its_size_by_both_evaluators():
    def row(program, size, part, psnr, lpips, other_lpips=None):
        own = {"psnr": psnr, "lpips": lpips}
        other = {"psnr": psnr, "lpips": lpips if other_lpips is None else other_lpips}
        return {"program": program, "size": size, "part": part, "latent_ae": own, "independent": other}

    rows = {
        "worse": row("diffusers", "f4", 1.0, 20.0, 0.5),
        "as good": row("latent-diffusion", "f4", 1.0, 25.0, 0.3, other_lpips=0.29),
        "another size": row("diffusers", "f8", 1.0, 18.0, 0.2),
        "without a result": {"failed": "no first step"},
        "ours, short": row("ours", "f4", 0.2, 25.0, 0.3),
        "ours, long": row("ours", "f4", 1.0, 10.0, 0.9),
        "ours, plain": row("ours from the default start", "f4", 0.2, 10.0, 0.9),
        "ours, larger, short": row("ours", "f8", 0.2, 18.0, 0.1),
        "ours, larger": row("ours", "f8", 0.4, 19.0, 0.3),
    }
    both = {"psnr": True, "lpips": True}
    assert targets(rows) == [
        {"rival": "worse", "ours": "ours, short", "at_least_as_good": {"latent_ae": both, "independent": both}},
        {
            "rival": "as good",
            "ours": "ours, short",
            "at_least_as_good": {"latent_ae": both, "independent": {"psnr": True, "lpips": False}},
        },
        {
            "rival": "another size",
            "ours": "ours, larger",
            "at_least_as_good": dict.fromkeys(("latent_ae", "independent"), {"psnr": True, "lpips": False}),
        },
    ]


def test_progress_is_that_of_the_last_bar(tmp_path):
    assert progress(tmp_path, EPOCHS) == 0
    with (tmp_path / "log.txt").open("w") as log:
        for epoch in range(2):
            bar = tqdm(total=88, desc=f"Epoch {epoch}", file=log, mininterval=0)
            bar.update(7)
            bar.set_postfix(loss=1.5)
    assert progress(tmp_path, EPOCHS) == 88 + 7
    with (tmp_path / "log.txt").open("a") as log:
        tqdm(total=10**6, desc="Steps", file=log, mininterval=0).update(12)
    assert progress(tmp_path, r"Steps: .*?\| (\d+)/\d+ \[") == 12


def test_a_program_is_asked_for_its_weights_and_ended(tmp_path):
    def program(code: str) -> Program:
        def saved(_: int) -> Path | None:
            path = tmp_path / "last.ckpt"
            return path if zipfile.is_zipfile(path) else None

        steps = lambda: progress(tmp_path, EPOCHS)  # noqa: E731
        return Program([sys.executable, "-c", code], {}, steps, lambda process: process.send_signal(10), saved, None)

    places = Places(*[tmp_path] * len(Places._fields))
    row, weights = run(program(SAVES_WHEN_ASKED), tmp_path, places, 0.0, 8)
    assert (row["steps"], weights) == (3, tmp_path / "last.ckpt")
    assert row["started"].startswith(f"{Path(sys.executable).name} -c")
    (tmp_path / "last.ckpt").unlink()
    with pytest.raises(Failed, match="ended with 1: [^$]*no such architecture"):
        run(program("raise SystemExit('no such architecture')"), tmp_path, places, 0.0, 8)


def test_the_time_of_a_program_is_the_processors_from_its_first_step_on(tmp_path):
    """Waiting does not count, and neither does what comes before the first step."""
    code = """
import signal, time
signal.signal(signal.SIGUSR1, lambda *_: open("saved", "w").close())
def work(seconds):
    while time.process_time() < seconds:
        pass
work(0.5)
for step in range(1, 1000):
    print(f"Epoch 0:   4%|1   | {step}/1000 [00:01<00:20]", flush=True)
    time.sleep(0.1)
    work(time.process_time() + 0.05)
"""
    asked: list[float] = []

    def ask(process):
        asked.append(sum(psutil.Process(process.pid).cpu_times()[:2]))
        process.send_signal(signal.SIGUSR1)

    def saved(_: int) -> Path | None:
        return tmp_path / "saved" if (tmp_path / "saved").exists() else None

    program = Program([sys.executable, "-c", code], {}, lambda: progress(tmp_path, EPOCHS), ask, saved, None)
    row, weights = run(program, tmp_path, Places(*[tmp_path] * len(Places._fields)), 0.5, 8)
    first = row["processor_seconds_to_first_step"]
    assert weights == tmp_path / "saved" and first >= 0.5
    # it looks twice in a second, in which the program works for a third of the time
    assert 0.45 <= asked[0] - first <= 0.9 and row["processor_seconds"] <= 0.9
    assert row["clock_seconds"] > 1.5 * row["processor_seconds"]


def test_steps_that_fit_are_counted_with_and_without_an_adversary():
    assert steps_within(50.0, plain_s=1.0, adversarial_s=2.0, start=100) == 50
    assert steps_within(300.0, plain_s=1.0, adversarial_s=2.0, start=100) == 200
