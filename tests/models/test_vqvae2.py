"""VQ-VAE-2: codes, losses and running means of its levels, written out with NumPy, and its folder."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from latent_ae.__main__ import main
from latent_ae.models.loading import load_first_stage
from latent_ae.models.reconstruct import Reconstructor
from latent_ae.models.vqvae2 import VQVAE2, packed
from latent_ae.objectives.code_averages import SMALLEST
from latent_ae_train.step import TrainStep
from tests.distributed.split import restore, saved
from tests.runs import SHAPES, family_words
from tests.tiny import build_step, micro_batches, settings_for
from tests.tiny_models import pictures as images_of
from tests.tiny_models import tiny

LATENT = (3 * 5, 4, 4)
MODEL = {"kind": "VQVAE2", "config": SHAPES["VQVAE2"]}


@pytest.fixture
def model() -> VQVAE2:
    network = tiny("VQVAE2").eval().requires_grad_(False)
    assert isinstance(network, VQVAE2)
    for level in network.quantize:  # codes as far apart as the latents
        torch.nn.init.normal_(level.embedding.weight, std=0.3)
    return network


def nearest(latent: Tensor, codebook: Tensor) -> Tensor:
    """Numbers of the nearest codes, by every difference."""
    places = latent.detach().numpy().transpose(0, 2, 3, 1)
    distances = ((places[..., None, :] - codebook.detach().numpy()) ** 2).sum(-1)
    return torch.from_numpy(distances.argmin(-1))


def by_hand(network: Any, images: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Latents and chosen vectors of both levels, and the image, with gradients that pass straight through."""
    (fine, coarse), (top_codes, bottom_codes) = network.encoder.up, (one.embedding.weight for one in network.quantize)
    features = fine(images)
    top = network.encoder.to_vectors[0](coarse(features))
    top_vectors = top_codes[nearest(top, top_codes)].movedim(-1, 1)
    through = top + (top_vectors - top).detach()
    bottom = network.encoder.to_vectors[1](torch.cat([features, network.encoder.down[0](through)], 1))
    bottom_vectors = bottom_codes[nearest(bottom, bottom_codes)].movedim(-1, 1)
    repeated = through.repeat_interleave(2, 2).repeat_interleave(2, 3)
    image = network.decoder(torch.cat([repeated, bottom + (bottom_vectors - bottom).detach()], 1))
    return [top, bottom], [top_vectors, bottom_vectors], image


def test_codes_that_are_almost_equal_are_found_again(model: VQVAE2) -> None:
    """As after a restart of many codes from few latents; otherwise an export does not reconstruct like its model."""
    generator = torch.Generator().manual_seed(0)
    for level in model.quantize:
        weight = level.embedding.weight
        weight.copy_(weight[:1] + 1e-5 * torch.randn(weight.shape, generator=generator))
    count = model.config.num_vq_embeddings
    indices = tuple(torch.randint(count, (2, side, side), generator=generator) for side in (4, 8))
    latent = model.vectors(indices)
    for found, expected in zip(model.nearest(latent), indices, strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(model.decode(latent).sample, model.decode(latent, force_not_quantize=True).sample)


def test_a_step_minimises_the_published_loss() -> None:
    """Razavi et al. 2019, eq. 2, summed over the levels, for the gradients of all weights, and each level's use."""
    settings = settings_for(model=MODEL, batch_size=4, optim={"lr": 1e-30}, loss={"commitment": 0.4})
    step = build_step(settings)
    gradients: dict[str, Tensor] = {}
    step.optimizers.autoencoder.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad.clone() for n, p in step.bare_reconstructor.named_parameters()})
    )
    (batch,) = batches = list(micro_batches(0, settings, latent=LATENT))
    logs = step(0, iter(batches))
    reference = build_step(settings).bare_reconstructor
    latents, vectors, image = by_hand(reference.autoencoder, batch.images)
    codes = sum(
        (chosen - latent.detach()).square().mean() + 0.4 * (latent - chosen.detach()).square().mean()
        for latent, chosen in zip(latents, vectors, strict=True)
    )
    ((image - batch.images).abs().mean() + codes).backward()
    assert float(logs["codebook"]) == pytest.approx(codes.item(), rel=1e-5)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    for level, table in enumerate(reference.codebooks, start=1):
        counts = np.bincount(nearest(latents[level - 1], table).flatten(), minlength=32)
        shares = counts[counts > 0] / counts.sum()
        entropy = -(shares * np.log(shares)).sum()
        assert float(logs[f"codebook_perplexity_level_{level}"]) == pytest.approx(np.exp(entropy))
        assert float(logs[f"codebook_used_level_{level}"]) == pytest.approx((counts > 0).mean())


def test_the_finer_level_rests_on_the_coarser(model: VQVAE2) -> None:
    images = images_of()
    top, bottom = model.encode(images).indices
    assert top.shape == (2, 8, 8) and bottom.shape == (2, 16, 16) and len(top.unique()) > 2 and len(bottom.unique()) > 2
    latents, _, _ = by_hand(model, images)
    assert torch.equal(top, nearest(latents[0], model.quantize[0].embedding.weight))
    assert torch.equal(bottom, nearest(latents[1], model.quantize[1].embedding.weight))
    model.quantize[1].embedding.weight.neg_()
    assert torch.equal(model.encode(images).indices[0], top), "the coarser does not see the finer"
    model.quantize[1].embedding.weight.neg_()
    model.quantize[0].embedding.weight.mul_(-5.0)
    assert not torch.equal(model.encode(images).indices[1], bottom)


def test_codes_decode_and_a_folder_gives_the_same_ones(model: VQVAE2, tmp_path: Path) -> None:
    images = images_of()
    encoded = model.encode(images)
    assert torch.equal(model.vectors(encoded.indices), encoded.latent) and encoded.latent.shape == (2, 20, 8, 8)
    # the position (5, 6) of the finer level lies in the square (2, 3), second row, first column
    top, bottom = (one.embedding.weight for one in model.quantize)
    assert torch.equal(encoded.latent[0, :4, 2, 3], top[encoded.indices[0][0, 2, 3]])
    assert torch.equal(encoded.latent[0, 4:, 2, 3].view(4, 2, 2)[:, 1, 0], bottom[encoded.indices[1][0, 5, 6]])
    _, _, image = by_hand(model, images)
    torch.testing.assert_close(model(images).sample, image)
    # as a sample of a prior over vectors, which lies beside the codes
    beside = encoded.latent + 1e-4 * torch.randn_like(encoded.latent)
    assert all(torch.equal(a, b) for a, b in zip(model.nearest(beside), encoded.indices, strict=True))
    assert torch.equal(model.decode(beside).sample, model(images).sample)
    assert not torch.equal(model.decode(beside, force_not_quantize=True).sample, model(images).sample)
    assert torch.equal(Reconstructor(model)(images).image, model(images).sample)
    model.save_pretrained(tmp_path)
    stage = load_first_stage(str(tmp_path))
    assert torch.equal(stage.reconstruct(images), model(images).sample)
    assert torch.equal(stage.encode(images).mean, encoded.latent) and not stage.random
    with pytest.raises(ValueError, match="a latent has 20 channels, not 4"):
        model.decode(encoded.latent[:, :4])
    with pytest.raises(ValueError, match="levels 1"):
        VQVAE2(levels=1)
    half = images.bfloat16()
    assert model.bfloat16()(half).sample.dtype == model.encode(half).latent.dtype == torch.bfloat16


def test_three_levels_fit_together() -> None:
    network = VQVAE2(block_out_channels=(8,), levels=3, norm_num_groups=4, latent_channels=2, num_vq_embeddings=4)
    indices = network.encode(images_of(8)).indices
    assert [one.shape for one in indices] == [(2, 2, 2), (2, 4, 4), (2, 8, 8)]
    parts = zip(network.quantize, indices, network.unpacked(network.vectors(indices)), strict=True)
    assert all(torch.equal(part, level.embedding(one).movedim(-1, 1)) for level, one, part in parts)
    assert network(images_of(8)).sample.shape == (2, 3, 8, 8)


def averaging(**codebook: Any) -> TrainStep:
    loss = {"revive_after": 1 if "normalised" in codebook else 0}
    return build_step(settings_for(model=MODEL, codebook={"ema_decay": 0.8} | codebook, loss=loss, ema={"decay": 0.5}))


def take(step: TrainStep, number: int) -> dict[str, Tensor]:
    return step(number, micro_batches(number, step.settings, latent=LATENT))


def test_the_codes_of_each_level_are_running_means_of_its_latents() -> None:
    step = averaging()
    before = [codes.detach().clone() for codes in step.bare_reconstructor.codebooks]
    (batch,) = micro_batches(0, step.settings, latent=LATENT)
    with torch.no_grad():
        latents, _, _ = by_hand(step.bare_reconstructor.autoencoder, batch.images)
    take(step, 0)
    for latent, old, new in zip(latents, before, step.bare_reconstructor.codebooks, strict=True):
        chosen, places = nearest(latent, old).flatten(), latent.movedim(1, -1).flatten(0, 2)
        counts = 0.8 + 0.2 * torch.bincount(chosen, minlength=32)
        sums = torch.stack([0.8 * old[code] + 0.2 * places[chosen == code].sum(0) for code in range(32)])
        smooth = (counts + SMALLEST) / (counts.sum() + 32 * SMALLEST) * counts.sum()
        torch.testing.assert_close(new.detach(), sums / smooth[:, None], rtol=1e-4, atol=1e-6)


def test_training_goes_on_from_what_a_checkpoint_holds() -> None:
    """Bit for bit, with every way to treat codes, on both levels; dead codes restart as latents of their own level."""
    whole, part = (averaging(normalised=True, gradient="rotation", entropy=0.1) for _ in range(2))
    take(whole, 0)
    restore(part, saved(whole))
    for step in (whole, part):
        take(step, 1)
        logs = take(step, 2)
    assert logs["assignment_entropy"] > 0
    for one, other in zip((*whole.networks, whole.ema.module), (*part.networks, part.ema.module), strict=True):
        assert all(torch.equal(a, other.state_dict()[name]) for name, a in one.state_dict().items())
    for codes in whole.bare_reconstructor.codebooks:
        torch.testing.assert_close(codes.norm(dim=1), torch.ones(len(codes)))


def test_dead_codes_restart_as_latents_of_their_level() -> None:
    step = build_step(settings_for(model=MODEL, loss={"revive_after": 1}, optim={"lr": 1e-30}))
    (batch,) = micro_batches(0, step.settings, latent=LATENT)
    with torch.no_grad():
        latents, _, _ = by_hand(step.bare_reconstructor.autoencoder, batch.images)
    pairs = zip(latents, step.bare_reconstructor.codebooks, strict=True)
    dead = [torch.bincount(nearest(latent, codes).flatten(), minlength=32) == 0 for latent, codes in pairs]
    take(step, 0)
    for latent, codes, unused in zip(latents, step.bare_reconstructor.codebooks, dead, strict=True):
        differences = codes.detach()[:, None] - latent[0].flatten(1).T
        restarted = unused & (unused.cumsum(0) <= latent[0, 0].numel())  # no latent twice
        assert torch.equal((differences.norm(dim=2) < 1e-6).any(1), restarted) and restarted.any() and not unused.all()


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("codebook.levels=[4,4]", "codebook.levels: fix one codebook, and this VQVAE2 has one for each level"),
        ("latents.noise=0.1", "latents.noise: changes a latent before it is decoded, and the finer levels"),
        ("codebook.temperature=2", "codebook.temperature: is for codes that are drawn"),
        ("model.config.levels=1", "model.config: VQVAE2 refuses it: levels 1"),
        ("data.resolution=18", "data.resolution: 18 is not a multiple of the model's factor 4: use 16"),
    ],
)
def test_what_does_not_fit_levels_is_refused(
    pictures: Path, tmp_path: Path, word: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*family_words(pictures, tmp_path / "run", "VQVAE2", word), "--dry-run"]) == 2
    assert said in capsys.readouterr().err


def test_a_latent_is_packed_on_the_grid_of_the_coarsest_level(model: VQVAE2) -> None:
    parts = [torch.randn(1, 4, 2, 3), torch.randn(1, 4, 4, 6)]
    assert all(torch.equal(a, b) for a, b in zip(parts, model.unpacked(packed(parts)), strict=True))
