"""gan.replay: a discriminator that goes on learning from earlier reconstructions, against the losses written out."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from latent_ae.config import UserError, load_settings
from latent_ae.data.rng import replay_numbers
from latent_ae.objectives.replay import Replay
from latent_ae_train.checkpoint import load_checkpoint, save_checkpoint
from latent_ae_train.settings import TrainSettings
from latent_ae_train.step import buffers_to_restore
from tests.tiny import GAN, STATE, adversary_of, build_step, global_batch, micro_batches, moved, settings_for, weights

KEPT = {**GAN, "conditional": True, "replay": 3}
DONE = torch.tensor(False)


@pytest.mark.parametrize("micro", [4, 1])
def test_every_second_sample_is_judged_by_a_stored_one(micro: int) -> None:
    """The third step, in one pass and in four: two reconstructions of first samples are stored by then. The decoder's
    term is that of the new reconstructions."""
    settings = settings_for(gan={**KEPT, "adaptive": False}, optim={"lr": 1e-30}, batch_size=4, micro_batch_size=micro)
    step, reference = build_step(settings), build_step(settings).bare_reconstructor
    network = adversary_of(build_step(settings))
    with torch.no_grad():
        batches = [global_batch(number, settings) for number in range(3)]
        outs = [reference(images, noise) for images, noise in batches]
    for number in range(2):
        step(number, micro_batches(number, settings))
    gradients: list[Tensor] = []
    step.optimizers.adversaries["gan"].register_step_pre_hook(
        lambda *_: gradients.extend(p.grad.clone() for p in adversary_of(step).parameters())
    )
    logs = step(2, micro_batches(2, settings))
    which = [int(drawn * 2) for drawn in replay_numbers(settings.seed, range(8, 12))]
    chosen = [outs[2], outs[which[1]], outs[2], outs[which[3]]]  # samples 9 and 11 are odd
    fakes = torch.stack([out.image[0 if out is not outs[2] else n] for n, out in enumerate(chosen)])
    latents = torch.stack([out.latent[0 if out is not outs[2] else n] for n, out in enumerate(chosen)])
    real, fake = network(batches[2][0], outs[2].latent), network(fakes, latents)
    (0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())).backward()
    for mine, parameter in zip(gradients, network.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-3, atol=1e-6)
    assert float(logs["generator"]) == pytest.approx(-network(outs[2].image, outs[2].latent).mean().item(), abs=1e-5)
    stored = step.objectives["gan"].replay
    expected = torch.stack([out.image[0] for out in outs])
    torch.testing.assert_close(stored.images, expected)
    assert bool(stored.present.all())


def test_a_full_store_replaces_one_and_leaves_out_what_is_not_finite() -> None:
    store = Replay(4, (1, 2, 2), (1, 1, 1))
    for number in range(40):
        store.store(torch.full((1, 2, 2), float(number)), torch.full((1, 1, 1), -float(number)), 0, number, DONE)
    values = store.images[:, 0, 0, 0].tolist()
    assert max(values) == 39 and len(set(values)) == 4 and values != [36, 37, 38, 39]
    assert torch.equal(store.latents[:, 0, 0, 0], -store.images[:, 0, 0, 0])
    images, latents, there = store.chosen(torch.tensor([0.0, 0.3, 0.999999]), 40)
    assert images[:, 0, 0, 0].tolist() == [values[0], values[1], values[3]] and bool(there.all())
    fresh = Replay(4, (1, 2, 2), (1, 1, 1))
    fresh.store(torch.full((1, 2, 2), torch.inf), torch.zeros(1, 1, 1), 0, 0, DONE)
    assert not bool(fresh.chosen(torch.tensor([0.5]), 1)[2]) and bool(fresh.images.isfinite().all())


def test_a_skipped_step_stores_nothing_and_copies_nothing() -> None:
    settings = settings_for(gan=KEPT, batch_size=4)
    step = build_step(settings)
    for number in range(4):
        step(number, micro_batches(number, settings))
    store = step.objectives["gan"].replay
    before = {name: tensor.clone() for name, tensor in store.state_dict().items()}
    parameter = next(step.bare_reconstructor.parameters())
    parameter.register_hook(lambda gradient: torch.full_like(gradient, torch.nan))
    step(4, micro_batches(4, settings))
    assert step.skipped_steps()[0] == [4]
    assert all(torch.equal(tensor, before[name]) for name, tensor in store.state_dict().items())
    assert not {id(tensor) for tensor in store.buffers()} & {id(tensor) for tensor in buffers_to_restore(step.state)}
    assert len(buffers_to_restore(step.state)) > 0


def test_a_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """With all that changes the discriminator's input or loss, past the size of the store."""
    more = {"lecam": 0.1, "r1": 0.1, "r1_every": 2, "diffaug": ["color"]}
    settings = settings_for(gan={**KEPT, **more}, batch_size=4, micro_batch_size=2)
    step = build_step(settings)
    for number in range(4):
        step(number, micro_batches(number, settings))
    again = build_step(settings)
    load_checkpoint(save_checkpoint(tmp_path, step, {**STATE, "step": 4}), again)
    for one in (step, again):
        one(4, micro_batches(4, settings))
    for own, other in zip(step.networks, again.networks, strict=True):
        assert not moved(weights(own), weights(other))
    stored, restored = (one.objectives["gan"].replay.state_dict() for one in (step, again))
    assert all(torch.equal(tensor, restored[name]) for name, tensor in stored.items())
    plain = build_step(settings_for(gan={**GAN, **more, "conditional": True}, batch_size=4, micro_batch_size=2))
    for number in range(5):
        plain(number, micro_batches(number, plain.settings))
    assert moved(weights(adversary_of(plain)), weights(adversary_of(step)))


def test_sizes_that_change_are_refused() -> None:
    with pytest.raises(UserError, match=r"gan\.replay: stores images of one size"):
        load_settings(TrainSettings, None, ["gan.replay=8", "latents.equivariance=0.5"])
