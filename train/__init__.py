"""The training loop of latent-ae: `train(TrainSettings.load("quickstart", "steps=100"))`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loop import train as train
    from .settings import TrainSettings as TrainSettings

_MODULES = {"TrainSettings": "settings", "train": "loop"}
__all__ = ["TrainSettings", "train"]


def __getattr__(name: str) -> Any:
    # looked up on first use, so that importing the package costs nothing
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
