"""The schema of records, one row per number, and the protocols of the numbers."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

SCHEMA = pa.schema(
    [
        ("run", pa.string()),  # id of the run directory that the row was measured in
        ("model", pa.string()),  # what was measured: the run, or a name given to a checkpoint
        ("model_other", pa.string()),  # what it was compared with: a name, "init", or null
        ("metric", pa.string()),  # "cka", "train/loss", ...
        ("layer", pa.string()),
        ("layer_other", pa.string()),
        ("depth", pa.float64()),  # of `layer`: 0 (stem) to 1 (last layer of the backbone), a head after 1
        ("depth_other", pa.float64()),  # of `layer_other`
        ("view", pa.string()),  # how the images were augmented: "clean", ...
        ("split", pa.string()),  # "train", "val", "test", "measure"
        ("epoch", pa.int64()),  # completed epochs: 0 is the initialisation
        ("step", pa.int64()),  # completed optimiser steps
        ("value", pa.float64()),  # in the unit that `records.catalogue` states, as are low and high
        ("low", pa.float64()),  # ends of the error bar, where there is one
        ("high", pa.float64()),
        ("n", pa.int64()),  # images behind the number
        ("protocol", pa.string()),  # short hash of all that changes the number
    ]
)
COLUMNS = SCHEMA.names


def record(**fields: Any) -> dict[str, Any]:
    """A row with every column; the ones not named are null.

    Raises:
        KeyError: a field that the schema does not have.

    Example:
        >>> record(metric="train/loss", value=0.5)["value"]
        0.5
        >>> record(metrc="train/loss")
        Traceback (most recent call last):
            ...
        KeyError: "no such column: ['metrc']"
    """
    unknown = sorted(set(fields) - set(COLUMNS))
    if unknown:
        raise KeyError(f"no such column: {unknown}")
    return {column: fields.get(column) for column in COLUMNS}


@dataclass(frozen=True)
class Protocol:
    """Everything that affects a number, and a short hash that is stored with the number.

    Args:
        what: plain data: layers, pooling, batch-norm mode, estimator, views, sample ids, seeds, versions, ...

    Example:
        >>> Protocol({"kernel": "linear", "gram_size": 64}).hash == Protocol({"gram_size": 64, "kernel": "linear"}).hash
        True
    """

    what: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The whole protocol as JSON, keys in order."""
        return json.dumps(self.what, sort_keys=True, indent=1, default=str)

    @property
    def hash(self) -> str:
        """Ten hexadecimal digits of the SHA-256 of :attr:`text`."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:10]
