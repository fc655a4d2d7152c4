"""The wheel holds everything that the commands need, recipes included."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_wheel_works_outside_the_checkout(tmp_path: Path) -> None:
    # a copy: building leaves files beside the sources
    source = tmp_path / "source"
    skipped = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=skipped)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("latent_ae-*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code = (
        "import latent_ae, latent_ae_train, latent_ae_eval, sys\n"
        f"assert all(m.__file__.startswith({str(site)!r}) for m in (latent_ae, latent_ae_train, latent_ae_eval))\n"
        "from latent_ae.__main__ import main\n"
        "sys.exit(main(['train', 'quickstart', '--dry-run']))"
    )
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=elsewhere, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "output_dir: runs/quickstart" in result.stdout and "global batch:" in result.stdout
    assert not list(elsewhere.iterdir())


def test_no_page_has_a_placeholder_left() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]
    assert len(pages) > 5
    assert [page.name for page in pages if re.search(r"@[A-Z]+@|TODO|TBD", page.read_text(encoding="utf-8"))] == []


def test_the_tables_in_the_docs_are_those_of_the_results() -> None:
    from benchmarks.tables import DOCS, PAGES, render

    texts = {page: page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("*.md"))}
    assert [page for page, text in texts.items() if "<!-- table: " in text] == PAGES
    for page in PAGES:
        assert render(page) == texts[page], "run python -m benchmarks.tables"


def test_the_source_layout_names_every_file_of_the_library_and_the_loop() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = text.split("## Source layout")[1].split("```")[1]
    parts = {"latent_ae": block.split("\ntrain/")[0], "train": block.split("\ntrain/")[1].split("\neval/")[0]}
    for folder, text in parts.items():
        named = set(re.findall(r"[a-z_0-9]+", text))
        files = {path.stem for path in (ROOT / folder).rglob("*.py")} - {"__init__", "__main__"}
        assert len(files) > 15 and files - named == set()
    places = {path.name for path in (ROOT / "eval").iterdir() if not path.name.startswith("__")}
    assert places - set(re.findall(r"[a-z_]+(?:\.py)?", block.split("\neval/")[1])) == set()


def test_links_between_the_pages_lead_somewhere() -> None:
    pages = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
        (ROOT / "docs").glob("*.md")
    )
    anchors = {page: anchors_of(page.read_text(encoding="utf-8")) for page in pages}
    lost = []
    for page in pages:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"https?:", target):
                continue
            name, _, anchor = target.partition("#")
            place = (page.parent / name).resolve() if name else page
            if not place.exists() or (anchor and anchor not in anchors.get(place, ())):
                lost.append(f"{page.name}: {target}")
    assert lost == []


def anchors_of(text: str) -> set[str]:
    """Anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
