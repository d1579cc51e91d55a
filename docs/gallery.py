"""The code of the pages: read for the tests, and run in full for the figures on digits (``make gallery``)."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
TUTORIAL = ROOT / "docs" / "add-a-method.md"
COMPARED = "runs/compare/hypersphere-simclr-supervised-untrained"
FIGURES = {
    "cka_map_supervised": "runs/demo/simclr/figures/cka_map_supervised",
    "cka_epochs_init": "runs/demo/simclr/figures/cka_epochs_init",
    "demo_invariance_views": "runs/demo/simclr/figures/invariance_views",
    "demo_rankme_epochs": "runs/demo/simclr/figures/spectrum_rankme_epochs",
    "demo_probes_ridge_depth": "runs/demo/simclr/figures/probes_ridge_depth",
    "demo_neighbors": "runs/demo/simclr/figures/neighbors_neighbors",
    "hypersphere_cka_map_simclr": "runs/quickstart/hypersphere/figures/cka_map_simclr",
    "hypersphere_layers_simclr": f"{COMPARED}/figures/layers_hypersphere_simclr",
    "hypersphere_invariance_and_classes": f"{COMPARED}/figures/invariance_and_classes",
}
"""Figure of the pages to where its command leaves it."""


@dataclass(frozen=True)
class Block:
    """A block of code on a page: a file if it has a title, else commands or a script."""

    page: Path
    line: int
    language: str
    title: str
    text: str

    def commands(self) -> list[list[str]]:
        """The command lines, as words: continued lines are one, comments are left out."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(page: Path) -> Iterator[Block]:
    """All fenced blocks of a page, in order."""
    text = page.read_text()
    for found in re.finditer(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', text, re.MULTILINE | re.DOTALL):
        yield Block(page, text.count("\n", 0, found.start()) + 1, found[1], found[2] or "", found[3])


def main() -> None:
    """Run the tutorial's commands in full, next to the runs of ``make demo``, and copy all figures."""
    folder = ROOT / "runs" / "gallery"
    trained = [ROOT / "runs/quickstart" / name for name in ("hypersphere", "taught", "near")]
    for made in (folder, *trained, ROOT / COMPARED):
        shutil.rmtree(made, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("configs", "runs"):
        (folder / name).symlink_to(ROOT / name)
    for block in blocks(TUTORIAL):
        if block.title:
            (folder / block.title).write_text(block.text)
        elif block.language == "bash":
            for program, *args in block.commands():
                assert program == "python"
                subprocess.run([sys.executable, *args], cwd=folder, check=True)
    for name, made in FIGURES.items():
        shutil.copy(ROOT / f"{made}.png", IMAGES / f"{name}.png")


if __name__ == "__main__":
    main()
