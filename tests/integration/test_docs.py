"""The site builds strictly and loads nothing from elsewhere; every figure of the pages is there and used."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs.gallery import FIGURES, IMAGES
from ssl_geometry import methods
from tests.integration.test_fit import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return folder


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=[\"']?(https?:)?//", page.read_text())
        loaded += re.findall(r"<link(?![^>]*rel=[\"']?canonical)[^>]*\shref=[\"']?(?:https?:)?//", page.read_text())
        assert not loaded, page
    assert not re.findall(r"url\(\s*[\"']?https?:|@import", "".join(css.read_text() for css in site.rglob("*.css")))


def test_the_reference_comes_from_docstrings(site: Path) -> None:
    page = (site / "api" / "metrics" / "index.html").read_text()
    assert "Unbiased minibatch CKA of every row layer with every column layer" in page
    assert "gram_size" in page
    assert 'href="../geometry/#ssl_geometry.geometry.gram.gram_vector"' in page
    assert ":func:" not in page
    assert "<code>ssl_geometry.metrics.cka</code>" in page
    assert "Jackknife" in (site / "api" / "geometry" / "index.html").read_text().title()


def test_what_a_method_is_made_of_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "api" / "methods.md").read_text()
    modules = {getattr(methods, name).__module__ for name in methods.__all__}
    assert not [module for module in sorted(modules) if f"::: {module}\n" not in page]


def test_every_figure_is_there_and_shown() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks" / "results").glob("*.md")]
    names = {page: re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text()) for page in pages}
    shown = {(page.parent / name).resolve() for page, found in names.items() for name in found}
    assert {path for path in shown if path.parent == IMAGES} == set(IMAGES.iterdir())
    assert all(path.is_file() for path in shown)


def test_every_figure_on_digits_is_made_by_make_gallery() -> None:
    on_digits = {path.stem for path in IMAGES.iterdir() if not path.stem.startswith(("cifar10-jpeg", "survey"))}
    assert on_digits == set(FIGURES)
    page = (ROOT / "docs" / "gallery.md").read_text()
    assert all(f"images/{path.name}" in page for path in IMAGES.iterdir())


def test_the_table_of_rooms_is_the_tree() -> None:
    rooms = (ROOT / "docs" / "architecture.md").read_text().partition("## The rooms")[2].partition("\n## ")[0]
    listed = [name for row in re.findall(r"^\|([^|]+)\|", rooms, re.MULTILINE) for name in re.findall("`([^`]+)`", row)]
    package = ROOT / "ssl_geometry"
    files = {path.name for path in package.glob("*.py")} - {"__init__.py", "__main__.py"}
    folders = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert sorted(listed) == sorted(files | folders)


def test_where_a_change_goes_is_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text.partition("## Where a change goes")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (?!change|---).*$", table, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([\w./]+(?:\.\w+|/))`", row)}
    assert len(rows) == 10
    assert {"fit_cli.py", "data/loader.py", "metrics/", "wandb.md"} <= named
    places = (ROOT / "ssl_geometry", ROOT / "docs", ROOT)
    assert not [name for name in sorted(named) if not any((place / name).exists() for place in places)]


def test_prose_is_wrapped_at_100_characters() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    pages += [*(ROOT / "docs" / "studies").glob("*.md"), *(ROOT / "benchmarks" / "results").glob("*.md")]
    too_long = []
    for page in pages:
        prose = re.sub(r"(?m)^```(?s:.*?)^```$|^    [^ *\n].*$|^[|#!].*$", "", page.read_text())
        too_long += [f"{page}: {line}" for line in prose.splitlines() if len(line) > 100]
    assert not too_long
