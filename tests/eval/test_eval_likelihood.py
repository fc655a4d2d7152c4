"""Bounds against linear-Gaussian models, whose likelihood is known in closed form, and against torch.distributions."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image
from scipy import stats
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from latent_ae.__main__ import main
from latent_ae.config import UserError
from latent_ae.data.rng import binary_images, posterior_noise
from latent_ae.models import linear_init as linear_start
from latent_ae.models.build import build_autoencoder
from latent_ae.models.likelihood import Likelihood
from latent_ae.models.posterior import Drawn, draw
from latent_ae.models.settings import ModelSettings
from latent_ae_eval.compare.measure import PAIRED, compare
from latent_ae_eval.likelihood.measure import measure_likelihood
from latent_ae_eval.likelihood.report import findings
from latent_ae_eval.likelihood.settings import LikelihoodSettings

SIGMA = 0.5
DENSITY = LikelihoodSettings(
    likelihood="gaussian", scale=SIGMA, discretised=False, num_workers=0, samples=64, batch_size=4, max_bad_fraction=0
)


class Affine(nn.Module):
    """Encoder or decoder: a matrix and a vector on the flattened input."""

    def __init__(self, matrix: Tensor, offset: Tensor, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.matrix, self.offset, self.shape = nn.Parameter(matrix.float()), nn.Parameter(offset.float()), shape

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self.matrix.T + self.offset).view(-1, *self.shape)


def affine_autoencoder(encoder: Affine, decoder: Affine, kind: type[AutoencoderKL] = AutoencoderKL) -> AutoencoderKL:
    """Of 4 px images and latents of 2 x 2 px."""
    autoencoder = kind(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=LATENT[0],
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    autoencoder.encoder, autoencoder.decoder = encoder, decoder
    return autoencoder


IMAGE, LATENT = (3, 4, 4), (2, 2, 2)
D, Z = math.prod(IMAGE), math.prod(LATENT)
EYE = torch.eye(Z, dtype=torch.float64)


def tied(weights: Tensor, offset: Tensor, mean_off: float = 0.0, variances: Tensor | None = None) -> AutoencoderKL:
    """Decodes by `weights` (D x Z); the posterior's mean is the true one plus `mean_off`, its variances the true
    posterior's, or as given."""
    covariance = torch.linalg.inv(EYE + weights.T @ weights / SIGMA**2)
    back = covariance @ weights.T / SIGMA**2
    logvar = (covariance.diagonal() if variances is None else variances).log()
    encoder = Affine(
        torch.cat([back, torch.zeros_like(back)]),
        torch.cat([mean_off - back @ offset, logvar]),
        (2 * LATENT[0], *LATENT[1:]),
    )
    return affine_autoencoder(encoder, Affine(weights, offset, IMAGE))


def random_weights() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(D, Z, generator=generator, dtype=torch.float64)
    return 0.25 * weights, 0.1 * torch.randn(D, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    levels = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), dtype=np.uint8)
    for number, one in enumerate(levels):
        Image.fromarray(one).save(folder / f"{number}.png")
    return folder


def read(folder: Path) -> Tensor:
    """Flattened, float64 in [-1, 1]."""
    found = [np.array(Image.open(path)) / 127.5 - 1.0 for path in sorted(folder.glob("*.png"))]
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).flatten(1)


def rows_of(result_folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(result_folder / "images.parquet").to_pylist()


def column(rows: list[dict[str, Any]], key: str) -> Tensor:
    return torch.tensor([row[key] for row in rows], dtype=torch.float64)


def evidence(x: Tensor, weights: Tensor, offset: Tensor) -> tuple[Tensor, MultivariateNormal]:
    """log p(x) and p(z | x) of the linear-Gaussian model (Tipping and Bishop 1999, eq. 3 and 6)."""
    eye = torch.eye(len(weights), dtype=torch.float64)
    marginal = MultivariateNormal(offset, weights @ weights.T + SIGMA**2 * eye)
    covariance = torch.linalg.inv(torch.eye(weights.shape[1], dtype=torch.float64) + weights.T @ weights / SIGMA**2)
    means = (x - offset) @ weights @ covariance / SIGMA**2
    return marginal.log_prob(x), MultivariateNormal(means, covariance)


def test_with_the_true_posterior_every_sample_gives_the_likelihood(images: Path, tmp_path: Path) -> None:
    weights = 0.5 * torch.linalg.qr(random_weights()[0]).Q  # at right angles: the true posterior is diagonal
    offset = random_weights()[1]
    result = measure_likelihood(tied(weights, offset), images, DENSITY, out=tmp_path)
    expected, _ = evidence(read(images), weights, offset)
    rows = rows_of(tmp_path)
    torch.testing.assert_close(column(rows, "importance_bound"), expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(column(rows, "effective_samples"), torch.full((7,), 64.0, dtype=torch.float64))
    bits = -expected.mean().item() / D / math.log(2.0) + math.log2(127.5)
    assert result["metrics"]["importance_bound"]["bits_per_dimension"]["mean"] == pytest.approx(bits, abs=1e-4)
    # of the ELBO only the noise of the distortion is left
    assert result["metrics"]["elbo"]["nats_per_image"]["mean"] == pytest.approx(expected.mean().item(), abs=1.0)
    assert result["latent_dimensions"] == Z


def test_the_gap_is_the_kl_to_the_true_posterior(images: Path, tmp_path: Path) -> None:
    """ELBO = log p(x) - KL(q || p(z | x)), and the importance-weighted bound rises to log p(x) from below."""
    weights, offset = random_weights()
    module = tied(weights, offset, mean_off=0.2, variances=torch.full((Z,), 0.3, dtype=torch.float64))
    settings = DENSITY.model_copy(update={"samples": 4096})
    result = measure_likelihood(module, images, settings, out=tmp_path)
    x = read(images)
    expected, true = evidence(x, weights, offset)
    own = MultivariateNormal(true.mean + 0.2, 0.3 * EYE)
    gap = kl_divergence(own, true)
    rows = rows_of(tmp_path)
    assert float(gap.min()) > 1.0
    torch.testing.assert_close(column(rows, "elbo"), expected - gap, rtol=0, atol=0.3)
    torch.testing.assert_close(column(rows, "importance_bound"), expected, rtol=0, atol=0.15)
    curve = [point["nats_per_image"] for point in result["curve"]]
    assert [point["samples"] for point in result["curve"]] == [2**n for n in range(13)]
    assert curve == sorted(curve) and curve[6] < expected.mean() < curve[-1] + 0.1
    # the samples of the curve, once more: disjoint pairs
    assert curve[1] - curve[0] > 0.1
    # rate and distortion apart
    prior = Normal(0.0, 1.0)
    rate = kl_divergence(Normal(own.mean, math.sqrt(0.3)), prior).sum(1)
    torch.testing.assert_close(column(rows, "rate"), rate, rtol=1e-4, atol=1e-4)
    made = true.mean.add(0.2) @ weights.T + offset
    spread = 0.3 * weights.square().sum() / (2 * SIGMA**2)
    distortion = D / 2 * math.log(2 * math.pi * SIGMA**2) + (x - made).square().sum(1) / (2 * SIGMA**2) + spread
    torch.testing.assert_close(column(rows, "distortion"), distortion, rtol=0, atol=0.3)
    metrics = {name: found["bits_per_dimension"]["mean"] for name, found in result["metrics"].items()}
    assert metrics["elbo"] == pytest.approx(metrics["distortion"] + metrics["rate"])
    assert metrics["rate"] == pytest.approx(rate.mean().item() / D / math.log(2.0), rel=1e-4)


def test_a_linear_start_is_a_linear_gaussian_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A real AutoencoderKL: its matrix is what it decodes basis vectors to."""
    monkeypatch.setattr(linear_start, "K", 256.0)  # the larger, the more linear
    shape = {"block_out_channels": (16, 16), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4}
    module = build_autoencoder(ModelSettings(init="linear", **shape), sample_size=8).eval()  # type: ignore[arg-type]
    (tmp_path / "data").mkdir()
    ramp = np.linspace(0.2, 0.8, 8)
    for number in range(4):
        smooth = 128 + 100 * np.sin(6 * np.outer(ramp, ramp)[..., None] + number + np.arange(3))
        Image.fromarray(smooth.astype(np.uint8)).save(tmp_path / f"data/{number}.png")
    with torch.no_grad():
        module.encoder.conv_out.bias[4:] = math.log(0.4)
        zero = module.decode(torch.zeros(1, 4, 4, 4)).sample.flatten().double()
        basis = torch.eye(64).view(64, 4, 4, 4)
        weights = (module.decode(basis).sample.flatten(1).double() - zero).T
        x = read(tmp_path / "data")
        mean = module.encode(x.float().view(-1, 3, 8, 8)).latent_dist.mean.flatten(1).double()
    result = measure_likelihood(module, tmp_path / "data", DENSITY.model_copy(update={"samples": 1024}), out=tmp_path)
    expected, true = evidence(x, weights, zero)
    gap = kl_divergence(MultivariateNormal(mean, 0.4 * torch.eye(64, dtype=torch.float64)), true)
    rows = rows_of(tmp_path)
    # the distortion's squares over 1024 samples: their standard error
    slope = 4 * 0.4 * ((x - zero - mean @ weights.T) @ weights).square().sum(1)
    error = torch.sqrt((slope + 2 * 0.4**2 * (weights.T @ weights).square().sum()) / (4 * SIGMA**4) / 1024)
    assert float(error.max()) < 1.0 and bool(((column(rows, "elbo") - (expected - gap)).abs() < 4 * error).all())
    bound = column(rows, "importance_bound")
    assert bool((bound < expected + 0.3).all()) and bool((bound > expected - 0.7 * gap).all())
    curve = [point["nats_per_image"] for point in result["curve"]]
    assert curve == sorted(curve)


def constant(value: float, kind: type[AutoencoderKL] = AutoencoderKL) -> AutoencoderKL:
    """Decodes the same value whatever the latent, which is the prior."""
    encoder = Affine(torch.zeros(2 * Z, D), torch.zeros(2 * Z), (2 * LATENT[0], *LATENT[1:]))
    return affine_autoencoder(encoder, Affine(torch.zeros(D, Z), torch.full((D,), value), IMAGE), kind)


@pytest.mark.parametrize("kind", ["gaussian", "logistic"])
def test_probabilities_of_all_levels_sum_to_one(kind: str, tmp_path: Path) -> None:
    for level in range(256):
        Image.fromarray(np.full((4, 4, 3), level, dtype=np.uint8)).save(tmp_path / f"{level:03d}.png")
    settings = LikelihoodSettings(likelihood=kind, scale=0.3, samples=2, num_workers=0, batch_size=64)
    result = measure_likelihood(constant(0.6), tmp_path, settings, out=tmp_path / "out")
    bits = column(rows_of(tmp_path / "out"), "importance_bound_bits")
    assert float((2.0**-bits).sum()) == pytest.approx(1.0, abs=1e-6)
    law = {"gaussian": stats.norm, "logistic": stats.logistic}[kind](0.6, 0.3)
    edges = np.concatenate([[-np.inf], (2 * np.arange(255) + 1) / 255 - 1, [np.inf]])
    np.testing.assert_allclose(2.0 ** -bits.numpy(), np.diff(law.cdf(edges)), rtol=1e-4)
    assert result["metrics"]["rate"]["nats_per_image"]["mean"] == 0.0
    assert result["findings"][0]["name"] == "Posterior collapse"
    # whatever the number of dimensions, as in training
    for nats, name in ((4.9, "Posterior collapse"), (5.1, "Rate")):
        result["metrics"]["rate"]["nats_per_image"]["mean"] = nats
        assert next(findings(result)).name == name


def test_a_uniform_guess_of_binary_pixels_has_one_bit(images: Path, tmp_path: Path) -> None:
    module = constant(0.0)
    settings = LikelihoodSettings(likelihood="bernoulli", samples=3, num_workers=0)
    result = measure_likelihood(module, images, settings)
    assert result["metrics"]["elbo"]["bits_per_dimension"]["mean"] == pytest.approx(1.0)
    assert result["likelihood"]["scale"] is None and any("binary" in note for note in result["notes"])
    assert {found["name"] for found in result["findings"]} >= {"No better than guessing"}
    # what is drawn is what is judged
    result = measure_likelihood(constant(0.5), images, settings, out=tmp_path)
    one = 1.0 / (1.0 + math.exp(-1.0))
    for row, image in zip(rows_of(tmp_path), read(images), strict=True):
        binary = binary_images(0, [row["index"]], image.view(1, *IMAGE).float())
        ones = int((binary > 0).sum())
        expected = -(ones * math.log(one) + (D - ones) * math.log(1 - one))
        assert row["distortion"] == pytest.approx(expected, rel=1e-6)


def test_binary_draws() -> None:
    image = torch.linspace(-1, 1, 5).view(1, 1, 1, 5).expand(1, 1, 4000, 5)
    drawn = binary_images(3, [7], image)
    assert torch.equal(drawn, binary_images(3, [7], image)) and not torch.equal(drawn, binary_images(3, [8], image))
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}
    share = (drawn > 0).double().mean((0, 1, 2))
    assert share[0] == 0 and share[4] == 1 and bool((share - torch.linspace(0, 1, 5)).abs().max() < 0.03)


def test_noise_differs_between_draws_and_is_that_of_training_for_the_first() -> None:
    first = posterior_noise(1, [3, 4], (2, 3))
    before = np.random.Generator(np.random.Philox(key=[1, 3], counter=[0, 0, 0, 1]))
    np.testing.assert_array_equal(first[0].numpy(), before.standard_normal((2, 3), dtype=np.float32))
    second = posterior_noise(1, [3, 4], (2, 3), 1)
    assert not torch.isclose(first, second).any()
    assert torch.equal(posterior_noise(1, [4], (2, 3), 1)[0], second[1])


def test_batches_change_nothing(model: str, photos: str, tmp_path: Path) -> None:
    settings = LikelihoodSettings(crop_px=32, likelihood="logistic", scale=0.1, samples=5, num_workers=0)
    found = []
    for size in (1, 4, 4):
        folder = tmp_path / f"{len(found)}"
        measure_likelihood(model, photos, settings.model_copy(update={"batch_size": size}), out=folder)
        found.append(rows_of(folder))
    assert found[1] == found.pop()
    for one, other in zip(*found, strict=True):
        assert one["name"] == other["name"]
        for key in ("elbo", "importance_bound", "rate", "distortion", "effective_samples"):
            assert one[key] == pytest.approx(other[key], rel=1e-5)
    reseeded = measure_likelihood(model, photos, settings.model_copy(update={"seed": 1}), out=tmp_path / "seed")
    for one, other in zip(found[0], rows_of(tmp_path / "seed"), strict=True):
        assert one["rate"] == pytest.approx(other["rate"]) and one["distortion"] != other["distortion"]
    effective = [row["effective_samples"] for row in rows_of(tmp_path / "seed")]
    assert max(effective) > reseeded["effective_samples"]["median"] == pytest.approx(np.median(effective))
    titles = [finding["name"] for finding in reseeded["findings"]]
    known = reseeded["metrics"]["importance_bound"]["bits_per_dimension"]["mean"]
    assert ("No better than guessing" in titles) is (known >= 8)


class TwoLevels(AutoencoderKL):
    """A class with its own draw: the two latent channels are two levels."""

    def draw(self, images: Tensor, noise: Tensor | None) -> Drawn:
        encoded = self.encode(images).latent_dist
        plain = Drawn(encoded.mean, encoded.mean, None, (), torch.zeros(len(images)))
        if noise is None:
            return plain
        own = Normal(encoded.mean, encoded.std)
        latent = encoded.mean + encoded.std * noise
        rate, prior = kl_divergence(own, Normal(0.0, 1.0)), Normal(0.0, 1.0)
        ratio = (prior.log_prob(latent) - own.log_prob(latent)).flatten(1).sum(1)
        # a level's rate that moves with the sample, as behind another level
        levels = (rate[:, :1] + noise[:, :1], rate[:, 1:])
        return plain._replace(latent=latent, rates=levels, log_ratio=ratio)


def test_levels_are_told_apart(images: Path, tmp_path: Path) -> None:
    weights, offset = random_weights()
    plain = tied(weights, offset, mean_off=0.3)
    module = affine_autoencoder(plain.encoder, plain.decoder, TwoLevels)  # type: ignore[arg-type]
    found = measure_likelihood(module, images, DENSITY, out=tmp_path / "levels")
    known = measure_likelihood(plain, images, DENSITY, out=tmp_path / "plain")
    for size, other in zip(found["curve"][1:], known["curve"][1:], strict=True):
        assert size["nats_per_image"] == pytest.approx(other["nats_per_image"], rel=1e-5)
    levels = [level["nats_per_image"]["mean"] for level in found["metrics"]["rate_levels"]]
    nats = {key: found["metrics"][key]["nats_per_image"]["mean"] for key in ("elbo", "distortion", "rate")}
    assert sum(levels) == pytest.approx(nats["rate"])
    assert nats["elbo"] == pytest.approx(-nats["distortion"] - nats["rate"], rel=1e-9)
    rates = draw(plain, read(images).float().view(-1, *IMAGE), None).rates[0].double()
    noise = torch.stack([posterior_noise(0, range(7), LATENT, number)[:, 0] for number in range(64)]).double()
    expected = rates[:, 0].sum((1, 2)).mean() + noise.sum((2, 3)).mean()
    assert levels[0] == pytest.approx(expected.item(), rel=1e-4)
    assert "rate_levels" not in known["metrics"] and "rate of level 2" in (tmp_path / "levels/report.html").read_text()
    # of the same images, and so compared image by image
    (row,) = [
        row
        for row in compare([tmp_path / "levels", tmp_path / "plain"])["differences"]
        if (row["part"], row["metric"]) == ("elbo", "bits_per_dimension")
    ]
    assert row["method"] == PAIRED
    bits = [found["metrics"]["elbo"]["bits_per_dimension"]["mean"] for found in (found, known)]
    assert row["difference"] == pytest.approx(bits[1] - bits[0], rel=1e-6)


@pytest.mark.parametrize("kind, discretised", [("gaussian", False), ("gaussian", True), ("logistic", True)])
def test_a_scale_is_fitted_to_a_fifth_of_the_images(kind: str, discretised: bool, images: Path) -> None:
    settings = LikelihoodSettings(likelihood=kind, scale="fit", discretised=discretised, samples=1, num_workers=0)
    result = measure_likelihood(constant(0.2), images, settings)
    true = read(images)[::5].flatten().numpy()  # the first and the sixth of seven
    law = {"gaussian": stats.norm, "logistic": stats.logistic}[kind]
    edges = np.concatenate([[-np.inf], (2 * np.arange(255) + 1) / 255 - 1, [np.inf]])
    level = np.round((true + 1) * 127.5).astype(int)

    def loss(scale: float) -> float:
        if not discretised:
            return float(-law.logpdf(true, 0.2, scale).mean())
        return float(-np.log(np.diff(law.cdf(edges, 0.2, scale))[level]).mean())

    best = minimize_scalar(loss, bounds=(0.05, 2.0), method="bounded").x
    assert result["likelihood"] == {
        "kind": kind,
        "scale": pytest.approx(best, rel=1e-3),
        "scale_from": "fitted",
        "discretised": discretised,
    }
    assert result["data"]["num_images"] == 5 and any("2 of the images" in note for note in result["notes"])


def test_the_likelihood_of_the_training_is_taken(model: str, photos: str, tmp_path: Path) -> None:
    AutoencoderKL.from_pretrained(model).save_pretrained(tmp_path / "export")
    (tmp_path / "export/likelihood.json").write_text(json.dumps(Likelihood("logistic", 0.25)._asdict()))
    settings = LikelihoodSettings(crop_px=32, samples=1, num_workers=0)
    found = measure_likelihood(tmp_path / "export", photos, settings)["likelihood"]
    assert found == {"kind": "logistic", "scale": 0.25, "scale_from": "training", "discretised": True}
    other = settings.model_copy(update={"likelihood": "gaussian", "scale": 0.5})
    found = measure_likelihood(tmp_path / "export", photos, other)["likelihood"]
    assert found == {"kind": "gaussian", "scale": 0.5, "scale_from": "given", "discretised": True}
    with pytest.raises(UserError, match="discretised: .* logistic"):
        measure_likelihood(tmp_path / "export", photos, settings.model_copy(update={"discretised": False}))
    (tmp_path / "export/likelihood.json").write_text(json.dumps(Likelihood("bernoulli", None)._asdict()))
    with pytest.raises(UserError, match="scale: .* bernoulli"):
        measure_likelihood(tmp_path / "export", photos, settings.model_copy(update={"scale": 0.1}))
    # without one: a fitted gaussian
    result = measure_likelihood(model, photos, settings)
    assert (result["likelihood"]["kind"], result["likelihood"]["scale_from"]) == ("gaussian", "fitted")
    assert any("no likelihood.json lies beside" in note for note in result["notes"])


def test_the_command(model: str, photos: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["crop_px=32", "samples=6", "likelihood=logistic", "scale=0.2", "num_pictures=1", "num_workers=0"]
    assert main(["eval", "likelihood", model, photos, *words, "--out", str(out)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((out / "result.json").read_text())
    assert [point["samples"] for point in result["curve"]] == [1, 2, 4, 6]
    assert [found["name"] for found in result["findings"]][:2] == ["Rate", "Tightness"]
    report = (out / "report.html").read_text(encoding="utf-8")
    assert "Most likely" in report and "Least likely" in report
    rows = {row["name"]: row["importance_bound_bits"] for row in rows_of(out)}
    best, worst = min(rows, key=lambda name: rows[name]), max(rows, key=lambda name: rows[name])
    cards = report[report.index("Most likely") :]
    shown = [part.split("&gt;.png")[0][-1] for part in cards.split("<h3>")[1:]]
    assert shown == [best[-6], worst[-6]]


def tiny_deterministic(folder: Path) -> str:
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), upsampling_scaling_factor=2,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def test_mistakes_are_named(
    model: str, photos: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def complaint(*words: str, of: str = model, data: str = photos) -> str:
        assert main(["eval", "likelihood", of, data, "--out", str(tmp_path / "out"), *words]) == 2
        return capsys.readouterr().err

    assert "latents of AutoencoderTiny are not random" in complaint(of=tiny_deterministic(tmp_path / "tiny"))
    assert "scale: bernoulli has no scale" in complaint("likelihood=bernoulli", "scale=0.1")
    assert "discretised: logistic" in complaint("likelihood=logistic", "discretised=false")
    assert "scale" in complaint("likelihood=gaussian", "scale=-1")
    assert "likelihood" in complaint("likelihood=poisson")
    assert "crop_px: 30 is not a multiple" in complaint("crop_px=30")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/damaged.png").write_bytes(b"no image")
    assert "damaged.png" in complaint("likelihood=logistic", "scale=0.1", data=str(tmp_path / "bad"))
    assert "holds one image, and scale=fit needs two" in complaint("scale=fit", "limit=1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "runs on one process, and 2 were launched" in complaint()


def test_unreadable_and_infinite_images_are_named(images: Path, tmp_path: Path) -> None:
    for path in images.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "3.png").write_bytes(b"no image")
    weights, offset = random_weights()
    module = tied(weights, offset)
    settings = DENSITY.model_copy(update={"max_bad_fraction": 0.2, "samples": 2})
    result = measure_likelihood(module, tmp_path, settings)
    assert result["data"]["num_images"] == 6 and result["data"]["skipped"][0].startswith("3.png: ")
    with pytest.raises(UserError, match="max_bad_fraction"):
        measure_likelihood(module, tmp_path, DENSITY)
    module.decoder.offset.data[0] = math.nan
    with pytest.raises(UserError, match="NaN or infinity"):
        measure_likelihood(module, tmp_path, settings)


def test_more_than_8_bits_are_noted(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (4, 4), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    settings = LikelihoodSettings(likelihood="logistic", scale=0.3, samples=1, num_workers=0)
    result = measure_likelihood(constant(0.0), tmp_path, settings)
    assert any("between levels of 8 bits" in note for note in result["notes"])


STORED: dict[str, tuple[str, dict[str, Any]]] = {
    "PNG": ("png", {}),
    "JPEG": ("jpg", {"quality": 75}),
    "lossy WebP": ("webp", {"quality": 75}),
    "lossless WebP": ("webp", {"lossless": True}),
    "lossy WebP with alpha": ("webp", {"quality": 75}),
    "lossless WebP with a profile": ("webp", {"lossless": True, "icc_profile": b"none"}),
    "animated lossy WebP": ("webp", {"quality": 75, "save_all": True, "duration": 10}),
}


@pytest.mark.parametrize("table", [False, True])
def test_images_that_were_stored_with_losses_are_noted(table: bool, tmp_path: Path) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 4), dtype=np.uint8)
    for name, (extension, options) in STORED.items():
        first, second = (Image.fromarray(one if "alpha" in name else one[..., :3]) for one in levels)
        more = {"append_images": [second]} if "save_all" in options else {}
        first.save(tmp_path / f"{name}.{extension}", **options, **more)
    files = sorted(tmp_path.iterdir())
    lossy = [file for file in files if "lossy" in file.name or "JPEG" in file.name]
    settings = LikelihoodSettings(likelihood="logistic", scale=0.3, samples=1, num_workers=0)

    def notes(chosen: list[Path], place: str) -> list[str]:
        """Of `eval likelihood`, for these files as a folder or as a Parquet file."""
        folder = tmp_path / place
        folder.mkdir()
        if table:
            rows = [{"image": {"bytes": file.read_bytes(), "path": None}} for file in chosen]
            pq.write_table(pa.Table.from_pylist(rows), folder / "images.parquet")
        else:
            for file in chosen:
                shutil.copy(file, folder)
        source, out = folder / "images.parquet" if table else folder, tmp_path / f"{place}-out"
        result = measure_likelihood(constant(0.0), source, settings, out=out)
        found = [note for note in result["notes"] if "stored with losses" in note]
        assert json.loads((out / "result.json").read_text())["notes"] == result["notes"]
        assert ("stored with losses" in (out / "report.html").read_text()) == bool(found)
        assert "lossy" not in pq.read_table(out / "images.parquet").column_names
        return found

    assert notes([file for file in files if file not in lossy], "kept") == []
    (note,) = notes(files, "all")
    assert note.startswith("stored with losses: 1 of 7 are JPEG, 3 of 7 are lossy WebP. ")


def test_the_recipe_has_a_latent_vector(pictures: Path, tmp_path: Path) -> None:
    """Trains, validates, exports (tiles of one latent px are not tried) and is measured."""
    words = ["steps=2", "batch_size=4", "validate.images=3", "data.resize_px=32", f"data.source={pictures}"]
    assert main(["train", "vae", f"output_dir={tmp_path / 'run'}", *words, "data.eval_fraction=0.25"]) == 0
    export = tmp_path / "run/export"
    stock = AutoencoderKL.from_pretrained(export)
    assert stock.encode(torch.zeros(1, 3, 32, 32)).latent_dist.mean.shape == (1, 64, 1, 1)
    assert "`enable_tiling`." in (export / "README.md").read_text()
    settings = LikelihoodSettings(resize_px=32, crop_px=32, samples=2, num_workers=0)
    result = measure_likelihood(export, pictures, settings)
    likelihood = result["likelihood"]
    assert (likelihood["kind"], likelihood["scale_from"]) == ("logistic", "training")
    assert likelihood["scale"] == pytest.approx(0.25, rel=0.01) and result["latent_dimensions"] == 64
