"""Images with their stored latents: each latent is that of its image, on any number of processes, or it is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from latent_ae.config import UserError
from latent_ae.data.loader import open_images, training_batches
from latent_ae.data.rng import posterior_noise
from latent_ae.data.settings import DataSettings
from latent_ae.latents.encode import encode_images
from latent_ae.latents.pairs import LatentPairs, open_pairs
from latent_ae.latents.settings import EncodeSettings
from latent_ae.models.family import LatentScaling
from latent_ae.models.loading import FirstStage, load_first_stage
from tests.tiny_models import TWO

SIDE = 16


@pytest.fixture(scope="module")
def made(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[FirstStage, Path, Path]:
    """A first stage, a folder of images and their latents in full precision."""
    folder = tmp_path_factory.mktemp("pairs")
    torch.manual_seed(0)
    AutoencoderKL(**TWO).save_pretrained(folder / "model")
    shutil.copytree(pictures, folder / "images")
    encode_images(
        folder / "model",
        folder / "images",
        folder / "latents",
        EncodeSettings(resolution=SIDE, stored="fp32", device="cpu"),
    )
    return load_first_stage(str(folder / "model")), folder / "images", folder / "latents"


def opened(made: tuple[FirstStage, Path, Path], sha256: str | None = None, **changes: Any) -> LatentPairs:
    stage, images, latents = made
    scaling = changes.pop("scaling", LatentScaling())
    data = DataSettings(
        **{"source": str(images), "resolution": SIDE, "num_workers": 0, "eval_fraction": 0.25} | changes
    )
    source = open_images(data, "train")
    scalings = {sha256 or str(stage.encoder_sha256): scaling}
    return open_pairs(str(latents), source, data, scalings=scalings, name="mine", seed=3)


def batches(pairs: LatentPairs, count: int, rank: int = 0, world_size: int = 1, micro: int = 4) -> list[Any]:
    data = DataSettings(resolution=SIDE, num_workers=0)
    sizes = {"batch_size": 8, "micro_batch_size": micro, "rank": rank, "world_size": world_size}
    read = training_batches(pairs.images, data, channels=3, seed=3, crop=pairs.crop, **sizes)
    return [next(read) for _ in range(count)]


def test_each_latent_is_that_of_its_image(made: tuple[FirstStage, Path, Path]) -> None:
    """Mirrored images, too; the noise draws from the posterior."""
    pairs, stage = opened(made), made[0]
    noise = torch.randn(4, *pairs.cache.shape)
    for batch in batches(pairs, 4):
        with torch.no_grad():
            encoded = stage.encode(batch.images)
        stored = pairs.latents(batch.indices, batch.numbers, torch.zeros_like(noise))
        torch.testing.assert_close(stored, encoded.mean, atol=1e-5, rtol=0)
        sampled = pairs.latents(batch.indices, batch.numbers, noise)
        torch.testing.assert_close(sampled, encoded.mean + encoded.std * noise, atol=1e-5, rtol=0)
        assert len(torch.unique(encoded.mean[:, 0, 0, 0])) > 1
        scaled = opened(made, scaling=LatentScaling(0.4, 0.1)).latents(batch.indices, batch.numbers, noise)
        torch.testing.assert_close(scaled, (sampled - 0.1) * 0.4)
    straight = [pairs.crop(_pixels(pairs, 0), number) for number in range(16)]
    assert len({array.tobytes() for array in straight}) == 2  # some are mirrored


def _pixels(pairs: LatentPairs, index: int) -> Any:
    import numpy as np

    return np.asarray(Image.open(pairs.images.read(index)).convert("RGB"))


def test_samples_do_not_depend_on_the_number_of_processes(made: tuple[FirstStage, Path, Path]) -> None:
    """Nor do the latents that are drawn for them."""
    pairs = opened(made)

    def taken(rank: int, processes: int, micro: int) -> dict[int, tuple[int, torch.Tensor, torch.Tensor]]:
        found = dict[int, tuple[int, torch.Tensor, torch.Tensor]]()
        for one in batches(pairs, 4, rank, processes, micro):
            latents = pairs.latents(one.indices, one.numbers, posterior_noise(3, one.numbers, pairs.cache.shape))
            rows = zip(one.numbers, one.indices, one.images, latents, strict=True)
            found |= {number: (index, image, latent) for number, index, image, latent in rows}
        return found

    alone, split = taken(0, 1, micro=4), taken(0, 2, micro=2) | taken(1, 2, micro=2)
    assert alone.keys() == split.keys() and len(alone) == 16
    for number, (index, image, latent) in alone.items():
        assert split[number][0] == index
        assert torch.equal(split[number][1], image) and torch.equal(split[number][2], latent)


def test_latents_of_something_else_are_refused(made: tuple[FirstStage, Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"decoder\.latents: .*latents holds latents of another .* starts from mine"):
        opened(made, sha256="0" * 64)
    with pytest.raises(UserError, match=r"data\.resolution: 32, and the images in .* were encoded with 16"):
        opened(made, resolution=32)
    with pytest.raises(UserError, match=r"data\.resize_px: 20, .* were encoded with 16"):
        opened(made, resize_px=20)
    with pytest.raises(UserError, match=r"data\.background: \[0, 0, 0\], .* encoded on \[255, 255, 255\]"):
        opened(made, background=(0, 0, 0))
    assert len(opened(made, sha256=made[0].sha256).images)  # what a cache of an earlier version has
    with pytest.raises(UserError, match="holds none of the .* training images of photos"):
        opened(made, source="photos")
    with pytest.raises(UserError, match="holds no latents"):
        opened((made[0], made[1], tmp_path))


@pytest.mark.parametrize("framing", [None, {"resize_px": 16, "crop_px": 16, "odd": 1}, {"crop_px": -1}])
def test_a_damaged_framing_is_refused(made: tuple[FirstStage, Path, Path], tmp_path: Path, framing: Any) -> None:
    folder = shutil.copytree(made[2], tmp_path / "latents")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["framing"]
    (folder / "manifest.json").write_text(json.dumps(manifest | ({"framing": framing} if framing else {})))
    with pytest.raises(UserError, match="manifest.json"):
        opened((made[0], made[1], folder))


@pytest.mark.parametrize("encoder", [["0"], {}, 5])
def test_a_damaged_digest_of_the_encoder_is_refused(
    made: tuple[FirstStage, Path, Path], tmp_path: Path, encoder: Any
) -> None:
    folder = shutil.copytree(made[2], tmp_path / "latents")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["made_from"]["encoder"] = encoder
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest.json is no manifest .* made_from.encoder"):
        opened((made[0], made[1], folder))


def test_an_image_that_has_changed_is_refused(made: tuple[FirstStage, Path, Path]) -> None:
    pairs = opened(made)
    path = Path(str(pairs.images.read(0)))
    before = path.read_bytes()
    Image.new("RGB", (SIDE, SIDE)).save(path)
    try:
        with pytest.raises(UserError, match="is not the image that was encoded"):
            batches(pairs, len(pairs.images))
    finally:
        path.write_bytes(before)


def test_mirrored_images_need_mirrored_latents(made: tuple[FirstStage, Path, Path], tmp_path: Path) -> None:
    settings = EncodeSettings(resolution=SIDE, flips=False, device="cpu")
    encode_images(made[0].location or "", made[1], tmp_path / "latents", settings)
    with pytest.raises(UserError, match=r"data\.flip: .* has no latents of mirrored images: set it to false"):
        opened((made[0], made[1], tmp_path / "latents"))
    assert len(opened((made[0], made[1], tmp_path / "latents"), flip=False).images)
