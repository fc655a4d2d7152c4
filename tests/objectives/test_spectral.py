"""Spectral regularisation against singular value decompositions."""

import pytest
import torch

from latent_ae.config import UserError
from latent_ae.objectives.spectral import Spectral, SpectralSettings
from tests.tiny import build_step, micro_batches, settings_for

WEIGHT = 0.5


@pytest.mark.parametrize("micro", [4, 2])
def test_the_gradient_is_that_of_the_largest_singular_values(micro: int) -> None:
    """Of all convolutions and linear layers, once in a step however it is split, after steps that change no weight."""
    settings = settings_for(
        loss={"pixel_weight": 0.0, "spectral": WEIGHT}, batch_size=4, micro_batch_size=micro, optim={"lr": 1e-30}
    )
    step = build_step(settings)
    model = step.bare_reconstructor
    gradients: dict[str, torch.Tensor] = {}
    step.optimizers.autoencoder.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    )
    for number in range(60):
        logged = step(number, micro_batches(0, settings))["spectral"]
    matrices = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.ndim > 1}
    for matrix in matrices.values():
        matrix.requires_grad_()
    values = {name: torch.linalg.matrix_norm(matrix.flatten(1), 2) for name, matrix in matrices.items()}
    assert logged.item() == pytest.approx(torch.stack(list(values.values())).mean().item(), rel=1e-3)
    torch.stack(list(values.values())).sum().backward()
    compared = 0
    for name, matrix in matrices.items():
        first, second, *_ = *torch.linalg.svdvals(matrix.detach().flatten(1)).tolist(), 0.0
        if first > 1.02 * second:  # otherwise the iteration is still between the two
            wanted = WEIGHT * matrix.grad
            assert (gradients[name] - wanted).norm() < 0.1 * wanted.norm(), name
            compared += 1
    assert compared > len(matrices) // 2
    assert not any(gradients[name].any() for name in gradients if name not in matrices)


def test_a_run_without_matrices_that_train_is_refused() -> None:
    with pytest.raises(UserError, match="^loss.spectral: nothing that trains is a convolution"):
        Spectral.build(SpectralSettings(spectral=1.0), None, torch.nn.GroupNorm(1, 4), torch.device("cpu"))
