"""The tables of docs/encode.md."""

from typing import Any

from benchmarks.machine import where


def encode_table(result: dict[str, Any]) -> str:
    rates = result["latents_per_second"]
    lines = [
        f"{where(result)}.",
        "",
        "| | images/s, best round | images per processor second | bytes per image | PSNR of reconstructions (dB) |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in result["writing"].values():
        for who, precision in (("plain loop", "fp32"), ("ours", "fp16")):
            lines.append(
                f"| {row['images']} images of {row['side_px']} px, {who} | {row[who]['images_per_second']:.1f} "
                f"| {row[who]['images_per_cpu_second']:.1f} "
                f"| {row[who]['bytes_per_image']:,} | {row['psnr'][precision]:.4f} |"
            )
    lines += ["", "| read in batches of 256 | latents/s |", "|---|---:|"]
    return "\n".join(lines + [f"| {name} | {rate:,} |" for name, rate in rates.items()])


MAKERS = {
    "encode": encode_table,
}
"""By the beginning of a result's name, the longer one first."""
