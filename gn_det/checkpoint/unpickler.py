"""Read pickles without executing anything, in bounded time and memory.

:class:`Unpickler` follows the opcodes that build plain values. A name in the pickle resolves to one of our own
constructors or is refused. :func:`read_pickle` reads numpy arrays with it, and ``torch_archive`` reads torch's files.

It extends the standard library's pure-Python unpickler, whose memo is a dict; the C one allocates a table as long as
the largest memo index. A weights file has a few thousand opcodes, so speed does not matter.

A few hundred bytes can keep other readers busy forever. Three limits prevent that here. Dict keys are short strings or
integers, because hashing nested tuples takes exponential time. :func:`check_values` limits depth and number of values,
because containers may contain themselves or share contents exponentially often. :meth:`Stream.copies` limits repeated
copying.
"""

from __future__ import annotations

import itertools
import mmap
import pickle
import re
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from gn_det.files import StrPath, open_regular
from gn_det.text import one_line

# A Mask R-CNN R-50-FPN with its optimizer has some 20,000 opcodes and 8 levels.
MAX_OPCODES = 500_000
MAX_PLACES = 500_000
MAX_DEPTH = 64
MAX_TEXT = 8 << 20  # characters
MAX_KEY = 512  # characters of a dict's key
_MAX_BITS = 256  # of an integer
# Longer Python 2 strings are array contents, kept as bytes without decoding to latin1.
_LONG_STRING = 256
_LONG_READ = 1 << 16
_DTYPE = re.compile(r"[<>|=]?(?:b1|[iu][1248]|f[248])$")

#: Names that a pickle may use: (module, name) to our replacement function or value.
Table = dict[tuple[str, str], Any]


class Refused(Exception):
    """The file contains something that is not allowed; the message continues the file's name."""


class Stream:
    """Part of a mapped file as a file object. Long reads are views, so a claimed length costs no memory."""

    def __init__(self, mapped: mmap.mmap, begin: int = 0, size: int | None = None) -> None:
        self._map, self._view, self.at = mapped, memoryview(mapped), begin
        self._end = len(mapped) if size is None else begin + size
        self._may_copy = 2 * len(mapped) + (1 << 20)

    def read(self, size: int) -> bytes | memoryview:
        begin = self.at
        self.at = end = begin + size
        if size < 0 or end > self._end:
            raise Refused("is truncated or damaged (it claims more bytes than it has); download it again")
        return self._map[begin:end] if size < _LONG_READ else self._view[begin:end]

    def readline(self) -> bytes:
        begin, self.at = self.at, self._map.find(b"\n", self.at, self._end) + 1
        if not self.at:
            raise Refused("is truncated or damaged (a line does not end); download it again")
        return self._map[begin : self.at]

    def copies(self, size: int) -> None:
        """Count bytes that a constructor copies, because a pickle can call it repeatedly on the same value."""
        self._may_copy -= size
        if self._may_copy < 0:
            raise Refused("copies its contents over and over, which no weights file does")


def check_values(value: Any) -> None:
    """Check that nested dicts, lists and tuples are shallow and small, so that traversing them is cheap.

    Raises:
        Refused: too many (shared values count each time), too much text, or an integer of more than 256 bits.
    """
    level, places, text = [value], 0, 0
    for _ in range(MAX_DEPTH + 1):
        nested = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list, tuple)))
        level = list(itertools.islice(itertools.chain.from_iterable(nested), MAX_PLACES + 1 - places))
        places += len(level)
        text += sum(len(v) for v in level if isinstance(v, str))
        if not level:
            return
        if text > MAX_TEXT:
            raise Refused(f"holds more than {MAX_TEXT} characters of text (shared ones count each time)")
        if places > MAX_PLACES:
            raise Refused(f"holds more than {MAX_PLACES} values (shared ones count each time)")
        if any(isinstance(v, int) and v.bit_length() > _MAX_BITS for v in level):
            raise Refused(f"holds an integer of more than {_MAX_BITS} bits, which no weights file does")
    raise Refused(f"nests its values more than {MAX_DEPTH} levels deep, which no weights file does")


class _Pending:
    """An array between its creation and its BUILD opcode."""

    array: Any = None


class _Memo(dict[int, Any]):
    """Memo of an unpickler that replaces a :class:`_Pending` by its array."""

    def __getitem__(self, key: int) -> Any:
        value = super().__getitem__(key)
        return value.array if isinstance(value, _Pending) and value.array is not None else value


# Any: the attributes that opcodes work on (stack, memo, read) are not in the type stubs.
_Base: Any = pickle._Unpickler  # type: ignore[attr-defined, unused-ignore]
_Stop: Any = pickle._Stop  # type: ignore[attr-defined, unused-ignore]
# Not supported: INST, OBJ, NEWOBJ, PERSID, the extension registry, sets, buffers. No weights file uses them.
_OPCODES = (
    "PROTO STOP POP POP_MARK DUP MARK NONE NEWTRUE NEWFALSE INT LONG LONG1 LONG4 BININT BININT1 BININT2 FLOAT "
    "BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES "
    "BINBYTES8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT GET BINGET LONG_BINGET "
    "PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL BINPERSID REDUCE"
)


class Unpickler(_Base):  # type: ignore[misc, unused-ignore]
    """Unpickler that supports only opcodes that build values.

    Args:
        stream: input; may hold several consecutive pickles.
        table: names that the pickle may use, besides plain containers.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {}

    def __init__(self, stream: Stream, table: Table) -> None:
        super().__init__(stream, encoding="latin1")
        self.read, self.readline = stream.read, stream.readline
        self._table = _plain_constructors(stream) | table

    def load(self) -> Any:
        """Return the value of a pickle.

        Raises:
            Refused: a limit is exceeded, or something is not allowed.
            Exception: of any type, for damaged bytes.
        """
        self.memo = _Memo()
        self.stack: list[Any] = []
        self.metastack: list[list[Any]] = []
        self.append = self.stack.append
        read, dispatch = self.read, self.dispatch
        try:
            for _ in range(MAX_OPCODES):
                dispatch[read(1)[0]](self)
        except _Stop as stop:
            check_values(stop.value)
            return stop.value
        raise Refused(f"has more than {MAX_OPCODES} pickle opcodes; no weights file has so many")

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._table[module, name]
        except KeyError:
            raise Refused(
                f"holds {one_line(module, 60)}.{one_line(name, 60)}, which is not a plain tensor or value and could "
                "run code; save the weights alone, as in torch.save({'model': model.state_dict()}, path)"
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        raise Refused("holds a persistent id, which no pickle of arrays does")

    def build(self, value: Any, state: Any) -> Any:
        """Return the result of BUILD for values other than dicts."""
        raise Refused(f"sets the state of a {type(value).__name__}, which no weights file does")

    def _decode_string(self, value: bytes) -> Any:
        return value if len(value) > _LONG_STRING else str(value, "latin1")

    # Opcodes that differ from the standard library.

    def _load_bytearray(self) -> None:  # the standard one allocates the claimed size
        self.append(self.read(int.from_bytes(self.read(8), "little")))

    def _load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        _set_items(self.stack[-1], items)

    def _load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _set_items(self.stack[-1], [key, value])

    def _load_setitems(self) -> None:
        items = self.pop_mark()
        _set_items(self.stack[-1], items)

    def _load_build(self) -> None:
        state, top = self.stack.pop(), self.stack[-1]
        if not isinstance(top, OrderedDict):  # else module versions of a state_dict, which are not used
            self.stack[-1] = self.build(top, state)

    def _load_refused(self) -> None:
        raise Refused("uses pickle opcodes that could run code and that no weights file needs")


def _code(opcode: str) -> int:
    return int(getattr(pickle, opcode)[0])


Unpickler.dispatch = dict.fromkeys(range(256), Unpickler._load_refused)
Unpickler.dispatch |= {_code(opcode): _Base.dispatch[_code(opcode)] for opcode in _OPCODES.split()}
Unpickler.dispatch |= {
    _code("FRAME"): lambda self: self.read(8),  # only says how much to read ahead
    _code("BYTEARRAY8"): Unpickler._load_bytearray,
    _code("DICT"): Unpickler._load_dict,
    _code("SETITEM"): Unpickler._load_setitem,
    _code("SETITEMS"): Unpickler._load_setitems,
    _code("BUILD"): Unpickler._load_build,
}


def _set_items(target: Any, items: list[Any]) -> None:
    """Put ``[key, value, key, value ...]`` into a dict."""
    if type(target) not in (dict, OrderedDict, Counter):
        raise Refused(f"sets items of a {type(target).__name__}, which no weights file does")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not (type(key) is str and len(key) <= MAX_KEY) and not (type(key) is int and -(2**63) <= key < 2**63):
            raise Refused(f"has a dict key of type {type(key).__name__}; keys are short strings or integers")
        target[key] = value


def _plain_constructors(stream: Stream) -> Table:
    """Names that any pickle may use: bytes of old protocols, and special dicts.

    Created anew for each file, so that a file cannot affect the next one.
    """

    def encode(text: Any, encoding: Any = "latin1") -> bytes:
        if encoding not in ("latin1", "latin-1") or not isinstance(text, str):
            raise Refused("holds bytes in an unknown encoding")
        stream.copies(len(text))
        return text.encode("latin1")

    def ordered(items: Any = ()) -> Any:
        stream.copies(200 * len(items))
        made: Any = OrderedDict()
        for pair in items:
            _set_items(made, list(pair))
        return made

    def counter(items: Any = None) -> Any:
        stream.copies(200 * len(items or ()))
        made: Any = Counter()
        _set_items(made, [part for pair in (items or {}).items() for part in pair])
        return made

    return {
        ("_codecs", "encode"): encode,
        # How protocols < 3 write an empty array's contents; a size is not allowed.
        ("builtins", "bytes"): lambda: b"",
        ("__builtin__", "bytes"): lambda: b"",
        ("collections", "OrderedDict"): ordered,
        ("collections", "Counter"): counter,
    }


# ------------------------------------------------------------ numpy


def read_pickle(path: StrPath) -> Any:
    """Return the value in a pickle of numpy arrays and plain values (Python 2 or 3), as in Detectron's model zoos.

    Raises:
        Refused: it holds any other object; the message does not name the file.
        Exception: of any type, for damaged bytes.
    """
    with open_regular(path) as file:
        return _Arrays(Stream(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))).load()


class _Arrays(Unpickler):
    """Unpickler of numpy's arrays."""

    def __init__(self, stream: Stream) -> None:
        table: Table = {("numpy", "ndarray"): None, ("numpy", "dtype"): _dtype}
        for core in ("numpy.core", "numpy._core"):
            table[f"{core}.multiarray", "_reconstruct"] = lambda kind, shape, code: _Pending()
            table[f"{core}.multiarray", "scalar"] = lambda kind, data: self._array((), kind, data, "C")[()]
            table[f"{core}.numeric", "_frombuffer"] = self._frombuffer
        super().__init__(stream, table)
        self._copies = stream.copies

    def build(self, value: Any, state: Any) -> Any:
        """Set the byte order of a dtype or the contents of an array."""
        if isinstance(value, np.dtype):
            if state[1] not in ("<", ">", "|", "=") or state[2:5] != (None, None, None):
                raise Refused("holds an array of a structured dtype; only plain numbers are read")
            value.__setstate__((3, state[1], None, None, None, -1, -1, 0))  # type: ignore[attr-defined]
            return value
        if not isinstance(value, _Pending):
            return super().build(value, state)
        _, shape, dtype, fortran, data = state
        value.array = self._array(shape, dtype, data, "F" if fortran is True else "C")
        return value.array

    def _array(self, shape: Any, dtype: Any, data: Any, order: Any) -> np.ndarray:
        if isinstance(data, str):  # Python 2's str, decoded as latin1
            self._copies(len(data))
            data = data.encode("latin1")
        if not isinstance(data, (bytes, memoryview)) or not isinstance(dtype, np.dtype):
            raise Refused("holds an array without plain contents or dtype")
        # Copy the dtype, because the pickle may change the byte order of its own later.
        made: np.ndarray = np.frombuffer(data, np.dtype(dtype.str)).reshape(shape, order="F" if order == "F" else "C")
        return made

    def _frombuffer(self, data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> np.ndarray:
        found = self._array(shape, dtype, data, order)
        return found if axes is None else found.transpose(axes)  # since numpy 2.4, such as channels last


def _dtype(code: Any, align: Any = False, copy: Any = False) -> np.dtype:
    if not isinstance(code, str) or not _DTYPE.match(code):
        raise Refused(f"holds an array of dtype {one_line(code, 40)!r}; only plain numbers are read")
    return np.dtype(code, copy=True)  # not numpy's shared object, because BUILD may set its byte order
