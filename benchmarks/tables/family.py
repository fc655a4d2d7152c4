"""The tables of docs/family.md."""

from typing import Any

from benchmarks.machine import where
from benchmarks.tables import with_interval


def family_table(result: dict[str, Any]) -> str:
    kinds = ("CIFAR-10, 20,000 images to train on", "BSDS500's 200 photographs to train on")
    parts: dict[int, dict[str, Any]] = {0: {}, 1: {}}
    for name, row in result["members"].items():
        parts[int(row["photos"])][name] = row
    lines = [f"`{result['recipe']}`; {where(result)}."]
    for number, members in parts.items():
        if not members:
            continue
        size, images = result["sizes"][number], next(iter(members.values()))["images"]
        lines += [
            "",
            f"{kinds[number]}, {result['steps']} steps of {size['batch']} at {size['px']} px; {images:,} held out:",
            "",
            "| | parameters (M) | latent | PSNR (dB) | SSIM | LPIPS (VGG) | Fréchet (VGG16) | training, images per "
            "processor second | decoding |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for name, row in members.items():
            found, speed = row["metrics"]["mode"], row["speed"]
            cells = [name, f"{row['parameters'] / 1e6:.2f}", " x ".join(map(str, row["latent_shape"]))]
            cells += [f"{found['psnr']:.2f}", f"{found['ssim']:.3f}", f"{found['lpips_vgg']:.3f}"]
            cells += [f"{found['frechet_vgg16']:.1f}", f"{speed['training']:.0f}", f"{speed['decoding']:.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
    for name, row in result["members"].items():
        if (codes := row.get("codebook")) is not None:
            lines += [
                "",
                f"{name}: the held-out images use {codes['used']:,} of {codes['codes']:,} codes, perplexity "
                f"{codes['perplexity']:.0f}.",
            ]
    lines += [
        "",
        "| beside the AutoencoderKL's scaled latents (variance {:.2f}) | squared distance of its own "
        "| PSNR of its images of them (dB) | LPIPS (VGG) |",
        "|---|---:|---:|---:|",
    ]
    for name, row in result["members"].items():
        if (found := row.get("beside_the_teacher")) is not None:
            lines[-2] = lines[-2].format(found["teacher_latent_variance"])
            lines.append(f"| {name} | {found['latent_mse']:.3f} | {found['psnr']:.2f} | {found['lpips_vgg']:.3f} |")
    return "\n".join(lines)


def flow_decoder_table(result: dict[str, Any]) -> str:
    """Figures of each decoder with their intervals, by its steps from noise."""
    columns = {"psnr": ("PSNR (dB)", 2), "ssim": ("SSIM", 3), "lpips_vgg": ("LPIPS", 3)}
    columns["frechet_vgg16"] = ("Fréchet distance (VGG16)", 1)
    lines = [
        f"First stage: `quickstart {result['first']}`; {result['data']}, `{result['evaluation']}`, 95 % intervals; "
        f"{where(result)}.",
        "",
        "Seconds are those of a processor, for the decoder's own training (of the distilled one with that of the flow "
        "it is distilled from), and before it for that of the first stage whose decoder it makes use of.",
        "",
        f"| decoder | parameters | of these trained | seconds | before | steps from noise "
        f"| {' | '.join(title for title, _ in columns.values())} |",
        f"|---|---:|---:|---:|---:|---:|{'---:|' * len(columns)}",
    ]
    for name, row in result["rows"].items():
        # rows without these are from before they were recorded, and their images from before each had its own noise
        trained, before = row.get("trained_parameters"), row.get("started_from_seconds")
        for steps, figures in row["figures"].items():
            cells = [
                f"{name}, noise shared by all images" if steps and trained is None else name,
                f"{row['decoder_parameters']:,}",
                "–" if trained is None else f"{trained:,}",
                f"{row['processor_seconds']:,.0f}",
                "–" if before is None else f"{before:,.0f}",
                steps or "–",
            ]
            cells += [with_interval(figures[key][0], figures[key][1], digits) for key, (_, digits) in columns.items()]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


MAKERS = {
    "family": family_table,
    "flow-decoder": flow_decoder_table,
}
"""By the beginning of a result's name, the longer one first."""
