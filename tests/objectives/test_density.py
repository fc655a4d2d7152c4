"""A mixture of Gaussians that trains with a first stage: against scipy and textbook EM, and as a score."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from scipy.stats import multivariate_normal
from torch import Tensor

from latent_ae.__main__ import main
from latent_ae.config import UserError, load_settings
from latent_ae.data.images import to_tensor
from latent_ae.data.transforms import center_crop
from latent_ae.models.build import facts_of
from latent_ae.models.density import FIRST, FLOOR, Density, reconstruction_features, stored_density
from latent_ae.objectives.density import DensityObjective, DensitySettings
from latent_ae.objectives.semi_supervised import SemiSupervised, SemiSupervisedSettings
from latent_ae_eval.anomaly.measure import find_anomalies
from latent_ae_eval.anomaly.settings import AnomalySettings
from latent_ae_train.settings import TrainSettings
from tests.runs import differing_tensors
from tests.tiny import build_step, micro_batches, settings_for
from tests.tiny_models import tiny


def clusters(number: int, seed: int) -> Tensor:
    """Two elongated clusters in four dimensions, one of a quarter of the samples."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, 4, generator=generator) * torch.tensor([1.0, 0.3, 0.5, 0.2])
    x[:, 1] += 0.5 * x[:, 0]
    first = torch.rand(number, generator=generator) < 0.25
    return torch.where(first[:, None], x + torch.tensor([4.0, 0.0, -2.0, 1.0]), x)


def of_clusters() -> Density:
    density = Density(2, latent_channels=2)
    for number in range(150):
        density.update(density.moments(clusters(64, number)), 0.9)
    return density


def test_energies_are_those_of_scipy() -> None:
    density, x = of_clusters(), clusters(50, 1000)
    weights = (density.masses / density.masses.sum()).numpy()
    means, covariances = density.means.numpy().astype(float), density.covariances.numpy().astype(float)
    centre = weights @ means
    spread = weights @ (np.diagonal(covariances, axis1=1, axis2=2) + (means - centre) ** 2)
    joint = [
        weights[k] * multivariate_normal(means[k], covariances[k] + np.diag(FLOOR * spread)).pdf(x.numpy())
        for k in range(2)
    ]
    np.testing.assert_allclose(density(x).numpy(), -np.log(sum(joint)), rtol=1e-4, atol=1e-4)


def test_it_finds_the_clusters() -> None:
    density = of_clusters()
    order = density.masses.argsort()
    assert density.masses[order][0].item() == pytest.approx(0.25, abs=0.06)
    wanted = torch.tensor([[4.0, 0.0, -2.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(density.means[order], wanted, rtol=0, atol=0.35)
    assert density.covariances[order[1], 0, 1].item() == pytest.approx(0.5, abs=0.15)
    between = torch.tensor([[2.0, 2.0, -1.0, 0.5]])
    assert density(between).item() > density(clusters(500, 7)).max().item()


def test_without_memory_an_update_is_the_textbooks_m_step() -> None:
    density, x = of_clusters(), clusters(300, 5)
    joint = density._joint(x)
    belongs = joint.softmax(1)
    mass = belongs.mean(0)
    means = (belongs.T @ x) / belongs.sum(0)[:, None]
    covariances = torch.stack([torch.cov(x.T, correction=0, aweights=belongs[:, k]) for k in range(2)])
    density.update(density.moments(x), 0.0)
    torch.testing.assert_close(density.masses, mass)
    torch.testing.assert_close(density.means, means, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(density.covariances, covariances, rtol=1e-3, atol=1e-3)


def test_an_average_of_updates_is_that_of_their_moments() -> None:
    """The mean is that of all samples with the weights of the average; the covariance that of the total variance."""
    density, batches = Density(1, latent_channels=2), [clusters(100, seed) + seed for seed in (0, 1, 2, 3)]
    for batch in batches:
        density.update(density.moments(batch), 0.8)
    arrays, weights = [batch.numpy().astype(float) for batch in batches], np.array([0.8**3, 0.8**2, 0.8, 1.0])
    means, inside = np.stack([x.mean(0) for x in arrays]), np.stack([np.cov(x.T, bias=True) for x in arrays])
    mean = np.average(means, axis=0, weights=weights)
    np.testing.assert_allclose(density.means[0].numpy(), mean, rtol=1e-4, atol=1e-5)
    # the first batch moves the mean only: both together have the covariance of the second one about their common mean
    means[:2], inside[0] = np.average(means[:2], axis=0, weights=weights[:2]), inside[1]
    apart = means - mean
    total = np.average(inside + apart[:, :, None] * apart[:, None], axis=0, weights=weights)
    np.testing.assert_allclose(density.covariances[0].numpy(), total, rtol=1e-3, atol=1e-4)


def test_the_second_update_gives_the_covariances_of_its_batch() -> None:
    density, batches = Density(1, latent_channels=2), [clusters(100, seed) + 5.0 * seed for seed in (0, 1)]
    for batch in batches:
        density.update(density.moments(batch), 0.8)
    covariance = np.cov(batches[1].numpy().astype(float).T, bias=True)
    np.testing.assert_allclose(density.covariances[0].numpy(), covariance, rtol=1e-3, atol=1e-4)


def test_the_penalty_has_the_gradient_of_the_published_one() -> None:
    """By autograd, of the sum of 1 / variance over Gaussians and latent channels of a batch."""
    density, x = of_clusters(), clusters(300, 5)
    for _ in range(200):  # to where the running averages are those of this batch
        density.update(density.moments(x), 0.0)
    belongs = density._joint(x).softmax(1).double()
    floor = FLOOR * density._spread()[:2].double()

    z = x.double().requires_grad_()
    counts = belongs.sum(0)
    means = (belongs.T @ z) / counts[:, None]
    variances = (belongs[:, :, None] * (z[:, None] - means).square()).sum(0)[:, :2] / counts[:, None]
    (wanted,) = torch.autograd.grad((1 / (variances + floor)).sum(), z)

    y = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(density.penalty(y).mean(), y)
    assert wanted[:, :2].norm() > 0.1 and (wanted[:, 2:] == 0).all()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-5)


def deviation_of_latents(penalty: float) -> Tensor:
    """Train a linear autoencoder, 16 to 2 to 16, on data of two dimensions and noise, with a density of weight 1."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0]
    scales = torch.tensor([1.0, 0.8] + [0.1] * 14)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder, decoder = torch.nn.Linear(16, 2), torch.nn.Linear(2, 16)
    density = Density(2, latent_channels=2)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-2)
    for step in range(250):
        x = (torch.randn(64, 16, generator=generator) * scales) @ basis.T
        z = encoder(x)
        y = decoder(z)
        features = density.features(z[:, :, None, None], x.view(-1, 1, 4, 4), y.view(-1, 1, 4, 4))
        loss = (x - y).square().sum(1).mean()
        if step >= FIRST:
            loss = loss + density(features).mean() + penalty * density.penalty(features).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        density.update(density.moments(features.detach()), 0.98)
    return z.detach().std(0)


def test_without_the_penalty_latents_shrink_to_a_point() -> None:
    assert deviation_of_latents(penalty=0.0).max() < 0.02
    assert deviation_of_latents(penalty=0.05).min() > 0.5  # 0.05 times the weight of the density, as published


def test_features_far_from_zero_that_hardly_vary_keep_a_positive_definite_covariance() -> None:
    density, generator = Density(3, latent_channels=8), torch.Generator().manual_seed(0)
    for _ in range(40):
        x = 50.0 + 1e-3 * torch.randn(4, 10, generator=generator)
        density.update(density.moments(x), 0.98)
        assert density(x).isfinite().all()


def test_the_gradient_reaches_latents_and_images_once_the_mixture_knows_something() -> None:
    settings = settings_for(density={"components": 2, "weight": 3.0, "penalty": 0.02}, loss={"pixel_weight": 1e-6})
    step = build_step(settings)
    density = step.objectives["density"].density
    for number in range(FIRST):
        step(number, micro_batches(number, settings))
        assert density.updates == number + 1
    batch = next(micro_batches(FIRST, settings))
    step.bare_reconstructor.zero_grad()
    done = step.forward_backward(batch, FIRST)
    found = [parameter.grad.clone() for parameter in step.bare_reconstructor.autoencoder.parameters()]
    out = step.bare_reconstructor(batch.images, batch.noise)
    errors = reconstruction_features(batch.images, out.image).float()
    features = torch.cat([out.latent.mean((2, 3)), errors], 1)
    energy, penalty = density(features).mean(), density.penalty(features).mean()
    pixel = 1e-6 * (out.image - batch.images).abs().mean()
    wanted = torch.autograd.grad(
        (3.0 * energy + 0.02 * penalty) / batch.images[0].numel() + pixel,
        list(step.bare_reconstructor.autoencoder.parameters()),
    )
    torch.testing.assert_close(done.logs["density_energy"], energy.detach())
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-7)
    assert any(one.norm() > 1e-4 for one in wanted)

    fresh = build_step(settings)  # which knows nothing yet
    fresh.forward_backward(next(micro_batches(0, settings)), 0)
    plain = build_step(settings_for(loss={"pixel_weight": 1e-6}))
    plain.forward_backward(next(micro_batches(0, settings)), 0)
    for one, other in zip(fresh.bare_reconstructor.parameters(), plain.bare_reconstructor.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-9)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Smooth pictures of two kinds."""
    folder, rng = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()
    for number in range(24):
        small = rng.uniform(0, 120, (4, 4, 3)) + (number % 2) * 120
        Image.fromarray(small.astype(np.uint8)).resize((32, 32), Image.Resampling.BICUBIC).save(
            folder / f"{number}.png"
        )
    return folder


def test_training_export_and_score(pictures: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [
        *("train", "quickstart", f"output_dir={run}", f"data.source={pictures}", f"data.eval_source={pictures}"),
        *("data.resolution=16", "batch_size=4", "loss.perceptual=0", "gan.weight=0", "validate.crop_px=16"),
        *("model.block_out_channels=[16,16]", "model.norm_num_groups=4", "steps=30", "checkpoint.every=15"),
        *("validate.every=30", "density.components=2", "optim.schedule=constant"),
    ]
    assert main(command) == 0
    density = stored_density(run)
    assert density is not None and density.updates == 30 and density.masses.sum() > 0.3
    assert "Density.from_pretrained" in (run / "export/README.md").read_text()
    settings = AnomalySettings(lpips=None, crop_px=16, num_workers=0)
    result = find_anomalies(run / "export", str(pictures), settings, out=tmp_path / "found")
    assert "density" in result["scores"] and "density" in result["method"]["scores"]
    assert "density trained with it" in (tmp_path / "found/report.html").read_text()

    # of a checkpoint the same one is exported
    assert main(["export", str(run / "checkpoints/step-00000030"), str(tmp_path / "again")]) == 0
    again = stored_density(tmp_path / "again")
    assert again is not None
    for name, value in density.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name

    # a run that was interrupted ends like one that was not
    resumed = tmp_path / "resumed"
    half = [word for word in command if not word.startswith("output_dir")] + [f"output_dir={resumed}"]
    assert main([*half, "steps=15"]) == 0 and main(half) == 0
    last = "checkpoints/step-00000030"
    assert differing_tensors(resumed / last, run / last) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("density.weight=2", "density.weight: needs the number of Gaussians: give density.components"),
        ("density.components=2", "density.components: takes the mean of each latent channel"),
    ],
)
def test_settings_that_contradict_each_other(words: str, said: str) -> None:
    recipe = "quickstart" if "weight" in words else "hierarchical-vae"
    with pytest.raises(UserError) as caught:
        load_settings(TrainSettings, recipe, words.split())
    assert said in str(caught.value)


def test_the_score_of_a_codebook_is_of_the_codes_as_in_training(pictures: Path, tmp_path: Path) -> None:
    vae = tiny("VQModel").eval()
    vae.save_pretrained(tmp_path / "model")
    density = Density(2, latent_channels=4)
    for number in range(3):
        density.update(density.moments(torch.randn(20, 6, generator=torch.Generator().manual_seed(number))), 0.5)
    density.save_pretrained(tmp_path / "model/density")
    settings = AnomalySettings(lpips=None, resize_px=None, crop_px=16, num_workers=0)
    find_anomalies(tmp_path / "model", str(pictures), settings, out=tmp_path / "out")
    rows = pq.read_table(tmp_path / "out/images.parquet").to_pylist()
    for row in rows[:4]:
        array = np.array(Image.open(pictures / row["name"]).convert("RGB"))
        image = to_tensor(center_crop(array, 16))[None]
        with torch.no_grad():
            encoded = vae.encode(image).latents
            vectors, reconstruction = vae.quantize(encoded)[0], vae.decode(encoded).sample
            energy = density(density.features(vectors, image, reconstruction)).item()
        assert row["density"] == pytest.approx(energy, rel=1e-3)


def test_a_class_whose_export_scales_each_latent_value_is_refused() -> None:
    """What learned the raw latents of an AutoencoderRAE would not know those of its export."""
    fresh = tiny("AutoencoderRAE")
    fresh.register_to_config(latents_mean=None, latents_std=None, scaling_factor=1.0)
    run = settings_for().facts()
    for kind, own in (
        (DensityObjective, DensitySettings(components=2)),
        (SemiSupervised, SemiSupervisedSettings(classes=2, weight=0)),
    ):
        (problem,) = kind.problems(own, run, facts_of(fresh))
        assert "the export of this AutoencoderRAE scales each of their values" in problem.message
        fresh.register_to_config(scaling_factor=2.0)  # as init_from brings it
        assert list(kind.problems(own, run, facts_of(fresh))) == []
        fresh.register_to_config(scaling_factor=1.0)
