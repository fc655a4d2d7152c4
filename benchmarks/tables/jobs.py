"""The tables of docs/jobs.md."""

import statistics
from typing import Any

from benchmarks.machine import where
from benchmarks.tables import half_width

SCORES = {
    "pixel_mean": "`pixel_mean`",
    "pixel_max": "`pixel_max`",
    "lpips_mean": "`lpips_mean`",
    "lpips_max": "`lpips_max`",
    "negative_elbo": "`negative_elbo`",
    "density": "`density`",
    "mixture": "`mixture`",
    "neighbours": "`neighbours`",
}


def anomaly_table(result: dict[str, Any]) -> str:
    """AUROC of each score, mean over the seeds, with its 95 % interval (t distribution)."""
    seeds = list(result["seeds"].values())
    # with pasted defects there is one set of images
    sets = list(seeds[0]) if "first stage" not in seeds[0] else [""]
    kinds = list(seeds[0][sets[0]] if sets[0] else seeds[0])
    lines = [
        f"AUROC, first stages of {result['steps']} steps, {result['images']:,} images, "
        + ("one seed" if len(seeds) == 1 else f"means over {len(seeds)} seeds with 95 % intervals (t distribution)")
        + f"; {where(result)}.",
        "",
        f"| | score | {' | '.join(kinds)} |",
        f"|---|---|{'---:|' * len(kinds)}",
    ]
    for name in sets:
        found = [one[name] if name else one for one in seeds]
        for score, title in SCORES.items():
            cells = []
            for kind in kinds:
                areas = [one[kind]["scores"][score]["auroc"] for one in found if score in one[kind]["scores"]]
                spread = f" ± {half_width(areas):.2f}" if len(areas) > 1 else ""
                cells.append(f"{statistics.mean(areas):.2f}{spread}" if areas else "")
            images = result.get("of", "CIFAR-10, {} normal" if name else "BSDS500, pasted defects").format(name)
            if any(cells):
                lines.append(f"| {images} | {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


MAKERS = {"anomaly": anomaly_table}
"""By the beginning of a result's name, the longer one first."""
