"""The tables of docs/pitfalls.md."""

from typing import Any

from benchmarks.machine import where
from benchmarks.tables import with_interval


def vaes_table(result: dict[str, Any]) -> str:
    """Figures of variational autoencoders."""
    lines = [
        f"{where(result)}.",
        "",
        "| run | PSNR (dB) | KL (nats per image) | bits per dimension | dead channels |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in result["rows"].items():
        bits = row["bits_per_dimension"]["mean"]
        lines.append(
            f"| {name} | {row['psnr']:.2f} | {row['rate_nats']['mean']:.1f} | {bits:.2f} "
            f"| {row['dead_channels']} of {row['channels']} |"
        )
    return "\n".join(lines)


def priors_table(result: dict[str, Any]) -> str:
    """Distance of samples from three priors, and of what the best samples are compared with."""
    rows = {f"samples of {name}": (row, "samples") for name, row in result["rows"].items()}
    first = next(iter(result["rows"].values()))  # all are of one model and one choice of images
    rows |= {"reconstructions": (first, "reconstructions"), "held-out images": (first, "held_out")}
    lines = [
        f"Distances to {first['metrics']['samples']['reference_images']} images, 95 % intervals; {where(result)}.",
        "",
        "| | number | Fréchet distance (VGG16) |",
        "|---|---:|---:|",
    ]
    for name, (row, key) in rows.items():
        value, interval = (row[part][key]["frechet_vgg16"] for part in ("metrics", "intervals"))
        lines.append(f"| {name} | {row['metrics'][key]['n']} | {with_interval(value, interval, 1)} |")
    return "\n".join(lines)


def blur_table(result: dict[str, Any]) -> str:
    """Numbers of channels and losses, by what is measured on held-out photographs."""
    columns = {"psnr": "PSNR (dB)", "ssim": "SSIM", "lpips_vgg": "LPIPS", "frechet_vgg16": "Fréchet distance (VGG16)"}
    digits = {"psnr": 2, "ssim": 3, "lpips_vgg": 3, "frechet_vgg16": 1}
    lines = [
        f"100 held-out photographs, 128 px, 95 % intervals; 4 or 16 latent channels with the squared error, and "
        f"16 with more losses; {where(result)}.",
        "",
        f"| | {' | '.join(columns.values())} |",
        f"|---|{'---:|' * len(columns)}",
    ]
    for name, row in result["rows"].items():
        intervals = row.get("intervals", {})
        cells = [with_interval(row[key], intervals.get(key), digits[key]) for key in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


MAKERS = {
    "pitfall-collapse": vaes_table,
    "pitfall-beta": vaes_table,
    "pitfall-priors": priors_table,
    "pitfall-blur": blur_table,
}
"""By the beginning of a result's name, the longer one first."""
