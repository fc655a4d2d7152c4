"""Runs another repository's training program, whose files stay as they are, in the environment that has its packages.

    python launch.py MODULE GROUPS SCRIPT [ARGUMENT ...]

The programs of latent-diffusion's line were written for older packages and have no setting for the number of groups of
their norms. What is missing is added here, from outside, before SCRIPT runs: names that NumPy 2, Pillow 10 and Python
3.12 (and 3.11, for `format`) no longer have, and GROUPS as the default of `Normalize` in MODULE.
"""

import importlib
import runpy
import sys
from pathlib import Path

import numpy as np
import PIL.Image


def main() -> None:
    module, groups, script = sys.argv[1:4]
    sys.argv = sys.argv[3:]
    sys.path.insert(0, str(Path(script).parent))
    if not hasattr(np, "Inf"):
        np.Inf = np.inf  # pytorch-lightning 1.4
    if not hasattr(PIL.Image, "LINEAR"):
        PIL.Image.LINEAR = PIL.Image.BILINEAR  # type: ignore[attr-defined]  # ldm.data.lsun
    import pytorch_lightning

    if pytorch_lightning.__version__.startswith("1."):
        enums = importlib.import_module("pytorch_lightning.utilities.enums")
        # f"{member}" was the member's value, and names an attribute
        enums.LightningEnum.__format__ = lambda member, spec: format(member.value, spec)
    importlib.import_module(module).Normalize.__defaults__ = (int(groups),)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
