"""Networks that were trained with a first stage and lie in its export, each in a folder of its own."""

from pathlib import Path
from typing import Any, TypeVar

from diffusers import ModelMixin

from latent_ae.config import UserError
from latent_ae.models.hub import file_on_hub
from latent_ae.models.loading import whole_model

M = TypeVar("M", bound=ModelMixin)


def stored_companion(kind: type[M], name: str, export: str | Path, revision: str | None = None) -> M | None:
    """Return a network of an export, of the export of a run, or of an export on the hub; None if it has none.

    Args:
        kind: Its class.
        name: Its folder in the export.
        export: The folder of the export or the run, or a hub id.
        revision: Commit or tag of a hub id.

    Raises:
        UserError: If it cannot be loaded.
    """
    root = Path(export).expanduser()
    folder = next((place for place in (root / name, root / "export" / name) if place.is_dir()), None)
    place: dict[str, Any] = {"subfolder": name, "revision": revision}
    if folder is not None:
        place = {"local_files_only": True}
    elif root.exists() or file_on_hub(str(export), f"{name}/config.json", revision) is None:
        return None
    try:
        network: M = whole_model(kind, folder or str(export), **place).eval()
    except Exception as error:  # diffusers raises many kinds for a missing, truncated or foreign file
        reason = " ".join(str(error).split())[:400]
        raise UserError(f"{folder or export}: its {kind.__name__} cannot be loaded: {reason}") from error
    return network
