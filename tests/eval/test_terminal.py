"""What `latent-ae eval` shows on a terminal, and what goes into a pipe."""

import hashlib
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from latent_ae_eval.table import Row, aligned
from tests.made_jobs import COMMANDS, DOWNLOADS, Jobs, on_a_terminal

EXPECTED = {
    "recon": lambda r: [
        ("PSNR (dB) ↑", "mode", f"{r['metrics']['mode']['psnr']:.2f}"),
        ("", "bicubic /2", f"{r['baseline']['metrics']['psnr']:.2f}"),
        ("SSIM ↑", "mode", f"{r['metrics']['mode']['ssim']:.4f}".replace("-", "−")),
    ],
    "latents": lambda r: [
        ("images", "16"),
        ("KL per value", f"{r['health']['kl_nats_per_dim']:.3g} nats"),
        ("effective rank", f"{r['health']['effective_rank']:.2f} of 4"),
    ],
    "likelihood": lambda r: [
        ("ELBO", "bits per dimension", f"{r['metrics']['elbo']['bits_per_dimension']['mean']:.4f}"),
        ("rate", "nats per image", f"{r['metrics']['rate']['nats_per_image']['mean']:,.1f}"),
    ],
    "anomaly": lambda r: [
        ("squared error, mean", "AUROC", f"{r['scores']['pixel_mean']['auroc']:.3f}"),
        ("negative ELBO", "AUROC", f"{r['scores']['negative_elbo']['auroc']:.3f}"),
    ],
    "probe": lambda r: [
        ("largest class", f"{100 * r['chance']:.1f} %"),
        *(
            ("", "pixels", f"{100 * found['mean']:.1f} %", f"± {100 * found['sd']:.1f}")
            for found in (r["features"]["pixels"][kind]["2"] for kind in ("logistic", "nearest"))
        ),
    ],
    "interpolate": lambda r: [
        (
            "middle from the cross-fade's, levels",
            "linear",
            f"{r['means']['linear']['middle_from_cross_fade']:.2f}",
        ),
        ("", "spherical", f"{r['means']['spherical']['middle_from_cross_fade']:.2f}"),
    ],
    "sample": lambda r: [("samples", "4")],
    "factors": lambda r: [("MIG", "mean", f"{r['mean']['mig']:.3f}"), ("", "sample", f"{r['sample']['mig']:.3f}")],
    "sample-compared": lambda r: [
        ("Fréchet, vgg16 (not FID) ↓", "samples", f"{r['metrics']['samples']['frechet_vgg16']:.3f}"),
        ("", "held-out images", f"{r['metrics']['held_out']['frechet_vgg16']:.3f}"),
    ],
    "ifid": lambda r: [
        ("Fréchet, vgg16 (not FID) ↓", "midpoints", f"{r['metrics']['midpoints']['frechet_vgg16']:.3f}"),
        ("", "reconstructions", f"{r['metrics']['reconstructions']['frechet_vgg16']:.3f}"),
    ],
    "diffusion": lambda r: [
        ("loss, relative to the trivial predictor's", f"{r['loss']['relative_loss']:.3f}"),
        ("Fréchet, vgg16 (not FID) ↓", "samples", f"{r['metrics']['samples']['frechet_vgg16']:.3f}"),
    ],
}
"""Lines that a terminal shows, by command: what stands in them, from left to right, out of result.json."""


def test_columns_are_aligned_and_empty_ones_left_out() -> None:
    rows = [
        Row("images", "3"),
        Row("PSNR", "27.15", "26 – 28", "mode"),
        Row("PSNR", "7.1", "", "bicubic"),
        Row("é", "1"),
    ]
    assert aligned(rows).splitlines() == [
        "                        95 % interval",
        "images               3",
        "PSNR    mode     27.15  26 – 28",
        "        bicubic    7.1",
        "é                    1",
    ]
    assert aligned([Row("images", "3"), Row("bits", "0.25")]) == "images     3\nbits    0.25"


@pytest.mark.parametrize("name", EXPECTED)
def test_a_terminal_gets_the_figures_and_no_json(jobs: Jobs, name: str, request) -> None:
    if name in DOWNLOADS:
        request.getfixturevalue("lpips_vgg")
    ended = jobs(name)
    assert ended.code == 0, ended.err
    result = json.loads((ended.folder / "result.json").read_text())
    lines = ended.out.splitlines()
    assert "<script>" in lines[0] and "{" not in ended.out and '"format"' not in ended.out
    assert sum(not line.startswith(("note: ", "look here: ", "worth a look: ", "problem: ")) for line in lines) < 40
    for cells in EXPECTED[name](result):
        pattern = r"\s{2,}".join(map(re.escape, filter(None, cells)))
        pattern = rf"^\s{{2,}}{pattern}(\s|$)" if not cells[0] else rf"^{pattern}(\s{{2}}|$)"
        assert any(re.search(pattern, line) for line in lines), (pattern, ended.out)
    assert all(f"note: {note}" in lines for note in result.get("notes") or ())


def test_a_comparison_is_a_table_and_json_in_a_pipe(jobs: Jobs, tmp_path, capsys) -> None:
    ended = jobs("compare")
    document = json.loads((ended.folder / "comparison.json").read_text())
    row = next(row for row in document["differences"] if row["metric"] == "psnr")
    assert ended.code == 0 and "{" not in ended.out
    lines = [line for line in ended.out.splitlines() if "PSNR (dB)" in line]
    values = next(row["values"] for row in document["metrics"] if row["metric"] == "psnr")
    assert f"{values['A']:.2f}" in lines[0] and "B − A" in lines[1]
    assert f"{abs(row['difference']):.3f}" in lines[1]
    words = [*jobs.words("compare"), "--out", str(tmp_path)]
    _, out, err = on_a_terminal(*words, "--json")
    assert out == json.dumps(document, indent=2) + "\n" and "PSNR (dB)" in err


def test_json_is_the_same_in_a_pipe_and_on_a_terminal_that_asks_for_it(jobs: Jobs, tmp_path, capsys) -> None:
    from latent_ae.__main__ import main

    words = [*jobs.words("likelihood"), "--out", str(tmp_path)]
    code, out, _ = on_a_terminal(*words, "--json")
    assert code == 0 and out == json.dumps(json.loads((tmp_path / "result.json").read_text()), indent=2) + "\n"
    capsys.readouterr()
    assert main(words) == 0 and capsys.readouterr().out == out


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in DOWNLOADS])
def test_a_bar_ends_its_line_before_anything_else_is_said(jobs: Jobs, name: str) -> None:
    err = jobs(name).err
    assert re.search(r"(^|\n)wrote .*\n$", err), err


def test_a_missing_fid_is_one_line_where_the_figures_are(jobs: Jobs) -> None:
    ended = jobs("recon")
    (line,) = [line for line in ended.out.splitlines() if "FID" in line]
    assert line == (
        "note: FID and KID are missing: the weights of inception are not available; `latent-ae weights fetch` says why "
        "and what helps"
    )
    assert json.loads((ended.folder / "result.json").read_text())["metrics"]["mode"]["fid"] is None
    note, table, how = (ended.page.index(text) for text in ("FID and KID are missing", "PSNR (dB) ↑", "<details>"))
    assert table < note < how and ended.page.count("FID and KID are missing") == 1
    assert "LATENT_AE_WEIGHTS" not in ended.page[:how] and "LATENT_AE_WEIGHTS" in ended.page[how:]


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in (*DOWNLOADS, "recon-other", "compare")])
def test_what_is_refused_leaves_nothing_behind(jobs: Jobs, tmp_path, monkeypatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    words = [word.replace(jobs.places["data"], str(tmp_path / "missing")) for word in jobs.words(name)]
    words = [word.replace(jobs.places["table"], str(tmp_path / "missing")) for word in words]
    words += ["prior=gaussian"] if name == "sample" else []
    code, out, err = on_a_terminal(*words, "--out", "a/b")
    assert code == 2 and not out and err.startswith("latent-ae eval: "), err
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "mine.txt").touch()
    assert on_a_terminal(*words, "--out", "a/b")[0] == 2
    assert (tmp_path / "a" / "mine.txt").exists() and (tmp_path / "a" / "b").is_dir()


def test_each_result_tells_apart_the_images_that_were_measured(jobs: Jobs) -> None:
    """The digests of their files in the order of their names, with the size where it is the image's own; a probe has
    those of both parts."""

    def result(name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((jobs(name).folder / "result.json").read_text())
        return found

    def of(contents: Iterable[bytes], factor: int = 0) -> str:
        lines = []
        for content in contents:
            width, height = Image.open(io.BytesIO(content)).size
            size = f"-{height // factor * factor}x{width // factor * factor}" if factor else ""
            lines.append(hashlib.blake2b(content, digest_size=16).hexdigest() + size)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    files = sorted(Path(jobs.places["data"]).rglob("*.png"), key=str)
    contents = [path.read_bytes() for path in files]
    everything = {name: result(name)["data"]["fingerprint"] for name in ("recon", "latents")}
    assert everything == dict.fromkeys(everything, of(contents))
    anomalies, factor = result("anomaly"), result("anomaly")["model"]["factor"]
    assert anomalies["data"]["fingerprint"] == of(contents, factor)
    assert anomalies["normal"]["fingerprint"] == of(
        (content for path, content in zip(files, contents, strict=True) if path.parent.name == "b" * 200), factor
    )
    table = pq.read_table(jobs.places["table"])
    assert result("factors")["data"]["fingerprint"] == of((row["bytes"] for row in table["image"].to_pylist()), factor)
    walked = result("interpolate")["data"]
    by_name = {
        str(path.relative_to(jobs.places["data"])): content for path, content in zip(files, contents, strict=True)
    }
    assert walked["fingerprint"] == of((by_name[name] for name in walked["images"]), factor)
    likely = pq.read_table(jobs("likelihood").folder / "images.parquet")["index"].to_pylist()  # others fit the scale
    assert result("likelihood")["data"]["fingerprint"] == of((contents[index] for index in likely), factor)
    train, test = result("probe")["data"]["fingerprints"]
    assert train != test and of(contents) not in (train, test)
