"""latent-ae encode: computes the latents of a data set once and stores them in files for training."""

from collections.abc import Sequence

from latent_ae.command_line import SettingsParser, print_result
from latent_ae.config import load_settings
from latent_ae.latents.settings import EncodeSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `latent-ae encode` and return its exit code.

    Raises:
        UserError: If the words are not understood, or `encode_images` refuses.
    """
    parser = SettingsParser(
        EncodeSettings,
        prog="latent-ae encode",
        description="Write the latents of every image and of its mirror image (mean and log-variance), labels and ids\n"
        "as Parquet files, which datasets and latent_ae.latents.cache read. The same command again resumes after a\n"
        "kill. The manifest goes to stdout as JSON.",
        examples="example: latent-ae encode runs/mine /my/photos latents/mine resolution=256\n"
        "on many GPUs: accelerate launch --multi_gpu --num_processes 8 -m latent_ae encode MODEL DATA OUT dtype=bf16",
    )
    parser.add_argument("model", help="folder or hub id of a first stage of diffusers, or a run or checkpoint")
    parser.add_argument("data", help="photos, a folder of images, Parquet or WebDataset files, or a hub id")
    parser.add_argument("out", help="the folder to write")
    words = parser.read(argv)
    settings = load_settings(EncodeSettings, None, words.override)

    def encode() -> dict:
        # imported late, so that a typo in the words is refused without waiting for torch
        from latent_ae.latents.encode import encode_images

        return encode_images(words.model, words.data, words.out, settings, progress=True)

    return print_result(encode, settings.batch_size)
