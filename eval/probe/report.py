"""The report of a probe: accuracy over the number of labels, for each kind of feature."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latent_ae.metrics.labels import short_name
from latent_ae.report import page
from latent_ae_eval.table import Row, aligned

NAMES = {
    "latent": "latent",
    "latent_pooled": "latent, averaged over the image",
    "pixels": "pixels",
    "pixels_pca": "pixels, principal components",
}
CLASSIFIERS = {"logistic": "Logistic regression", "nearest": "Nearest neighbours"}


def probe_text(result: Mapping[str, Any]) -> str:
    """Return the accuracies as a table for a terminal."""
    rows = [
        Row("test images", f"{result['data']['test_images']:,}"),
        Row("largest class", f"{100 * result['chance']:.1f} %"),
    ]
    for kind, title in CLASSIFIERS.items():
        for size in result["features"]["latent"][kind]:
            for feature, accuracies in result["features"].items():
                values = accuracies[kind][size]
                mean, sd = f"{100 * values['mean']:.1f} %", f"± {100 * values['sd']:.1f}"
                rows.append(Row(f"{title}, {size} labels", mean, sd, NAMES[feature]))
    if (own := result.get("label_model")) is not None:
        rows.append(Row(own_title(own), f"{100 * own['accuracy']:.1f} %", "", "label model"))
    return aligned(rows, "deviation over the draws")


def own_title(own: Mapping[str, Any]) -> str:
    """Return what the label model's row is called."""
    labels = "all labels" if own["labels_per_class"] is None else f"{own['labels_per_class']} labels"
    return f"Trained with the model, {labels}"


def write_probe_report(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result of `probe` as report.html, one self-contained file. Raises UserError if it cannot be written."""
    model = short_name(result["model"].get("location"), str(result["model"].get("class")))
    data, sizes = result["data"], list(result["features"]["latent"]["logistic"])
    facts = {
        "classes": len(data["classes"]),
        "test images": f"{data['test_images']:,}",
        "size": " x ".join(map(str, reversed(data["size_px"]))) + " px",
        "draws of labels": result["settings"]["draws"],
        "largest class": f"{100 * result['chance']:.1f} %",
    }
    skipped = len(data["skipped"])
    remarks = [*result["notes"], *([f"Unreadable test images that were skipped: {skipped:,}."] if skipped else [])]
    sections = [page.facts(facts) + page.notes(remarks)]
    charts, tables = [], []
    for kind, title in CLASSIFIERS.items():
        series, lines = {}, []
        for feature, accuracies in result["features"].items():
            values = accuracies[kind]
            series[NAMES[feature]] = [(float(size), 100 * values[size]["mean"]) for size in sizes]
            cells = {
                f"{size} labels": page.estimate(f"{100 * v['mean']:.1f}", f"± {100 * v['sd']:.1f}")
                for size, v in values.items()
            }
            lines.append({title: NAMES[feature], "dimensions": accuracies["dimensions"]} | cells)
        charts.append(page.line_chart(series, title=title, x_label="labels per class", y_label="accuracy, %"))
        tables.append(page.table(lines))
    about = page.paragraph(
        "Accuracy on the test images in percent, mean over the draws; small: standard deviation over the draws. "
        "Features of the first stage are useful where they beat the pixels that they were computed from.",
        soft=True,
    )
    if (own := result.get("label_model")) is not None:
        which = "" if own["labels_per_class"] is None else f" (draw {own['draw']})"
        line = {own_title(own) + which: "label model", "accuracy": page.estimate(f"{100 * own['accuracy']:.1f}", "")}
        tables.append(page.table([line]))
    sections.append(page.section("Accuracy", about, *tables))
    if len(sizes) > 1:
        sections.append(page.section("Against the number of labels", page.grid(*charts)))
    manifest = {key: value for key, value in result.items() if key not in ("features", "notes")}
    sections.append(page.section("How this was measured", page.manifest(manifest)))
    title = f"{model}: labels read from latents of {short_name(data['location'], 'images')}"
    page.write(path, page.page(title, sections, subtitle="A first stage, measured by latent-ae eval probe."))
