"""Networks that were trained with a first stage and lie in its export, each in a folder of its own."""

from pathlib import Path
from typing import TypeVar

from diffusers import ModelMixin

from latent_ae.config import UserError

M = TypeVar("M", bound=ModelMixin)


def stored_companion(kind: type[M], name: str, export: str | Path) -> M | None:
    """Return a network of an export, or of the export of a run; None if it has none.

    Args:
        kind: Its class.
        name: Its folder in the export.
        export: The folder of the export or the run.

    Raises:
        UserError: If it cannot be loaded.
    """
    root = Path(export).expanduser()
    folder = next((place for place in (root / name, root / "export" / name) if place.is_dir()), None)
    if folder is None:
        return None
    try:
        network: M = kind.from_pretrained(folder, local_files_only=True).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder}: this {kind.__name__} cannot be loaded: {error}") from error
    return network
