"""Read pickles without executing anything, in bounded time and memory.

:class:`Unpickler` follows the opcodes that build plain values; a name in the pickle resolves to a constructor of ours
or is refused. It reads ``.pkl`` files of numpy arrays (``numpy_pickle``) and torch's files (``torch_archive``).

It is built on the standard library's pure-Python unpickler: its memo is a dict, so a hostile memo index costs nothing,
whereas the C one allocates a table of that size. A weights file has few thousand opcodes, so speed does not matter.

What a few hundred bytes can do to any other reader, and what stops it here: dict keys whose hash takes for ever (keys
are short strings or integers), millions of levels, containers that hold themselves or share their contents so often
that walking through them never ends (:func:`check_values`), and a long text that is decoded again and again
(:meth:`Stream.copies`).
"""

from __future__ import annotations

import itertools
import mmap
import pickle
import re
import struct
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar

from gn_det.text import one_line

# A Mask R-CNN R-50-FPN with its optimizer has some 20,000 opcodes and 8 levels.
MAX_OPCODES = 500_000
MAX_PLACES = 500_000
MAX_DEPTH = 64
MAX_TEXT = 8 << 20  # characters
MAX_KEY = 512  # characters of a dict's key
_MAX_BITS = 256  # of an integer
_MAX_DIMS = 32
_MAX_LINE = 250  # bytes of a number or a name written as text

# Longer Python 2 strings are array contents: kept as bytes instead of a detour through latin1 text.
_LONG_STRING = 256
_LONG_READ = 1 << 16  # the protocols keep what is longer out of their frames
# Contents of an array may be written as latin1 text; one wider character would make four bytes of each.
_LONG_TEXT = 1 << 20
_WIDE = re.compile(rb"[\xc4-\xff]")
_WIDE_ESCAPE = re.compile(rb"\\(?:U|u(?!00))")

#: What a pickle may name, by module and name: functions that it may call instead, and values.
Table = dict[tuple[str, str], Any]


class Refused(Exception):
    """The file asks for something that is not allowed; the message follows the file's name."""


class Stream:
    """Part of a mapped file that never promises more bytes than it has: a claimed length costs no memory.

    Long reads are views of the mapping, so that the contents of arrays are not copied here.
    """

    def __init__(self, mapped: mmap.mmap, begin: int = 0, size: int | None = None) -> None:
        self._map, self._view, self.at = mapped, memoryview(mapped), begin
        self._end = len(mapped) if size is None else begin + size
        self._may_copy = 2 * len(mapped) + (1 << 20)

    def read(self, size: int) -> bytes | memoryview:
        begin, end = self.at, self.at + size
        if size < 0 or end > self._end:
            raise Refused("is truncated or damaged (it claims more bytes than it has); download it again")
        self.at = end
        return self._map[begin:end] if size < _LONG_READ else self._view[begin:end]

    def readline(self) -> bytes:
        begin, self.at = self.at, self._map.find(b"\n", self.at, self._end) + 1
        if not self.at:
            raise Refused("is truncated or damaged (a line does not end); download it again")
        return self._map[begin : self.at]

    def copies(self, size: int) -> None:
        """Account for bytes that a constructor copies; a pickle can call it again and again on the same value."""
        self._may_copy -= size
        if self._may_copy < 0:
            raise Refused("copies its contents again and again, which no weights file does")


def check_values(value: Any) -> None:
    """Check that dicts, lists and tuples have few levels and places, so that others may walk through them.

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
            raise Refused(
                f"holds more than {MAX_PLACES} values (shared ones count each time), which no weights file does"
            )
        if any(isinstance(v, int) and v.bit_length() > _MAX_BITS for v in level):
            raise Refused(f"holds an integer of more than {_MAX_BITS} bits, which no weights file does")
    raise Refused(f"nests its values more than {MAX_DEPTH} levels deep, which no weights file does")


class Pending:
    """An array between its creation and its BUILD opcode."""

    array: Any = None


class _Memo(dict[int, Any]):
    """The memo of an unpickler; it gives the array of a :class:`Pending`."""

    def __getitem__(self, key: int) -> Any:
        value = super().__getitem__(key)
        return value.array if isinstance(value, Pending) and value.array is not None else value


# Any: the attributes that opcodes work on (stack, memo, read) are not in the type stubs.
_Base: Any = pickle._Unpickler  # type: ignore[attr-defined, unused-ignore]
_Unframer: Any = pickle._Unframer  # type: ignore[attr-defined, unused-ignore]
_Stop: Any = pickle._Stop  # type: ignore[attr-defined, unused-ignore]
# Left out: INST, OBJ, NEWOBJ, PERSID, the extension registry, sets, buffers. No weights file has them.
_OPCODES = (
    "PROTO FRAME STOP POP POP_MARK DUP MARK NONE NEWTRUE NEWFALSE INT LONG LONG1 LONG4 BININT BININT1 BININT2 FLOAT "
    "BINFLOAT BINSTRING SHORT_BINSTRING SHORT_BINUNICODE BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE TUPLE1 "
    "TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE "
    "GLOBAL STACK_GLOBAL BINPERSID"
)


class Unpickler(_Base):  # type: ignore[misc, unused-ignore]
    """Opcodes that only build values.

    Args:
        stream: where to read; several pickles may follow each other.
        table: what the pickle may name.
        storages: gives the storage of a persistent id, by which torch refers to data outside the pickle.
        build: what BUILD gives for a value and its state, for values other than dicts.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {}

    def __init__(
        self,
        stream: Stream,
        table: Table,
        *,
        storages: Callable[[Any], Any] | None = None,
        build: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        super().__init__(stream, encoding="latin1")
        self._table, self._storages, self._build = table, storages, build
        self._longest_line = _MAX_LINE

    def load(self) -> Any:
        """Return the one value of a pickle.

        Raises:
            Refused: a limit, or something that is not allowed.
            Exception: of any type, for damaged bytes.
        """
        self._unframer = _Unframer(self._file_read, self._file_readline)
        self.read, self.memo = self._unframer.read, _Memo()
        self.stack: list[Any] = []
        self.metastack: list[list[Any]] = []
        self.append = self.stack.append
        try:
            for _ in range(MAX_OPCODES):
                self.dispatch[self.read(1)[0]](self)
        except _Stop as stop:
            check_values(stop.value)
            return stop.value
        raise Refused(f"has more than {MAX_OPCODES} pickle opcodes, which no weights file does")

    def readline(self) -> bytes:
        line: bytes = self._unframer.readline()
        if len(line) > self._longest_line:
            raise Refused(f"writes a number or a name with {len(line)} characters, which no weights file does")
        return line

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._table[module, name]
        except KeyError:
            raise Refused(
                f"holds {one_line(module, 60)}.{one_line(name, 60)}, which is not a plain tensor or value and could "
                "run code; save the weights alone, as in torch.save({'model': model.state_dict()}, path)"
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        if self._storages is None:
            raise Refused("holds a persistent id, which no pickle of arrays does")
        return self._storages(pid)

    def _decode_string(self, value: bytes) -> Any:
        return value if len(value) > _LONG_STRING else str(value, "latin1")

    # The opcodes that are not the standard library's.

    def _load_string(self) -> None:
        self._longest_line = sys.maxsize
        _Base.load_string(self)
        self._longest_line = _MAX_LINE

    def _load_unicode(self) -> None:
        self._append_text(self._unframer.readline()[:-1], "raw-unicode-escape", _WIDE_ESCAPE)

    def _load_text(self, form: str) -> None:
        (size,) = struct.unpack(form, self.read(struct.calcsize(form)))
        self._append_text(self.read(size), "utf-8", _WIDE)

    def _append_text(self, data: bytes | memoryview, encoding: str, wide: re.Pattern[bytes]) -> None:
        if len(data) > _LONG_TEXT and wide.search(data):
            raise Refused("holds a text of several megabytes, which no weights file does")
        self.append(str(data, encoding, "surrogatepass"))

    def _load_bytearray(self) -> None:  # the standard one allocates what is claimed
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(self.read(size))

    def _load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        set_items(self.stack[-1], items)

    def _load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        set_items(self.stack[-1], [key, value])

    def _load_setitems(self) -> None:
        items = self.pop_mark()
        set_items(self.stack[-1], items)

    def _load_reduce(self) -> None:
        args, function = self.stack.pop(), self.stack[-1]
        if not callable(function) or type(args) is not tuple:
            raise Refused("calls something that is not a constructor")
        self.stack[-1] = function(*args)

    def _load_build(self) -> None:
        state, top = self.stack.pop(), self.stack[-1]
        if isinstance(top, OrderedDict):
            return  # the versions of a state_dict's modules, which nothing reads
        if self._build is None:
            raise Refused(f"sets the state of a {type(top).__name__}, which no weights file does")
        self.stack[-1] = self._build(top, state)

    def _load_refused(self) -> None:
        raise Refused(
            "uses pickle opcodes that no weights file does, which are not followed because they could run code"
        )


def _code(opcode: str) -> int:
    return int(getattr(pickle, opcode)[0])


Unpickler.dispatch = dict.fromkeys(range(256), Unpickler._load_refused)
Unpickler.dispatch |= {_code(opcode): _Base.dispatch[_code(opcode)] for opcode in _OPCODES.split()}
Unpickler.dispatch |= {
    _code("STRING"): Unpickler._load_string,
    _code("UNICODE"): Unpickler._load_unicode,
    _code("BINUNICODE"): lambda self: self._load_text("<I"),
    _code("BINUNICODE8"): lambda self: self._load_text("<Q"),
    _code("BYTEARRAY8"): Unpickler._load_bytearray,
    _code("DICT"): Unpickler._load_dict,
    _code("SETITEM"): Unpickler._load_setitem,
    _code("SETITEMS"): Unpickler._load_setitems,
    _code("REDUCE"): Unpickler._load_reduce,
    _code("BUILD"): Unpickler._load_build,
}


def set_items(target: Any, items: list[Any]) -> None:
    """Put ``[key, value, key, value ...]`` into a dict."""
    if type(target) not in (dict, OrderedDict, Counter):
        raise Refused(f"sets items of a {type(target).__name__}, which no weights file does")
    keys, values = items[::2], items[1::2]
    for key in keys:
        if not (type(key) is str and len(key) <= MAX_KEY) and not (type(key) is int and -(2**63) <= key < 2**63):
            kind = f"a text of {len(key)} characters" if type(key) is str else f"of type {type(key).__name__}"
            raise Refused(f"has a dict with a key that is {kind}; keys are short strings or integers")
    for key, value in zip(keys, values, strict=True):
        target[key] = value


def check_shape(shape: Any) -> tuple[int, ...]:
    """Return the shape that a file gives, if it is one.

    Raises:
        Refused: not a tuple of plain sizes.
    """
    size = 1
    good = type(shape) is tuple and len(shape) <= _MAX_DIMS and all(type(n) is int for n in shape)
    for n in shape if good else ():
        size *= max(n, 1)
        good = good and 0 <= n < 1 << 48 and size <= 1 << 60
    if not good:
        raise Refused(f"holds an array of shape {one_line(shape, 60)}")
    return shape  # type: ignore[no-any-return, unused-ignore]


def plain_constructors(stream: Stream) -> Table:
    """What any pickle may name: bytes of old protocols, and special dicts.

    Made for each file: nothing that a file does to them reaches the next one.
    """

    def encode(text: Any, encoding: Any = "latin1") -> bytes:
        if not isinstance(encoding, str) or encoding not in ("latin1", "latin-1") or not isinstance(text, str):
            raise Refused("holds bytes in an unknown encoding")
        stream.copies(len(text))
        return text.encode("latin1")

    def empty_bytes() -> bytes:  # how protocols < 3 write an empty array's contents; a size is not allowed
        return b""

    def ordered(items: Any = ()) -> Any:
        if type(items) not in (list, tuple) or not all(type(i) in (list, tuple) and len(i) == 2 for i in items):
            raise Refused("makes a dict of something that is not a list of pairs")
        stream.copies(200 * len(items))
        made: Any = OrderedDict()
        set_items(made, [part for item in items for part in item])
        return made

    def counter(items: Any = None) -> Any:
        if type(items) not in (dict, type(None)):
            raise Refused("makes a Counter of something that is not a dict")
        stream.copies(200 * len(items or ()))
        made: Any = Counter()
        dict.update(made, items or {})
        return made

    return {
        ("_codecs", "encode"): encode,
        ("builtins", "bytes"): empty_bytes,
        ("__builtin__", "bytes"): empty_bytes,
        ("collections", "OrderedDict"): ordered,
        ("collections", "Counter"): counter,
    }
