"""Comparisons: intervals against scipy and the t interval, refusals, and what a reader gets to see."""

import json
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.stats

from latent_ae.__main__ import main
from latent_ae.config import UserError
from latent_ae.metrics.distances import jackknife_interval
from latent_ae.metrics.labels import Label, label_of
from latent_ae_eval.compare import measure as module
from latent_ae_eval.compare.measure import (
    CHANCE,
    DIFFERS,
    INDEPENDENT,
    OTHERWISE,
    PAIRED,
    UNKNOWN,
    compare,
    independent_interval,
    mean_intervals,
)
from latent_ae_eval.compare.report import comparison_text
from latent_ae_eval.compare.results import label_at
from latent_ae_eval.job import job_of
from latent_ae_eval.latents import HEALTH
from tests.economy import drawn
from tests.made_jobs import COMMANDS
from tests.made_results import HOSTILE, result, table, write
from tests.report.html_reader import read


def made(tmp_path, name, *, rows=None, parquet=True, changes=None, **numbers):
    rows = rows or table(**numbers)
    return write(tmp_path / name, result(rows, name, **(changes or {})), rows if parquet else None)


def found(comparison, metric="psnr", kind="mode", of="B"):
    (row,) = (r for r in comparison["differences"] if (r["metric"], r["part"], r["of"]) == (metric, kind, of))
    return row


def test_interval_is_scipys_percentile_bootstrap_and_near_the_t_interval():
    values = np.random.default_rng(1).gamma(2.0, 1.0, size=(500, 2))
    ours = mean_intervals(values)
    for column, (low, high) in zip(values.T, ours, strict=True):
        theirs = scipy.stats.bootstrap(
            (column,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
        ).confidence_interval
        width = theirs.high - theirs.low
        # a quantile of 2,000 resamples is itself uncertain by some 3 % of the width
        assert abs(low - theirs.low) < 0.06 * width and abs(high - theirs.high) < 0.06 * width
        t = scipy.stats.t.interval(0.95, 499, column.mean(), column.std(ddof=1) / 500**0.5)
        assert abs(low - t[0]) < 0.08 * width and abs(high - t[1]) < 0.08 * width


def test_chunks_do_not_move_the_interval_and_gaps_are_left_out(monkeypatch):
    values = np.random.default_rng(1).normal(size=(200, 2))
    whole = mean_intervals(values)
    monkeypatch.setattr(module, "CHUNK", 7 * 200)
    np.testing.assert_allclose(mean_intervals(values), whole, rtol=1e-12)
    values[:, 1] = np.nan
    values[:100, 1] = 1.5
    np.testing.assert_allclose(mean_intervals(values)[0], whole[0], rtol=1e-12)
    assert mean_intervals(values)[1].tolist() == [1.5, 1.5]


def test_equal_models_differ_in_about_one_comparison_of_twenty():
    differences = np.random.default_rng(3).normal(size=(100, 1000))
    low, high = mean_intervals(differences).T
    false_alarms = np.mean((low > 0) | (high < 0))
    # 0.05 +- 3.3 standard errors of 1,000 comparisons, and the bootstrap's own 0.005 at n = 100
    assert 0.03 < false_alarms < 0.08


def test_equal_models_on_other_images_each_differ_in_one_comparison_of_twenty_or_fewer():
    """Half-widths from ten groups each; where both are as wide, Student's quantile of one is a little too wide."""
    values = np.random.default_rng(4).normal(size=(2, 5000, 10))
    left_out = (values.sum(2)[..., None] - values) / 9
    means = values.mean(2)
    false_alarms = 0
    for a, b, without_a, without_b in zip(*means, *left_out, strict=True):
        pair = tuple(jackknife_interval(a, without_a)), tuple(jackknife_interval(b, without_b))
        low, high = independent_interval((a, pair[0]), (b, pair[1]))
        false_alarms += low > 0 or high < 0
    assert 0.03 < false_alarms / 5000 < 0.05  # P(|T| > 2.262) with 18 degrees of freedom: 0.036


def test_a_paired_difference_that_independent_intervals_miss(tmp_path):
    a, b = made(tmp_path, "a", noise=0.2), made(tmp_path, "b", noise=0.2, seed=1, shift=0.2)
    row = found(compare([a, b]))
    assert row["verdict"] == DIFFERS and row["better"] == "B" and row["method"] == PAIRED and row["n"] == 60
    pairs = zip(table(noise=0.2), table(noise=0.2, seed=1, shift=0.2), strict=True)
    differences = [y["mode_psnr"] - x["mode_psnr"] for x, y in pairs]
    theirs = scipy.stats.bootstrap((differences,), np.mean, method="percentile").confidence_interval
    assert row["difference"] == pytest.approx(np.mean(differences))
    assert row["interval"] == pytest.approx(theirs, abs=0.01)
    (b / "images.parquet").unlink()
    comparison = compare([a, b])
    row = found(comparison)
    assert row["verdict"] == CHANCE and row["better"] is None and row["method"] == INDEPENDENT
    assert "B and A are not compared image by image: B has no images.parquet." in comparison["notes"]
    lower = found(compare([made(tmp_path, "a2", noise=0.2), made(tmp_path, "b2", noise=0.2, shift=0.2)]), "lpips_vgg")
    assert lower["difference"] < 0 and lower["better"] == "B"


def test_the_same_model_does_not_differ_from_itself(tmp_path):
    comparison = compare([made(tmp_path, "a"), made(tmp_path, "b")])
    assert {row["verdict"] for row in comparison["differences"]} == {CHANCE, UNKNOWN}
    assert found(comparison, "kid")["verdict"] == UNKNOWN  # a value without an interval
    assert all(row["best"] is None for row in comparison["metrics"])


def test_independent_half_widths_add_as_squares(tmp_path):
    b = {"metrics": {"mode": {"fid": 1.3}}, "intervals": {"mode": {"fid": [1.1, 1.5]}}}
    row = found(compare([made(tmp_path, "a"), made(tmp_path, "b", changes=b)]), "fid")
    assert row["difference"] == pytest.approx(0.3) and row["method"] == INDEPENDENT
    half = (0.1**2 + 0.2**2) ** 0.5
    assert row["interval"] == pytest.approx([0.3 - half, 0.3 + half]) and row["verdict"] == DIFFERS


def test_best_beats_every_other_or_is_not_named(tmp_path):
    a, b = made(tmp_path, "a", noise=0.1), made(tmp_path, "b", noise=0.1, seed=1, shift=1)
    c = made(tmp_path, "c", noise=0.1, seed=2, shift=1)  # as good as b
    d = made(tmp_path, "d", noise=0.1, seed=3, shift=2)

    def best(*folders):
        (row,) = (r for r in compare(folders)["metrics"] if (r["metric"], r["part"]) == ("psnr", "mode"))
        return row["best"]

    assert best(a, b) == "B" and best(b, a) == "A" and best(a, b, c) is None and best(a, b, c, d) == "D"


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"protocol": {"crop_px": 128}}, "protocol.crop_px: A 256, B 128"),
        ({"protocol": {"border": "cut"}}, "protocol.border: A not recorded, B cut"),
        ({"protocol": {"name": "ldm"}}, "protocol.name: A default, B ldm"),
        ({"protocol": {"changed": {"bands": [1, 2]}}}, "protocol.changed.bands: A not recorded, B 1 2"),
        ({"data": {"fingerprint": "e" * 64}}, "data.fingerprint: A ffffffffffffffff, B eeeeeeeeeeeeeeee"),
        ({"data": {"fingerprint": None}}, "data.fingerprint: A ffffffffffffffff, B not recorded"),
        ({"data": {"num_images": 61}}, "number of images: A 60, B 61"),
        ({"seed": 1}, "seed of the posterior's samples: A 0, B 1"),
    ],
)
def test_what_was_measured_otherwise_is_refused_and_told_loudly_when_compared_anyway(tmp_path, changes, line, capsys):
    a, b = made(tmp_path, "a"), made(tmp_path, "b", changes=changes)
    with pytest.raises(UserError, match="not measured in the same way") as refusal:
        compare([a, b])
    assert line in str(refusal.value) and "--anyway" in str(refusal.value)
    assert main(["eval", "compare", str(a), str(b), "--anyway", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    comparison = json.loads(printed.out)
    assert comparison["differing"] == [line] and comparison["comparable"] is False
    assert {row["verdict"] for row in comparison["differences"]} == {OTHERWISE}
    assert {row["best"] for row in comparison["metrics"]} == {None}
    loud = f"NOT MEASURED IN THE SAME WAY: {line}"
    shown = read((tmp_path / "out" / "comparison.html").read_text()).text
    assert loud in printed.err and loud in shown and "and B b (not measured in the same way)" in shown


def test_unrecorded_data_is_refused_even_when_neither_tells(tmp_path):
    nothing = {"data": {"fingerprint": None}}
    with pytest.raises(UserError, match="A not recorded, B not recorded"):
        compare([made(tmp_path, "a", changes=nothing), made(tmp_path, "b", changes=nothing)])


def test_a_deterministic_model_is_compared_by_its_mode_whatever_the_seed(tmp_path):
    changes = {"seed": 5, "protocol": {"latents": ["mode"], "changed": {"latents": ["mode"]}}}
    a, b = made(tmp_path, "a"), made(tmp_path, "b", kinds=("mode",), noise=0.1, shift=1, changes=changes)
    comparison = compare([a, b], out=tmp_path / "out")
    assert found(comparison)["better"] == "B"
    assert {row["part"] for row in comparison["differences"]} == {"mode"}
    assert "B: no figures for the latent's sample." in comparison["notes"]
    assert [row["values"]["B"] for row in comparison["metrics"] if row["part"] == "sample"] == [None] * 5


def test_a_deterministic_model_stands_beside_samples_where_a_protocol_takes_only_those(tmp_path):
    """As in the tables of papers: a codebook's reconstruction beside that of a posterior's sample."""
    sampled = {"protocol": {"latents": ["sample"]}}
    a, b = (
        made(tmp_path, "a", kinds=("sample",), changes=sampled),
        made(tmp_path, "b", kinds=("mode",), changes=sampled),
    )
    comparison = compare([a, b])
    row = found(comparison, kind="sample")
    assert row["difference"] == pytest.approx(0.5) and row["method"] == PAIRED  # samples of `table` are that much worse
    (psnr,) = (r for r in comparison["metrics"] if (r["part"], r["metric"]) == ("sample", "psnr"))
    assert psnr["best"] == "B" and None not in psnr["values"].values()


def test_independent_intervals_keep_their_longer_side():
    """Zou and Donner (2008), eq. 3, on two proportions near 1."""
    a, b = (0.95, (0.90, 0.97)), (0.99, (0.96, 1.00))
    low, high = 0.04 - (0.03**2 + 0.02**2) ** 0.5, 0.04 + (0.01**2 + 0.05**2) ** 0.5
    assert independent_interval(a, b) == pytest.approx((low, high))


def test_missing_metrics_are_named(tmp_path):
    b = made(tmp_path, "b")
    document = json.loads((b / "result.json").read_text())
    for kind in ("mode", "sample"):
        document["metrics"][kind] |= {"fid": None, "psnr": float("nan")}
        del document["metrics"][kind]["kid"]
    del document["intervals"], document["baseline"], document["notes"], document["versions"]
    write(b, document | {"seconds": float("inf")})
    comparison = compare([made(tmp_path, "a"), b], out=tmp_path / "out")
    assert "B lacks PSNR (dB), rFID, KID." in comparison["notes"]
    assert {row["metric"] for row in comparison["differences"]} == {"ssim", "lpips_vgg"}
    json.loads((tmp_path / "out" / "comparison.json").read_text(), parse_constant=pytest.fail)


def shown_charts(tmp_path, *results) -> tuple[list[str], list[str]]:
    """Titles of the charts of quality against cost, and the notes."""
    out = tmp_path / "out"
    with drawn():
        notes = compare(results, out=out)["notes"]
    text = (out / "comparison.html").read_text()
    # a title has several lines in a chart
    titles = [" ".join(re.findall(r">([^<]+)</text>", svg)) for svg in re.findall(r"<svg.*?</svg>", text, re.S)]
    return [title for title in titles if "against" in title], notes


def test_quality_is_drawn_against_time_and_size_with_names(tmp_path):
    quick = {"cost": {"seconds_per_image": {"decode": 0.0625}, "bits_per_pixel": {"fp16": 4.0, "indices": 0.5}}}
    charts, notes = shown_charts(tmp_path, made(tmp_path, "a"), made(tmp_path, "quick", changes=quick))
    assert not notes and len(charts) == 4
    expected = [(metric, axis) for axis in ("time to decode", "bits per pixel") for metric in ("PSNR", "rFID")]
    for chart, words in zip(charts, expected, strict=True):
        assert all(word in chart for word in words) and " A B " in chart
    text = read((tmp_path / "out" / "comparison.html").read_text()).text
    # a column for each model; codes are stored as their indices
    table = (
        "A aB quickparameters83,653,86383,653,863time to decode, ms per image50062.5stored latent, bits per pixel10.5"
    )
    assert table in text.replace("\n", "")
    for line in ("time (ms per image)decode50062.5", "latent (bits per pixel)fp1614", "parametersdecoder49,490,199"):
        assert line in text.replace("\n", "")


def test_a_result_of_an_older_version_is_noted_once_and_nothing_is_drawn(tmp_path):
    a, b = made(tmp_path, "a"), made(tmp_path, "b", changes={"cost": None})
    for results in ((a, b), (b, b)):
        charts, notes = shown_charts(tmp_path, *results)
        (note,) = (note for note in notes if "older version" in note)
        assert note.startswith("A, B: " if results == (b, b) else "B: ") and not charts
    assert "time (ms per image)" not in (tmp_path / "out" / "comparison.html").read_text()  # of the last two


def test_what_has_no_time_is_drawn_by_its_size_alone(tmp_path):
    b = made(tmp_path, "b", changes={"cost": {"seconds_per_image": {"encode": None, "decode": None, "whole": 0.1}}})
    charts, notes = shown_charts(tmp_path, made(tmp_path, "a"), b)
    assert len(charts) == 2 and all("bits per pixel" in chart for chart in charts)
    assert "B: no time to decode, so quality is not drawn against it." in notes


def test_times_do_not_prevent_a_comparison_and_other_machines_are_noted(tmp_path):
    a, b = made(tmp_path, "a"), made(tmp_path, "b", changes={"cost": {"device": "a graphics card", "batch_size": 8}})
    comparison = compare([a, b])
    assert comparison["comparable"] and not comparison["differing"]
    (note,) = comparison["notes"]
    assert note == (
        "Times were not taken in the same way: A a processor, float32, batches of 1, 256 x 256 px; "
        "B a graphics card, float32, batches of 8, 256 x 256 px."
    )


def test_few_images_give_no_verdict(tmp_path):
    comparison = compare([made(tmp_path, "a", num_images=5), made(tmp_path, "b", num_images=5, noise=0.1, shift=1)])
    assert {row["verdict"] for row in comparison["differences"]} == {UNKNOWN}
    assert any("5 images are too few" in note for note in comparison["notes"])


def test_images_are_matched_by_what_they_are_and_not_by_their_order(tmp_path):
    rows = table(noise=0.1, seed=1, shift=0.5)
    straight = compare([made(tmp_path, "a"), made(tmp_path, "b", rows=rows)])
    shuffled = compare([tmp_path / "a", made(tmp_path, "b", rows=rows[::-1])])
    assert straight["differences"] == shuffled["differences"] and found(straight)["method"] == PAIRED


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda rows: rows[:-1], "does not hold the images of its result"),
        (lambda rows: [row | {"digest": None} for row in rows], "does not hold the images of its result"),
        (lambda rows: [row | {"digest": f"other {row['name']}"} for row in rows], "their images are not the same"),
        (lambda rows: [row | {"mode_psnr": row["mode_psnr"] + 1} for row in rows], "of different measurements"),
        (lambda rows: [{"index": row["index"]} for row in rows], "cannot be read"),
        (lambda rows: [row | {"mode_psnr": "much"} for row in rows], "cannot be read"),
    ],
)
def test_tables_of_other_images_are_not_paired(tmp_path, damage, reason):
    a, b = made(tmp_path, "a"), made(tmp_path, "b")
    write(b, json.loads((b / "result.json").read_text()), damage(table()))
    comparison = compare([a, b])
    assert found(comparison)["method"] == INDEPENDENT and reason in " ".join(comparison["notes"])


def test_a_damaged_table_is_not_an_error(tmp_path):
    a, b = made(tmp_path, "a"), made(tmp_path, "b")
    (b / "images.parquet").write_bytes(b"PAR1 and no more")
    assert "cannot be read" in " ".join(compare([a, b])["notes"])


@pytest.mark.parametrize(
    "text, reason",
    [
        (None, "no such file"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("\udcff", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"model": {}}', '"format" is null'),
        ('{"format": "latent-ae reconstruction 2"}', '"latent-ae reconstruction 2", not that'),
        ('{"format": "latent-ae reconstruction 1"}', '"model" is not an object'),
        ({"metrics": {"mode": 3}}, '"metrics" does not hold'),
        ({"intervals": []}, '"intervals" does not hold'),
        ({"data": {"num_images": True}}, '"data.num_images"'),
        ({"format": "latent-ae ifid 1", "metrics": {"midpoints": 3}}, "what `eval ifid` writes is missing or damaged"),
        ({"notes": 5}, '"notes" is not a list'),
        ({"versions": ["x"]}, '"versions" is not an object'),
        ({"format": "latent-ae latents 1"}, "KeyError: 'health'); measure again: latent-ae eval latents"),
    ],
)
def test_what_is_no_result_is_named(tmp_path, text, reason, capsys):
    good, bad = made(tmp_path, "good"), tmp_path / "bad" / "result.json"
    bad.parent.mkdir()
    if isinstance(text, dict):
        text = json.dumps(result(table()) | text)
    if text is not None:
        bad.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert main(["eval", "compare", str(good), str(bad)]) == 2
    error = capsys.readouterr().err
    assert str(bad) in error and reason in error


def other(folder, job: str, name: str, **changes):
    """A result of another evaluation, of the model and data of `made(tmp_path, name)`."""
    base = result(table(), name)
    kept = {key: base[key] for key in ("model", "data", "versions", "notes")}
    (folder := folder / f"{job}-{name}").mkdir()
    document = {"format": job_of(job).format, "settings": {"seed": 0, "limit": None}, **kept}
    (folder / "result.json").write_text(json.dumps(document | changes))
    return folder


def midpoints(value: float, half: float) -> dict:
    return {
        "metrics": {"midpoints": {"n": 60, "frechet_vgg16": value}, "reconstructions": {"n": 60, "frechet_vgg16": 5.0}},
        "intervals": {"midpoints": {"frechet_vgg16": [value - half, value + half]}},
    }


def test_evaluations_of_one_model_stand_together_and_are_drawn_against_quality(tmp_path):
    a, b = made(tmp_path, "a"), made(tmp_path, "b", noise=0.1, shift=1)
    ifid_a, ifid_b = (other(tmp_path, "ifid", name, **midpoints(v, 1.0)) for name, v in (("a", 20.0), ("b", 30.0)))
    health = {"health": {"effective_rank": 3.5, "dead_channels": [1], "spectrum": {"latents": {"slope": -1.5}}}}
    latents_b = other(tmp_path, "latents", "b", **health)
    charts, notes = shown_charts(tmp_path, ifid_b, a, latents_b, ifid_a, b)  # in any order: B's midpoints came first
    assert [chart for chart in charts if "midpoints" in chart and "PSNR" in chart]
    comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [(m["name"], set(m["results"])) for m in comparison["models"]] == [
        ("A b", {"ifid", "latents", "recon"}),
        ("B a", {"recon", "ifid"}),
    ]
    row = found(comparison, "frechet_vgg16", "midpoints")
    assert row["job"] == "ifid" and row["better"] == "B" and row["difference"] == -10 and row["n"] == 60
    assert row["interval"] == pytest.approx([-10 - 2**0.5, -10 + 2**0.5])
    assert found(comparison, "frechet_vgg16", "reconstructions")["verdict"] == UNKNOWN  # without an interval
    values = {row["metric"]: row["values"] for row in comparison["metrics"] if row["job"] == "latents"}
    assert values == {
        "effective_rank": {"A": 3.5, "B": None},
        "dead_channels": {"A": 1.0, "B": None},
        "spectrum_slope": {"A": -1.5, "B": None},
    }
    assert "B: no result of eval latents." in notes
    text = read((tmp_path / "out" / "comparison.html").read_text()).text
    assert "At a glance" in text and "eval ifid" in text and "effective rank" in text


def located(name: str) -> dict:
    """Changes that make a result that of the model `name`."""
    return {"model": {"location": f"/m/{name}/export"}}


def test_readings_of_text_are_compared_crop_by_crop_and_by_size(tmp_path):
    folders = []
    for name, better in (("a", 0.0), ("b", 0.01)):
        ned = np.random.default_rng(0).uniform(0.2, 0.8, 40) + better  # the crops differ more than the models
        group = {"metrics": {"ned_reconstruction": ned.mean()}, "intervals": {"ned_reconstruction": [0.4, 0.6]}}
        few = {**group, "metrics": {"n": 30, **group["metrics"]}}
        more = {
            "data": {"num_images": 40, "fingerprint": "f"},
            "engine": {"version": "5"},
            "groups": {"size_px": {"8": few}},
        }
        folders.append(other(tmp_path, "text", name, **group, **more))
        rows = [{"digest": str(i), "ned_reconstruction": float(value)} for i, value in enumerate(ned)]
        pq.write_table(pa.Table.from_pylist(rows), folders[-1] / "readings.parquet")
    # beside reconstructions of another number of images
    comparison = compare([*folders, *(made(tmp_path, f"recon-{name}", changes=located(name)) for name in "ab")])
    assert len(comparison["models"]) == 2 and found(comparison)["n"] == 60
    whole, small = (found(comparison, "ned_reconstruction", part) for part in ("", "8 px"))
    assert whole["method"] == PAIRED and whole["better"] == "B" and whole["interval"] == pytest.approx([0.01, 0.01])
    assert small["method"] == INDEPENDENT and small["verdict"] == CHANCE and (whole["n"], small["n"]) == (40, 30)
    document = json.loads((folders[0] / "result.json").read_text())
    write(folders[0], document | {"engine": {"version": "4"}})
    with pytest.raises(UserError, match="eval text, engine.version: A 4, B 5"):
        compare(folders)


def test_weights_tell_models_apart_and_a_second_evaluation_is_compared_like_another_models(tmp_path):
    def moved(name, sha256):  # the same weights in two folders are one model
        return {"model": result(table(), name)["model"] | {"sha256": sha256}}

    a = made(tmp_path, "a", changes=moved("a", "1"))
    same, apart = (other(tmp_path, "ifid", n, **midpoints(1, 1), **moved(n, s)) for n, s in (("x", "1"), ("y", "2")))
    assert [set(m["results"]) for m in compare([a, same, apart])["models"]] == [{"recon", "ifid"}, {"ifid"}]
    again = made(tmp_path, "again", noise=0.1, changes=moved("a", "1"))
    assert [m["label"] for m in compare([a, again, same])["models"]] == ["A", "B"]
    with pytest.raises(UserError, match="at least two models"):
        compare([a, same])


def test_only_distances_of_reconstructions_are_called_rfid(tmp_path):
    samples = [
        other(tmp_path, "diffusion", name, metrics={"samples": {"n": 60, "fid": value}}, recipe={"steps": 5})
        for name, value in (("a", 30.0), ("b", 40.0))
    ]
    comparison = compare(samples, out=tmp_path / "samples")
    for text in (comparison_text(comparison), (tmp_path / "samples/comparison.html").read_text()):
        assert "FID" in text and "rFID, samples" not in text and "rFID ↓" not in text
    comparison = compare([made(tmp_path, "a"), made(tmp_path, "b")], out=tmp_path / "recon")
    assert "rFID" in (tmp_path / "recon/comparison.html").read_text()


def test_evaluations_under_other_conditions_are_refused(tmp_path):
    a = other(tmp_path, "ifid", "a", **midpoints(1, 1))
    b = other(
        tmp_path, "ifid", "b", **midpoints(1, 1), settings={"seed": 1, "limit": None, "batch_size": 3, "ema": True}
    )
    with pytest.raises(UserError, match="eval ifid, seed: A 0, B 1") as refusal:
        compare([a, b])
    assert "batch_size" not in str(refusal.value) and "ema" not in str(refusal.value)
    likely = {"metrics": {"elbo": {"bits_per_dimension": {"mean": 4.0, "interval": [3.0, 5.0]}}}}
    kinds = [other(tmp_path, "likelihood", k, **likely, likelihood={"kind": k}) for k in ("gaussian", "bernoulli")]
    with pytest.raises(UserError, match="eval likelihood, likelihood.kind: A gaussian, B bernoulli"):
        compare(kinds)
    trained = {"metrics": {"samples": {"n": 60, "frechet_vgg16": 9.0}, "held_out": {"frechet_vgg16": 1.0}}}
    steps = [
        other(tmp_path, "diffusion", name, **trained, settings={"lr": lr}, recipe={"lr": 1e-3, "steps": count})
        for name, lr, count in (("f", "preset", 500), ("g", 1e-3, 500), ("h", "preset", 40_000))
    ]
    assert [row["part"] for row in compare(steps[:2])["metrics"]] == ["samples"]  # a preset and its value are the same
    with pytest.raises(UserError, match="eval diffusion, recipe.steps: A 500, B 40000"):
        compare(steps[::2])
    sets = [other(tmp_path, "diffusion", name, **trained, data={"fingerprints": ["1", name]}) for name in ("i", "j")]
    with pytest.raises(UserError, match="eval diffusion, data.fingerprint: A 1 i, B 1 j"):
        compare(sets)
    c, d, e = (
        other(tmp_path, "ifid", name, **midpoints(1, 1), networks=networks)
        for name, networks in (("c", {"fid": "1", "frechet_vgg16": ""}), ("d", {"fid": "2"}), ("e", {}))
    )
    with pytest.raises(UserError, match="eval ifid, networks.fid: A 1, B 2"):
        compare([c, d])
    assert compare([c, e])["comparable"]  # what is missing is missing
    places = [
        other(tmp_path, "probe", name, features={}, data={"location": place, "test_images": 9})
        for name, place in (("a", "/d/x"), ("b", "/d/y"), ("c", "/d/x"))
    ]
    with pytest.raises(UserError, match="eval probe, data.location: A /d/x, B /d/y"):
        compare(places[:2])
    assert compare(places[::2])["comparable"]
    # a result from before fingerprints beside one that has them: the location tells
    late = other(
        tmp_path, "probe", "d", features={}, data={"location": "/d/x", "test_images": 9, "fingerprints": ["1", "2"]}
    )
    assert compare([places[0], late])["comparable"]
    with pytest.raises(UserError, match="eval probe, data.location: A /d/y, B /d/x"):
        compare([places[1], late])
    near = [
        other(tmp_path, "ifid", name, **midpoints(1, 1), neighbours_from=one, settings={"neighbours_from": path})
        for name, path, one in (
            ("k", "/d/train", {"fingerprint": "1"}),
            ("l", "/e/train", {"fingerprint": "1"}),
            ("m", "/d/train", {"fingerprint": "2"}),
            ("n", None, None),
        )
    ]
    assert compare(near[:2])["comparable"]
    for one in near[2:]:
        with pytest.raises(UserError, match="eval ifid, neighbours_from.fingerprint: A 1, B (2|not recorded)"):
            compare([near[0], one])
    facts = {"method": "spread", "number": 9, "seed": 0, "fingerprint": "1"}
    datas = ({"location": "x", "split": of, "choice": facts | {"of": of}} for of in (24, 23))
    choices = [other(tmp_path, "probe", str(data["split"]), features={}, data=data) for data in datas]
    with pytest.raises(UserError, match="images chosen from the data: A 9 of 24 images.*, B 9 of 23"):
        compare(choices)


def test_every_evaluation_has_figures_with_names(jobs, lpips_vgg):
    """Of real results, with all values that their figures name in their places."""
    for name in (name for name in COMMANDS if name != "compare"):
        document = json.loads((jobs(name).folder / "result.json").read_text())
        job = job_of(name.partition("-")[0])
        assert document["format"] == job.format
        figures = job.figures(document)
        if name != "sample":  # without data nothing is measured
            assert figures, name
        assert all(label_of(metric) != Label(metric, None, None) for _, metric in figures), name
        if job.name == "latents":
            assert set(HEALTH) <= {metric for _, metric in figures}
            assert {"noise of 0.1 stds", "half size"} <= {part for part, _ in figures}


def test_numbers_that_no_float_holds_and_parts_without_a_count_are_survived(tmp_path):
    a, b = (other(tmp_path, "ifid", name, **midpoints(1, 1)) for name in "ab")
    document = json.loads((b / "result.json").read_text())
    del document["metrics"]["midpoints"]["n"]
    document["metrics"]["reconstructions"]["frechet_vgg16"] = 10**400
    (b / "result.json").write_text(json.dumps(document))
    comparison = compare([a, b], out=tmp_path / "out")
    assert {row["part"] for row in comparison["differences"]} == {"midpoints"}


def test_models_of_one_name_are_told_apart_by_their_folders(tmp_path):
    a = made(tmp_path, "a", changes={"model": {"location": "/m/x"}})
    b = made(tmp_path, "b", changes={"model": {"location": "/n/x"}})
    assert [model["name"] for model in compare([a, b])["models"]] == ["A x (a)", "B x (b)"]


def test_labels_go_on_behind_z():
    assert [label_at(position) for position in (0, 25, 26, 51, 52, 701, 702)] == [
        "A",
        "Z",
        "AA",
        "AZ",
        "BA",
        "ZZ",
        "AAA",
    ]


def test_counts_and_folders_that_cannot_be(tmp_path, capsys):
    a = made(tmp_path, "a")
    assert main(["eval", "compare", str(a)]) == 2 and "at least two models" in capsys.readouterr().err
    assert main(["eval", "compare", str(a), str(a), "--out", str(a / "result.json")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_hostile_names_are_shown_and_never_run(tmp_path):
    changes = {"model": {"location": f"/m/{HOSTILE}\udcff"}, "notes": [HOSTILE]}
    rows = [row | {"name": HOSTILE + row["name"]} for row in table()]
    a, b = made(tmp_path, "a", rows=rows, changes=changes), made(tmp_path, "b", rows=rows)
    compare([a, b], out=tmp_path / "out")
    reader = read((tmp_path / "out" / "comparison.html").read_text())
    assert not {"script", "iframe"} & {tag for tag, _ in reader.tags} and "</script>" in reader.text


def test_equal_inputs_give_equal_files(tmp_path):
    a, b = made(tmp_path, "a"), made(tmp_path, "b", noise=0.1, seed=1)
    for out in ("one", "two"):
        compare([a / "result.json", b], out=tmp_path / out)
    for name in ("comparison.json", "comparison.html"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert [path.name for path in sorted((tmp_path / "one").iterdir())] == ["comparison.html", "comparison.json"]


def test_help_and_refusals_need_no_heavy_imports(tmp_path):
    a, b = made(tmp_path, "a"), made(tmp_path, "b", changes={"seed": 1})
    code = (
        "import sys\nfrom latent_ae.__main__ import main\n"
        "try:\n    main(['eval', 'compare', '--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        f"assert main(['eval', 'compare', {str(a)!r}, {str(b)!r}]) == 2\n"
        "assert not {'torch', 'diffusers', 'datasets', 'pyarrow', 'matplotlib'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "example: latent-ae eval compare" in done.stdout
