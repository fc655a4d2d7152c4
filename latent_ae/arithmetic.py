"""Precision of float32 arithmetic on a GPU, layers that an autocast leaves in float32, and memory formats."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


class WeightPrecisionConv2d(nn.Conv2d):
    """A convolution that computes in its weight's precision under any autocast, and returns that precision."""

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(features.to(self.weight.dtype))


def training_memory_format(device: torch.device) -> torch.memory_format:
    """Return the fastest memory format of trained networks and their images on `device`.

    It is channels-last, except on CPUs without AVX-512, where the quickstart's step takes 1.1 times as long in it
    because of the gradients of its convolutions; docs/performance.md has the measurements.
    """
    contiguous = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
    return torch.contiguous_format if contiguous else torch.channels_last


def lay_out(network: Network, layout: torch.memory_format) -> Network:
    """Puts the weights of the network's 2-D convolutions into a memory format, in place, and returns the network.

    `Module.to` fails on networks with 3-D convolutions, whose weights have five dimensions.
    """
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=layout)
    return network


@contextmanager
def float32_arithmetic(*, tf32: bool = False, repeatable: bool = False, benchmark: bool = False) -> Iterator[None]:
    """Set in a `with` block how CUDA devices compute float32 convolutions and matrix products.

    PyTorch's own default is TF32 (10 bits of mantissa instead of 23) for convolutions and float32 for matrix products.
    The previous settings are restored afterwards. A CPU has no TF32.

    Args:
        tf32: Whether both kinds of operations may round their inputs to TF32.
        repeatable: Also restrict cuDNN to algorithms that give the same result every time.
        benchmark: Let cuDNN try its algorithms on each new shape and keep the fastest, unless `repeatable`.
    """
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    precisions = [operation.fp32_precision for operation in _operations()]
    choice = cudnn.deterministic, cudnn.benchmark
    try:
        older = cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:  # the caller has set an fp32_precision that the older flags cannot express, so they stay
        older = None
        _set_precisions(["tf32"] * 3 if tf32 else [])
    else:  # these also set fp32_precision of torch >= 2.9, and torch.compile reads them
        cudnn.allow_tf32 = products.allow_tf32 = tf32
    if not tf32:  # "none", which the older flags leave, would follow torch.backends.fp32_precision
        _set_precisions(["ieee"] * len(precisions))
    cudnn.benchmark = benchmark and not repeatable
    if repeatable:
        cudnn.deterministic = True
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = choice
        if older is not None:
            cudnn.allow_tf32 = older[0]
            torch.set_float32_matmul_precision(older[1])
        _set_precisions(precisions)


def _set_precisions(precisions: list[str]) -> None:
    for operation, precision in zip(_operations(), precisions, strict=False):
        operation.fp32_precision = precision


def _operations() -> list[Any]:
    """Return the backends that have an `fp32_precision` of their own; none before torch 2.9."""
    backends: Any = torch.backends
    if not hasattr(backends.cudnn, "conv"):
        return []
    return [backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul, backends.mkldnn.matmul]
