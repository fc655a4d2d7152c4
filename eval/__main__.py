"""latent-ae eval: one command per question. Settings are checked before anything heavy is imported."""

import sys
from collections.abc import Sequence

from latent_ae.config import close_word
from latent_ae.text import printable
from latent_ae_eval.job import job_of

COMMANDS = {
    "recon": "how close reconstructions are to their images: FID, KID, LPIPS, PSNR, SSIM, MS-SSIM",
    "latents": "how healthy latents are: information, dead channels, rank, outliers, spectrum, what changes cost",
    "interpolate": "what lies between images: paths through latent space beside a cross-fade",
    "probe": "what simple classifiers read from latents when labels are few",
    "anomaly": "which images a first stage cannot reconstruct, and where",
    "likelihood": "how likely a variational autoencoder finds images: ELBO and a tighter bound, rate, distortion",
    "sample": "what latents of a prior decode to: the model's own, a Gaussian, or a flow fitted to the latents",
    "factors": "which latent dimensions represent which known factors, and how separately",
    "ifid": "how good decoded midpoints between neighbouring latents are, a guide to samples without a training",
    "text": "how well text survives: what tesseract reads in reconstructions, by script and size",
    "diffusion": "how well a diffusion model learns the latents: loss curve, samples, their Fréchet distance to data",
    "compare": "which of several measured first stages is better, beyond chance",
}
"""Commands and their lines of the usage text. All but `compare`, which takes results, are jobs of `job.JOBS`."""


def usage() -> str:
    """Return the usage text with a line for each command."""
    return "\n".join(
        [
            "usage: latent-ae eval COMMAND ...",
            "",
            "Measure a finished first stage.",
            "",
            *(f"  {name:<12} {summary}" for name, summary in COMMANDS.items()),
            "",
            "latent-ae eval COMMAND --help says more. Example: latent-ae eval recon runs/quickstart/export photos",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `latent-ae eval` and return its exit code. Raises UserError like the jobs."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    if words[0] not in COMMANDS:
        close = close_word(words[0], list(COMMANDS))
        hint = f"; did you mean {close}?" if close else ""
        print(f"latent-ae eval: no such command: {printable(words[0])}{hint}\n\n{usage()}", file=sys.stderr)
        return 2
    if words[0] == "compare":
        from latent_ae_eval.compare.command import main as compare

        return compare(words[1:])
    return job_of(words[0]).main(words[1:])


if __name__ == "__main__":
    from latent_ae.__main__ import main as latent_ae

    sys.exit(latent_ae(["eval", *sys.argv[1:]]))
