"""What a notebook uses: public names, and the example that docs/python.md explains."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import latent_ae
from latent_ae_train import TrainSettings

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples/first_stage.py"


def test_importing_the_packages_imports_nothing_else() -> None:
    code = (
        "import sys; before = set(sys.modules); import latent_ae, latent_ae_train, latent_ae_eval; "
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before} & {'torch', 'pydantic', 'diffusers'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_every_public_name_is_there() -> None:
    assert set(latent_ae.__all__) <= set(dir(latent_ae)) and len(latent_ae.__all__) > 10
    for name in latent_ae.__all__:
        assert getattr(latent_ae, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = latent_ae.lode


def test_the_page_shows_what_the_example_does() -> None:
    example = EXAMPLE.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(encoding="utf-8"), re.S)
    assert len(blocks) > 5
    assert [block for block in blocks if block not in example] == []


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(tmp_path), "2"])
    load = TrainSettings.load  # with smaller images to validate on
    monkeypatch.setattr(TrainSettings, "load", lambda *words: load(*words, "validate.crop_px=64"))
    left = runpy.run_path(str(EXAMPLE))
    assert left["mine"].grad.isfinite().all()
    assert left["z"].mean.shape == (1, 8, 128, 128)
    assert json.loads((tmp_path / "comparison/comparison.json").read_text()) == left["comparison"]
    assert (tmp_path / "losses.png").stat().st_size > 1000
