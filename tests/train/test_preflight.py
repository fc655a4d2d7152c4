"""What can fail later is said before the first step, on all processes, and once."""

import http.server
import json
import runpy
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from latent_ae.__main__ import main
from latent_ae.config import UserError
from latent_ae.export.write import check_upload
from latent_ae_train.preflight import try_passes
from tests.distributed.launch import DISTRIBUTED, launch
from tests.robustness.failing_disk import limit
from tests.runs import differing_tensors, only_message, words
from tests.tiny import GAN, build_step, micro_batches, settings_for


def test_a_trouble_of_one_process_stops_all_with_one_message(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = launch(2, DISTRIBUTED / "trouble_on_processes.py", str(out), str(pictures))
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = ((out / f"rank{rank}").read_text().splitlines() for rank in (0, 1))
    assert second == ["held-out 2 ", "weights 2 ", "quota 2 ", "preview 2 ", "log 2 "]
    assert first[0].startswith("held-out 2 latent-ae train: process 1: data.eval_source: held-out holds no images")
    assert first[1].startswith("weights 2 latent-ae train: process 1: the weights of vgg16 are not available")
    assert first[2].startswith("quota 2 latent-ae train: cannot write the checkpoint") and "quota" in first[2]
    assert "previews/step-00000003.png: Disk quota exceeded" in first[3]
    assert "log.jsonl: No space left on device" in first[4]


@pytest.mark.parametrize("name", ["log.jsonl", "results.json", "report.html", "checkpoints", "previews", "export"])
def test_what_is_in_the_way(name: str, pictures: Path, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    run.mkdir()
    if name in ("checkpoints", "previews", "export"):
        (run / name).write_text("in the way")
    else:
        (run / name).mkdir()
    assert main(words(pictures, run)) == 2
    message = only_message(capsys)
    assert f"{run}/{name}" in message and ("cannot write" in message or "is not an export" in message), message
    assert not (run / "log.jsonl").is_file(), "it was said after the first validation"


@pytest.mark.usefixtures("no_finish")
def test_a_limit_that_df_does_not_show(pictures: Path, tmp_path: Path, capsys: Any) -> None:
    """Only the optimizers' file is too large for it."""
    assert main(words(pictures, tmp_path / "first", "steps=2")) == 0
    saved = tmp_path / "first/checkpoints/step-00000002"
    sizes = {path.name: path.stat().st_size for path in saved.iterdir()}
    largest = max(size for name, size in sizes.items() if name != "optimizer.pt")
    assert sizes["optimizer.pt"] > 1.5 * largest
    capsys.readouterr()
    limit(int(1.3 * largest))
    try:
        assert main(words(pictures, tmp_path / "run")) == 2
    finally:
        limit(None)
    assert f"cannot write {tmp_path}/run: File too large" in only_message(capsys)
    assert not list((tmp_path / "run/checkpoints").iterdir()) and not (tmp_path / "run/log.jsonl").exists()


def test_a_tracker_that_does_not_start(pictures: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    run.mkdir()
    (run / "latent-ae").write_text("where its files should go")
    assert main(words(pictures, run, "report_to=[tensorboard]")) == 2
    assert "report_to: tensorboard does not start" in only_message(capsys)
    assert not (run / "log.jsonl").exists()


@pytest.mark.usefixtures("no_finish")
def test_a_tracker_that_fails_later_ends_nothing(
    pictures: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    def away(*_: Any, **__: Any) -> None:
        raise ConnectionError("the server is away")

    monkeypatch.setattr(SummaryWriter, "add_scalar", away)
    assert main(words(pictures, tmp_path / "run", "report_to=[tensorboard]", "steps=4")) == 0
    error = capsys.readouterr().err
    assert error.count("report_to: logging to tensorboard ends: the server is away") == 1


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A hub that answers `whoami` with what the dictionary holds, and knows no other question."""
    answer: dict[str, Any] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path.endswith("/whoami-v2") and answer
            self.send_response(200 if known else 401)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield answer
    server.shutdown()
    server.server_close()


def test_the_right_to_upload(hub: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="push_to_hub: nothing can be uploaded to ada/vae: .*hf auth login"):
        check_upload("ada/vae")  # the token is not known
    hub |= {"name": "ada", "orgs": [{"name": "engine"}], "auth": {"accessToken": {"role": "write"}}}
    for name in ("ada/vae", "engine/vae", "vae"):
        check_upload(name)
    with pytest.raises(UserError, match="babbage/vae does not belong to ada, engine"):
        check_upload("babbage/vae")
    with pytest.raises(UserError, match="nothing can be uploaded to a/b/c"):
        check_upload("a/b/c")
    hub["auth"]["accessToken"]["role"] = "read"
    with pytest.raises(UserError, match="the token of ada may only read"):
        check_upload("ada/vae")


def test_the_hub_is_asked_before_the_first_step(
    pictures: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    assert main(words(pictures, tmp_path / "run", "push_to_hub=ada/vae")) == 2
    assert "push_to_hub: nothing can be uploaded to ada/vae" in only_message(capsys)
    assert not (tmp_path / "run/log.jsonl").exists()
    assert main(["export", str(tmp_path), str(tmp_path / "out"), "--push-to-hub", "ada/vae"]) == 2
    assert "push_to_hub: nothing can be uploaded" in only_message(capsys)


LATE = ("gan.start=4", "gan.discriminator_warmup=0", "gan.warmup=0", "gan.r1=0.1", "gan.r1_every=16")


@pytest.mark.parametrize("part", ["PatchDiscriminator.forward", "generator_loss", "r1_penalty", "lecam_loss"])
def test_the_phase_of_the_gan_is_tried_before_the_first_step(
    part: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ArithmeticError(part)

    module = "latent_ae.models.patch_discriminator" if "forward" in part else "latent_ae.objectives.gan"
    monkeypatch.setattr(f"{module}.{part}", broken)
    run = tmp_path / "run"
    with pytest.raises(ArithmeticError, match=part):
        main(words(pictures, run, *LATE))
    assert not (run / "log.jsonl").exists() and not list((run / "checkpoints").iterdir())


def test_too_little_memory_for_the_last_phase(
    pictures: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("latent_ae.objectives.gan.generator_loss", full)
    assert main(words(pictures, tmp_path / "run", *LATE)) == 2
    message = only_message(capsys)
    for part in ("4 images of 16 px", "micro_batch_size", "gradient_checkpointing=true", "precision=bf16", "2 GiB"):
        assert part in message, message
    assert not (tmp_path / "run/log.jsonl").exists()


@pytest.mark.usefixtures("no_finish")
def test_the_trial_is_of_the_step_that_does_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """R1 is due in steps 0, 8 and 16, and from step 15 on the adversarial term trains the autoencoder, too."""
    gan = {**GAN, "discriminator_warmup": 15, "r1": 0.1, "r1_every": 8}
    step, tried = build_step(settings_for(steps=20, gan=gan)), list[int]()
    monkeypatch.setattr(step, "forward_backward", lambda batch, number: tried.append(number))
    try_passes(step, next(micro_batches(0, step.settings)))
    assert tried == [16]


def test_a_trial_leaves_no_trace(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = (*LATE[1:], "gan.norm=spectral", "gan.lecam=0", "loss.learned_logvar=true", "micro_batch_size=2")
    more += ("latents.equivariance=0.5", "latents.noise=0.5", "gan.diffaug=[color]", "checkpoint.keep=3")
    assert main(words(pictures, tmp_path / "with", *more)) == 0
    monkeypatch.setattr("latent_ae_train.loop.try_passes", lambda *_: None)
    assert main(words(pictures, tmp_path / "without", *more)) == 0
    for step in (2, 6):
        name = f"checkpoints/step-{step:08d}"
        assert not differing_tensors(tmp_path / "with" / name, tmp_path / "without" / name)


@pytest.mark.filterwarnings("ignore:'latent_ae.__main__' found in sys.modules")
def test_a_command_that_stops_leaves_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Left to the interpreter's end, gloo's threads abort the process now and then."""
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        monkeypatch.setattr(sys, "argv", ["latent-ae", "train", "no-such-recipe"])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_module("latent_ae", run_name="__main__")
        assert stopped.value.code == 2 and not distributed.is_initialized()
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
