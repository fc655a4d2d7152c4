"""Reads and writes files of weights; nothing in a file is executed.

Tensors are read one by one, so a full checkpoint of a pipeline takes no more memory than the part that is used.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from latent_ae.config import UserError
from latent_ae.text import printable

PICKLED = (".ckpt", ".pt", ".pth", ".bin")
WRAPPERS = (
    *("ema", "model", "module", "state_dict", "model_state_dict"),
    *("autoencoder", "params", "generator"),
)
"""Keys under which repositories keep the tensors; averaged ones come first, as in the code of LlamaGen and RAE."""


class Stand:
    """Replaces the objects in training checkpoints that are not tensors and that this project does not use."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


HARMLESS = [
    (Stand, f"{package}.{name}")
    for package, names in {
        "pytorch_lightning": ("callbacks.model_checkpoint.ModelCheckpoint", "utilities.parsing.AttributeDict"),
        "lightning.pytorch": ("callbacks.model_checkpoint.ModelCheckpoint", "utilities.parsing.AttributeDict"),
        "numpy": ("core.multiarray.scalar", "_core.multiarray.scalar", "dtype"),
        "_codecs": ("encode",),
        "argparse": ("Namespace",),
        **{module: ("PosixPath", "WindowsPath", "PurePosixPath") for module in ("pathlib", "pathlib._local")},
    }.items()
    for name in names
]
"""Names that are replaced by `Stand`: callbacks and arguments of trainers, paths, NumPy numbers (a best score)."""


class Tensors(Mapping[str, Tensor]):
    """Tensors by name, each of which is read on access."""

    def __init__(self, names: list[str], read: Callable[[str], Tensor]) -> None:
        self.names, self.read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def read_tensors(path: Path, ema: bool | None = None) -> tuple[Tensors, str]:
    """Read the tensors of a file.

    Args:
        path: A safetensors file, or a pickled one, which torch's restricted reader reads.
        ema: Whether to take averaged (True) or raw (False) weights if a pickled file has both; None takes averaged
            ones.

    Returns:
        The tensors, and "averaged" or "raw" if the file has both, else "as stored".

    Raises:
        UserError: If there is no such file, it is damaged, or it holds anything but weights.
    """
    if not path.is_file():
        raise UserError(f"no such file: {path} (from {Path.cwd()})")
    if path.suffix in PICKLED:
        return _unpickled(path, ema)
    try:
        file = safe_open(path, framework="pt")
        return Tensors(list(file.keys()), file.get_tensor), "as stored"
    except Exception as error:  # safetensors raises its own kind, and OSError
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot read {path} as safetensors: {reason} (pickled files end in .ckpt, .pt)") from None


def _unpickled(path: Path, ema: bool | None) -> tuple[Tensors, str]:
    try:
        with torch.serialization.safe_globals(HARMLESS):
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # a file from before torch 1.6 cannot be mapped
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign pickle can fail in any way
        text = " ".join(str(error).split())
        culprit = re.search(r"(?:GLOBAL|global:?|call) (?:GLOBAL )?([\w.]+\.\w+)", text)
        if "weights_only" in text or "Unsupported" in text:
            holds = f" ({printable(culprit[1])})" if culprit else ""
            raise UserError(
                f"{path} is refused: it holds more than weights{holds}, and reading that could run any code. Get it as "
                "safetensors, or save its state_dict alone on a machine where you trust it"
            ) from None
        raise UserError(f"cannot read {path}: {printable(text)[:200]}; it is damaged or no file of torch") from None
    weights = "as stored"
    while inside := _wrapped(content):
        if "ema" in inside and len(inside) > 1:
            weights = "raw" if ema is False else "averaged"
            inside.remove("ema") if ema is False else None
        content = content[inside[0]]
    if not _has_tensors(content):
        raise UserError(f"{path} holds no tensors by name (looked in it and in {', '.join(WRAPPERS)})")
    named = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    return Tensors(list(named), named.__getitem__), weights


def _wrapped(content: Any) -> list[str]:
    """Return the keys of WRAPPERS under which there are tensors by name, however deep."""
    if not isinstance(content, Mapping):
        return []
    return [key for key in WRAPPERS if _has_tensors(content.get(key)) or _wrapped(content.get(key))]


def _has_tensors(content: Any) -> bool:
    return isinstance(content, Mapping) and any(isinstance(value, Tensor) for value in content.values())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], wrapper: str | None) -> None:
    """Write tensors by name.

    Args:
        path: The file: a pickled one if its name ends in one of PICKLED, else safetensors.
        tensors: The tensors by name.
        wrapper: Key under which a pickled file holds the tensors; None writes them at the top.
    """
    whole = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    if path.suffix in PICKLED:
        torch.save(whole if wrapper is None else {wrapper: whole}, path)
    else:
        save_file(whole, path, metadata={"format": "pt"})


def dtypes_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the dtypes of the floating-point tensors by name, for results."""
    found = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values() if tensor.is_floating_point()}
    return ", ".join(sorted(found))
