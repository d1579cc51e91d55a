"""The wheel: built without the network, it holds the package alone, and its commands start outside of the repository.

The environment that it is put into borrows the dependencies of this one; the package itself comes from the wheel.
"""

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import ssl_geometry
from tests.integration.test_fit import ROOT, clean_environment

COMMANDS = ["fit", "compare", "probe", "survey", "zoo", "doctor", "report.__main__"]
START_ALL = """
import runpy, sys
import ssl_geometry
print(ssl_geometry.__file__)
for command in sys.argv[1:]:
    sys.argv[1:] = ["--help"]
    try:
        runpy.run_module(f"ssl_geometry.{command}", run_name="__main__")  # as python -m does
    except SystemExit as exit_:
        assert not exit_.code, command
"""


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in clean_environment().items() if name != "PYTHONPATH"}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("ssl_geometry", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_it_holds_the_package_and_nothing_else(wheel: Path) -> None:
    assert wheel.name == f"ssl_geometry-{ssl_geometry.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as files:
        names = {name for name in files.namelist() if ".dist-info/" not in name}
        (metadata,) = [files.read(name).decode() for name in files.namelist() if name.endswith("/METADATA")]
    package = (path for path in (ROOT / "ssl_geometry").rglob("*") if path.is_file())
    assert names == {str(path.relative_to(ROOT)) for path in package if "__pycache__" not in path.parts}
    assert "Requires-Python: >=3.11" in metadata
    assert "License-Expression: Apache-2.0" in metadata


def test_its_commands_start_outside_of_the_repository(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    (packages,) = (tmp_path / "env").glob("lib/python*/site-packages")
    # Searched after the wheel's; editable installs there are not, for only files of site's own folders are read.
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    shown = run(python, "-c", START_ALL, *COMMANDS, cwd=tmp_path)
    assert Path(shown.partition("\n")[0]) == packages / "ssl_geometry" / "__init__.py"
    assert all(f"usage: python -m ssl_geometry.{command.removesuffix('.__main__')}" in shown for command in COMMANDS)
