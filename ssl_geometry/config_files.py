"""The config files of ``fit``: those that others start from, and that of a run which is continued."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ssl_geometry.errors import UserError, did_you_mean, first_line
from ssl_geometry.runs.run import config_of, run_of


def expand_bases(args: Sequence[str]) -> list[str]:
    """Put the config files that a config file starts from before it.

    Args:
        args: command line.

    Returns:
        The command line with ``--config base.yaml`` before each ``--config child.yaml`` that names ``base: base.yaml``.

    Raises:
        UserError: a config file that does not exist, is no YAML mapping, or starts from itself.

    Example:
        >>> import tempfile; folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "a.yaml").write_text("data: {batch_size: 4}"), (folder / "b.yaml").write_text("base: a.yaml")
        >>> [Path(arg).name for arg in expand_bases(["--config", str(folder / "b.yaml"), "--debug"])]
        ['--config', 'a.yaml', '--config', 'b.yaml', '--debug']
    """
    expanded: list[str] = []
    seen: set[Path] = set()
    pending = list(args)
    while pending:
        arg = pending.pop(0)
        option, _, value = arg.partition("=")
        if option not in ("--config", "-c") or not (value or pending):
            expanded.append(arg)
            continue
        chain = [Path(value or pending.pop(0)).resolve()]
        while base := _base_of(chain[0]):
            if base in chain:
                raise UserError(f"--config {chain[-1]}: {base} starts from itself")
            chain.insert(0, base)
        for path in chain:
            if path not in seen:  # a base shared by two files must not override the first of them
                expanded += ["--config", str(path)]
                seen.add(path)
    return expanded


class UniqueKeys(yaml.SafeLoader):
    """YAML in which a key stands once: of two, the parser would take the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping.

        Raises:
            UserError: a key that stands twice.
        """
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line, before = key.start_mark.line + 1, lines.get(key.value)
            if before is not None:
                where = f"line {line}" if before == line else f"lines {before} and {line}"
                raise UserError(f"--config {self.name}: {key.value!r} is given twice, in {where}; merge them")
            lines[key.value] = line
        return super().construct_mapping(node, deep)


def _base_of(path: Path) -> Path | None:
    if not path.is_file():
        siblings = [str(other) for other in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise UserError(f"--config {path}: no such file; {did_you_mean(str(path), siblings)}")
    try:
        with path.open(encoding="utf-8") as file:
            content = yaml.load(file, Loader=UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not YAML ({first_line(error)})") from error
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror})") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: expected options as `key: value`, found {type(content).__name__}")
    base = content.get("base")
    if not isinstance(base, str | None):
        raise UserError(f"--config {path}: base: {base}: expected one config file, such as `base: other.yaml`")
    return (path.parent / base).resolve() if base else None


def config_of_resumed(args: Sequence[str]) -> list[str]:
    """``--resume RUN`` without a configuration continues with the run's own."""
    given = {arg.partition("=")[0] for arg in args}
    values = [*args, ""]
    paths = [
        values[i + 1] if arg == "--resume" else arg.partition("=")[2] for i, arg in enumerate(args) if "--resume" in arg
    ]
    if not paths or given & {"--config", "-c", "--model"}:
        return []
    if paths[-1] in ("", "auto"):
        return []
    directory = run_of(Path(paths[-1]).resolve())
    if config_of(directory) is None:
        raise UserError(
            f"--resume {directory}: its config.yaml, the options of the run, is missing or damaged: put it "
            "back, or start a new run"
        )
    return ["--config", str(directory / "config.yaml")]
