"""The layouts that are known, one record each; light, because the help lists them."""

from latent_ae.convert import dc_ae, ldm, rae, taesd, vq
from latent_ae.convert.layout import Layout

LAYOUTS: dict[str, Layout] = {**ldm.LAYOUTS, **vq.LAYOUTS, **dc_ae.LAYOUTS, **taesd.LAYOUTS, **rae.LAYOUTS}
"""By the name that `--to` takes; the first that recognises a file is its layout."""
WRITTEN = tuple(name for name in LAYOUTS if name != "diffusers")
"""Those that `--to` writes."""
