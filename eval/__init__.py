"""Evaluations of finished first stages: `evaluate("recon", MODEL, DATA, limit=100)`."""

from typing import Any

__all__ = ["evaluate"]


def __getattr__(name: str) -> Any:
    # resolved on first use, so that importing the package costs nothing
    if name == "evaluate":
        from latent_ae_eval.job import evaluate

        return evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
