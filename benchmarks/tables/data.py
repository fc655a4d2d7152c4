"""The tables of docs/data.md."""

from typing import Any

from benchmarks.machine import where


def buckets_table(result: dict[str, Any]) -> str:
    """What crops of one size and of several make of a first stage, measured at one size."""
    side = result["crop_px"]
    framings = {
        "cut_from_the_whole": f"{side} px cut from the whole",
        "resized_first": f"resized to {side} px",
    }
    lines = [
        f"`{result['base']}`, seed 0 alone; {where(result)}.",
        "",
        f"| crops | pixels (M) | {' | '.join(framings.values())} |",
        "|---|---:|" + "---:|" * len(framings),
    ]
    for name, run in result["runs"].items():
        cells = [f"{run[key]['psnr']:.2f} dB, LPIPS {run[key]['lpips_vgg']:.3f}" for key in framings]
        lines.append(f"| {name} | {run['pixels'] / 1e6:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


MAKERS = {
    "buckets": buckets_table,
}
"""By the beginning of a result's name, the longer one first."""
