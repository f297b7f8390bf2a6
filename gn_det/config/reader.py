"""Read YAML from outside in bounded time and memory: plain text, numbers, lists and sections, nothing else.

Every YAML file and every YAML text of a checkpoint goes through :func:`parse_yaml`. It gives what PyYAML's SafeLoader
gives, except that duplicate keys, keys that are not text, several documents, unknown tags and endless structures are
errors, and that dates stay text.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from gn_det.errors import ConfigError
from gn_det.files import open_regular
from gn_det.text import one_line, shown

#: Bytes of a file or text. The largest config that ships has 2 kB, a dumped one with 1,200 class names 40 kB.
MAX_BYTES = 1 << 19
#: Lists and sections inside each other; Detectron2's deepest key has 5 levels.
MAX_DEPTH = 32
#: Values, lists and sections of a text, with everything that its aliases repeat.
MAX_NODES = 50_000
#: Characters of a number.
MAX_DIGITS = 100
#: Numbers and operators of a formula, and the values it may make.
_MAX_FORMULA, _MAX_VALUES = 1000, 1000

_PREFIX = "tag:yaml.org,2002:"
_EVAL = f"{_PREFIX}python/object/apply:eval"
_MERGE = f"{_PREFIX}merge"
#: Characters that no text may have, not even escaped. "\udc80" to "\udcff" stay: undecodable bytes of file names.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udc7f\udd00-\udfff]")


class _Refused(Exception):
    """A text that is refused, and where."""

    def __init__(self, problem: str, mark: Any = None):
        self.problem, self.mark = problem, mark
        super().__init__(problem)


class _Loader(yaml.SafeLoader):
    """PyYAML's scanner, parser and composer with a limit on depth and on the number of nodes, aliases expanded."""

    def __init__(self, text: str, python_tags: bool = False):
        super().__init__(text)
        self.python_tags = python_tags
        self.depth = self.nodes = 0
        self.sizes: dict[int, int] = {}

    def fetch_more_tokens(self) -> Any:
        # The scanner runs ahead of the composer, and each of its steps costs as much as there are open brackets.
        if self.flow_level > MAX_DEPTH or len(self.indents) > MAX_DEPTH:
            raise _Refused(f"more than {MAX_DEPTH} levels of nesting", self.get_mark())
        return super().fetch_more_tokens()

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) and event.anchor in self.anchors:
            if id(self.anchors[event.anchor]) not in self.sizes:
                raise _Refused(f"alias {shown(event.anchor)} leads back to itself", event.start_mark)
            self.count(self.sizes[id(self.anchors[event.anchor])], event.start_mark)
            return super().compose_node(parent, index)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _Refused(f"more than {MAX_DEPTH} levels of nesting", event.start_mark)
        before = self.nodes
        self.count(1, event.start_mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self.sizes[id(node)] = self.nodes - before
        self.depth -= 1
        return node

    def count(self, nodes: int, mark: Any) -> None:
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            raise _Refused(f"more than {MAX_NODES} values, aliases included", mark)


# Dates and "=" are text here.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("timestamp", "value")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(path: Path, what: str = "config file") -> dict[str, Any]:
    """Return the keys and values of a YAML file.

    Args:
        path: a regular file of at most :data:`MAX_BYTES`, in UTF-8.
        what: names the file in messages.

    Raises:
        ConfigError: missing, not readable, not valid YAML, or no keys and values; see :func:`parse_yaml`.
    """
    source = f"{what} {one_line(str(path), 300)}"
    try:
        with open_regular(path) as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{source} does not exist") from None
    except OSError as error:
        raise ConfigError(f"{source} cannot be read: {one_line(error.strerror or error)}") from None
    except ValueError:
        raise ConfigError(f"{source} cannot be read: the name holds a NUL character") from None
    loaded = parse_yaml(data, source)
    if loaded is None:
        raise ConfigError(f"{source} is empty")
    if not isinstance(loaded, dict):
        raise ConfigError(f"{source} must hold keys and values, not a {type(loaded).__name__}")
    return loaded


def parse_yaml(text: str | bytes, source: str, *, python_tags: bool = False) -> Any:
    """Return the value of a YAML text: None, bool, int, float, str, list or dict with text keys.

    Args:
        text: at most :data:`MAX_BYTES`; bytes are UTF-8, with or without a byte order mark.
        source: names the text in messages.
        python_tags: read what Python's dumper tagged (``!!python/...``) as the plain list, section or text below the
            tag, and ``!!binary`` as bytes. Nothing is called.

    Raises:
        ConfigError: not valid or not plain YAML, or too large; one line with the source and the place.
    """
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{source} is larger than {MAX_BYTES // 1024} kB")
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        loader = _Loader(text, python_tags)
        node = loader.get_single_node()
        return None if node is None else _value(node, loader)
    except UnicodeDecodeError:
        kind = " (it looks like UTF-16)" if isinstance(text, bytes) and text[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise ConfigError(f"{source} is not UTF-8 text{kind}; save it as UTF-8") from None
    except _Refused as error:
        raise ConfigError(f"{source}{_place(error.mark)}: {error.problem}") from None
    except yaml.MarkedYAMLError as error:
        problem = one_line(error.problem or "not valid YAML")
        raise ConfigError(f"{source}{_place(error.problem_mark)}: {problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {one_line(str(error), 200)}") from None
    except (ValueError, OverflowError, RecursionError) as error:  # PyYAML's own: "\U99999999", tags that are no URI
        raise ConfigError(f"{source} is not valid YAML: {one_line(error)}") from None


def _place(mark: Any) -> str:
    return f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""


def _value(node: yaml.Node, loader: _Loader) -> Any:
    if isinstance(node, yaml.SequenceNode) and node.tag == _EVAL:
        return _evaluated(node)
    kind = node.tag.removeprefix(_PREFIX)
    if loader.python_tags and kind.startswith("python/"):
        kind = (
            "map" if isinstance(node, yaml.MappingNode) else "seq" if isinstance(node, yaml.SequenceNode) else "python"
        )
    if loader.python_tags and isinstance(node, yaml.ScalarNode) and kind in ("python", "binary"):
        return loader.construct_yaml_binary(node) if kind == "binary" else node.value
    if isinstance(node, yaml.MappingNode) and kind == "map":
        return _mapping(node, loader)
    if isinstance(node, yaml.SequenceNode) and kind == "seq":
        return [_value(item, loader) for item in node.value]
    if isinstance(node, yaml.ScalarNode) and kind in ("null", "bool", "int", "float", "str"):
        return _scalar(node, kind, loader)
    raise _Refused(f"tag {shown(node.tag)} is not allowed; only text, numbers, lists and keys are", node.start_mark)


def _scalar(node: yaml.ScalarNode, kind: str, loader: _Loader) -> Any:
    if kind == "str":
        if _CONTROL.search(node.value):
            raise _Refused("text with a control character", node.start_mark)
        return node.value
    if len(node.value) > MAX_DIGITS:
        raise _Refused(f"a number of {len(node.value)} characters", node.start_mark)
    try:
        return loader.construct_object(node)
    except (ValueError, OverflowError, KeyError, IndexError):
        raise _Refused(f"{shown(node.value)} is not a valid {kind}", node.start_mark) from None


def _mapping(node: yaml.MappingNode, loader: _Loader) -> dict[str, Any]:
    """Keys and values; ``<<`` adds those of another mapping, or of several, that are not given here."""
    own: dict[str, Any] = {}
    merged: dict[str, Any] | None = None
    for key_node, value_node in node.value:
        if key_node.tag == _MERGE:
            if merged is not None:
                raise _Refused("duplicate key '<<'", key_node.start_mark)
            merged = _merged(value_node, loader)
            continue
        if key_node.tag != f"{_PREFIX}str" or not isinstance(key_node, yaml.ScalarNode):
            shape = shown(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "a list or section"
            raise _Refused(f"key {shape} is not text; put keys in quotes", key_node.start_mark)
        key = _scalar(key_node, "str", loader)
        if key in own:
            raise _Refused(f"duplicate key {shown(key)}", key_node.start_mark)
        own[key] = _value(value_node, loader)
    return own if merged is None else {**merged, **own}


def _merged(node: yaml.Node, loader: _Loader) -> dict[str, Any]:
    value = _value(node, loader)
    mappings = value if isinstance(value, list) else [value]
    if not all(isinstance(mapping, Mapping) for mapping in mappings):
        raise _Refused("'<<' needs a section or a list of sections", node.start_mark)
    return {key: item for mapping in reversed(mappings) for key, item in mapping.items()}


# ------------------------------------------------------------ formulas


def _evaluated(node: yaml.SequenceNode) -> Any:
    """The value of Detectron2's ``!!python/object/apply:eval ["..."]``, where it is plain arithmetic."""
    if len(node.value) != 1 or not isinstance(node.value[0], yaml.ScalarNode):
        raise _Refused("!!python/object/apply:eval needs one text", node.start_mark)
    try:
        return arithmetic(node.value[0].value)
    except ValueError as error:
        raise _Refused(f"!!python/object/apply:eval: {one_line(error)}", node.start_mark) from None


_OPERATORS: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
_HELP = "only numbers, + - * / **, lists and one comprehension over a list are allowed"


def arithmetic(text: str) -> Any:
    """Return what ``eval`` gives for numbers, ``+ - * / **``, lists and one comprehension over a literal list.

    Example: ``[[x, x * 2**(1.0/3)] for x in [32, 64]]``.

    Raises:
        ValueError: anything else, or a result that is too large.
    """
    if len(text) > _MAX_FORMULA:
        raise ValueError(f"a formula of {len(text)} characters")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError(f"{shown(text)} is not a formula; {_HELP}") from None
    budget = [_MAX_VALUES]
    try:
        return _formula(tree, {}, budget)
    except (ArithmeticError, RecursionError):
        raise ValueError(f"{shown(text)} has no finite value") from None


def _formula(node: ast.AST, names: dict[str, float], budget: list[int]) -> Any:
    budget[0] -= 1
    if budget[0] < 0:
        raise ValueError(f"a formula with more than {_MAX_VALUES} steps")
    if isinstance(node, ast.List):
        return [_formula(item, names, budget) for item in node.elts]
    if isinstance(node, ast.ListComp) and not names and len(node.generators) == 1:
        loop = node.generators[0]
        if isinstance(loop.target, ast.Name) and isinstance(loop.iter, ast.List) and not (loop.ifs or loop.is_async):
            values = [_number(item, {}, budget) for item in loop.iter.elts]
            return [_formula(node.elt, {loop.target.id: value}, budget) for value in values]
    return _number(node, names, budget)


def _number(node: ast.AST, names: dict[str, float], budget: list[int]) -> int | float:
    budget[0] -= 1
    if budget[0] < 0:
        raise ValueError(f"a formula with more than {_MAX_VALUES} steps")
    value: Any = None
    if isinstance(node, ast.Constant):
        value = node.value
    elif isinstance(node, ast.Name):
        value = names.get(node.id)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        operand = _number(node.operand, names, budget)
        value = -operand if isinstance(node.op, ast.USub) else +operand
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _number(node.left, names, budget), _number(node.right, names, budget)
        if isinstance(node.op, ast.Pow) and abs(right) > 64:
            raise ValueError(f"an exponent of {shown(right)}; at most 64 is allowed")
        value = _OPERATORS[type(node.op)](left, right)
    if type(value) not in (int, float):
        raise ValueError(_HELP)
    if not math.isfinite(value) if isinstance(value, float) else abs(value) > 10**18:
        raise ValueError("a number beyond 1e18")
    return value


# ------------------------------------------------------------ values on a command line

_TOKEN = re.compile(r"""\s*([\[\](),]|'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*"|[^\s\[\](),'"]+)\s*""")
_WORDS = {"True": True, "False": False, "None": None}


def python_value(text: str) -> Any:
    """Return what ``ast.literal_eval`` gives for numbers, text, True, False, None and lists and tuples of these.

    Unlike ``literal_eval`` it is bounded: deep nesting cannot exhaust the stack, nor long numbers the processor.

    Raises:
        ValueError: anything else.
    """
    if len(text) > MAX_BYTES:
        raise ValueError("too long")
    # One entry for each open bracket: the bracket, its values, and whether a comma was the last token.
    stack: list[tuple[str, list[Any], list[bool]]] = [("", [], [True, False])]
    at, count = 0, 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        count += 1
        if match is None or count > 2 * MAX_NODES:
            raise ValueError("not a value")
        at, token = match.end(), match[1]
        bracket, values, state = stack[-1]
        if token == ",":
            if state[0]:
                raise ValueError("a comma without a value")
            state[0] = state[1] = True
        elif token in ("]", ")"):
            if bracket + token not in ("[]", "()"):
                raise ValueError("brackets do not match")
            stack.pop()
            _append(stack[-1], _closed(bracket, values, state))
        elif token in ("[", "("):
            if len(stack) > MAX_DEPTH or not state[0]:
                raise ValueError("nested too deep, or a comma is missing")
            stack.append((token, [], [True, False]))
        else:
            _append(stack[-1], _literal(token))
    if len(stack) != 1 or not stack[0][1]:
        raise ValueError("brackets do not match, or no value")
    return _closed("(", *stack[0][1:])


def _append(level: tuple[str, list[Any], list[bool]], value: Any) -> None:
    _, values, state = level
    if not state[0]:
        raise ValueError("a comma is missing")
    values.append(value)
    state[0] = False


def _closed(bracket: str, values: list[Any], state: list[bool]) -> Any:
    """A list, a tuple, or the value in brackets."""
    if bracket == "[":
        return values
    return tuple(values) if state[1] or not values else values[0]


def _literal(token: str) -> Any:
    if token in _WORDS:
        return _WORDS[token]
    if len(token) > MAX_DIGITS and token[0] not in "'\"":
        raise ValueError("a number that is too long")
    try:
        value = ast.literal_eval(token)
    except (SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError("not a value") from None
    if type(value) not in (int, float, str):
        raise ValueError("not a number or text")
    return value
