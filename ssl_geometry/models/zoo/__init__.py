"""Published checkpoints: a table of them, their download, and their files read as data into this package's backbones.

Each file is checked against a hash, read without running any code that it holds, and loaded strictly: every weight of
the backbone comes from the file, and nothing of a backbone in the file is left over.
"""

from typing import TYPE_CHECKING, Any

from ssl_geometry.models.zoo.download import cache_folder, cached, fetch, verify
from ssl_geometry.models.zoo.table import TABLE, Checkpoint

if TYPE_CHECKING:
    from ssl_geometry.models.zoo.load import Loaded, load_checkpoint, load_strictly

__all__ = [
    "TABLE",
    "Checkpoint",
    "Loaded",
    "cache_folder",
    "cached",
    "fetch",
    "load_checkpoint",
    "load_strictly",
    "verify",
]

if not TYPE_CHECKING:  # where mypy looks, a name that is not there stays a mistake

    def __getattr__(name: str) -> Any:
        """What reads files: with torch, which table and cache do without."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from ssl_geometry.models.zoo import load

        return getattr(load, name)
