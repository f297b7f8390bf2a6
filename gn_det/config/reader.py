"""Read untrusted YAML in bounded time and memory: only text, numbers, lists and sections.

:func:`parse_yaml` returns what PyYAML's SafeLoader returns, except that duplicate keys, keys that are not text, several
documents, unknown tags and recursive structures are errors, and dates stay text.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from gn_det.errors import ConfigError
from gn_det.files import open_regular
from gn_det.text import one_line, shown
from gn_det.values import is_number

#: Largest text in bytes. The largest shipped config has 2 kB, a dumped one with 1,200 class names 40 kB.
MAX_BYTES = 1 << 19
#: Deepest nesting; Detectron2's deepest key has 5 levels.
MAX_DEPTH = 32
#: Most values, lists and sections of a text, with aliases expanded.
MAX_NODES = 50_000
#: Longest number in characters.
MAX_DIGITS = 100
#: Longest formula in characters, and most numbers and operators in it.
_MAX_FORMULA, _MAX_STEPS = 1000, 1000

_PREFIX = "tag:yaml.org,2002:"
_EVAL = f"{_PREFIX}python/object/apply:eval"
#: Characters not allowed even if escaped. "\udc80" to "\udcff" are allowed: undecodable bytes of file names.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udc7f\udd00-\udfff]")


def _refused(problem: str, mark: Any) -> ConstructorError:
    return ConstructorError(None, None, problem, mark)


class _Loader(yaml.SafeLoader):
    """PyYAML's scanner, parser and composer with a limit on depth and on the number of nodes, aliases expanded."""

    def __init__(self, text: str):
        super().__init__(text)
        self.depth = self.nodes = 0
        self.sizes: dict[int, int] = {}

    def fetch_more_tokens(self) -> Any:
        # The scanner runs ahead of the composer, and the cost of each step grows with the number of open brackets.
        if self.flow_level > MAX_DEPTH or len(self.indents) > MAX_DEPTH:
            raise _refused(f"more than {MAX_DEPTH} levels of nesting", self.get_mark())
        return super().fetch_more_tokens()

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        peek: Callable[[], Any] = self.peek_event
        event = peek()
        if isinstance(event, yaml.AliasEvent) and event.anchor in self.anchors:
            if id(self.anchors[event.anchor]) not in self.sizes:
                raise _refused(f"alias {shown(event.anchor)} leads back to itself", event.start_mark)
            self.count(self.sizes[id(self.anchors[event.anchor])], event.start_mark)
            return super().compose_node(parent, index)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _refused(f"more than {MAX_DEPTH} levels of nesting", event.start_mark)
        before = self.nodes
        self.count(1, event.start_mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self.sizes[id(node)] = self.nodes - before
        self.depth -= 1
        return node

    def count(self, nodes: int, mark: Any) -> None:
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            raise _refused(f"more than {MAX_NODES} values, aliases included", mark)

    def value(self, node: yaml.Node) -> Any:
        """Return the plain value of a node, with aliases as copies."""
        kind = node.tag.removeprefix(_PREFIX)
        if isinstance(node, yaml.SequenceNode) and node.tag == _EVAL:
            return _evaluated(node)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self.section(node)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self.value(item) for item in node.value]
        if isinstance(node, yaml.ScalarNode) and kind in ("null", "bool", "int", "float", "str"):
            return self.scalar(node, kind)
        raise _refused(f"tag {shown(node.tag)} is not allowed; only text, numbers, lists and keys are", node.start_mark)

    def scalar(self, node: yaml.ScalarNode, kind: str) -> Any:
        if kind == "str":
            if _CONTROL.search(node.value):
                raise _refused("text with a control character", node.start_mark)
            return node.value
        if len(node.value) > MAX_DIGITS:
            raise _refused(f"a number of {len(node.value)} characters", node.start_mark)
        try:
            return self.construct_object(node)
        except (ValueError, OverflowError, KeyError, IndexError):
            raise _refused(f"{shown(node.value)} is not a valid {kind}", node.start_mark) from None

    def section(self, node: yaml.MappingNode) -> dict[str, Any]:
        """Return keys and values; ``<<`` adds missing keys from one or more other mappings, the first of which wins.

        Our own merge: PyYAML 6.0.4 lets the last one win.
        """
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        names: set[str] = set()
        for key, value in node.value:
            kind = key.tag.removeprefix(_PREFIX) if isinstance(key, yaml.ScalarNode) else ""
            if kind not in ("str", "merge"):
                name = shown(key.value) if kind else "a list or section"
                raise _refused(f"key {name} is not text; put keys in quotes", key.start_mark)
            if key.value in names:
                raise _refused(f"duplicate key {shown(key.value)}", key.start_mark)
            names.add(key.value)
            if kind == "str":
                own[self.scalar(key, kind)] = self.value(value)
                continue
            for other in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if not isinstance(other, yaml.MappingNode):
                    raise _refused("expected a mapping or list of mappings for merging", other.start_mark)
                merged = self.section(other) | merged
        return merged | own


# Dates and "=" are text here.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("timestamp", "value")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(path: Path, what: str = "config file") -> dict[str, Any]:
    """Return keys and values of a YAML file; ConfigError calls it ``what``. See :func:`parse_yaml`."""
    source = f"{what} {one_line(str(path), 300)}"
    try:
        with open_regular(path) as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{source} does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ConfigError(f"{source} cannot be read: {one_line(getattr(error, 'strerror', '') or error)}") from None
    loaded = parse_yaml(data, source)
    if not isinstance(loaded, dict):
        found = "nothing" if loaded is None else f"a {type(loaded).__name__}"
        raise ConfigError(f"{source} must hold keys and values, but holds {found}")
    return loaded


def parse_yaml(text: str | bytes, source: str) -> Any:
    """Return the value of a YAML text: None, bool, int, float, str, list or dict with text keys.

    It has at most :data:`MAX_BYTES`; bytes are UTF-8, with or without a byte order mark. Anything else is a ConfigError
    of one line with the source and the place.
    """
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{source} is larger than {MAX_BYTES // 1024} kB")
    try:
        loader = _Loader(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
        node = loader.get_single_node()
        return None if node is None else loader.value(node)
    except UnicodeDecodeError:
        kind = " (it looks like UTF-16)" if text[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise ConfigError(f"{source} is not UTF-8 text{kind}; save it as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        parts = filter(None, (error.context, error.problem))
        mark, problem = error.problem_mark, one_line(", ".join(parts) or "not valid YAML", 300)
        place = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{source}{place}: {problem}") from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # "\U99999999", tags that are no URI
        raise ConfigError(f"{source} is not valid YAML: {one_line(str(error), 200)}") from None


# ------------------------------------------------------------ formulas


def _evaluated(node: yaml.SequenceNode) -> Any:
    """Evaluate Detectron2's ``!!python/object/apply:eval ["..."]`` if it is plain arithmetic."""
    if len(node.value) != 1 or not isinstance(node.value[0], yaml.ScalarNode):
        raise _refused("!!python/object/apply:eval needs one text", node.start_mark)
    try:
        return arithmetic(node.value[0].value)
    except ValueError as error:
        raise _refused(f"!!python/object/apply:eval: {one_line(error)}", node.start_mark) from None


_OPERATORS: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
_SIGNS: dict[type[ast.AST], Callable[[Any], Any]] = {ast.USub: operator.neg, ast.UAdd: operator.pos}
_HELP = "only numbers, + - * / **, lists and one comprehension over a list are allowed"


def arithmetic(text: str) -> Any:
    """Evaluate numbers, ``+ - * / **``, lists and one comprehension over a literal list like ``eval``, or ValueError.

    Example: ``[[x, x * 2**(1.0/3)] for x in [32, 64]]``.
    """
    if len(text) > _MAX_FORMULA:
        raise ValueError(f"a formula of {len(text)} characters")
    try:
        return _formula(ast.parse(text.strip(), mode="eval").body, {}, iter(range(_MAX_STEPS)))
    except (SyntaxError, MemoryError):
        raise ValueError(f"{shown(text)} is not a formula; {_HELP}") from None
    except (ArithmeticError, RecursionError):
        raise ValueError(f"{shown(text)} has no finite value") from None


def _formula(node: ast.AST, names: dict[str, float], steps: Iterator[int]) -> Any:
    match node:
        case ast.List(elts=elements):
            return [_formula(element, names, steps) for element in elements]
        case ast.ListComp(
            elt=element,
            generators=[ast.comprehension(target=ast.Name(id=name), iter=ast.List(elts=values), ifs=[], is_async=0)],
        ) if not names:
            return [_formula(element, {name: _number(value, {}, steps)}, steps) for value in values]
    return _number(node, names, steps)


def _number(node: ast.AST, names: dict[str, float], steps: Iterator[int]) -> Any:
    if next(steps, None) is None:
        raise ValueError(f"a formula with more than {_MAX_STEPS} steps")
    value: Any = None
    match node:
        case ast.Constant():
            value = node.value
        case ast.Name():
            value = names.get(node.id)
        case ast.UnaryOp() if type(node.op) in _SIGNS:
            value = _SIGNS[type(node.op)](_number(node.operand, names, steps))
        case ast.BinOp() if type(node.op) in _OPERATORS:
            left, right = _number(node.left, names, steps), _number(node.right, names, steps)
            if isinstance(node.op, ast.Pow) and abs(right) > 64:
                raise ValueError(f"an exponent of {shown(right)}; at most 64 is allowed")
            value = _OPERATORS[type(node.op)](left, right)
    if type(value) not in (int, float):
        raise ValueError(_HELP)
    if not math.isfinite(value) if isinstance(value, float) else abs(value) > 10**18:
        raise ValueError("a number beyond 1e18")
    return value


# ------------------------------------------------------------ values on a command line

_TOKEN = re.compile(r"""\s+|[\[\](),]|'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*"|[+-]?[\w.][\w.+-]*""")


def python_value(text: str) -> Any:
    """Evaluate numbers, text, True, False, None and lists and tuples of these like ``ast.literal_eval``, or ValueError.

    Unlike ``literal_eval`` it is bounded: deep nesting cannot exhaust the stack, and long numbers cannot take long.
    """
    at, depth, count = 0, 0, 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        token = match[0] if match else ""
        at, count, depth = at + len(token), count + 1, depth + (token in ("[", "(")) - (token in ("]", ")"))
        long = len(token) > MAX_DIGITS and token[0] not in "'\" "
        if not token or depth > MAX_DEPTH or count > 2 * MAX_NODES or long:
            raise ValueError("not a value, or too large")
    try:
        value = ast.literal_eval(text.strip())
    except (SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError("not a value") from None
    if not _is_plain(value):
        raise ValueError("not a number, text or list")
    return value


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, str)) or is_number(value)
