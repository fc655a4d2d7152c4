"""The transformer over codes: its probabilities over all sequences, what each position sees, and its rate."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from latent_ae.config import UserError
from latent_ae.data.images import to_tensor, to_uint8
from latent_ae.data.rng import augmentation_numbers, epoch_order
from latent_ae.latents.cache import open_latents
from latent_ae.latents.encode import encode_images
from latent_ae.models.codes import latent_of_codes, nearest_codes
from latent_ae.models.loading import load_first_stage
from latent_ae.report.pictures import picture_grid
from latent_ae_eval.__main__ import main
from latent_ae_eval.sample import JOB
from latent_ae_eval.sample.codes import CodeImages, CodeTrainer, nats
from latent_ae_eval.sample.measure import sample
from latent_ae_eval.sample.settings import SampleSettings
from latent_ae_eval.sample.transformer import CodeTransformer, coarser_places
from tests.eval.generation.small import SMALL
from tests.tiny_models import tiny

QUICK = {key: value for key, value in SMALL.items() if key != "sampling_steps"} | {"samples": 20, "lr": 3e-3}


def random(codes: int, sides: tuple[int, ...], scale: float = 0.3) -> CodeTransformer:
    """A transformer whose probabilities are far from uniform and depend on all that they may."""
    torch.manual_seed(0)
    model = CodeTransformer(codes, sides, width=64, depth=2).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(scale * torch.randn_like(parameter))
    return model


def test_no_position_sees_its_own_or_a_later_code() -> None:
    model = random(3, (2, 4)).double()
    sequence = torch.randint(3, (1, 20), generator=torch.Generator().manual_seed(1))
    logits = model(sequence)
    for place in range(20):
        other = sequence.clone()
        other[0, place] = (other[0, place] + 1) % 3
        differs = (model(other) - logits).abs().amax(2)[0] > 1e-12
        assert not differs[: place + 1].any(), place
        assert differs[place + 1 :].all(), place


def test_the_probabilities_of_all_sequences_sum_to_one_and_samples_have_them() -> None:
    model = random(2, (1, 2), 0.15)
    every = torch.cartesian_prod(*[torch.arange(2)] * 5)
    shares = (-nats(model(every), every).double().sum(1)).exp()
    assert float(shares.sum()) == pytest.approx(1.0, abs=1e-6) and float(shares.max() / shares.min()) > 10
    drawn = model.sample(torch.rand(20_000, 5, generator=torch.Generator().manual_seed(0)))
    found = torch.bincount((drawn * 2 ** torch.arange(4, -1, -1)).sum(1), minlength=32)
    assert stats.chisquare(found.numpy(), 20_000 * (shares / shares.sum()).numpy()).pvalue > 1e-3
    # the last of the codes, where the sum of the shares rounds below the number
    assert model.sample(torch.full((1, 5), 1.0)).max() == 1


def test_each_position_gets_the_coarser_codes_over_it() -> None:
    """Of levels of 1, 2 and 4 px: the second row of the finest lies under the upper two codes of the middle level."""
    places = coarser_places((1, 2, 4))
    assert places[0].tolist() == [21, 21] and places[1:5].tolist() == [[0, 21]] * 4
    assert places[5:13].tolist() == [[0, 1], [0, 1], [0, 2], [0, 2]] * 2
    assert places[13:].tolist() == [[0, 3], [0, 3], [0, 4], [0, 4]] * 2
    model = random(2, (1, 2, 4))
    sequence = torch.zeros(1, 21, dtype=torch.int64)
    other = sequence.clone()
    other[0, 2] = 1  # the upper right code of the middle level
    changed = (model._inputs(other, 0, 21) != model._inputs(sequence, 0, 21)).any(2)[0]
    assert changed.nonzero()[:, 0].tolist() == [3, 7, 8, 11, 12], "and the position behind it"
    assert [one.shape for one in model.grids(sequence)] == [(1, 1, 1), (1, 2, 2), (1, 4, 4)]


def first_stage(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    module = tiny(name)
    for parameter in module.parameters():
        if parameter.shape[0] == 16 and parameter.ndim == 2:  # the codes, as far apart as the latents
            torch.nn.init.normal_(parameter, std=0.3)
    module.save_pretrained(folder)
    return folder


def pictures(folder: Path) -> torch.Tensor:
    return torch.stack([to_tensor(np.asarray(Image.open(file))) for file in folder.rglob("*.png")])


def words(place: Path, data: Path, **changes: object) -> list[str]:
    return ["sample", str(place), str(data), *(f"{key}={value}" for key, value in (QUICK | changes).items())]


def test_its_rate_is_that_of_the_codes_of_held_out_images(images, tmp_path, capsys, lpips_vgg):
    place, out = first_stage("VQVAE2", tmp_path / "model"), tmp_path / "fitted"
    command = words(place, images, prior="codes", validation_images=64, steps=40)
    assert main([*command, "--out", str(out)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["codes"] == {"sides": [4, 8], "number": 16}
    assert result["recipe"].keys().isdisjoint({"patch_size", "sampling_steps"})
    assert result["curve"][0]["loss"] == pytest.approx(math.log(16)), "before training all codes are equally likely"
    # from the images and the stored folders alone
    module, transformer = load_first_stage(str(place)).module, CodeTransformer.from_pretrained(out / "code-prior")
    with torch.no_grad():
        trained, held_out = (module.encode(pictures(images / part)).indices for part in ("train", "val"))
        sequences = torch.cat([one.flatten(1) for one in held_out], 1)
        logarithms = transformer(sequences).double().log_softmax(2).gather(2, sequences[..., None])
    bits = -float(logarithms.sum()) / math.log(2) / 64
    found = result["metrics"]["codes"]
    assert found["n"] == 64 and found["bits_per_dimension"] == pytest.approx(bits / (3 * 16 * 16), rel=1e-3)
    assert found["bits_per_code"] == pytest.approx(bits / 80, rel=1e-3) and found["bits_per_code"] < 4
    low, high = result["intervals"]["codes"]["bits_per_code"]
    assert low < found["bits_per_code"] < high
    trivial = sum(
        -float(np.log((np.bincount(own.flatten(), minlength=16) + 1) / (own.numel() + 16))[part.flatten()].sum())
        for own, part in zip(trained, held_out, strict=True)
    )
    assert result["loss"]["relative_loss"] == pytest.approx(bits * 64 * math.log(2) / trivial, rel=2e-3)
    # and of mirrored images, on which it trains, too
    codes = CodeImages(module, open_latents(out / "latents" / "train"), torch.device("cpu"))
    with torch.no_grad():
        mirrored = torch.cat([one.flatten(1) for one in module.encode(pictures(images / "train").flip(3)).indices], 1)
    assert sorted(codes.sequences(range(80), torch.ones(80)).tolist()) == sorted(mirrored.tolist())
    trainer = CodeTrainer(codes, SampleSettings(**QUICK), torch.device("cpu"))
    for parameter in trainer.model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    rows, flipped = epoch_order(0, 0, 80)[:16], augmentation_numbers(0, range(16), 1) < 0.5
    assert flipped.any() and not flipped.all()
    batch = torch.where(flipped, codes.sequences(rows, torch.ones(16)), codes.sequences(rows))
    assert torch.allclose(trainer.loss(), nats(trainer.model(batch), batch).mean())

    # the samples are those of the stored transformer, in batches of any size
    uniform = [torch.rand(80, generator=torch.Generator().manual_seed(number)) for number in range(20)]
    with torch.no_grad():
        latent = latent_of_codes(module, transformer.grids(transformer.sample(torch.stack(uniform))))
        expected = to_uint8(module.decode(latent).sample).float() / 127.5 - 1
    assert main([*words(place, images, prior=out, images_at_a_time=7), "--out", str(tmp_path / "again")]) == 0
    again = json.loads(capsys.readouterr().out)
    pages = [np.asarray(Image.open(folder / "samples.png")).astype(int) for folder in (out, tmp_path / "again")]
    assert np.abs(pages[0] - pages[1]).max() <= 1 and "codes" not in again["metrics"]
    grid = np.asarray(picture_grid([list(row) for row in expected.split(8)])).astype(int)
    assert np.abs(pages[0] - grid).max() <= 1
    # on pages and in comparisons
    page = (out / "report.html").read_text()
    assert "a transformer over the codes" in page and "bits per code" in page and "rate of a lossy code" in page
    assert JOB.figures(result)["codes", "bits_per_code"] == (found["bits_per_code"], (low, high))


@pytest.mark.parametrize("name", ["VQModel", "DiscreteVAE"])
def test_one_level_of_codes_has_a_prior_too(name, images, tmp_path, lpips_vgg):
    place = first_stage(name, tmp_path / "model")
    module = load_first_stage(str(place)).module
    numbers = torch.arange(16).view(1, 4, 4)
    latent = latent_of_codes(module, [numbers])
    assert torch.equal(nearest_codes(module, latent)[0], numbers)
    assert torch.equal(
        latent[0, :, 1, 2],
        dict(module.named_parameters())["embedding.weight" if name == "DiscreteVAE" else "quantize.embedding.weight"][
            6
        ],
    )
    settings, out = SampleSettings(**QUICK | {"steps": 2, "validations": 2}), tmp_path / "out"
    result = sample(place, images, "codes", settings, out=out)
    latents = open_latents(out / "latents" / "train")
    assert latents.manifest["latent"]["stored"] == "fp32"
    assert result["codes"] == {"sides": [8], "number": 16} and 0 < result["metrics"]["codes"]["bits_per_code"] < 4.1


def test_mistakes_end_with_a_message(model, images, tmp_path):
    def message(place: Path, **changes: object) -> str:
        with pytest.raises(UserError) as caught:
            main([*words(place, images, prior="codes", **changes), "--out", str(tmp_path / "out")])
        return str(caught.value)

    assert "prior: codes is for latents that are codes (VQModel, VQVAE2, DiscreteVAE), and AutoencoderKL has none" in (
        message(model).replace("DiscreteVAE, VQVAE2", "VQVAE2, DiscreteVAE")
    )
    assert "patch_size: is for flows" in message(model, patch_size=1)
    assert "sampling_steps: is for flows" in message(model, sampling_steps=3)
    place, encoded = first_stage("VQModel", tmp_path / "codes"), tmp_path / "encoded"
    encode_images(place, images, encoded, SampleSettings(**SMALL).encoding("train"))  # fp16
    for key in ("latents", "held_out_latents"):
        assert message(place, **{key: encoded}).startswith(f"{key}: {encoded} holds latents in fp16")
    assert not (tmp_path / "out/latents").exists(), "refused before anything is encoded"
    (tmp_path / "fitted/code-prior").mkdir(parents=True)
    with pytest.raises(UserError, match="sampling_steps: is for flows"):
        main(words(model, images, prior=tmp_path / "fitted", sampling_steps=3))
    assert "DATA" in str(pytest.raises(UserError, sample, model, None, "codes", SampleSettings(**QUICK)).value)
