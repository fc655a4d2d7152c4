"""latent-ae eval ifid: the command's description; settings, measure and report are separate modules."""

from latent_ae_eval.ifid.settings import IfidSettings
from latent_ae_eval.job import Job

JOB = Job(
    "ifid",
    IfidSettings,
    measure="interpolated_distance",
    text="ifid_text",
    format="latent-ae ifid 1",
    incidental=("batch_size", "neighbours_from", "neighbours_split"),
    conditions=("neighbours_from.fingerprint",),
    description="""\
Measure the interpolated Fréchet distance (iFID, arXiv 2603.05630), a guide to how well a diffusion model will sample,
without training one: the latent of each image is moved halfway to a near latent, the midpoint is decoded, and the
distance between these images and the originals is measured. It is called iFID with Inception's features only. A
terminal gets a table, a pipe JSON; result.json, pairs.parquet, pairs.png and report.html are written into a folder.
The same command again resumes an evaluation that was killed.""",
    examples="""\
example: latent-ae eval ifid runs/quickstart/export photos
as published: latent-ae eval ifid MODEL imagenet/val neighbours_from=imagenet/train resize_px=256 crop_px=256
on many GPUs: accelerate launch --multi_gpu --num_processes 8 -m latent_ae eval ifid MODEL DATA""",
)
