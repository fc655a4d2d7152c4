"""The tables of docs/codes.md."""

from typing import Any

from benchmarks.machine import where
from benchmarks.tables import with_interval


def codebooks_table(result: dict[str, Any]) -> str:
    seeds = ", ".join(str(run["seed"]) for run in next(iter(result["rows"].values()))["runs"])
    lines = [
        f"`vqgan {' '.join(result['common'])}` and the words of the row; seeds {seeds}; {where(result)}.",
        "",
        "| | words | PSNR (dB) | `codebook_perplexity` | `codebook_used` |",
        "|---|---|---:|---:|---:|",
    ]
    for name, row in result["rows"].items():
        kinds = {"psnr": ".2f", "perplexity": ".0f", "used": ".0%"}
        found = [", ".join(format(run[key], digits) for run in row["runs"]) for key, digits in kinds.items()]
        lines.append(f"| {name} | {row['settings'] and '`' + row['settings'] + '`'} | {' | '.join(found)} |")
    return "\n".join(lines)


def discrete_table(result: dict[str, Any]) -> str:
    lines = [
        f"BSDS500's 200 photographs to train on, {result['steps']} steps of {result['batch']} crops of {result['px']} "
        f"px, {result['images']} held out; seed {result['seed']}; {where(result)}.",
        "",
        "| | settings | parameters (M) | PSNR (dB) | SSIM | LPIPS (VGG) | codes used | perplexity "
        "| KL (nats per position) | processor time (s) |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]

    def of_codes(kind: dict[str, Any]) -> list[str]:
        found = kind["metrics"]
        figures = [f"{found['psnr']:.2f}", f"{found['ssim']:.3f}", f"{found['lpips_vgg']:.3f}"]
        return [*figures, f"{kind['used']:,} of {kind['codes']:,}", f"{kind['perplexity']:.0f}"]

    for name, row in result["contestants"].items():
        rate = row["kl_per_position"]
        cells = [name, f"`{' '.join(row['settings'])}`", f"{row['parameters'] / 1e6:.2f}", *of_codes(row)]
        cells += ["" if rate is None else f"{rate:.2f}", f"{row['processor_seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
        if drawn := row.get("drawn"):  # results from before codes were drawn in evaluation have none
            lines.append(f"| {' | '.join([f'{name}, drawn codes', '', '', *of_codes(drawn), '', ''])} |")
    return "\n".join(lines)


def vqvae2_table(result: dict[str, Any]) -> str:
    def of(values: list[float], digits: int) -> str:
        return with_interval(values[0], values[1:], digits)

    rows = result["contestants"]
    lines = [
        f"{result['data']}, {result['steps']} steps of {result['batch']} for each first stage, {result['prior_steps']} "
        f"steps of 32 for each transformer; 1,000 held-out images, {result['samples']} samples of each prior; seed "
        f"{result['seed']}; 95 % intervals over the images; {where(result)}.",
        "",
        f"| | {' | '.join(rows)} |",
        "|---|---:|---:|",
    ]

    def line(heading: str, cells: list[str]) -> None:
        lines.append(f"| {heading} | {' | '.join(cells)} |")

    every = list(rows.values())
    line("parameters (M)", [f"{row['parameters'] / 1e6:.2f}" for row in every])
    line("codes of an image", [" + ".join(f"{side} x {side}" for side in row["sides"]) for row in every])
    line("number of codes of each level", [f"{row['codes']:,}" for row in every])
    line("used by held-out images", [" and ".join(f"{one:,}" for one in row["used"]) for row in every])
    line("their perplexity", [" and ".join(f"{one:.0f}" for one in row["perplexity"]) for row in every])
    line("PSNR (dB)", [f"{row['metrics']['psnr']:.2f}" for row in every])
    line("SSIM", [f"{row['metrics']['ssim']:.3f}" for row in every])
    line("bits per code, transformer", [of(row["rate"]["bits_per_code"], 2) for row in every])
    line("bits per dimension of the codes, transformer", [of(row["rate"]["bits_per_dimension"], 4) for row in every])
    line("its loss over that of independent codes", [f"{row['transformer']['relative_loss']:.3f}" for row in every])
    headings = {
        "samples": "samples, transformer over codes",
        "gaussian": "samples, Gaussian of the latents",
        "reconstructions": "reconstructions of held-out images",
        "held_out": "held-out images",
    }
    for kind, heading in headings.items():
        line(f"Fréchet (VGG16) to images trained on: {heading}", [of(row["frechet_vgg16"][kind], 1) for row in every])
    for part, heading in (("training", "first stage"), ("transformer", "transformer")):
        line(f"processor time, {heading} (s)", [f"{row['processor_seconds'][part]:.0f}" for row in every])
    return "\n".join(lines)


MAKERS = {
    "codebooks": codebooks_table,
    "discrete": discrete_table,
    "vqvae2": vqvae2_table,
}
"""By the beginning of a result's name, the longer one first."""
