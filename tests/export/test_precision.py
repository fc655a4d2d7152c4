"""What half precision and tiling do to a first stage, against the same done by hand."""

import copy
import json
import math
import re

import pytest
import skimage
import torch
from diffusers import AutoencoderKL

from latent_ae.export import precision
from latent_ae.export.precision import compare_tiled, probe_precision, probe_tiling, verdict
from latent_ae.models.build import build_autoencoder
from latent_ae.models.settings import ModelSettings
from latent_ae.progress import progress_bar


def tiny_autoencoder() -> AutoencoderKL:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
        )


IMAGES = torch.from_numpy(skimage.data.astronaut()[100:148, 200:232] / 127.5 - 1).float().permute(2, 0, 1)[None]


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return 10 * math.log10(4 / float((a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean()))


def reconstructed(vae: AutoencoderKL, dtype: torch.dtype) -> torch.Tensor:
    vae = copy.deepcopy(vae).to(dtype).eval()
    with torch.no_grad():
        return vae(IMAGES.to(dtype), sample_posterior=False).sample.float()


def rounded(vae: AutoencoderKL, dtype: torch.dtype) -> torch.Tensor:
    """In float32, each parameter, the image and whatever a module gives rounded to `dtype`."""
    vae = copy.deepcopy(vae).eval()

    def hook(module, inputs, output):
        return output.to(dtype).float() if isinstance(output, torch.Tensor) else None

    for module in vae.modules():
        module.register_forward_hook(hook)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.copy_(parameter.to(dtype))
        return vae(IMAGES.to(dtype).float(), sample_posterior=False).sample


def test_a_normal_model_fits_and_is_left_as_it_is():
    vae = tiny_autoencoder().train()
    before = copy.deepcopy(vae.state_dict()), dict(vae.config), torch.get_rng_state()
    found = probe_precision(vae, IMAGES.repeat(2, 1, 1, 1))
    assert found["force_upcast"] is False and found["images"] == 2
    exact = reconstructed(vae, torch.float32)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        assert found[name]["psnr"] == pytest.approx(psnr(rounded(vae, dtype), exact), abs=0.02)
        assert found[name]["psnr"] == pytest.approx(psnr(reconstructed(vae, dtype), exact), abs=4)
        assert (found[name]["not_finite"], found[name]["first_not_finite"], found[name]["emulated"]) == (0, None, True)
    # three bits less are 18 dB, where rounding is all there is
    assert 10 < found["fp16"]["psnr"] - found["bf16"]["psnr"] < 26
    assert vae.training and not vae.use_tiling and dict(vae.config) == before[1]
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in vae.state_dict().items())
    assert all(parameter.requires_grad for parameter in vae.parameters()) and not _hooks(vae)
    assert torch.equal(torch.get_rng_state(), before[2])
    assert verdict(found).startswith("fp16 is safe: the largest activation is ")
    json.dumps(found)


def _hooks(vae: AutoencoderKL) -> list:
    return [hook for module in vae.modules() for hook in module._forward_hooks.values()]


def test_peaks_are_those_of_the_layers():
    vae = tiny_autoencoder().eval()
    outputs: dict[str, float] = {}
    for name, module in vae.named_modules():
        module.register_forward_hook(lambda m, i, out, name=name: outputs.update({name: float(out.abs().max())})
                                     if isinstance(out, torch.Tensor) else None)  # fmt: skip
    peaks = probe_precision(tiny_autoencoder(), IMAGES)["peaks"]
    with torch.no_grad():
        vae(IMAGES, sample_posterior=False)
    assert len(peaks) == 5 and peaks[0]["max_abs"] == pytest.approx(max(outputs.values()), abs=1e-3)
    assert [peak["max_abs"] for peak in peaks] == sorted((peak["max_abs"] for peak in peaks), reverse=True)
    darker = torch.cat([IMAGES, 0.1 * IMAGES])
    alone = [probe_precision(tiny_autoencoder(), image[None])["peaks"][0] for image in darker]
    both = probe_precision(tiny_autoencoder(), darker)["peaks"][0]
    assert alone[0] != alone[1] and both == max(alone, key=lambda peak: peak["max_abs"])
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 1e3
    layers = [peak["layer"] for peak in probe_precision(vae, IMAGES)["peaks"]]
    assert layers[0] == "decoder.conv_out" and "decoder" not in layers  # which only hands it on


@pytest.mark.parametrize("layer", ["encoder.conv_in", "decoder.up_blocks.0.resnets.1.conv1"])
def test_a_layer_that_overflows_is_named_and_upcast(layer):
    vae = tiny_autoencoder()
    with torch.no_grad():
        # a group norm follows, so that in fp32 nothing is amiss
        vae.get_submodule(layer).weight *= 1e6
    found = probe_precision(vae, IMAGES)
    assert reconstructed(vae, torch.float32).isfinite().all()
    assert found["force_upcast"] is True and found["peaks"][0]["max_abs"] > 65504
    assert layer in {peak["layer"] for peak in found["peaks"]}
    assert found["fp16"]["first_not_finite"] == layer and found["fp16"]["not_finite"] > 0
    assert found["fp16"]["psnr"] is None and not reconstructed(vae, torch.float16).isfinite().all()
    assert found["bf16"]["not_finite"] == 0 and found["bf16"]["first_not_finite"] is None
    assert verdict(found).startswith(f"fp16 is not safe: values are not finite from {layer} on; the largest activation")


@pytest.mark.parametrize("layer", ["encoder.conv_in", "decoder.up_blocks.1.resnets.1.conv1"])
def test_values_that_are_not_finite_are_counted_by_layer(layer):
    vae, images = tiny_autoencoder(), torch.cat([0 * IMAGES, IMAGES])
    with torch.no_grad():
        vae.get_submodule(layer).weight *= 1e6
    half, expected, before = copy.deepcopy(vae).half().eval(), {}, [torch.empty(0)]

    def count(name, output):
        if isinstance(output, torch.Tensor) and output.data_ptr() != before[0].data_ptr():  # else only handed on
            before[0] = output
            if number := int(output.isinf().sum() + output.isnan().sum()):
                expected[name] = expected.get(name, 0) + number

    for name, module in half.named_modules():
        module.register_forward_hook(lambda m, i, out, name=name: count(name, out))
    with torch.no_grad():
        for image in images:
            half.decode(half.encode(image[None].half()).latent_dist.mode())
    found = probe_precision(vae, images)
    assert found["fp16"]["layers_not_finite"] == len(expected) and next(iter(expected)) == layer
    assert list(found["fp16"]["not_finite_by_layer"].items()) == list(expected.items())[:20]
    assert (len(expected) > 20) == (layer == "encoder.conv_in")
    assert found["bf16"]["layers_not_finite"] == 0 and found["bf16"]["not_finite_by_layer"] == {}


def test_near_the_limit_is_not_safe_either():
    vae = tiny_autoencoder()
    peak = probe_precision(vae, IMAGES)
    before = next(p["max_abs"] for p in peak["peaks"])
    for factor, unsafe in ((0.45, False), (0.55, True)):
        near = tiny_autoencoder()
        layer = near.decoder.conv_in
        outputs: list[float] = []
        handle = layer.register_forward_hook(lambda m, i, out, seen=outputs: seen.append(float(out.abs().max())))
        reconstructed_once(near)
        handle.remove()
        with torch.no_grad():
            scale = factor * 65504 / outputs[0]
            layer.weight *= scale
            layer.bias *= scale
        found = probe_precision(near, IMAGES)
        assert found["fp16"]["not_finite"] == 0 and found["force_upcast"] is unsafe
        assert found["peaks"][0]["max_abs"] > before
        assert ("other images may reach higher" in verdict(found)) is unsafe


def reconstructed_once(vae: AutoencoderKL) -> None:
    with torch.no_grad():
        vae.eval()(IMAGES, sample_posterior=False)


def without_half(error: str):
    """A convolution of a device that has no fp16."""
    forward = torch.nn.Conv2d.forward

    def convolve(self, x):
        if x.dtype == torch.float16:
            raise RuntimeError(error)
        return forward(self, x)

    return convolve


def test_a_cpu_does_not_compute_in_half_precision(monkeypatch):
    def refused(self, x):
        assert x.dtype == self.weight.dtype == torch.float32
        return torch.nn.functional.conv2d(x, self.weight, self.bias, self.stride, self.padding)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", refused)
    found = probe_precision(tiny_autoencoder(), IMAGES)
    assert found["fp16"]["emulated"] and found["bf16"]["emulated"]


def test_another_device_computes_or_is_emulated_and_said_so(monkeypatch):
    """As on an accelerator, here on the CPU."""
    vae = tiny_autoencoder()
    exact = reconstructed(vae, torch.float32)

    def tried(dtype):
        with progress_bar("", 1, "layer") as progress:
            return precision._in_type(vae, IMAGES, torch.device("cpu"), dtype, exact, progress, emulated=False)

    for dtype in (torch.bfloat16, torch.float16):
        found = tried(dtype)
        assert found["psnr"] == pytest.approx(psnr(reconstructed(vae, dtype), exact), abs=0.02)
        assert not found["emulated"]
    monkeypatch.setattr(torch.nn.Conv2d, "forward", without_half("\"slow_conv2d_cpu\" not implemented for 'Half'"))
    found = tried(torch.float16)
    assert found["emulated"] and not tried(torch.bfloat16)["emulated"]
    assert found["psnr"] == pytest.approx(psnr(rounded(vae, torch.float16), exact), abs=0.02)
    with torch.no_grad():
        vae.decoder.conv_in.weight *= 1e6
    assert tried(torch.float16)["first_not_finite"] == "decoder.conv_in"
    monkeypatch.setattr(torch.nn.Conv2d, "forward", without_half("another"))
    with pytest.raises(RuntimeError, match="another"):
        tried(torch.float16)


def test_the_trial_shows_how_far_it_is(capsys):
    probe_precision(tiny_autoencoder(), IMAGES.repeat(2, 1, 1, 1))
    error = capsys.readouterr().err
    assert "trial in half precision: 100%" in error
    done, total = re.findall(r"(\d+)/(\d+)", error)[-1]
    # three types, two images, once through each convolution, group norm and linear layer
    layers = (torch.nn.Conv2d, torch.nn.GroupNorm, torch.nn.Linear)
    assert int(done) == int(total) == 6 * sum(isinstance(module, layers) for module in tiny_autoencoder().modules())


def test_tiles_that_diffusers_cannot_put_together_are_not_tried():
    vae = tiny_autoencoder().eval()
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    for latent_px in (1, 2, 3, 4, 5, 6, 8, 9):
        vae.register_to_config(sample_size=latent_px * factor)
        found = probe_tiling(vae, IMAGES[0])
        assert (found is not None) == (latent_px % 4 == 0)


def test_tiled_decoding_is_compared_with_whole():
    vae = tiny_autoencoder().eval()
    found = probe_tiling(vae, IMAGES[0])
    assert (found["side_px"], found["tile_px"]) == (48, 32)
    picture = torch.cat([IMAGES[0], IMAGES[0].flip(2)], 2)[:, :48, :48][None]
    with torch.no_grad():
        latents = vae.encode(picture).latent_dist.mode()
        whole = vae.decode(latents).sample
        vae.enable_tiling()
        tiled = vae.decode(latents).sample
    assert found["psnr"] == pytest.approx(psnr(tiled, whole), abs=0.01) and found["psnr"] < 99
    difference = (tiled - whole).abs()
    assert found["max_abs"] == pytest.approx(float(difference.max()), abs=1e-5)
    seams = torch.zeros(48, 48, dtype=torch.bool)
    seams[24:32] = seams[:, 24:32] = True  # the second tile begins at 24, the first ends at 32
    assert found["mean_abs_at_seams"] == pytest.approx(float(difference[..., seams].mean()), abs=1e-6)
    assert found["mean_abs_elsewhere"] == pytest.approx(float(difference[..., ~seams].mean()), abs=1e-6)
    assert vae.use_tiling and compare_tiled(vae, latents, 64)["psnr"] == precision.MOST_DB  # one tile


def test_tiles_that_do_not_meet_are_left_out():
    """diffusers steps through the latent by three quarters of a tile, cut to whole latent pixels."""
    settings = ModelSettings(block_out_channels=(4,) * 6, layers_per_block=1, norm_num_groups=2)
    vae = build_autoencoder(settings, sample_size=32)
    assert probe_tiling(vae, IMAGES[0]) is None
    with pytest.raises((RuntimeError, ValueError)):
        compare_tiled(vae, torch.zeros(1, 4, 2, 2), 32)
    assert probe_tiling(build_autoencoder(settings, sample_size=64), IMAGES[0]) is None
    assert probe_tiling(build_autoencoder(settings, sample_size=128), IMAGES[0])["tile_px"] == 128
