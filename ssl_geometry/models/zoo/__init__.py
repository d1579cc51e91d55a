"""Published checkpoints: a table of them, their download, and their files read as data into this package's backbones.

Each file is checked against a hash, read without running any code that it holds, and loaded strictly: every weight of
the backbone comes from the file, and nothing of a backbone in the file is left over.
"""

from ssl_geometry.models.zoo.download import cache_folder, cached, fetch, verify
from ssl_geometry.models.zoo.load import Loaded, load_checkpoint, load_strictly
from ssl_geometry.models.zoo.table import TABLE, Checkpoint

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
