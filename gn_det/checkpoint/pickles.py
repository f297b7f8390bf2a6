"""Read pickles without executing anything, in bounded time and memory.

:class:`Machine` follows the opcodes that build plain values and hands everything else to a table of constructors. Both
containers that hold pickles use it: ``.pkl`` files of numpy arrays here, torch's files in ``archives``.

Built on the standard library's pure-Python unpickler: its memo is a dict, so a hostile memo index costs nothing,
whereas the C one allocates a table of that size. A weights file has few thousand opcodes, so speed does not suffer.

What a few hundred bytes can do to any other reader, and what stops it here: keys whose hash or values whose text takes
for ever (keys are strings or integers; a structure has a bounded number of places, shared ones counted each time),
millions of levels (bounded nesting), containers that hold themselves (a container in use does not change any more),
and one long text that is decoded again and again (bounded copies).
"""

from __future__ import annotations

import mmap
import pickle
import re
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO, ClassVar

import numpy as np

from gn_det.checkpoint.heads import read_head
from gn_det.errors import WeightsError
from gn_det.files import StrPath, open_regular
from gn_det.text import one_line

# A Mask R-CNN R-50-FPN with its optimizer has some 20,000 opcodes, 1,000 tensors and 8 levels.
MAX_OPCODES = 500_000
MAX_PLACES = 500_000
MAX_TENSORS = 50_000
MAX_DEPTH = 64
MAX_KEY = 512  # characters of a dict's key
MAX_DIMS = 32
_MAX_INT = 32  # bytes
_MAX_SIZE = 1 << 48  # of one dimension

_DTYPE = re.compile(r"[<>|=]?(?:b1|[iu][1248]|f[248])$")
# Longer Python 2 strings are array contents: kept as bytes instead of a detour through latin1 text.
_LONG_STRING = 256
_LONG_READ = 1 << 16  # the protocols keep what is longer out of their frames
# Contents of an array may stand as text of latin1; one wider character would make four bytes of each.
_LONG_TEXT = 1 << 20
_WIDE = re.compile(rb"[\xc4-\xff]")
_WIDE_ESCAPE = re.compile(rb"\\(?:U|u(?!00))")

Table = dict[tuple[str, str], Any]  # what a pickle may name: constructors, and values


class Refused(Exception):
    """The pickle asks for something that is not admitted; the message goes on after the file's name."""


def read_pickle(path: StrPath) -> dict[str, Any]:
    """Return the dict in a pickle of arrays, dicts, lists, tuples, strings, bytes and numbers (Python 2 or 3).

    Raises:
        WeightsError: unreadable, damaged, not a dict, or holding any other object (named; nothing is executed).
    """
    read_head(path)
    try:
        with open_regular(path) as raw:
            file = Bounded(raw)
            machine = Machine(file, len(file))
            machine.admit(_constructors(machine))
            loaded = machine.load()
    except Refused as error:
        raise WeightsError(f"{path}: {error}") from None
    except Exception as error:  # whatever damaged bytes provoke in the interpreter of opcodes is the file's fault
        raise WeightsError(
            f"{path}: is not a pickle of weights or is damaged ({one_line(error)}); download it again"
        ) from None
    if not isinstance(loaded, dict):
        raise WeightsError(f"{path}: holds a {type(loaded).__name__}, not a dict of weights")
    return loaded


class Bounded:
    """A part of a mapped file that never promises more bytes than it has: a claimed length costs no memory.

    Long reads are views of the mapping, so that the contents of arrays are not copied here.
    """

    def __init__(self, file: BinaryIO | mmap.mmap, begin: int = 0, size: int | None = None) -> None:
        self._map = file if isinstance(file, mmap.mmap) else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._view = memoryview(self._map)
        self._begin, self.at = begin, begin
        self._end = len(self._view) if size is None else begin + size

    def __len__(self) -> int:
        return self._end - self._begin

    def read(self, size: int) -> bytes | memoryview:
        at = self.at
        if size < 0 or size > self._end - at:
            raise Refused("is truncated or damaged (it claims more bytes than it has); download it again")
        self.at = at + size
        return self._map[at : self.at] if size < _LONG_READ else self._view[at : self.at]

    def readline(self) -> bytes:
        end = self._map.find(b"\n", self.at, self._end) + 1
        if not end:
            raise Refused("is truncated or damaged (a line does not end); download it again")
        line = self._map[self.at : end]
        self.at = end
        return line


class _Node:
    """What is known of a container: levels below and with it, places in it, and whether something holds it."""

    __slots__ = ("depth", "held", "places")

    def __init__(self, depth: int, places: int) -> None:
        self.depth, self.places, self.held = depth, places, False


_OPCODES = (
    "PROTO FRAME STOP POP POP_MARK DUP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 BINFLOAT "
    "STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_TUPLE BINGET LONG_BINGET BINPUT "
    "LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL"
)


# Any: the attributes that opcodes work on (stack, memo, read) are not in the type stubs.
_Base: Any = pickle._Unpickler  # type: ignore[attr-defined, unused-ignore]
_Unframer: Any = pickle._Unframer  # type: ignore[attr-defined, unused-ignore]
_Stop: Any = pickle._Stop  # type: ignore[attr-defined, unused-ignore]


class Machine(_Base):
    """Opcodes that only build values; names resolve to the admitted table alone.

    Args:
        file: what :class:`Bounded` offers.
        size: bytes of the whole file, to which copies and claims are held.
        about: what to do instead of having the file name other things, for the message.
    """

    # Left out: INST, OBJ, NEWOBJ, extension registry, sets, buffers. No weights file has them.
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {}

    def __init__(self, file: Any, size: int, about: str = "") -> None:
        super().__init__(file, encoding="latin1")
        self._about = about or "only numpy arrays, dicts, lists and plain values are read from a pickle"
        self._allowed: Table = {}
        self._functions: set[int] = set()
        self._nodes: dict[int, _Node] = {}
        self._kept: list[Any] = []  # an id means its container only while that lives
        self._may_copy = 2 * size + (1 << 20)
        self._tensors = 0

    def admit(self, table: Table) -> None:
        """Let the pickle name what ``table`` has, by module and name; its value is called instead."""
        self._allowed = table
        self._functions = {id(function) for function in table.values()}

    def load(self) -> Any:
        """Return the one value of a pickle.

        Raises:
            Refused: a limit, or something that is not admitted.
            Exception: of any type, for damaged bytes.
        """
        self._unframer = _Unframer(self._file_read, self._file_readline)
        self.read, self.readline = self._unframer.read, self._unframer.readline
        self.metastack: list[list[Any]] = []
        self.stack: list[Any] = []
        self.proto = 0
        self.append = self.stack.append
        read, dispatch = self.read, self.dispatch
        try:
            for _ in range(MAX_OPCODES):
                dispatch[read(1)[0]](self)
        except _Stop as stop:
            return stop.value
        raise Refused(f"has more than {MAX_OPCODES} pickle opcodes, which no weights file does")

    # ------------------------------------------------------------------------------------------- what values may cost

    def copies(self, size: int) -> None:
        """Account for bytes that are copied on the file's behalf."""
        self._may_copy -= size
        if self._may_copy < 0:
            raise Refused("copies its contents again and again, which no weights file does")

    def one_more_tensor(self) -> None:
        """Account for a tensor or array."""
        self._tensors += 1
        if self._tensors > MAX_TENSORS:
            raise Refused(f"holds more than {MAX_TENSORS} tensors")

    def enter(self, value: Any, items: Iterable[Any] = ()) -> Any:
        """Register a new container that holds ``items``."""
        self._nodes[id(value)] = _Node(1, 1)
        self._kept.append(value)
        self._hold(value, items)
        return value

    def _hold(self, container: Any, items: Iterable[Any]) -> None:
        """Account for ``items`` that go into ``container``, which nothing may hold yet."""
        nodes, depth, places = self._nodes, 0, 0
        for item in items:
            node = nodes.get(id(item))
            places += 1
            if node is not None:
                node.held = True
                places += node.places
                depth = max(depth, node.depth)
        mine = nodes[id(container)]
        if mine.held:
            raise Refused("changes a container that something else holds already, which no weights file does")
        mine.depth, mine.places = max(mine.depth, depth + 1), mine.places + places
        if mine.depth > MAX_DEPTH:
            raise Refused(f"nests its values more than {MAX_DEPTH} levels deep, which no weights file does")
        if mine.places > MAX_PLACES:
            raise Refused(f"holds more than {MAX_PLACES} values (shared ones count each time)")

    def set_items(self, target: Any, items: list[Any]) -> None:
        """Put ``[key, value, key, value ...]`` into a dict."""
        if type(target) not in (dict, OrderedDict, Counter):
            raise Refused(f"sets items of a {type(target).__name__}, which no weights file does")
        keys, values = items[::2], items[1::2]
        for key in keys:
            if not (type(key) is str and len(key) <= MAX_KEY) and not (type(key) is int and -(2**63) <= key < 2**63):
                raise Refused(f"has a dict with a key that is {_named(key)}; keys are short strings or integers")
        self._hold(target, values)
        for key, value in zip(keys, values, strict=True):
            target[key] = value

    # ---------------------------------------------------------------------------------------------------- constructors

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise Refused(
                f"holds {one_line(module, 60)}.{one_line(name, 60)}, which is not loaded because it could run "
                f"code; {self._about}"
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        raise Refused("holds a persistent id, which no weights file does")

    def build(self, top: Any, state: Any) -> None:
        """Follow BUILD for the value on top of the stack."""
        if isinstance(top, _Dtype):
            _build_dtype(top, state)
        elif isinstance(top, _Pending):
            if not isinstance(state, tuple) or len(state) != 5:
                raise Refused("is damaged: an array has no contents")
            _, shape, dtype, fortran, data = state
            self.stack[-1] = top.array = _array(self, shape, dtype, "F" if fortran is True else "C", data)
        elif isinstance(top, OrderedDict):  # the versions of a state_dict's modules
            versions = state.get("_metadata") if isinstance(state, dict) else None
            if isinstance(versions, dict) and all(_is_versions(v) for v in versions.values()):
                top._metadata = versions  # type: ignore[attr-defined]
        else:
            raise Refused(f"sets the state of a {type(top).__name__}, which no weights file does")

    # --------------------------------------------------------------------------------------------------------- opcodes

    def _decode_string(self, value: bytes) -> Any:
        return value if len(value) > _LONG_STRING else str(value, "latin1")

    def _line(self, limit: int) -> bytes:
        line = self.readline()[:-1]
        if len(line) > limit:
            raise Refused(f"writes a number with {len(line)} characters, which no weights file does")
        return line

    def _load_int(self) -> None:
        line = self._line(80)
        self.append({b"00": False, b"01": True}[line] if line in (b"00", b"01") else int(line.rstrip(b"L")))

    def _load_long(self, form: str) -> None:
        (size,) = struct.unpack(form, self.read(struct.calcsize(form)))
        if not 0 <= size <= _MAX_INT:
            raise Refused(f"holds an integer of {size} bytes, which no weights file does")
        self.append(int.from_bytes(self.read(size), "little", signed=True))

    def _load_float(self) -> None:
        self.append(float(self._line(80)))

    def _load_unicode(self) -> None:
        line = self.readline()[:-1]
        if len(line) > _LONG_TEXT and _WIDE_ESCAPE.search(line):
            raise Refused("holds a text of several megabytes, which no weights file does")
        self.append(str(line, "raw-unicode-escape"))

    def _load_text(self, form: str) -> None:
        (size,) = struct.unpack(form, self.read(struct.calcsize(form)))
        data = self.read(size)
        if size > _LONG_TEXT and _WIDE.search(data):
            raise Refused("holds a text of several megabytes, which no weights file does")
        self.append(str(data, "utf-8", "surrogatepass"))

    def _load_tuple(self, size: int | None) -> None:
        if size is None:
            items = self.pop_mark()
        else:
            items = self.stack[-size:]
            if len(items) < size:
                raise Refused("is damaged (its stack is empty); download it again")
            del self.stack[-size:]
        self.append(self.enter(tuple(items), items) if items else ())

    def _load_list(self) -> None:
        items = self.pop_mark()
        self.append(self.enter(list(items), items))

    def _load_dict(self) -> None:
        items = self.pop_mark()
        made = self.enter({})
        self.set_items(made, items)
        self.append(made)

    def _load_append(self) -> None:
        self._extend([self.stack.pop()])

    def _load_appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise Refused(f"appends to a {type(target).__name__}, which no weights file does")
        self._hold(target, items)
        target.extend(items)

    def _load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items(self.stack[-1], [key, value])

    def _load_setitems(self) -> None:
        items = self.pop_mark()
        self.set_items(self.stack[-1], items)

    def _load_get(self) -> None:
        self.append(self.memo[int(self._line(20))])
        self._finish_array()

    def _finish_array(self) -> None:
        top = self.stack[-1]
        if isinstance(top, _Pending) and top.array is not None:
            self.stack[-1] = top.array

    def _load_put(self) -> None:
        self.memo[int(self._line(20))] = self.stack[-1]

    def _load_reduce(self) -> None:
        args = self.stack.pop()
        function = self.stack[-1]
        if id(function) not in self._functions or type(args) is not tuple:
            raise Refused("calls something that is not a constructor of arrays")
        self.stack[-1] = function(*args)

    def _load_build(self) -> None:
        state = self.stack.pop()
        self.build(self.stack[-1], state)

    def _load_binpersid(self) -> None:
        self.stack[-1] = self.persistent_load(self.stack[-1])

    def _load_bytearray8(self) -> None:
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(self.read(size))

    def _load_refused(self) -> None:
        raise Refused(
            "uses pickle opcodes that no weights file does, which are not followed because they could run code"
        )


def _dispatch() -> dict[int, Callable[[Any], None]]:
    def get(original: Callable[[Any], None]) -> Callable[[Any], None]:
        def load(self: Any) -> None:
            original(self)
            self._finish_array()

        return load

    base = _Base.dispatch
    table: dict[int, Callable[[Any], None]] = dict.fromkeys(range(256), Machine._load_refused)
    table |= {getattr(pickle, op)[0]: base[getattr(pickle, op)[0]] for op in _OPCODES.split()}
    own: dict[str, Callable[[Any], None]] = {
        "INT": Machine._load_int,
        "LONG": Machine._load_int,
        "LONG1": lambda self: self._load_long("<B"),
        "LONG4": lambda self: self._load_long("<i"),
        "FLOAT": Machine._load_float,
        "UNICODE": Machine._load_unicode,
        "SHORT_BINUNICODE": lambda self: self._load_text("<B"),
        "BINUNICODE": lambda self: self._load_text("<I"),
        "BINUNICODE8": lambda self: self._load_text("<Q"),
        "TUPLE": lambda self: self._load_tuple(None),
        "TUPLE1": lambda self: self._load_tuple(1),
        "TUPLE2": lambda self: self._load_tuple(2),
        "TUPLE3": lambda self: self._load_tuple(3),
        "EMPTY_LIST": lambda self: self.append(self.enter([])),
        "EMPTY_DICT": lambda self: self.append(self.enter({})),
        "LIST": Machine._load_list,
        "DICT": Machine._load_dict,
        "APPEND": Machine._load_append,
        "APPENDS": Machine._load_appends,
        "SETITEM": Machine._load_setitem,
        "SETITEMS": Machine._load_setitems,
        "GET": Machine._load_get,
        "BINGET": get(base[pickle.BINGET[0]]),
        "LONG_BINGET": get(base[pickle.LONG_BINGET[0]]),
        "PUT": Machine._load_put,
        "REDUCE": Machine._load_reduce,
        "BUILD": Machine._load_build,
        "BINPERSID": Machine._load_binpersid,
        "BYTEARRAY8": Machine._load_bytearray8,
    }
    return table | {getattr(pickle, op)[0]: function for op, function in own.items()}


Machine.dispatch = _dispatch()


def _named(value: Any) -> str:
    return f"a text of {len(value)} characters" if isinstance(value, str) else f"of type {type(value).__name__}"


def _is_versions(value: Any) -> bool:
    """``{"version": 2}``, as torch keeps for each module."""
    return isinstance(value, dict) and all(type(v) is int for v in value.values())


def check_shape(shape: Any) -> tuple[int, ...]:
    """Return a shape that a file gives, if it is one.

    Raises:
        Refused: not a tuple of plain sizes.
    """
    places = 1
    if type(shape) is not tuple or len(shape) > MAX_DIMS or not all(type(n) is int for n in shape):
        raise Refused(f"holds an array of shape {one_line(shape, 60)}")
    for size in shape:
        places *= max(size, 1)
        if not 0 <= size <= _MAX_SIZE or places > 1 << 60:
            raise Refused(f"holds an array of shape {one_line(shape, 60)}")
    return shape


# ------------------------------------------------------------------------------------------------------ numpy's pickles


class _Dtype:
    """Stands for a numpy dtype of plain numbers while the pickle is read; never part of the result."""

    def __init__(self, code: Any) -> None:
        if not isinstance(code, str) or not _DTYPE.match(code):
            raise Refused(f"holds an array of dtype {one_line(code, 40)!r}; only plain numbers are read")
        self.code = code.lstrip("<>|=")
        self.order = code[0] if code[0] in "<>|=" else "="

    def numpy(self) -> np.dtype:
        return np.dtype(self.order + self.code)


def _text(value: Any) -> Any:
    return str(value, "latin1") if isinstance(value, (bytes, memoryview)) and len(value) <= 8 else value


def _bytes(machine: Machine, value: Any) -> bytes | memoryview:
    if isinstance(value, str):  # Python 2's str, decoded as latin1
        machine.copies(len(value))
        return value.encode("latin1")
    if not isinstance(value, (bytes, memoryview)):
        raise Refused(f"holds an array whose contents are a {type(value).__name__}")
    return value


def _array(machine: Machine, shape: Any, dtype: Any, order: str, data: Any) -> np.ndarray:
    shape = check_shape(shape)
    if not isinstance(dtype, _Dtype):
        raise Refused("holds an array without a plain dtype")
    machine.one_more_tensor()
    raw = _bytes(machine, data)
    size = dtype.numpy().itemsize
    for n in shape:
        size *= n
    if len(raw) != size:
        raise Refused(
            f"is damaged: an array of shape {one_line(shape, 60)} {dtype.code} has {len(raw)} bytes instead of "
            f"{one_line(size)}"
        )
    return np.frombuffer(raw, dtype.numpy()).reshape(shape, order="F" if order == "F" else "C")


def _build_dtype(dtype: _Dtype, state: Any) -> None:
    plain = isinstance(state, tuple) and len(state) >= 5 and state[2] is None and state[3] is None and state[4] is None
    order = _text(state[1]) if plain else None
    if not isinstance(order, str) or order not in ("<", ">", "|", "="):
        raise Refused("holds an array of a structured dtype; only plain numbers are read")
    dtype.order = order


class _Pending:
    """An array between its creation and its BUILD opcode; the memo may hold it in the array's place."""

    array: np.ndarray | None = None


def plain_constructors(machine: Machine) -> Table:
    """What any pickle may name: bytes of old protocols, and ordered dicts."""

    def encode(text: Any, encoding: Any = "latin1") -> bytes:
        if not isinstance(encoding, str) or encoding not in ("latin1", "latin-1") or not isinstance(text, str):
            raise Refused("holds bytes in an unknown encoding")
        machine.copies(len(text))
        return text.encode("latin1")

    def empty_bytes() -> bytes:  # how protocols < 3 write an empty array's contents; a size is not admitted
        return b""

    def ordered(items: Any = ()) -> Any:
        if type(items) not in (list, tuple) or not all(type(i) in (list, tuple) and len(i) == 2 for i in items):
            raise Refused("makes a dict of something that is not a list of pairs")
        machine.copies(200 * len(items))
        made = machine.enter(OrderedDict())
        machine.set_items(made, [part for item in items for part in item])
        return made

    def counter(items: Any = ()) -> Any:
        if type(items) is not dict and items != ():
            raise Refused("makes a Counter of something that is not a dict")
        machine.copies(200 * len(items))
        made = machine.enter(Counter())
        if items:
            machine._hold(made, items.values())
            dict.update(made, items)
        return made

    return {
        ("_codecs", "encode"): encode,
        ("builtins", "bytes"): empty_bytes,
        ("__builtin__", "bytes"): empty_bytes,
        ("collections", "OrderedDict"): ordered,
        ("collections", "Counter"): counter,
    }


def _constructors(machine: Machine) -> Table:
    """What a pickle of arrays may name, by module and name, and what happens instead of importing it.

    Made anew for each file: a pickle can set attributes on what it is handed, and that must not outlive it.
    """

    def reconstruct(kind: Any, shape: Any, code: Any) -> _Pending:
        return _Pending()

    def ndarray(*args: Any) -> Any:
        raise Refused("calls numpy.ndarray, which no weights file does")

    def dtype(code: Any, align: Any = False, copy: Any = False) -> _Dtype:
        return _Dtype(_text(code))

    def scalar(kind: Any, data: Any) -> Any:
        return _array(machine, (), kind, "C", data)[()]

    def frombuffer(data: Any, kind: Any, shape: Any, order: Any, axes: Any = None) -> np.ndarray:
        found = _array(machine, shape, kind, "F" if order == "F" else "C", data)
        if axes is None:
            return found
        # Since numpy 2.4, of an array whose axes stand in another order, such as channels last.
        if type(axes) is not tuple or not all(type(n) is int for n in axes) or sorted(axes) != list(range(found.ndim)):
            raise Refused("is damaged: an array has an impossible order of axes")
        return found.transpose(axes)

    table: Table = {("numpy", "ndarray"): ndarray, ("numpy", "dtype"): dtype, **plain_constructors(machine)}
    for core in ("numpy.core", "numpy._core"):
        table[f"{core}.multiarray", "_reconstruct"] = reconstruct
        table[f"{core}.multiarray", "scalar"] = scalar
        table[f"{core}.numeric", "_frombuffer"] = frombuffer
    return table
