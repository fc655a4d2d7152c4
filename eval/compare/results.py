"""Reads results of `latent-ae eval recon` safely, and checks whether they can be compared."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latent_ae.config import UserError
from latent_ae.metrics.labels import number, pair, short_name
from latent_ae.report.page import flattened
from latent_ae.text import choice_in_words
from latent_ae_eval.job import RECONSTRUCTION_FORMAT

NOT_COMPARED = ("latents", "changed", "changed.latents")
"""Keys of a protocol that may differ: each kind of latent is compared with its own kind only, so a deterministic model
needs no sample; and `changed` without further keys is empty."""
AGREEMENT = 1e-4
"""Relative tolerance: a table whose means differ more from the result's comes from another measurement."""


@dataclass(frozen=True)
class Result:
    """One measured model."""

    label: str
    """A, B, ..."""
    path: Path
    document: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The label and the name of the model."""
        model = self.document["model"]
        return f"{self.label} {short_name(model.get('location'), str(model.get('class') or 'model'))}"

    @property
    def num_images(self) -> int:
        """Number of measured images."""
        return int(self.document["data"]["num_images"])

    def value(self, kind: str, metric: str) -> float | None:
        """Return the value of a metric for a kind of latent, or None."""
        return number((self.document["metrics"].get(kind) or {}).get(metric))

    def interval(self, kind: str, metric: str) -> tuple[float, float] | None:
        """Return the 95 % interval of a metric for a kind of latent, or None."""
        return pair(((self.document.get("intervals") or {}).get(kind) or {}).get(metric))

    def figures(self) -> list[tuple[str, str]]:
        """Return the latent kinds and metrics of which it has a value."""
        pairs = [(kind, metric) for kind, values in self.document["metrics"].items() for metric in values or {}]
        return [(kind, metric) for kind, metric in pairs if metric != "n" and self.value(kind, metric) is not None]


def read_result(path: str | Path, label: str) -> Result:
    """Read a result of `eval recon`.

    Args:
        path: A result.json, or the folder that holds one.
        label: Label of the result in the comparison.

    Raises:
        UserError: If there is no such file, or it holds something else.
    """
    path = Path(path)
    file = path / "result.json" if path.is_dir() else path
    try:
        document = json.loads(file.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; give a result.json, or the folder that `eval recon` wrote") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON ({error}); give the result.json of `latent-ae eval recon`") from None
    if problem := _problem(document):
        raise UserError(f"{file}: not a result that can be compared: {problem}; measure again: latent-ae eval recon")
    return Result(label, file, document)


def _problem(document: Any) -> str | None:
    if not isinstance(document, dict):
        return "it is not a JSON object"
    if document.get("format") != RECONSTRUCTION_FORMAT:
        return f'its "format" is {json.dumps(document.get("format"))}, not "{RECONSTRUCTION_FORMAT}"'
    for key in ("model", "protocol", "data", "metrics"):
        if not isinstance(document.get(key), dict):
            return f'"{key}" is not an object'
    for key in ("metrics", "intervals"):
        parts = document.get(key)
        kinds = parts.values() if isinstance(parts, dict) else [parts]
        if not all(values is None or isinstance(values, dict) for values in kinds):
            return f'"{key}" does not hold an object for each kind of latent'
    count = document["data"].get("num_images")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        return '"data.num_images" is not a positive whole number'
    return None


def differing(results: Sequence[Result]) -> list[str]:
    """Return what prevents a comparison, a line for each difference with every result's value."""
    settings = [dict(flattened(result.document["protocol"])) for result in results]
    paths = dict.fromkeys(path for values in settings for path in values if path not in NOT_COMPARED)
    lines = {f"protocol.{path}": [values.get(path) for values in settings] for path in paths}
    lines["number of images"] = [f"{result.num_images:,}" for result in results]
    obstacles = [_differing_line(name, results, values) for name, values in lines.items() if len(set(values)) > 1]
    prints = [str(result.document["data"].get("fingerprint") or "") for result in results]
    if len(set(prints)) > 1 or not all(prints):  # a fingerprint that is not recorded may be any
        obstacles.append(_differing_line("data.fingerprint", results, [print_[:16] or None for print_ in prints]))
        choices = [result.document["data"].get("choice") for result in results]
        words = [choice_in_words(choice) if isinstance(choice, dict) else None for choice in choices]
        if len(set(words)) > 1:
            obstacles.append(
                _differing_line("images chosen from the data", results, words)
                + "; if the data is the same, measure again with the same limit and seed"
            )
    sampled = [result for result in results if result.document["metrics"].get("sample")]
    seeds = [str(result.document.get("seed")) for result in sampled]
    if len(set(seeds)) > 1:
        obstacles.append(_differing_line("seed of the posterior's samples", sampled, seeds))
    return obstacles


def _differing_line(name: str, results: Sequence[Result], values: Sequence[str | None]) -> str:
    shown = (
        f"{result.label} {'not recorded' if value is None else ' '.join(value.splitlines())}"
        for result, value in zip(results, values, strict=True)
    )
    return f"{name}: {', '.join(shown)}"


class NoPairs(ValueError):
    """Images cannot be compared one by one; the message is the reason."""


@dataclass(frozen=True)
class ImageTable:
    """The content of images.parquet: a row per image, sorted by the images' digests."""

    keys: list[tuple[str, int]]
    """Sorted pairs of a digest and a number, which distinguishes images that are equal byte for byte."""
    columns: Mapping[tuple[str, str], np.ndarray]
    """(n,) float64 by latent kind and metric, nan where an image has no value."""


def read_images(result: Result) -> ImageTable:
    """Read the table next to a result. Raises NoPairs if there is none, or it belongs to another measurement."""
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table

    path = result.path.parent / "images.parquet"
    names = {f"{kind}_{metric}": (kind, metric) for kind, metric in result.figures()}
    try:
        table = read_table(path, partitioning=None)
        copies: Counter[str] = Counter()
        rows = []
        for digest in table["digest"].to_pylist():
            rows.append((digest, copies[digest]))
            copies[digest] += 1
        order = sorted(range(len(rows)), key=rows.__getitem__)
        columns = {
            figure: table[column].to_numpy().astype(np.float64)[order]
            for column, figure in names.items()
            if column in table.column_names
        }
    except FileNotFoundError:
        raise NoPairs(f"{result.label} has no images.parquet") from None
    except (OSError, ArrowException, KeyError, TypeError, ValueError) as error:
        raise NoPairs(f"{path} cannot be read ({error})") from None
    if len(rows) != result.num_images or not all(digest for digest, _ in rows):
        raise NoPairs(f"{path} does not hold the {result.num_images} images of its result, each with a digest")
    for figure, values in columns.items():
        mean = np.nanmean(values) if np.isfinite(values).any() else np.nan
        if not np.isclose(mean, result.value(*figure), rtol=AGREEMENT, atol=1e-9):
            raise NoPairs(f"{path} and its result differ in {'_'.join(figure)}: they are of different measurements")
    return ImageTable([rows[position] for position in order], columns)


def paired_differences(a: ImageTable, b: ImageTable) -> dict[tuple[str, str], np.ndarray]:
    """Return b - a by latent kind and metric, (n,), nan where either has no value.

    Raises:
        NoPairs: If the images differ.
    """
    if a.keys != b.keys:
        raise NoPairs("their images are not the same")
    return {figure: b.columns[figure] - values for figure, values in a.columns.items() if figure in b.columns}
