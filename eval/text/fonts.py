"""Finds fonts that have the letters of a script: those of matplotlib, which every machine has, or the system's."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib import get_data_path
from matplotlib.font_manager import findSystemFonts
from matplotlib.ft2font import FT2Font

from latent_ae.config import UserError
from latent_ae_eval.text.scripts import Script

OF_MATPLOTLIB = ("DejaVuSans.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf")


class Font(NamedTuple):
    """A face of a font file."""

    path: Path
    face: int

    def describe(self) -> dict[str, str | int]:
        """Return the name, the face and the digest of the file, JSON-ready."""
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
        return {"file": self.path.name, "face": self.face, "sha256": digest}


def fonts_for(script: Script, given: Sequence[str]) -> list[Font]:
    """Return the fonts in which a script is rendered; an empty list if there is none.

    Left-to-right scripts that matplotlib's fonts cover are the same on every machine. For the others the first of
    the script's known fonts that the system has is taken.

    Args:
        script: The script.
        given: Font files of the user, of which those that have the script are taken; without any, fonts are found.

    Raises:
        UserError: If a given file is no font.
    """
    if given:
        return [font for font in (Font(Path(name).expanduser(), 0) for name in given) if covers(font, script)]
    own = [Font(Path(get_data_path()) / "fonts" / "ttf" / name, 0) for name in OF_MATPLOTLIB]
    if not script.fonts and (found := [font for font in own if covers(font, script)]):
        return found
    system = {Path(path).name: Path(path) for path in sorted(findSystemFonts())} | {own[0].path.name: own[0].path}
    known = [Font(system[name], face) for name, face in script.fonts if name in system]
    return [font for font in known if covers(font, script)][:1]


def covers(font: Font, script: Script) -> bool:
    """Return whether a font has all letters and digits of a script. Raises UserError if the file is no font."""
    try:
        known = FT2Font(str(font.path)).get_charmap()
    except (OSError, RuntimeError) as error:
        raise UserError(f"fonts: {font.path} is no font file that FreeType reads: {error}") from None
    return all(ord(letter) in known for letter in set(script.words + script.letters + script.digits))
