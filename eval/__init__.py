"""Evaluations of finished first stages: `evaluate("recon", MODEL, DATA, limit=100)`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latent_ae_eval.job import evaluate as evaluate

_MODULES = {"evaluate": "job"}
__all__ = ["evaluate"]


def __getattr__(name: str) -> Any:
    # looked up on first use, so that importing the package costs nothing
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
