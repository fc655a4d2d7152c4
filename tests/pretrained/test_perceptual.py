"""LPIPS against the `lpips` package, on random trunks (always) and on the real ones (where they can be had)."""

import copy

import lpips
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from skimage import data

from latent_ae.config import UserError
from latent_ae.pretrained.lpips import LPIPS
from latent_ae.pretrained.weight_files import TRUNKS, store
from latent_ae.pretrained.weights import weight_file

NETS = {"vgg": "vgg16", "alex": "alexnet"}

# lpips 0.1.4 on the pairs of `photograph_pairs` (astronaut; blurred, bicubic, noisy), computed by `reference` below:
#   [reference(net, load_file(weight_file(NETS[net])))(x, y).flatten().tolist() ...]
RECORDED = {
    "vgg": (0.218359, 0.287490, 0.393885),
    "alex": (0.326102, 0.405865, 0.245623),
}


def random_trunk(net):
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.randn(shape, generator=generator) * (2 / np.prod(shape[1:])) ** 0.5
        if len(shape) == 4
        else torch.randn(shape, generator=generator) * 0.1
        for key, shape in TRUNKS[NETS[net]].shapes().items()
    }


@pytest.fixture(scope="module")
def bare_reference():
    return {net: lpips.LPIPS(net=net, pnet_rand=True, verbose=False).requires_grad_(False) for net in NETS}


@pytest.fixture
def reference(bare_reference):
    """The `lpips` package's metric with a given trunk."""

    def make(net, tensors):
        metric = bare_reference[net]
        state = metric.net.state_dict()
        metric.net.load_state_dict({key: tensors["features." + key.split(".", 1)[1]] for key in state})
        return metric

    return make


@pytest.fixture
def ours(tmp_path):
    def make(net, tensors):
        store(tensors, tmp_path / f"{NETS[net]}.safetensors", "test")
        return LPIPS(net, tmp_path)

    return make


@pytest.fixture(params=NETS)
def both(request, ours, reference):
    tensors = random_trunk(request.param)
    return ours(request.param, tensors), reference(request.param, tensors)


def noise_pair(height=47, width=61, channels=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(2, channels, height, width, generator=generator) * 2 - 1
    y = (x + 0.3 * torch.randn(x.shape, generator=generator)).clamp(-1, 1)
    return x, y


def photograph_pairs():
    """(3, 3, 128, 160) in [-1, 1] twice: part of the astronaut, and that part blurred, bicubic x1/4, noisy."""
    photo = data.astronaut()[40:168, 140:300]
    small = Image.fromarray(photo).resize((40, 32), Image.Resampling.BICUBIC)
    padded = np.pad(photo.astype(np.int64), ((2, 2), (2, 2), (0, 0)), mode="edge")
    blurred = sum(padded[i : i + 128, j : j + 160] for i in range(5) for j in range(5)) // 25
    noisy = photo + np.random.RandomState(0).randint(-40, 41, photo.shape)
    bicubic = np.asarray(small.resize((160, 128), Image.Resampling.BICUBIC))
    distorted = np.stack([blurred, bicubic, noisy.clip(0, 255)])
    x = torch.from_numpy(np.stack([photo] * 3)).permute(0, 3, 1, 2)
    y = torch.from_numpy(distorted).permute(0, 3, 1, 2)
    return x.float() / 127.5 - 1, y.float() / 127.5 - 1


# The distance


def test_distance_equals_lpips(both):
    metric, reference = both
    x, y = noise_pair()
    expected = reference(x, y).flatten()
    assert (expected > 0.01).all()
    torch.testing.assert_close(metric(x, y), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metric(y, x), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metric.train()(x, y), expected, rtol=1e-5, atol=1e-6)  # no mode, no dropout


@pytest.mark.parametrize("net", NETS)
def test_real_trunk_on_photographs(net, reference):
    try:
        tensors = load_file(weight_file(NETS[net]))
    except UserError as error:
        pytest.skip(f"{str(error).splitlines()[0]} docs/weights.md says how.")
    x, y = photograph_pairs()
    with torch.no_grad():
        found = LPIPS(net)(x, y)
        expected = reference(net, tensors)(x, y).flatten()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, torch.tensor(RECORDED[net]), rtol=2e-4, atol=0)


def test_paths_with_and_without_gradients_agree(both):
    metric, _ = both
    x, y = noise_pair()
    with torch.no_grad():
        expected = metric(x, y)
    for x_needs, y_needs in ((True, False), (False, True), (True, True)):
        found = metric(x.clone().requires_grad_(x_needs), y.clone().requires_grad_(y_needs))
        torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=1e-6)


def test_one_channel_is_repeated(both):
    metric, _ = both
    x, y = noise_pair(channels=1)
    torch.testing.assert_close(metric(x, y), metric(x.repeat(1, 3, 1, 1), y.repeat(1, 3, 1, 1)))
    assert metric(x, y).shape == (2,)


# The gradient


def test_gradients_equal_those_of_lpips(both):
    # trunks in float64: in float32 a unit that is 0 but for rounding may be on in one and off in the other, and the
    # gradient of a whole receptive field with it
    metric, reference = (copy.deepcopy(network).double() for network in both)
    x, y = (images.double() for images in noise_pair(40, 40))
    weights = torch.tensor([1.0, -2.0])

    def gradients(call, x_needs, y_needs):
        inputs = x.clone().requires_grad_(x_needs), y.clone().requires_grad_(y_needs)
        (call(*inputs).flatten() * weights).sum().backward()
        return [tensor.grad for tensor in inputs]

    expected = gradients(reference, True, True)
    size = expected[0].abs().max().item()
    for needs in ((True, True), (True, False), (False, True)):
        for found, wanted, needed in zip(gradients(metric, *needs), expected, needs, strict=True):
            if needed:
                torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * size)
            else:
                assert found is None


@pytest.mark.parametrize("first_weight", [1e-2, 1e-26])
def test_gradient_is_finite_where_that_of_lpips_is_not(ours, reference, first_weight):
    """A trunk of positive weights: black gives zero features, and white gives some whose squares underflow to 0."""
    tensors = {key: torch.full_like(value, 1e-2 * (value.ndim == 4)) for key, value in random_trunk("alex").items()}
    tensors["features.0.weight"].fill_(first_weight)
    metric = ours("alex", tensors)
    black, white = torch.full((1, 3, 32, 32), -1.0), torch.full((1, 3, 32, 32), 1.0)

    def gradient(call, x, y):
        x = x.clone().requires_grad_()
        call(x, y).sum().backward()
        return x.grad

    if first_weight < 1e-20:
        assert not gradient(reference("alex", tensors), white, black).isfinite().all()
    else:
        assert metric(black, white) > 0.1
    for x, y in ((black, white), (white, black), (black, black), (white, white)):
        assert gradient(metric, x, y).isfinite().all()


def test_gradient_of_identical_images_is_zero(both):
    metric, _ = both
    for x in (noise_pair()[0], torch.zeros(1, 3, 32, 32)):
        image = x.clone().requires_grad_()
        distance = metric(image, x)
        distance.sum().backward()
        assert distance.abs().max() == 0
        assert image.grad.abs().max() == 0


# Training


def test_nothing_is_trainable_or_saved(both):
    metric, _ = both
    assert not list(metric.parameters())
    assert not metric.state_dict()


def saved_bytes(call, *inputs):
    """Bytes that the graph keeps for backward, each storage counted once, without the metric's own tensors."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = call(*inputs)
    own = {buffer.untyped_storage().data_ptr() for buffer in call.buffers()}
    sizes = [tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own]
    return sum(sizes) if result.requires_grad else 0


def test_target_keeps_only_what_the_comparison_needs(ours, reference):
    """x: every activation and the pools' indices; y: the five compared features; little else."""
    metric, theirs = ours("vgg", random_trunk("vgg")), reference("vgg", random_trunk("vgg"))
    x, y = noise_pair(64, 64)
    activations = sum(n * c / d**2 for n, c, d in ((2, 64, 1), (2, 128, 2), (3, 256, 4), (3, 512, 8), (3, 512, 16)))
    pools = sum(c / d**2 for c, d in ((64, 2), (128, 4), (256, 8), (512, 16)))
    compared = sum(c / d**2 for c, d in ((64, 1), (128, 2), (256, 4), (512, 8), (512, 16)))
    needed = 2 * 64 * 64 * (4 * activations + (4 + 8) * pools + 4 * compared)
    found = saved_bytes(metric, x.clone().requires_grad_(), y)
    assert needed <= found < 1.05 * needed
    assert found < 0.9 * saved_bytes(theirs, x.clone().requires_grad_(), y)
    assert saved_bytes(metric, x, y) == 0


def test_trunk_runs_in_autocast_precision_and_distance_in_float32(ours):
    metric = ours("alex", random_trunk("alex"))
    x, y = (image[:1, :, :31, :31] for image in noise_pair())
    exact = metric(x, y)
    image = x.clone().requires_grad_()
    feature_types = set()

    def keep(tensor):
        if tensor.ndim == 4 and tensor.shape[1] == 64 and tensor.shape[2] > 1:
            feature_types.update({tensor.dtype} - {torch.int64})  # not the pools' indices
        return tensor

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        distance = metric(image, y)
    assert feature_types == {torch.bfloat16}
    distance.sum().backward()
    assert distance.dtype == torch.float32 and image.grad.dtype == torch.float32
    torch.testing.assert_close(distance.detach(), exact, rtol=0.05, atol=0)
    assert image.grad.isfinite().all() and image.grad.abs().max() > 0


# What is refused


def test_wrong_images_are_refused(both):
    metric, _ = both
    x, _ = noise_pair()
    bad = [(x[0], x[0]), (x, x[:1]), (x[:, :2], x[:, :2]), (x.repeat(1, 2, 1, 1),) * 2]
    bad += [((x * 127).to(torch.uint8),) * 2]
    smallest = {"vgg": 16, "alex": 31}[metric.net]
    bad += [(x[..., : smallest - 1, :smallest],) * 2]
    for pair in bad:
        with pytest.raises(ValueError, match="LPIPS"):
            metric(*pair)
    assert metric(*(x[..., :smallest, :smallest],) * 2).shape == (2,)


def test_unknown_net_is_refused():
    with pytest.raises(ValueError, match="squeeze"):
        LPIPS("squeeze")


def test_maps_equal_those_of_lpips(both):
    ours, theirs = both
    x, y = noise_pair()
    distances, maps = ours.maps(x, y)
    torch.testing.assert_close(distances, ours(x, y))
    theirs.spatial = True
    try:
        expected = theirs(x, y)[:, 0]
    finally:
        theirs.spatial = False
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-5)
