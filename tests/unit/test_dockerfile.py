"""The Dockerfile, read as text: what it copies is there, what it starts exists, and it does not run as root.

It is not built here: that needs Docker and gigabytes from the network.
"""

import json
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatchcase
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import ssl_geometry

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text()


def instructions(text: str) -> list[tuple[str, str]]:
    """Each instruction and what it says, comments left out and continued lines joined."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", "", lines)
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())]


def of(kind: str) -> list[str]:
    return [rest for word, rest in instructions(TEXT) if word == kind]


def ignored(path: str, patterns: str) -> bool:
    """Whether .dockerignore keeps a path out of the build: the last pattern that matches it or a folder of it wins."""
    out = False
    parents = ["/".join(path.split("/")[: n + 1]) for n in range(path.count("/") + 1)]
    for line in patterns.split():
        pattern = line.removeprefix("!").removeprefix("**/")
        names = [part.split("/")[-1] for part in parents] if line.startswith("**/") else parents
        if any(fnmatchcase(name, pattern) for name in names):
            out = not line.startswith("!")
    return out


IGNORE = "\n".join(line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#"))


def test_what_it_copies_is_there_and_not_ignored() -> None:
    sources = [source for rest in of("COPY") for source in rest.split()[:-1]]
    assert {"pyproject.toml", "constraints.txt", "ssl_geometry", "configs"} <= set(sources)
    for source in sources:
        path = ROOT / source
        assert path.exists(), source
        files = [path] if path.is_file() else [file for file in path.rglob("*") if "__pycache__" not in file.parts]
        kept = [str(file.relative_to(ROOT)) for file in files]
        assert not [name for name in kept if ignored(name, IGNORE)]


@pytest.mark.parametrize(
    "path", [".git/config", "runs/a/checkpoints/last.ckpt", "data/x", "tests/unit/test_cka.py", ".env", ".venv/x"]
)
def test_nothing_else_is_sent_to_the_build(path: str) -> None:
    assert ignored(path, IGNORE)


def test_patterns_of_dockerignore_are_read_as_docker_reads_them() -> None:
    assert ignored("a/b", "a")
    assert not ignored("a/b", "*\n!a")
    assert ignored("a/__pycache__/x.pyc", "*\n!a\n**/__pycache__")


def test_the_dependencies_come_before_the_source() -> None:
    order = [f"{word} {rest}" for word, rest in instructions(TEXT)]
    installed = next(number for number, line in enumerate(order) if "--requirement" in line)
    assert "--constraint constraints.txt" in order[installed]
    before = " ".join(line for line in order[:installed] if line.startswith("COPY"))
    assert before == "COPY pyproject.toml constraints.txt ./"
    assert any(line.startswith("COPY ssl_geometry") for line in order[installed:])


def test_its_list_of_requirements_is_that_of_the_package(tmp_path: Path) -> None:
    found = re.search(r'python -c "(.*)" > requirements.txt', TEXT)
    assert found
    printed = subprocess.run([sys.executable, "-c", found[1]], cwd=ROOT, capture_output=True, text=True, check=True)
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert printed.stdout.splitlines() == wanted


def test_what_it_starts_exists(capsys: pytest.CaptureFixture[str]) -> None:
    (entry,), (default,) = of("ENTRYPOINT"), of("CMD")
    python, option, module = json.loads(entry)
    assert (python, option) == ("python", "-m")
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    assert "__main__" in Path(spec.origin).read_text()
    with pytest.raises(SystemExit) as stop:
        import_module(module).main(json.loads(default))
    assert not stop.value.code
    assert "usage: python -m ssl_geometry.fit" in capsys.readouterr().out


def test_it_does_not_run_as_root_and_bears_a_version() -> None:
    assert of("USER")[-1] not in ("root", "0")
    assert instructions(TEXT)[-1][0] == "CMD"
    (base,) = of("FROM")
    assert ":" in base
    assert "latest" not in base
    assert f'image.version="{ssl_geometry.__version__}"' in TEXT
    minor = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f"python:{minor}-" in base, "constraints.txt pins what was tried with this Python"


def test_no_secret_is_in_it() -> None:
    assert not re.search(r"(?i)(api[_-]?key|token|password|secret)", TEXT)
    assert not of("ADD")
    assert not re.search(r"https?://|--index-url|--extra-index-url", TEXT)
