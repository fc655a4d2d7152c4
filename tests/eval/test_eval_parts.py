"""The evaluator's parts by themselves: shards on disk, features in files, distances, what is shown."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pytest
import torch

from latent_ae.config import UserError
from latent_ae.data.held_out import HeldOutImage
from latent_ae.metrics.distances import frechet_of_features, mmd_without_groups, squared_mmd
from latent_ae.metrics.labels import shift_keys
from latent_ae.models.loading import first_stage
from latent_ae.pretrained.inception import InceptionFeatures
from latent_ae_eval.features import collect, frechet, inception_network
from latent_ae_eval.recon.manifest import evaluation_key, reference_key
from latent_ae_eval.recon.measure import evaluate_reconstruction
from latent_ae_eval.recon.pictures import chosen_rows
from latent_ae_eval.recon.settings import ReconSettings
from latent_ae_eval.recon.shard import Measurer
from latent_ae_eval.recon.summary import kernel, means, unseen_reason
from latent_ae_eval.storage import FeatureFile, ReferenceCache, Shard, WorkFolder
from tests.eval.small import settings_with, write_photos
from tests.tiny_models import tiny

pytestmark = pytest.mark.usefixtures("own_cache")


def feature_files(folder, count: int, dimensions: int, noise: float = 0.3) -> tuple[FeatureFile, FeatureFile]:
    """Originals, and reconstructions that resemble them one by one."""
    rng = np.random.default_rng(0)
    x = np.maximum(rng.normal(size=(count, dimensions)), 0)
    y = x + noise * rng.normal(size=x.shape) + 0.02
    files = FeatureFile(folder / "a.f32"), FeatureFile(folder / "b.f32")
    for file, values in zip(files, (x, y), strict=True):
        for part in np.array_split(values, 3):
            file.append(part)
    return files


def rows_of(file: FeatureFile) -> np.ndarray:
    return file.rows(np.arange(file.count))


@pytest.mark.parametrize("count", [60, 300])
def test_distances_of_files_are_those_of_their_features(tmp_path, count):
    """With fewer vectors than dimensions, and with more (sums, in groups)."""
    a, b = feature_files(tmp_path, count, 80)
    assert np.array_equal(a.rows(np.array([7, 3])), rows_of(a)[[7, 3]])
    value, interval = frechet(a, b)
    assert value == pytest.approx(frechet_of_features(rows_of(a), rows_of(b)), rel=1e-9)
    left_out = [
        frechet_of_features(np.delete(rows_of(a), np.s_[g::10], 0), np.delete(rows_of(b), np.s_[g::10], 0))
        for g in range(10)
    ]
    half = 2.262157 * np.sqrt(0.9 * np.square(left_out - np.mean(left_out)).sum())
    assert interval == pytest.approx([value - half, value + half], rel=1e-6)
    value, interval = kernel(a, b)
    assert value == pytest.approx(squared_mmd(rows_of(a), rows_of(b), paired=True), rel=1e-6)
    assert kernel(a, a)[0] == pytest.approx(0, abs=1e-9)  # a perfect first stage is at no distance
    assert interval[0] < value < interval[1]
    (tmp_path / "few").mkdir()
    assert frechet(*feature_files(tmp_path / "few", 49, 8))[1] is None


def test_leaving_out_groups_is_leaving_them_out():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 23, 6))
    for group, value in enumerate(mmd_without_groups(x, y, 5)):
        kept = np.arange(23) % 5 != group
        assert value == pytest.approx(squared_mmd(x[kept], y[kept], paired=True), rel=1e-9)


def test_the_interval_of_a_kernel_distance_has_about_the_right_width():
    """Reconstructions resemble their originals one by one, so it is much narrower than that of two independent sets."""
    rng, values, halves = np.random.default_rng(0), [], []
    for _ in range(150):
        x = rng.normal(size=(60, 16))
        y = x + 0.5 * rng.normal(size=x.shape)
        values.append(squared_mmd(x, y, paired=True))
        left_out = np.array(mmd_without_groups(x, y, 10))
        halves.append(1.96 * np.sqrt(0.9 * np.square(left_out - left_out.mean()).sum()))
    assert 0.75 < np.mean(halves) / (1.96 * np.std(values)) < 1.5


def test_the_interval_of_a_distance_over_subsets_holds_its_expectation(tmp_path):
    """Subsets of originals and of reconstructions are of different images, which adds noise of its own."""
    rng, inside = np.random.default_rng(0), 0
    draw = lambda count: (x := rng.normal(size=(count, 8)), x + 0.1 * rng.normal(size=x.shape))  # noqa: E731
    truth = np.mean([squared_mmd(*draw(200)) for _ in range(300)])
    for number in range(60):
        files = FeatureFile(tmp_path / f"{number}a.f32"), FeatureFile(tmp_path / f"{number}b.f32")
        for file, values in zip(files, draw(200), strict=True):
            file.append(values.astype(np.float32))
        value, (low, high) = kernel(*files, subset_size=20)
        assert value == pytest.approx((low + high) / 2)
        inside += low < truth < high
    assert inside >= 50  # 57 on average, and 22 by the jackknife alone


def test_a_shard_of_another_evaluation_or_a_changed_one_is_never_taken(tmp_path, capsys):
    shard = Shard([{"index": 3, "name": "a"}], ["b: torn"], {"vgg16.input": torch.ones(1, 4)})
    one, other = WorkFolder(tmp_path / "work", {"seed": 0}), WorkFolder(tmp_path / "work", {"seed": 1})
    assert one.begin() == 0
    one.write(5, shard)
    again = WorkFolder(tmp_path / "work", {"seed": 0})
    assert again.begin() == 1 and again.done() == {5} and other.done() == frozenset()
    read = again.read(5)
    assert read.rows == shard.rows and read.skipped == shard.skipped
    (path,) = (tmp_path / "work").glob("shard-*")
    for position in (-1, path.read_bytes().index(b"torn")):  # a number, a note
        content = bytearray(path.read_bytes())
        content[position] ^= 1
        path.write_bytes(content)
        assert again.done() == frozenset()
        again.write(5, shard)
    (tmp_path / "work/thesis.tex").write_text("not ours")
    (tmp_path / "work/.shard-1-000000.safetensors.9.part").write_text("cut short")
    assert other.begin() == 0 and "keeps 1 finished parts" in capsys.readouterr().err
    other.write(1, shard)
    other.remove()  # a trial with other settings costs nothing of an evaluation that was killed
    assert again.begin() == 1 and again.done() == {5}
    again.remove()
    assert [found.name for found in (tmp_path / "work").iterdir()] == ["thesis.tex"]
    unknown = WorkFolder(tmp_path / "work", None)
    unknown.begin()
    unknown.write(0, shard)
    again.begin()  # nothing can resume that one
    assert [found.name for found in (tmp_path / "work").iterdir()] == ["thesis.tex"]
    assert WorkFolder(tmp_path, None).token != WorkFolder(tmp_path, None).token


def test_a_changed_reference_file_is_not_believed(tmp_path):
    cache = ReferenceCache({"crop_px": 32})
    cache.keep(["a", "b"], torch.arange(8.0).view(2, 4))
    assert torch.equal(cache.find(["a", "b"]), torch.arange(8.0).view(2, 4))
    assert cache.find(["b", "a"]) is None and ReferenceCache({"crop_px": 16}).find(["a", "b"]) is None
    (path,) = cache.folder.iterdir()
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    assert cache.find(["a", "b"]) is None


def test_keys_hold_all_that_numbers_depend_on():
    default = ReconSettings()
    parts = {"model": "m", "data": "d", "shard": 16, "networks": {"inception": "i"}}
    keys = [evaluation_key(default, **parts | {name: {"x": "x"}}) for name in parts]
    changes = [{"seed": 1}, {"limit": 5}, {"dtype": "bf16"}, {"rounding": "cut"}, {"frechet": ()}, {"baseline": False}]
    keys += [evaluation_key(default.model_copy(update=change), **parts) for change in changes]
    keys.append(evaluation_key(default, **parts))
    assert len({json.dumps(key) for key in keys}) == len(keys)
    assert evaluation_key(default.model_copy(update={"batch_size": 1, "num_workers": 0}), **parts) == keys[-1]
    changes = [{"resample": "linear"}, {"rounding": "cut"}, {"extractor": "pytorch-fid"}, {"crop_px": 128}]
    changes += [{"resize_px": 300}, {"background": (0, 0, 0)}]
    references = [reference_key(default.model_copy(update=change), 3, 8, "i") for change in changes]
    references += [reference_key(default.model_copy(update={"bands": ((0, 1, 2),)}), 4, 8, "i")]
    references += [reference_key(default, *words) for words in ((4, 8, "i"), (3, 8, "i"), (1, 8, "i"), (3, 8, "j"))]
    assert len({json.dumps(key) for key in references}) == len(references)
    assert reference_key(default, 3, 4, "i") == reference_key(default, 3, 8, "i")  # of a crop the factor does not enter
    assert reference_key(default.model_copy(update={"latents": ("mode",)}), 3, 8, "i") == references[-3]


def test_the_worst_come_first_and_what_is_not_finite_is_the_worst():
    table = pa.table({"mode_psnr": [10.0, 30.0, None, 20.0, 25.0, 15.0], "index": range(6)})
    assert chosen_rows(table, "mode", 2) == {"Worst": [2, 0], "Median": [3, 5], "Best": [1, 4]}
    table = table.append_column("mode_lpips_vgg", pa.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]))
    assert chosen_rows(table, "mode", 1) == {"Worst": [5], "Median": [2], "Best": [0]}
    assert chosen_rows(pa.table({"mode_psnr": pa.array([None, None], pa.float64())}), "mode", 3) == {"Worst": [1, 0]}
    assert chosen_rows(table, "sample", 3) == {} and chosen_rows(table, "mode", 0) == {}


def measured(items: list[HeldOutImage], model, inception: str, **changes) -> Shard:
    settings = settings_with(frechet=("inception",), inception_weights=inception, **changes)
    network = InceptionFeatures(settings.resolved().extractor, inception)
    networks = {"inception": inception_network(network, torch.device("cpu"))}
    return Measurer(first_stage(model), settings, torch.device("cpu"), networks, {}).measure(items)


def test_features_are_those_of_the_rounded_pixels_of_each_kind_and_nan_where_there_are_none(inception):
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sizes = [images[0], images[1, :, :8], images[2]]  # the second comes last: batches are of one shape
    items = [HeldOutImage(i, f"{i}", image, digest=f"{i}") for i, image in enumerate(sizes)]
    items.append(HeldOutImage(3, "torn", None, "cut short"))

    def spoils_the_third(given):
        made = given * 0.9
        if torch.equal(given[-1], images[2]):
            made[-1, 0, 0, 0] = torch.inf
        return made

    shard = measured(items, spoils_the_third, inception, crop_px=None, batch_size=2)
    assert [row["index"] for row in shard.rows] == [1, 0, 2] and shard.skipped == ["torn: cut short"]
    network = InceptionFeatures(weights=inception)
    levels = ((images[0] * 0.9 + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)[None]
    torch.testing.assert_close(shard.features["inception.mode"][1], network(levels)[0], rtol=1e-4, atol=1e-5)
    assert shard.features["inception.mode"].isfinite().all(1).tolist() == [True, True, False]
    assert shard.features["inception.input"].isfinite().all() and shard.rows[2]["mode_psnr"] is None
    other = measured(items[:1], lambda given: given, inception, crop_px=None, extractor="pytorch-fid")
    assert not torch.allclose(other.features["inception.input"][0], shard.features["inception.input"][1], rtol=1e-2)


def test_shards_come_together_in_the_order_of_the_images(tmp_path):
    work = WorkFolder(tmp_path, {})
    work.begin()
    for number, indices in ((1, [5, 4]), (0, [2, 0, 1])):
        rows = [{"index": i, "name": f"{i}", "channels": 3, "height": 8, "width": 8} for i in indices]
        rows = [row | {"mode_psnr": float(row["index"]), "mode_ssim": None} for row in rows]
        features = torch.tensor(indices, dtype=torch.float32)[:, None].expand(-1, 2).clone()
        made = features + 10
        made[features == 4] = torch.nan
        work.write(number, Shard(rows, [f"torn {number}"], {"vgg16.input": features, "vgg16.mode": made}))
    table, skipped, files = collect(work, work.done())
    assert table["index"].to_pylist() == [0, 1, 2, 4, 5] and skipped == ["torn 0", "torn 1"]
    # image 4 has no finite reconstruction, so it counts on neither side
    assert rows_of(files["vgg16.input"])[:, 0].tolist() == [0, 1, 2, 5]
    assert rows_of(files["vgg16.mode"])[:, 0].tolist() == [10, 11, 12, 15]
    notes: list[str] = []
    assert means(table, "mode", notes.append, 0) == ({"n": 5, "psnr": 2.4, "ssim": None}, {})
    assert notes == ["mode_ssim: 5 of 5 images left out, a side is shorter than 11 px"]


def test_protocols_reach_the_pixels(tmp_path):
    """Each part that a protocol sets changes what it is for, and nothing else is silently the default's."""
    photos, model = write_photos(tmp_path / "photos", 2, side=90), tiny("AutoencoderKL")

    def row(**changes):
        settings = settings_with(latents=("mode",), resize_px=41, **changes)
        return evaluate_reconstruction(model, photos, settings)["images"][0]

    assert len({row(resample=name)["mode_psnr"] for name in ("adm", "bicubic", "tensor", "linear")}) == 4
    levels, floats = row(), row(protocol="vavae", resample="adm")
    assert floats["mode_psnr"] == pytest.approx(levels["mode_psnr"], abs=0.05)
    assert abs(floats["mode_ssim"] - levels["mode_ssim"]) > 1e-3  # in [-1, 1], not in [0, 1]


def test_a_second_evaluation_into_the_same_folder_is_refused(tmp_path):
    photos, results = write_photos(tmp_path / "photos", 2), []

    def inner(images):
        with pytest.raises(UserError, match="another evaluation is writing into"):
            evaluate_reconstruction(tiny("AutoencoderKL"), photos, settings_with(), out=tmp_path / "out")
        results.append(images)
        return images

    evaluate_reconstruction(inner, photos, settings_with(num_pictures=0), out=tmp_path / "out")
    assert results and (tmp_path / "out/result.json").is_file()


def test_a_model_in_another_precision_is_a_copy_and_its_config_counts():
    model = tiny("AutoencoderKL")
    assert first_stage(model, dtype="bf16").dtype == torch.bfloat16
    assert next(model.parameters()).dtype == torch.float32
    half = tiny("AutoencoderKL").bfloat16()
    assert first_stage(half).dtype == torch.float32 and next(half.parameters()).dtype == torch.bfloat16
    before = first_stage(model).sha256
    model.register_to_config(act_fn="gelu")
    assert first_stage(model).sha256 != before


def test_what_a_function_gives_is_checked():
    class Mine(type(tiny("AutoencoderKL"))):
        pass

    torch.manual_seed(0)
    assert dataclasses.is_dataclass(first_stage(torch.compile(tiny("AutoencoderKL"))))
    assert first_stage(Mine(block_out_channels=(8,), norm_num_groups=4)).name == "AutoencoderKL"
    for made, shown in ((None, "NoneType"), (torch.zeros(1, 1, 8, 8), r"\(1, 1, 8, 8\)")):
        with pytest.raises(UserError, match=f"gives {shown} for images of"):
            first_stage(lambda images, made=made: made).reconstruct(torch.zeros(1, 3, 8, 8))


def test_channels_in_bands_are_no_colours():
    """Neither their names nor networks that see red, green and blue would know their order."""
    assert shift_keys(3) == ["shift_red", "shift_green", "shift_blue"]
    assert shift_keys(3, ((2, 1, 0),)) == ["shift_00", "shift_01", "shift_02"]
    for network in ("inception", "dinov2", "vgg16"):
        assert unseen_reason(network, 3, ()) == "" != unseen_reason(network, 3, ((2, 1, 0),))
