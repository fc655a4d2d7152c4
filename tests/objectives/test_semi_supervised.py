"""The label model (M2 of Kingma et al. 2014): its bounds against a closed form, its labels, export and probe."""

import math
import re
import shutil
from html import unescape
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from latent_ae.__main__ import main
from latent_ae.config import UserError, load_settings
from latent_ae.data.loader import open_images, training_batches
from latent_ae.data.sources import TableSource
from latent_ae.export.model_card import label_model_text
from latent_ae.models.label_model import LabelModel, stored_label_model
from latent_ae.objectives import SemiSupervised
from latent_ae.objectives.semi_supervised import semi_supervised_terms
from latent_ae_eval.probe.measure import probe
from latent_ae_eval.probe.settings import ProbeSettings
from latent_ae_train.data import labelled_images
from latent_ae_train.settings import TrainSettings
from tests.runs import differing_tensors, words
from tests.tiny import build_step, micro_batches, settings_for
from tests.tiny_models import tiny

SHAPE = (2, 1, 1)


def linear_gaussian() -> tuple[LabelModel, torch.Tensor, torch.Tensor]:
    """Return a label model with p(z | y, s) = N(m_y + A s, v), and q(s | z, y) set to N(0, 1); m, and A."""
    model = LabelModel(num_classes=3, latent_shape=SHAPE, style_size=2, width=4)
    means, loading = (
        torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 1.0]]).double(),
        torch.tensor([[0.7, 0.2], [-0.3, 0.5]]),
    )
    return model, means, loading.double()


def test_the_bound_is_the_evidence_where_the_posterior_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    # with p(z | y, s) = N(m_y + A s, v I), log p(z, y) and the exact q(s | z, y) are known, and for this q every style
    # gives log p(z, s, y) - log q(s | z, y) = log p(z, y), so that the bound's mean is the evidence
    model, means, loading = linear_gaussian()
    variance, z = 0.5, torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0)).double()
    flat = z.flatten(1)
    precision = torch.eye(2).double() + loading.T @ loading / variance
    covariance = precision.inverse()
    # a diagonal posterior is exact only where the covariance is: rotate the style so
    eigenvalues, rotation = torch.linalg.eigh(covariance)
    loading = loading @ rotation

    def encoder(given: torch.Tensor) -> torch.Tensor:
        mean = (flat[:, None] - means) @ loading / variance * eigenvalues
        return torch.cat([mean, eigenvalues.log().expand_as(mean)], 2)

    def decoder(given: torch.Tensor) -> torch.Tensor:
        mean = given[..., :2] @ loading.T + given[..., 2:] @ means
        return torch.cat([mean, torch.full_like(mean, math.log(variance))], -1)

    monkeypatch.setattr(model.encoder, "forward", encoder)
    monkeypatch.setattr(model.decoder, "forward", decoder)
    z32 = z.float()
    noise = torch.randn(40_000, 5, 2, generator=torch.Generator().manual_seed(1)).double()
    marginal = torch.distributions.MultivariateNormal(means, loading @ loading.T + variance * torch.eye(2).double())
    evidence = marginal.log_prob(flat[:, None]) - math.log(3)
    bounds = torch.stack([model(z32, one)[:, 1] for one in noise[:400]])
    error = bounds.std(0) / math.sqrt(len(bounds))
    assert ((bounds.mean(0) - evidence).abs() < 5 * error + 1e-5).all()


def test_terms_are_those_of_the_paper_written_out() -> None:
    generator = torch.Generator().manual_seed(0)
    log_q = torch.randn(4, 3, generator=generator).log_softmax(1)
    bounds, labels = torch.randn(4, 3, generator=generator), torch.tensor([2, -1, 0, -1])
    bound, cross_entropy = semi_supervised_terms(torch.stack([log_q, bounds], 1), labels)
    for n, label in enumerate(labels.tolist()):
        q = log_q[n].exp().tolist()
        marginal = sum(q[y] * float(bounds[n, y]) for y in range(3)) - sum(q[y] * math.log(q[y]) for y in range(3))
        assert float(bound[n]) == pytest.approx(float(bounds[n, label]) if label >= 0 else marginal, rel=1e-5)
        assert float(cross_entropy[n]) == pytest.approx(-math.log(q[label]) if label >= 0 else 0.0, rel=1e-5)


def test_the_gradients_are_those_of_the_loss_written_out() -> None:
    own = {"classes": 3, "weight": 0.25, "classification": 4.0, "style_size": 3, "width": 8}
    settings = settings_for(semi_supervised=own, loss={"pixel_weight": 0.0}, optim={"lr": 1e-30})
    step = build_step(settings)
    found: dict[str, torch.Tensor] = {}
    model = step.bare_reconstructor
    step.optimizers.autoencoder.register_step_pre_hook(
        lambda *_: found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    )
    step(2, micro_batches(2, settings))

    (batch,) = micro_batches(2, settings)
    head = model.heads["semi_supervised"]
    out = model(batch.images, batch.noise, draws=batch.draws)
    assert batch.labels is not None and set(batch.labels.tolist()) == {-1, 0, 1, 2}

    def loss(latent: torch.Tensor) -> torch.Tensor:
        bound, cross_entropy = semi_supervised_terms(
            head.label_model(latent, *batch.draws["semi_supervised"]), batch.labels
        )
        return (4.0 * cross_entropy - bound).mean() / (3 * 16 * 16)

    assert out.logvar is not None
    entropy = 0.5 * out.logvar.flatten(1).sum(1).mean() / (3 * 16 * 16)
    encoder = [n for n, p in model.named_parameters() if n.startswith(("autoencoder.encoder", "autoencoder.quant"))]
    of_label_model = [n for n in found if n.startswith("heads.")]
    parameters = dict(model.named_parameters())
    expected = dict(
        zip(
            of_label_model,
            torch.autograd.grad(loss(out.latent.detach()), [parameters[n] for n in of_label_model]),
            strict=True,
        )
    )
    through = torch.autograd.grad(0.25 * (loss(out.latent) - entropy), [parameters[n] for n in encoder])
    expected |= dict(zip(encoder, through, strict=True))
    assert len(of_label_model) == 12 and len(encoder) > 20
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-8, msg=name)


def test_without_a_weight_no_gradient_of_the_label_model_reaches_the_encoder() -> None:
    """Of the same batches. In a training the share of labelled images changes which images a batch has."""
    plain = settings_for(optim={"lr": 1e-2})
    with_labels = settings_for(optim={"lr": 1e-2}, semi_supervised={"classes": 3, "style_size": 3, "width": 8})
    steps = [build_step(plain), build_step(with_labels)]
    for step in steps:
        for number in range(2):
            step(number, micro_batches(number, step.settings))
    for (name, one), other in zip(
        steps[0].bare_reconstructor.autoencoder.named_parameters(),
        steps[1].bare_reconstructor.autoencoder.parameters(),
        strict=True,
    ):
        assert torch.equal(one, other), name


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of pictures, dark and light, in noise; 40 of each."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(80):
        place = folder / ("dark", "light")[number % 2]
        place.mkdir(exist_ok=True)
        pixels = rng.integers(0, 110, (16, 16, 3)) + 140 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number:02d}.png")
    return folder


def test_the_label_model_has_the_shape_of_the_crops() -> None:
    own = {"classes": 3, "style_size": 3, "width": 8}
    settings = settings_for(semi_supervised=own, data={"resolution": 16, "buckets": [[16, 32]]})
    step = build_step(settings)
    assert step.bare_reconstructor.heads["semi_supervised"].label_model.latent_shape[1:] == (16, 8)  # 16 px wide
    step(0, micro_batches(0, settings))


LABELS = ["semi_supervised.classes=2", "semi_supervised.labels_per_class=3", "semi_supervised.width=16", "gan.weight=0"]


def test_a_share_of_the_samples_is_labelled_and_no_other_label_is_seen(pictures: Path) -> None:
    settings = load_settings(TrainSettings, "quickstart", [*words(pictures, pictures)[2:], *LABELS])
    source, held_out = open_images(settings.data, "train"), open_images(settings.data, "held_out")
    fed, labels = labelled_images(settings, source, held_out)
    assert labels.names == ["dark", "light"]
    shown = {fed.name(i).split(": ", 1)[1] for i in np.flatnonzero(labels.of_images >= 0)}
    assert len(shown) == 6 and sum("dark" in name for name in shown) == 3
    batches = training_batches(fed, settings.data, channels=3, seed=0, batch_size=100, micro_batch_size=100)
    batch = next(batches)
    batches.close()
    seen = labels.of_images[list(batch.indices)]
    brightness = batch.images.mean((1, 2, 3)).numpy()
    assert ((brightness > 0) == (seen == 1))[seen >= 0].all()  # the label is that of the picture
    hidden = sum(i >= len(source) for i in batch.indices)
    assert 15 <= hidden <= 35 and (seen >= 0).sum() >= hidden
    assert (seen < 0).sum() > 50


def test_training_export_and_probe(pictures: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [*words(pictures, run), *LABELS, "steps=40", "checkpoint.every=20", "optim.lr=3e-3"]
    assert main(command) == 0
    network = stored_label_model(run / "export")
    assert network is not None and network.config.class_names == ["dark", "light"]
    settings = ProbeSettings(test_fraction=0.25, labels_per_class=(3,), draws=2)
    result = probe(run / "export", str(pictures), settings)
    assert result["label_model"]["accuracy"] > 0.9 and result["label_model"]["labels_per_class"] == 3
    assert result["label_model"]["draw"] == 0 and result["notes"] == []
    assert probe(run, str(pictures), settings)["label_model"] == result["label_model"]  # a run is its export

    # and why it is not, where the images have another size or other classes
    result = probe(run, str(pictures), settings.model_copy(update={"resize_px": 32}), out=tmp_path / "large")
    assert result["label_model"] is None
    (note,) = result["notes"]
    assert re.search(
        r"own label model is not measured: it is for latents of \d+ x 8 x 8, and these have \d+ x 16", note
    )
    assert note in unescape((tmp_path / "large/report.html").read_text())
    shutil.copytree(pictures, tmp_path / "named")
    (tmp_path / "named/light").rename(tmp_path / "named/white")
    (note,) = probe(run, str(tmp_path / "named"), settings)["notes"]
    assert "was trained with other classes: dark, light" in note

    # of a checkpoint the same one is exported
    assert main(["export", str(run / "checkpoints/step-00000040"), str(tmp_path / "again")]) == 0
    again = stored_label_model(tmp_path / "again")
    assert again is not None and again.config.class_names == ["dark", "light"]
    for one, other in zip(network.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)

    # a run that was interrupted ends like one that was not
    resumed = tmp_path / "resumed"
    half = [word for word in command if not word.startswith("output_dir")] + [f"output_dir={resumed}"]
    assert main([*half, "steps=20", "optim.schedule=constant"]) == 0
    assert main([*half, "optim.schedule=constant"]) == 0
    whole = tmp_path / "whole"
    assert main([*command, f"output_dir={whole}", "optim.schedule=constant"]) == 0
    last = "checkpoints/step-00000040"
    assert differing_tensors(resumed / last, whole / last) == []


def test_a_probe_classifies_codes_as_in_training(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_stage = tiny("VQModel")
    first_stage.save_pretrained(tmp_path)
    settings = ProbeSettings(test_fraction=0.25, labels_per_class=(3,), draws=2)
    shape = (first_stage.config.vq_embed_dim or first_stage.config.latent_channels, 8, 8)
    LabelModel(2, shape, 3, 8, class_names=("dark", "light")).save_pretrained(tmp_path / "label_model")
    seen: list[torch.Tensor] = []
    classify = LabelModel.classify
    monkeypatch.setattr(LabelModel, "classify", lambda own, z: seen.append(z) or classify(own, z))
    result = probe(tmp_path, str(pictures), settings)
    assert result["notes"] == [] and result["label_model"] is not None
    vectors, codes = torch.cat(seen).movedim(1, -1).flatten(0, 2), first_stage.quantize.embedding.weight
    assert torch.cdist(vectors, codes).amin(1).max() < 1e-3
    assert "labels.classify(vae.quantize(z)[0])" in label_model_text(LabelModel(2), "there", codes=True)


@pytest.mark.parametrize(
    "changes, expected",
    [
        (["semi_supervised.classes=3"], "semi_supervised.classes: 3, and .* has 2: dark, light"),
        (["semi_supervised.labels_per_class=99"], "semi_supervised.labels_per_class: class dark has"),
        (["semi_supervised.label_column=kind"], "semi_supervised.label_column: kind is a column"),
    ],
)
def test_labels_that_do_not_fit(pictures: Path, changes: list[str], expected: str) -> None:
    settings = load_settings(TrainSettings, "quickstart", [*words(pictures, pictures)[2:], *LABELS, *changes])
    source, held_out = open_images(settings.data, "train"), open_images(settings.data, "held_out")
    with pytest.raises(UserError, match=expected):
        labelled_images(settings, source, held_out)


def test_only_numbers_from_0_on_are_classes(tmp_path: Path) -> None:
    kinds = [0, 10**12, -2, -100, None]
    rows = {"image": [Image.new("RGB", (16, 16))] * 60, "label": [kinds[number % 5] for number in range(60)]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "numbers.parquet")
    changes = ["semi_supervised.classes=2", "semi_supervised.labels_per_class=null", "semi_supervised.share=0"]
    settings = load_settings(TrainSettings, "quickstart", [f"data.source={tmp_path / 'numbers.parquet'}", *changes])
    source, held_out = open_images(settings.data, "train"), open_images(settings.data, "held_out")
    assert isinstance(source, TableSource)
    _, labels = labelled_images(settings, source, held_out)
    assert labels.names == ["0", "1000000000000"]
    expected = [{0: 0, 10**12: 1}.get(rows["label"][row], -1) for row in source.rows]
    assert labels.of_images.tolist() == expected and set(expected) == {-1, 0, 1}


def test_a_class_without_training_images_is_named(pictures: Path, tmp_path: Path) -> None:
    place = tmp_path / "held-out/odd"
    place.mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(place / "0.png")
    changes = [f"data.eval_source={place.parent}", "semi_supervised.classes=3", "semi_supervised.labels_per_class=null"]
    settings = load_settings(TrainSettings, "quickstart", [f"data.source={pictures}", *changes])
    source, held_out = open_images(settings.data, "train"), open_images(settings.data, "held_out")
    with pytest.raises(UserError, match=r"semi_supervised.classes: no training image of .* has class odd"):
        labelled_images(settings, source, held_out)


@pytest.mark.parametrize(
    "weight, kl, expected", [(0, 1, False), (1, 0, False), (1, 1, True)], ids=["M1 + M2", "joint", "two priors"]
)
def test_the_plan_names_a_second_prior(weight: float, kl: float, expected: bool) -> None:
    changes = ["semi_supervised.classes=2", f"semi_supervised.weight={weight}", f"loss.kl={kl}"]
    settings = load_settings(TrainSettings, "semi-supervised", changes)
    text = SemiSupervised.describe(settings.semi_supervised, settings.facts())
    assert ("beside the prior of loss.kl" in text) is expected


@pytest.mark.parametrize(
    "changes, expected",
    [
        (["semi_supervised.draw=1"], "semi_supervised.draw: needs the number of classes"),
        (["semi_supervised.classes=2", "data.streaming=true"], "data.streaming: semi_supervised finds labels by"),
        (
            ["semi_supervised.classes=2", "latents.equivariance=0.5"],
            "semi_supervised.classes: needs latents of one size",
        ),
        (
            ["semi_supervised.classes=2", "semi_supervised.weight=1", "train=decoder", "init_from=hub/id", "model={}"],
            "semi_supervised.weight: is for the encoder, which train leaves fixed",
        ),
    ],
)
def test_settings_that_do_not_go_together(changes: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        load_settings(TrainSettings, "quickstart", changes)


def test_the_logged_cross_entropy_is_of_labelled_samples_alone() -> None:
    settings = settings_for(
        semi_supervised={"classes": 3, "style_size": 3, "width": 8},
        optim={"lr": 1e-30},
        batch_size=8,
        micro_batch_size=2,
    )
    step = build_step(settings)
    first = step(0, micro_batches(0, settings))["label_cross_entropy"]
    model = step.bare_reconstructor
    found = []
    for batch in micro_batches(0, settings):
        terms = model(batch.images, batch.noise, draws=batch.draws).heads["semi_supervised"].detach()
        assert batch.labels is not None
        found += [float(-terms[n, 0, label]) for n, label in enumerate(batch.labels.tolist()) if label >= 0]
    assert float(first) == pytest.approx(sum(found) / len(found), rel=1e-4)
    # a step without labelled samples leaves it as it is
    unlabelled = [batch._replace(labels=torch.full((2,), -1)) for batch in micro_batches(1, settings)]
    assert torch.equal(step(1, iter(unlabelled))["label_cross_entropy"], first)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_scale_of_a_latent_of_few_numbers_is_seen(size: int) -> None:
    model = LabelModel(2, (size, 1, 1), style_size=1, width=4)
    latent = torch.arange(1.0, size + 1).view(1, size, 1, 1)
    seen = model.classify(torch.cat([latent, 3.0 * latent]))
    assert not torch.allclose(seen[0], seen[1], atol=1e-3)
