"""Pickles read as data: arrays and containers are built by this file alone, every other name is refused.

A pickle names functions that its reader calls. This reader looks none up: it knows a few names of NumPy, JAX, Haiku
and dill, and puts a function or class of its own, without effects, in the place of each.
"""

import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ssl_geometry.errors import UserError

RECORDS = ("byol", "optax")
"""Packages whose classes are records of plain values, such as the state of an optimiser."""
FIELDS = {
    "_ByolExperimentState": ("online_params", "target_params", "online_state", "target_state", "opt_state"),
}
"""Of records whose fields are looked up by name."""


class Record(tuple):
    """A named tuple of the file, as a plain tuple."""

    __slots__ = ()
    fields: tuple[str, ...] = ()

    def __new__(cls, *values: Any) -> "Record":
        """Its values one by one, as pickles of named tuples give them."""
        return super().__new__(cls, values)

    def as_dict(self) -> dict[str, Any]:
        """Its values by name."""
        return dict(zip(self.fields, self, strict=True))


def _record(name: str, fields: Any = (), *_: Any) -> type[Record]:
    return type(str(name), (Record,), {"__slots__": (), "fields": tuple(map(str, fields or FIELDS.get(name, ())))})


class _Type:
    """A type of numbers; of the state that NumPy would take from the file, the order of bytes alone."""

    def __init__(self, name: Any, *_: Any) -> None:
        if not re.fullmatch(r"[biufc]\d{1,2}", str(name)):
            raise pickle.UnpicklingError(f"arrays of type {name}")
        self.numpy = np.dtype(str(name))

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError(f"bytes in the order {state[1]}")
        self.numpy = self.numpy.newbyteorder("=" if state[1] == "|" else state[1])


class _Array(np.ndarray):
    """An array whose type is checked before it takes its values from the file."""

    def __setstate__(self, state: Any) -> None:
        *version, shape, kind, fortran, values = state
        if not isinstance(kind, _Type) or not isinstance(values, bytes):
            raise pickle.UnpicklingError("an array of objects")
        super().__setstate__((*version, shape, kind.numpy, fortran, values))


def _empty(*_: Any) -> np.ndarray:
    return np.empty(0).view(_Array)  # its state, which follows in the file, gives shape, type and values


def _array(make: Callable[..., np.ndarray], arguments: tuple, state: tuple, *_: Any) -> np.ndarray:
    array = make(*arguments)
    array.__setstate__(state)
    return array


def _scalar(kind: _Type, value: Any) -> Any:
    return np.frombuffer(value, kind.numpy, 1)[0]


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes as {encoding}")
    return text.encode("latin1")


def _bytes() -> bytes:
    return b""


KNOWN: dict[tuple[str, str], Any] = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _empty for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    ("numpy", "ndarray"): None,  # an argument of _reconstruct, never made
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encode,
    ("dill._dill", "_create_array"): _array,
    ("dill._dill", "_create_namedtuple"): _record,
    ("jax._src.array", "_reconstruct_array"): _array,
    ("jax._src.device_array", "reconstruct_device_array"): _array,
    ("jax.interpreters.xla", "_reconstruct_device_array"): _array,
    ("haiku._src.data_structures", "FlatMapping"): dict,
    ("haiku._src.data_structures", "frozendict"): dict,
    ("haiku._src.data_structures", "to_immutable_dict"): dict,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "bytes"): _bytes,  # how protocol 2 writes empty bytes
    **{("builtins", kind.__name__): kind for kind in (dict, list, tuple, set, frozenset, int, float, complex, bool)},
}


class _DataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of a known name."""
        module = "builtins" if module == "__builtin__" else module
        if (module, name) in KNOWN:
            return KNOWN[module, name]
        if module.partition(".")[0] in RECORDS and name.isidentifier():
            return _record(name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def read_pickle(file: Path) -> Any:
    """Read a pickle of arrays and containers, without calling any code that it names.

    Args:
        file: the file.

    Returns:
        Plain containers of arrays and numbers; named tuples are :class:`Record`.

    Raises:
        UserError: a name in the file that is not known to be data, or a file that is cut short.
    """
    try:
        with file.open("rb") as stream:
            return _DataUnpickler(stream).load()
    except pickle.UnpicklingError as error:
        raise UserError(f"{file}: holds {error}, which is not plain data; nothing of it was loaded") from error
    except Exception as error:  # a damaged pickle fails anywhere
        raise UserError(f"{file}: not a whole checkpoint ({error}); delete it and fetch it again") from error
