"""The report of a likelihood: findings in words and numbers, the curve of the bound, and images."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from latent_ae.metrics.labels import short_name
from latent_ae.objectives.kl import COLLAPSED_NATS
from latent_ae.report import page
from latent_ae.report.page import Finding
from latent_ae.report.pictures import to_picture
from latent_ae_eval.table import Row, aligned, to_look_at

NAMES = {
    "importance_bound": "importance-weighted bound",
    "elbo": "ELBO",
    "distortion": "distortion",
    "rate": "rate",
}
MARKS = {"fine": "normal", "look": "worth a look", "problem": "a problem"}
UNITS = {"bits per dimension": ("bits_per_dimension", ".4f"), "nats per image": ("nats_per_image", ",.1f")}
"""Units by name, with their key in a result and their format."""
FEW_EFFECTIVE = 2.0
PICTURE_BYTES = 400_000


class Shown(NamedTuple):
    """An image and the reconstruction of its posterior's mode, (C, H, W) in [-1, 1] on the CPU."""

    row: Mapping[str, Any]
    image: Tensor
    reconstruction: Tensor


def findings(result: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield the findings on a result of `measure_likelihood` (without its findings), in plain sentences."""
    metrics, curve = result["metrics"], result["curve"]
    bits = {name: values["bits_per_dimension"]["mean"] for name, values in metrics.items() if name != "rate_levels"}
    nats = metrics["rate"]["nats_per_image"]["mean"]
    per_dimension = nats / result["latent_dimensions"]
    if nats < COLLAPSED_NATS:
        text = (
            f"{nats:.2g} nats per image: the latent says almost nothing of its image, and the bits are about those of "
            "one decoded image for all. Lower loss.kl, warm it up (loss.kl_warmup) or set loss.free_bits."
        )
        yield Finding("Posterior collapse", "problem", text)
    else:
        text = (
            f"The latent costs {nats:,.4g} nats per image, {per_dimension:.3g} for each of its dimensions: "
            f"{bits['rate']:.3g} of {bits['elbo']:.3g} bits per dimension. The rest is what the decoder leaves open."
        )
        yield Finding("Rate", "fine", text)
    samples, effective = curve[-1]["samples"], result["effective_samples"]["median"]
    if samples > 1:
        gap = bits["elbo"] - bits["importance_bound"]
        last = curve[-2]["bits_per_dimension"] - curve[-1]["bits_per_dimension"]
        text = (
            f"{samples:,} samples improve on the ELBO by {gap:.3g} bits per dimension, going from "
            f"{curve[-2]['samples']:,} to {samples:,} of them by {last:.2g}. "
        )
        if effective < FEW_EFFECTIVE:
            text += (
                f"The median image's weights are worth {effective:.2g} of the {samples:,}: one sample decides, so the "
                "bound is loose and the likelihood may be a good deal higher. Raise samples."
            )
            yield Finding("Tightness", "look", text)
        else:
            text += f"The median image's weights are worth {effective:.3g} of the {samples:,}."
            yield Finding("Tightness", "fine", text)
    guess = 1.0 if result["likelihood"]["kind"] == "bernoulli" else 8.0
    if bits["importance_bound"] >= guess:
        text = f"{bits['importance_bound']:.3g} bits per dimension; a model that knows nothing needs {guess:g}."
        yield Finding("No better than guessing", "problem", text)


def write_likelihood_report(
    path: Path, result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], shown: Mapping[str, Sequence[Shown]]
) -> None:
    """Write report.html, one self-contained file. Raises UserError if it cannot be written.

    Args:
        path: The file.
        result: The content of result.json.
        rows: The rows of images.parquet.
        shown: Images by heading.
    """
    model = short_name(result["model"].get("location"), str(result["model"].get("class")))
    likelihood, curve = result["likelihood"], result["curve"]
    facts = {
        "images": f"{result['data']['num_images']:,}",
        "likelihood": likelihood["kind"] + ("" if likelihood["discretised"] else ", of binary draws")
        if likelihood["kind"] == "bernoulli"
        else ("discretised " if likelihood["discretised"] else "density of ") + likelihood["kind"],
        "scale": None if likelihood["scale"] is None else f"{likelihood['scale']:.4g} ({likelihood['scale_from']})",
        "samples": f"{curve[-1]['samples']:,}",
        "latent": f"{result['latent_dimensions']:,} dimensions",
    }
    remarks = list(result["notes"])
    if skipped := len(result["data"]["skipped"]):
        remarks.append(f"Unreadable images that were skipped: {skipped:,}.")
    summary = page.facts({name: value for name, value in facts.items() if value is not None}) + page.notes(remarks)
    sentences = page.findings(
        [(one["name"], one["state"], MARKS[one["state"]], one["text"]) for one in result["findings"]]
    )
    charts = page.grid(
        page.line_chart(
            {"bound": [(point["samples"], point["bits_per_dimension"]) for point in curve]},
            title="bits per dimension; one sample is the ELBO",
            x_label="samples",
            log_x=True,
        ),
        page.histogram({"images": [row["importance_bound_bits"] for row in rows]}, title="bits per dimension"),
    )
    sections = [
        summary,
        page.section("Findings", sentences),
        page.section("Figures", _table(result), charts),
        *(page.section(heading, page.grid(*map(_card, images))) for heading, images in shown.items()),
        page.section(
            "How this was measured",
            page.manifest({k: v for k, v in result.items() if k not in ("metrics", "curve", "findings", "notes")}),
        ),
    ]
    title = f"{model}: likelihood of {short_name(result['data']['location'], 'images')}"
    page.write(path, page.page(title, sections, subtitle="A first stage, measured by latent-ae eval likelihood."))


def likelihood_text(result: Mapping[str, Any]) -> str:
    """Return the bounds as a table for a terminal, and every finding that needs a look."""
    rows = [Row("images", f"{result['data']['num_images']:,}")]
    for unit in UNITS:
        rows += [Row(name, *_figure(values, unit), unit) for name, values in _named(result).items()]
    lines = to_look_at(result["findings"], MARKS)
    return "\n".join([aligned(rows), *([""] if lines else []), *lines])


def _named(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    metrics = result["metrics"]
    named = {NAMES[key]: metrics[key] for key in NAMES}
    return named | {f"rate of level {n}": values for n, values in enumerate(metrics.get("rate_levels", ()), start=1)}


def _figure(values: Mapping[str, Any], unit: str) -> tuple[str, str]:
    """Return a mean and its interval as text."""
    key, digits = UNITS[unit]
    mean, ends = values[key]["mean"], values[key]["interval"]
    small = " – ".join(format(end, digits) for end in ends) if ends else ""
    return format(mean, digits).replace("-", "−"), small.replace("-", "−")


def _table(result: Mapping[str, Any]) -> str:
    lines = [
        {"": name} | {unit: page.estimate(*_figure(values, unit)) for unit in UNITS}
        for name, values in _named(result).items()
    ]
    text = (
        "Bits are a cost, lower is better; nats of the two bounds are log-likelihoods, higher is better. ELBO = minus "
        "distortion and rate. Small: 95 % interval over the images."
    )
    return page.table(lines) + page.paragraph(text, soft=True)


def _card(shown: Shown) -> str:
    row = shown.row
    figures = [
        page.figure(to_picture(image.clamp(-1, 1)), caption, max_bytes=PICTURE_BYTES)
        for caption, image in (("input", shown.image), ("reconstruction", shown.reconstruction.nan_to_num(nan=-1)))
    ]
    text = ", ".join(f"{label} {row[f'{name}_bits']:.4g}" for name, label in NAMES.items())
    text += f" bits per dimension; effective samples {row['effective_samples']:.3g}"
    return page.card(row["name"], f"no. {row['index']}", page.beside(*figures), page.paragraph(text, soft=True))
