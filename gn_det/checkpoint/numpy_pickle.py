"""Pickles of numpy arrays, as Caffe2, Detectron and Detectron2's model zoo publish them."""

from __future__ import annotations

import math
import mmap
import re
from typing import Any

import numpy as np

from gn_det.checkpoint.unpickler import Pending, Refused, Stream, Table, Unpickler, check_shape, plain_constructors
from gn_det.files import StrPath, open_regular
from gn_det.text import one_line

_DTYPE = re.compile(r"[<>|=]?(?:b1|[iu][1248]|f[248])$")


def read_pickle(path: StrPath) -> Any:
    """Return the value in a pickle of arrays, dicts, lists, tuples, strings, bytes and numbers (Python 2 or 3).

    Raises:
        Refused: it holds any other object; the message does not name the file.
        Exception: of any type, for damaged bytes.
    """
    with open_regular(path) as file:
        stream = Stream(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return Unpickler(stream, _constructors(stream), build=lambda top, state: _build(stream, top, state)).load()


def _build(stream: Stream, top: Any, state: Any) -> Any:
    """Set the byte order of a dtype or the contents of an array."""
    if isinstance(top, np.dtype):
        plain = isinstance(state, tuple) and len(state) >= 5 and state[2] is state[3] is state[4] is None
        if not plain or not isinstance(state[1], str) or state[1] not in ("<", ">", "|", "="):
            raise Refused("holds an array of a structured dtype; only plain numbers are read")
        top.__setstate__((3, state[1], None, None, None, -1, -1, 0))  # type: ignore[attr-defined]
        return top
    if not isinstance(top, Pending) or not isinstance(state, tuple) or len(state) != 5:
        raise Refused(f"sets the state of a {type(top).__name__}, which no weights file does")
    _, shape, dtype, fortran, data = state
    top.array = _array(stream, shape, dtype, data, "F" if fortran is True else "C")
    return top.array


def _array(stream: Stream, shape: Any, dtype: Any, data: Any, order: Any = "C") -> np.ndarray:
    shape = check_shape(shape)
    if not isinstance(dtype, np.dtype):
        raise Refused("holds an array without a plain dtype")
    if isinstance(data, str):  # Python 2's str, decoded as latin1
        stream.copies(len(data))
        data = data.encode("latin1")
    if not isinstance(data, (bytes, memoryview)):
        raise Refused(f"holds an array whose contents are a {type(data).__name__}")
    size = math.prod(shape) * dtype.itemsize
    if len(data) != size:
        raise Refused(
            f"is damaged: an array of shape {one_line(shape, 60)} {dtype.name} has {len(data)} bytes instead of "
            f"{one_line(size)}"
        )
    # A dtype of its own: that of the pickle may get another byte order afterwards.
    made: np.ndarray = np.frombuffer(data, np.dtype(dtype.str)).reshape(shape, order="F" if order == "F" else "C")
    return made


def _constructors(stream: Stream) -> Table:
    def reconstruct(kind: Any, shape: Any, code: Any) -> Pending:
        return Pending()

    def dtype(code: Any, align: Any = False, copy: Any = False) -> np.dtype:
        if not isinstance(code, str) or not _DTYPE.match(code):
            raise Refused(f"holds an array of dtype {one_line(code, 40)!r}; only plain numbers are read")
        return np.dtype(code, copy=True)  # never numpy's own object: its byte order may be set

    def scalar(kind: Any, data: Any) -> Any:
        return _array(stream, (), kind, data)[()]

    def frombuffer(data: Any, kind: Any, shape: Any, order: Any, axes: Any = None) -> np.ndarray:
        found = _array(stream, shape, kind, data, order)
        if axes is None:
            return found
        # Since numpy 2.4, of an array whose axes are in another order, such as channels last.
        if type(axes) is not tuple or not all(type(n) is int for n in axes) or sorted(axes) != list(range(found.ndim)):
            raise Refused("is damaged: an array has an impossible order of axes")
        moved: np.ndarray = found.transpose(axes)
        return moved

    table: Table = {("numpy", "ndarray"): None, ("numpy", "dtype"): dtype, **plain_constructors(stream)}
    for core in ("numpy.core", "numpy._core"):
        table[f"{core}.multiarray", "_reconstruct"] = reconstruct
        table[f"{core}.multiarray", "scalar"] = scalar
        table[f"{core}.numeric", "_frombuffer"] = frombuffer
    return table
