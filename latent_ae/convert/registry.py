"""The known layouts; imports nothing heavy, because the help lists them."""

from latent_ae.convert import dc_ae, ldm, rae, taesd, vq
from latent_ae.convert.layout import Layout

LAYOUTS: dict[str, Layout] = {**ldm.LAYOUTS, **vq.LAYOUTS, **dc_ae.LAYOUTS, **taesd.LAYOUTS, **rae.LAYOUTS}
"""The layouts by their names for `--to`; the layout of a file is the first one that recognises it."""
WRITTEN = tuple(name for name in LAYOUTS if name != "diffusers")
"""Names of the layouts that `--to` writes."""
