"""The tables of docs/recipes.md."""

from typing import Any

from benchmarks.machine import where


def step_memory_table(result: dict[str, Any]) -> str:
    """Computed memory of a training step beside what a process took."""
    lines = [f"{where(result)}.", "", "| | computed (MB) | measured (MB) | ratio |", "|---|---:|---:|---:|"]
    return "\n".join(
        lines
        + [
            f"| {name} | {row['computed_mb']:,.0f} | {row['measured_mb']:,.0f} | {row['computed_over_measured']:.2f} |"
            for name, row in result["rows"].items()
        ]
    )


def recipes_table(result: dict[str, Any]) -> str:
    """The full-size recipes, a row for each of their phases."""
    lines = [
        f"| recipe, phase | shape | px | steps | batch | memory (GB), images | most images in {result['gpu_gb']} GB "
        "| TFLOP a step | published | measured with |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|---|",
    ]
    for row in result["rows"]:
        name, phase = row["recipe"], row["phase"]
        last = [other for other in result["rows"] if other["recipe"] == name][-1]
        target, how = result["targets"].get(name, ("", "")) if row is last else ("", "")
        lines.append(
            f"| `{name}`{f', {phase}' if phase else ''} "
            f"| {_latent(row)}, {row['parameters'] / 1e6:.0f} M "
            f"| {row['resolution']} | {row['steps']:,} | {row['batch_size']} "
            f"| {row['peak_gb']:.1f}, {row['micro_batch']} in {row['precision']} | {row['largest_micro_batch']} "
            f"| {row['tflops_per_image'] * row['batch_size']:,.0f} | {target} "
            f"| {f'`{how}`' if how.startswith('protocol') else how} |"
        )
    return "\n".join(lines)


def _latent(row: dict[str, Any]) -> str:
    """The latent's size in words. Levels are stored as the channels of one pixel."""
    channels = row["latent_channels"]
    return f"{channels:,} values in levels" if channels > 10_000 else f"f{row['factor']}, {channels} channels"


MAKERS = {
    "step-memory": step_memory_table,
    "recipes": recipes_table,
}
"""By the beginning of a result's name, the longer one first."""
