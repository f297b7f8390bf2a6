"""Read ``.pkl`` weights without executing anything: numpy arrays and plain values, nothing else.

Built on the standard library's pure-Python unpickler: its memo is a dict, so a hostile memo index costs nothing,
whereas the C one allocates a table of that size. A weights file has few thousand opcodes, so speed does not suffer.
"""

from __future__ import annotations

import mmap
import os
import pickle
import re
import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO, ClassVar

import numpy as np

from gn_det.checkpoint.io import read_head
from gn_det.errors import WeightsError
from gn_det.files import StrPath
from gn_det.text import one_line

_DTYPE = re.compile(r"[<>|=]?(?:b1|[iu][1248]|f[248])$")
# Longer Python 2 strings are array contents: kept as bytes instead of a detour through latin1 text.
_LONG_STRING = 256
_LONG_READ = 1 << 16  # the protocols keep what is longer out of their frames


def read_pickle(path: StrPath) -> dict[str, Any]:
    """The dict in a pickle of arrays, dicts, lists, tuples, strings, bytes and numbers (Python 2 or 3).

    Raises:
        WeightsError: unreadable, damaged, not a dict, or holding any other object (named; nothing is executed).
    """
    read_head(path)
    try:
        with open(path, "rb") as raw:
            loaded = _Unpickler(_Bounded(raw)).load()
    except _Refused as error:
        raise WeightsError(f"{path}: {error}") from None
    except Exception as error:  # whatever damaged bytes provoke in the interpreter of opcodes is the file's fault
        raise WeightsError(
            f"{path}: is not a pickle of weights or is damaged ({one_line(error)}); download it again"
        ) from None
    if not isinstance(loaded, dict):
        raise WeightsError(f"{path}: holds a {type(loaded).__name__}, not a dict of weights")
    return loaded


class _Refused(Exception):
    """The pickle asks for something that is not admitted."""


class _Bounded:
    """A mapped file that never promises more bytes than it has: a claimed length costs no memory.

    Long reads are views of the mapping, so that the contents of arrays are not copied here.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._view = memoryview(self._map)

    def read(self, size: int) -> bytes | memoryview:
        at = self._map.tell()
        if size < 0 or size > len(self._view) - at:
            raise _Refused("is truncated or damaged (it claims more bytes than it has); download it again")
        if size < _LONG_READ:
            return self._map.read(size)
        self._map.seek(size, os.SEEK_CUR)
        return self._view[at : at + size]

    def readline(self) -> bytes:
        return self._map.readline()


class _Dtype:
    """Stands for a numpy dtype of plain numbers while the pickle is read; never part of the result."""

    def __init__(self, code: str) -> None:
        if not isinstance(code, str) or not _DTYPE.match(code):
            raise _Refused(f"holds an array of dtype {one_line(code, 40)!r}; only plain numbers are read")
        self.code = code.lstrip("<>|=")
        self.order = code[0] if code[0] in "<>|=" else "="

    def numpy(self) -> np.dtype:
        return np.dtype(self.order + self.code)


def _text(value: Any) -> Any:
    return str(value, "latin1") if isinstance(value, (bytes, memoryview)) else value


def _bytes(value: Any) -> bytes | memoryview:
    if isinstance(value, str):  # Python 2's str, decoded as latin1
        return value.encode("latin1")
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise _Refused(f"holds an array whose contents are a {type(value).__name__}")
    return bytes(value) if isinstance(value, bytearray) else value


def _array(shape: Any, dtype: Any, order: str, data: Any) -> np.ndarray:
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape) or len(shape) > 32:
        raise _Refused(f"holds an array of shape {one_line(shape, 60)}")
    if not isinstance(dtype, _Dtype):
        raise _Refused("holds an array without a plain dtype")
    raw = _bytes(data)
    size = dtype.numpy().itemsize
    for n in shape:
        size *= n
    if len(raw) != size:
        raise _Refused(f"is damaged: an array of shape {shape} {dtype.code} has {len(raw)} bytes instead of {size}")
    return np.frombuffer(raw, dtype.numpy()).reshape(shape, order="F" if order == "F" else "C")


def _build_dtype(dtype: _Dtype, state: Any) -> None:
    plain = isinstance(state, tuple) and len(state) >= 5 and state[2] is None and state[3] is None and state[4] is None
    order = _text(state[1]) if plain else None
    if order not in ("<", ">", "|", "="):
        raise _Refused("holds an array of a structured dtype; only plain numbers are read")
    dtype.order = order


class _Pending:
    """An array between its creation and its BUILD opcode; the memo may hold it in the array's place."""

    array: np.ndarray | None = None


def _constructors() -> dict[tuple[str, str], Callable[..., Any]]:
    """What a pickle may name, by module and name, and what happens instead of importing it.

    Made anew for each file: a pickle can set attributes on what it is handed, and that must not outlive it.
    """

    def reconstruct(kind: Any, shape: Any, code: Any) -> _Pending:
        return _Pending()

    def ndarray(*args: Any) -> Any:
        raise _Refused("calls numpy.ndarray, which no weights file does")

    def dtype(code: Any, align: Any = False, copy: Any = False) -> _Dtype:
        return _Dtype(_text(code))

    def scalar(kind: Any, data: Any) -> Any:
        return _array((), kind, "C", data)[()]

    def frombuffer(data: Any, kind: Any, shape: Any, order: Any) -> np.ndarray:
        return _array(shape, kind, order, data)

    def encode(text: Any, encoding: Any = "latin1") -> bytes:
        if encoding not in ("latin1", "latin-1") or not isinstance(text, str):
            raise _Refused("holds bytes in an unknown encoding")
        return text.encode("latin1")

    def empty_bytes() -> bytes:  # how protocols < 3 write an empty array's contents; a size is not admitted
        return b""

    def ordered(items: Any = ()) -> Any:
        return OrderedDict(items)

    table: dict[tuple[str, str], Callable[..., Any]] = {
        ("numpy", "ndarray"): ndarray,
        ("numpy", "dtype"): dtype,
        ("_codecs", "encode"): encode,
        ("builtins", "bytes"): empty_bytes,
        ("__builtin__", "bytes"): empty_bytes,
        ("collections", "OrderedDict"): ordered,
    }
    for core in ("numpy.core", "numpy._core"):
        table[f"{core}.multiarray", "_reconstruct"] = reconstruct
        table[f"{core}.multiarray", "scalar"] = scalar
        table[f"{core}.numeric", "_frombuffer"] = frombuffer
    return table


_OPCODES = (
    "PROTO FRAME STOP POP POP_MARK DUP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT "
    "BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE SHORT_BINUNICODE "
    "BINUNICODE8 EMPTY_LIST APPEND APPENDS LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT SETITEM "
    "SETITEMS GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL REDUCE BUILD BYTEARRAY8"
)


# Any: the attributes that opcodes work on (stack, memo, read) are not in the type stubs.
_Base: Any = pickle._Unpickler  # type: ignore[attr-defined, unused-ignore]


class _Unpickler(_Base):
    """Opcodes that only build values; names resolve to :func:`_constructors` alone."""

    # Left out: INST, OBJ, NEWOBJ, persistent ids, extension registry, sets, buffers. No weights file has them.
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        getattr(pickle, op)[0]: _Base.dispatch[getattr(pickle, op)[0]] for op in _OPCODES.split()
    }

    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="latin1")
        self._allowed = _constructors()

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise _Refused(
                f"holds {one_line(module, 60)}.{one_line(name, 60)}, which is not loaded because it could run "
                "code; only numpy arrays, dicts, lists and plain values are read from a pickle"
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("holds a persistent id, which no weights file does")

    def _decode_string(self, value: bytes) -> Any:
        return value if len(value) > _LONG_STRING else str(value, "latin1")

    def _load_reduce(self) -> None:
        args = self.stack.pop()
        function = self.stack[-1]
        if not any(function is allowed for allowed in self._allowed.values()) or not isinstance(args, tuple):
            raise _Refused("calls something that is not a constructor of arrays")
        self.stack[-1] = function(*args)

    def _load_build(self) -> None:
        state = self.stack.pop()
        top = self.stack[-1]
        if isinstance(top, _Dtype):
            _build_dtype(top, state)
        elif isinstance(top, _Pending):
            if not isinstance(state, tuple) or len(state) != 5:
                raise _Refused("is damaged: an array has no contents")
            _, shape, dtype, fortran, data = state
            self.stack[-1] = top.array = _array(shape, dtype, "F" if fortran else "C", data)
        elif not isinstance(top, OrderedDict):  # a state_dict's OrderedDict carries _metadata, which we do not need
            raise _Refused(f"sets the state of a {type(top).__name__}, which no weights file does")

    def _load_bytearray8(self) -> None:
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(self.read(size))

    def _load_refused(self) -> None:
        raise _Refused(
            "uses pickle opcodes that no weights file does, which are not followed because they could run code"
        )


def _get(original: Callable[[Any], None]) -> Callable[[Any], None]:
    def load(self: Any) -> None:
        original(self)
        top = self.stack[-1]
        if isinstance(top, _Pending) and top.array is not None:
            self.stack[-1] = top.array

    return load


def _dispatch() -> dict[int, Callable[[Any], None]]:
    table: dict[int, Callable[[Any], None]] = dict.fromkeys(_Base.dispatch, _Unpickler._load_refused)
    table |= _Unpickler.dispatch
    for name in ("GET", "BINGET", "LONG_BINGET"):
        code = getattr(pickle, name)[0]
        table[code] = _get(table[code])
    table[pickle.REDUCE[0]] = _Unpickler._load_reduce
    table[pickle.BUILD[0]] = _Unpickler._load_build
    table[pickle.BYTEARRAY8[0]] = _Unpickler._load_bytearray8
    return table


_Unpickler.dispatch = _dispatch()
