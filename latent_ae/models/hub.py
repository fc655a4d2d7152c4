"""What a repository on the hub holds besides the weights that diffusers loads."""

from collections.abc import Sequence
from pathlib import Path

from latent_ae.config import UserError


def file_on_hub(repository: str, name: str, revision: str | None = None) -> Path | None:
    """Return a file of a repository; None if it has no such file, or it is not in the cache and the hub gives nothing.

    Args:
        repository: Id of the repository.
        name: Path of the file in it.
        revision: Commit or tag.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(repository, name, revision=revision)  # needs no network
        return Path(cached if isinstance(cached, str) else hf_hub_download(repository, name, revision=revision))
    except Exception:  # no such file, no network, offline mode, no permission
        return None


def subfolder_on_hub(repository: str, places: Sequence[str], revision: str | None = None) -> str | None:
    """Return the subfolder of a pipeline's first stage; None if the repository is the model itself.

    Args:
        repository: Id of the repository.
        places: Subfolders in which pipelines keep their first stage.
        revision: Commit or tag.

    Raises:
        UserError: If the hub cannot be asked, or none of the places has a config.json.
    """
    from huggingface_hub import file_exists, try_to_load_from_cache

    files = {None: "config.json"} | {place: f"{place}/config.json" for place in places}
    for place, file in files.items():  # files that were downloaded before need no network
        if isinstance(try_to_load_from_cache(repository, file, revision=revision), str):
            return place
    try:
        for place, file in files.items():
            if file_exists(repository, file, revision=revision):
                return place
    except Exception as error:  # no network, offline mode, no permission, no such repository
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{repository} is neither a folder here (from {Path.cwd()}) nor in the hub's cache, and the hub cannot be "
            f"asked ({reason}). Give a folder, or download it on a machine with a network and set HF_HOME to its cache"
        ) from error
    raise UserError(f"{repository}: neither a config.json nor one in {', '.join(places)}: no first stage")
