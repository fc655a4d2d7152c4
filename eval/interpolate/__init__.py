"""latent-ae eval interpolate: the command's description; settings, measure and report are separate modules."""

from latent_ae_eval.interpolate.settings import InterpolateSettings
from latent_ae_eval.job import Job

JOB = Job(
    "interpolate",
    InterpolateSettings,
    measure="interpolate",
    text="interpolation_text",
    description="""\
Show what lies between images: linear and spherical paths through the latents beside a cross-fade of the pixels. A
terminal gets a table, a pipe JSON; result.json, grid.png, an animation and report.html are written into a folder.""",
    examples="""\
example: latent-ae eval interpolate runs/quickstart/export photos
chosen images, as a GIF: latent-ae eval interpolate MODEL DATA images=[cat.png,dog.png] animation=gif""",
)
