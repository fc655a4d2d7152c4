"""The report of factors: the gaps, the mutual information as a heat map, and the effect of each dimension."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from latent_ae.metrics.labels import short_name
from latent_ae.report import page
from latent_ae_eval.table import Row, aligned

MOST_ROWS = 32
ABOUT = (
    "Mutual information gap of a factor: how much more informative the best dimension is about it than the next one, "
    "as a fraction of the factor's entropy (Chen et al. 2018). 1: one dimension has all the information and no other "
    "any; 0: two dimensions have equally much. MIG is the mean. A sample includes the posterior's noise, which hides "
    "information in changes too small for the decoder to see."
)
SCORES = (
    "FactorVAE score: how often the dimension that varies least among images with one factor in common tells which "
    "factor that is (Kim and Mnih 2018); by chance about 1 / number of factors. DCI (Eastwood and Williams 2018): "
    "disentanglement is 1 if each dimension is of use for one factor only, completeness is 1 if each factor has one "
    "dimension, informativeness is the accuracy of trees that predict the factors. All are of the posterior's mean in "
    "the active dimensions."
)
TRAVERSED = (
    "Each row moves one active dimension from -2 to 2 standard deviations of the prior and leaves the others as they "
    "are in image {image}. A row names the factors about which its dimension is the most informative."
)


def factors_text(result: Mapping[str, Any]) -> str:
    """Return the gaps as a table for a terminal."""
    kinds = {"mean": result["mean"], "sample": result["sample"]}
    rows = [Row("images", f"{result['data']['num_images']:,}")]
    rows += [Row("MIG", f"{values['mig']:.3f}", "", kind) for kind, values in kinds.items()]
    for name in result["data"]["factors"]:
        for kind, values in kinds.items():
            best = f"dimension {values['dimensions'][name]}"
            rows.append(Row(f"gap of {name}", f"{values['gaps'][name]:.3f}", best, kind))
    rows += [Row(name, value, "", "mean") for name, value in _scores(result).items()]
    rows.append(Row("total correlation (nats)", f"{result['sample']['total_correlation']:.3f}", "", "sample"))
    rows.append(Row("active dimensions", f"{len(result['active_dimensions'])} of {len(result['variances'])}"))
    return aligned(rows, "most informative")


def _scores(result: Mapping[str, Any]) -> dict[str, str]:
    """Return FactorVAE's score and, where it was measured, DCI, as texts by their names."""
    mean = result["mean"]
    scores = {"FactorVAE score": mean["factor_vae_score"]}
    if (found := mean.get("dci")) is not None:
        scores |= {f"{name} (DCI)": found[name] for name in ("disentanglement", "completeness", "informativeness")}
    return {name: f"{value:.3f}" for name, value in scores.items()}


def write_factors_report(path: Path, result: Mapping[str, Any], picture: Image.Image | None) -> None:
    """Write report.html, one self-contained file. Raises UserError if it cannot be written.

    Args:
        path: The file.
        result: The content of result.json.
        picture: The traversals, or None.
    """
    model = short_name(result["model"].get("location"), str(result["model"].get("class")))
    data, mean, sample = result["data"], result["mean"], result["sample"]
    facts = {
        "MIG of the mean": f"{mean['mig']:.3f}",
        "MIG of a sample": f"{sample['mig']:.3f}",
        **_scores(result),
        "total correlation of a sample": f"{sample['total_correlation']:.3f} nats",
        "images": f"{data['num_images']:,}",
        "latent": " x ".join(map(str, result["latent"])),
        "active dimensions": f"{len(result['active_dimensions'])} of {len(result['variances'])}",
    }
    skipped = len(data["skipped"])
    remarks = [*result["notes"], *([f"Unreadable images that were skipped: {skipped:,}."] if skipped else [])]
    lines = [
        {
            "factor": name,
            "values": count,
            "entropy (nats)": f"{data['entropies'][name]:.2f}",
            **{
                f"gap, {kind}": page.estimate(f"{values['gaps'][name]:.3f}", f"dimension {values['dimensions'][name]}")
                for kind, values in (("mean", mean), ("sample", sample))
            },
        }
        for name, count in data["factors"].items()
    ]
    sections = [
        page.facts(facts) + page.notes(remarks),
        page.section("Gaps", page.paragraph(ABOUT, soft=True), page.table(lines), page.paragraph(SCORES, soft=True)),
    ]
    if picture is not None:
        about = page.paragraph(TRAVERSED.format(image=result["traversed"]["image"]), soft=True)
        figure = page.figure(picture, "traversals.png", max_bytes=1_500_000)
        sections.append(page.section("What each dimension does", about, figure))
    names = list(data["factors"])
    entropies = [data["entropies"][name] for name in names]
    charts = []
    for kind, values in (("the mean", mean), ("a sample", sample)):
        parts = [[value / h for value, h in zip(row, entropies, strict=True)] for row in values["mutual_information"]]
        order = sorted(range(len(parts)), key=lambda d: -max(parts[d]))[:MOST_ROWS]
        rows = {str(d): parts[d] for d in sorted(order)}
        charts.append(page.heat_map(rows, names, title=f"of {kind}", y_label="latent dimension"))
    about = page.paragraph(
        "Mutual information of each dimension and factor, in percent of the factor's entropy"
        + (f"; the {MOST_ROWS} most informative dimensions." if len(result["variances"]) > MOST_ROWS else "."),
        soft=True,
    )
    sections.append(page.section("Mutual information", about, page.grid(*charts)))
    if (found := mean.get("dci")) is not None:
        rows = {str(d): row for d, row in zip(result["active_dimensions"], found["importance"], strict=True)}
        about = page.paragraph(
            "How much each active dimension matters for the trees that predict each factor, in percent; DCI's "
            "disentanglement and completeness are of this matrix.",
            soft=True,
        )
        heat = page.heat_map(rows, names, title="of the mean", y_label="latent dimension")
        sections.append(page.section("Importance", about, heat))
    manifest = {key: value for key, value in result.items() if key not in ("mean", "sample", "variances", "notes")}
    sections.append(page.section("How this was measured", page.manifest(manifest)))
    title = f"{model}: factors of {short_name(data['location'], 'images')}"
    page.write(path, page.page(title, sections, subtitle="A first stage, measured by latent-ae eval factors."))
