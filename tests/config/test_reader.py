"""The YAML reader: SafeLoader's values for plain YAML, one line and little work for everything else."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gn_det import config_file
from gn_det.config import load_config
from gn_det.config.reader import MAX_BYTES, MAX_DIGITS, MAX_NODES, arithmetic, parse_yaml, python_value
from gn_det.errors import ConfigError

PLAIN = """\
a: 1
b: [0x10, 0o17, 017, 1_000, -3, +4, 1:30]
c: [1.5, 1e3, 1.e+3, .5, -.inf, 1:30.5]
d: {yes: on, 'NO': null, "e\\tf": ~}
e: |
  two
  lines
f: &f {x: [1], y: é}
g: *f
"""


def test_plain_yaml_has_safe_loaders_values() -> None:
    text = PLAIN.replace("{yes:", "{'yes':")
    assert repr(parse_yaml(text, "x")) == repr(yaml.safe_load(text))
    assert parse_yaml(f"\ufeff{text}".encode(), "x") == parse_yaml(text, "x")
    for path in (Path(config_file("gn_fpn")).parent).glob("*.yaml"):
        assert repr(parse_yaml(path.read_bytes(), "x")) == repr(yaml.safe_load(path.read_text()))
    assert parse_yaml("", "x") is None and parse_yaml("# only a comment", "x") is None
    assert parse_yaml("a: 2020-01-01\nb: =", "x") == {"a": "2020-01-01", "b": "="}


def test_own_keys_win_over_merged_ones_and_the_first_of_several_sections() -> None:
    """As YAML's merge key says; PyYAML 6.0.4 compares keys by identity and takes others."""
    text = """\
f: &f {x: [1], MODEL.NORM: GN}
g: {<<: *f, MODEL.NORM: BN}
h: {<<: [{z: 0}, *f, {z: 1, x: 3, MODEL.NORM: LN}]}
i: &i {<<: *f, x: 2}
j: [*i, {<<: *i}, {<<: [*f, *i]}, {<<: [*i, *f], MODEL.NORM: IN}]
"""
    loaded = parse_yaml(text, "x")
    assert loaded["g"] == {"x": [1], "MODEL.NORM": "BN"}
    assert loaded["h"] == {"z": 0, "x": [1], "MODEL.NORM": "GN"}
    both = {"x": 2, "MODEL.NORM": "GN"}
    assert loaded["j"] == [both, both, {"x": [1], "MODEL.NORM": "GN"}, {"x": 2, "MODEL.NORM": "IN"}]


def test_numbers_of_100_characters_are_the_longest() -> None:
    for digits in ("1" * MAX_DIGITS, "0x" + "f" * (MAX_DIGITS - 2), "1." + "1" * (MAX_DIGITS - 2)):
        assert parse_yaml(f"a: {digits}", "x") == yaml.safe_load(f"a: {digits}")
        with pytest.raises(ConfigError, match=f"a number of {MAX_DIGITS + 1} characters"):
            parse_yaml(f"a: {digits}1", "x")


def test_what_aliases_share_is_not_shared_afterwards() -> None:
    loaded = parse_yaml("a: &a {x: [1]}\nb: *a", "x")
    loaded["a"]["x"].append(2)
    assert loaded["b"] == {"x": [1]}


def bomb(item: str, first: str) -> str:
    return f"a0: &a0 {first}\n" + "\n".join(
        f"a{i}: &a{i} " + item % ", ".join([f"*a{i - 1}"] * 9) for i in range(1, 40)
    )


HOSTILE: dict[str, tuple[str, str]] = {
    "flow levels": ("[" * 900, "levels of nesting"),
    "many brackets": ("[" * MAX_BYTES, "levels of nesting"),
    "map levels": ("{a: " * 900, "levels of nesting"),
    "dashes": ("- " * (MAX_BYTES // 2), "levels of nesting"),
    "question marks": ("? " * (MAX_BYTES // 2), "levels of nesting"),
    "block levels": ("\n".join(" " * i + "a:" for i in range(900)), "levels of nesting"),
    "size": ("a" * (MAX_BYTES + 1), "larger than"),
    "values": ("[" + "1," * (MAX_NODES + 1) + "]", f"more than {MAX_NODES} values"),
    "alias bomb": (bomb("[%s]", "[1]"), "aliases included"),
    "merge bomb": (bomb("{<<: [%s]}", "{x: 1}"), "aliases included"),
    "alias to itself": ("&a [*a]", "leads back"),
    "merge with itself": ("&a {<<: *a}", "leads back"),
    "no such alias": ("a: *b", "undefined alias"),
    "merge of a number": ("<<: 3", "expected a mapping or list of mappings for merging"),
    "long integer": ("a: " + "9" * 5000, "a number of 5000 characters"),
    "long hex": ("a: 0x" + "f" * 5000, "a number of 5002 characters"),
    "long sexagesimal": ("a: 1" + ":1" * 5000, "a number of 10001 characters"),
    "long float": ("a: 1." + "1" * 5000, "a number of 5002 characters"),
    "no integer": ("a: 0x_", "not a valid int"),
    "tagged integer": ("a: !!int x", "not a valid int"),
    "binary": ("a: !!binary aGk=", "is not allowed"),
    "set": ("a: !!set {b}", "is not allowed"),
    "pairs": ("a: !!pairs [b: 1]", "is not allowed"),
    "date": ("a: !!timestamp 2020-01-01", "is not allowed"),
    "python": ("a: !!python/object/apply:os.system ['true']", "is not allowed"),
    "long tag": ("a: !" + "x" * 5000 + " b", "is not allowed"),
    "duplicate": ("a: 1\na: 2", "duplicate key 'a'"),
    "quoted duplicate": ("a: 1\n'a': 2", "duplicate key 'a'"),
    "two merges": ("<<: {a: 1}\n<<: {a: 2}", "duplicate key '<<'"),
    "number as key": ("1: 2", "key '1' is not text"),
    "word as key": ("on: 2", "key 'on' is not text"),
    "number as merged key": ("<<: {1: 2}", "key '1' is not text"),
    "duplicate in a merged section": ("<<: {a: 1, a: 2}", "duplicate key 'a'"),
    "list as key": ("? [a]\n: 2", "a list or section is not text"),
    "NUL": ("a: \0", "not valid YAML"),
    "escaped NUL": ('a: "\\0"', "control character"),
    "NUL in a text": ('a: "x\\0"', "control character"),
    "escape in a key": ('"\\e[31m": 1', "control character"),
    "half a character": ('a: "\\ud800"', "control character"),
    "beyond Unicode": ('a: "\\U99999999"', "not valid YAML"),
    "two documents": ("a: 1\n---\nb: 2", "expected a single document in the stream, but found another document"),
    "formula": ('a: !!python/object/apply:eval ["9**9**9"]', "an exponent of 387420489"),
    "call": ("a: !!python/object/apply:eval [\"__import__('os').system('true')\"]", "only numbers"),
    "formula without text": ("a: !!python/object/apply:eval []", "needs one text"),
}

_SCRIPT = """
import json, resource, sys
from gn_det.config.reader import parse_yaml
from gn_det.errors import ConfigError
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
found = {}
for name, text in json.load(sys.stdin).items():
    try:
        found[name] = "accepted " + repr(parse_yaml(text, "f.yaml"))[:100]
    except ConfigError as error:
        found[name] = str(error)
assert "torch" not in sys.modules
print(json.dumps(found))
"""


def test_hostile_texts_are_one_line_within_a_gigabyte() -> None:
    pytest.importorskip("resource", reason="limits memory by the resource module of POSIX")
    texts = json.dumps({name: text for name, (text, _) in HOSTILE.items()})
    done = subprocess.run([sys.executable, "-c", _SCRIPT], input=texts, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout)
    for name, (_, word) in HOSTILE.items():
        assert said[name].startswith("f.yaml") and word in said[name], (name, said[name])
        assert said[name].isprintable() and len(said[name]) < 400


@pytest.mark.parametrize(
    ("data", "word"),
    [("a: é".encode("latin-1"), "is not UTF-8"), ("a: 1".encode("utf-16"), "looks like UTF-16"), (b"a: \x01", "valid")],
)
def test_other_encodings(tmp_path: Path, data: bytes, word: str) -> None:
    (tmp_path / "c.yaml").write_bytes(data)
    with pytest.raises(ConfigError, match=word):
        load_config(str(tmp_path / "c.yaml"))


# ------------------------------------------------------------ formulas and values

FORMULAS = [
    "[[x, x * 2**(1.0/3), x * 2**(2.0/3) ] for x in [32, 64, 128, 256, 512 ]]",  # Detectron2's Base-RetinaNet.yaml
    "[x / 3 for x in [1, -2, 2.5]]",
    "1 - -2 * 3 ** 2 + 7 / 2",
    "[]",
    " 2 ** -3",
    "0.5 ** 64",
]


@pytest.mark.parametrize("text", FORMULAS)
def test_formulas_are_what_eval_gives(text: str) -> None:
    assert repr(arithmetic(text)) == repr(eval(text.strip()))
    assert repr(parse_yaml(f'a: !!python/object/apply:eval ["{text}"]', "x")["a"]) == repr(eval(text.strip()))


@pytest.mark.parametrize(
    "text",
    ["9**9**9", "2**65", "0.5**65", "10**20", "1e308 * 10", "1/0", "(-1)**0.5", "x", "[x for x in x]",
     "[x for x in [1] if x]",
     "[[y for y in [x]] for x in [1]]", "[x for x in range(3)]", "f(1)", "'a'", "True", "1 << 9", "[1] * 9", "[*[1]]",
     "1 if 1 else 2", "(x := 1)", "-" * 2000 + "1", "(" * 400 + "1" + ")" * 400, "", "(1,)",
     "[1" + ",1" * 480 + "]*1",
     "[[" + "x," * 200 + "x] for x in [" + "1," * 200 + "1]]",
     "[" + "x+" * 200 + "x for x in [" + "1," * 200 + "1]]"],
)  # fmt: skip
def test_other_formulas_are_refused(text: str) -> None:
    with pytest.raises(ValueError) as e:
        arithmetic(text)
    assert len(str(e.value)) < 300


VALUES = ["1", "-1.5", "1e3", "0x10", "1_000", "'a'", '"GN"', "True", "None", "()", "[]", "(1)", "(1,)", "1, 2",
          "[1, (2,)]", " [ 'a' , \"b\\n\" ] ", "[[32], [64, 128]]", "(1, [2, (3, 'x,y]')],)"]  # fmt: skip


@pytest.mark.parametrize("text", VALUES)
def test_values_are_what_literal_eval_gives(text: str) -> None:
    assert repr(python_value(text)) == repr(ast.literal_eval(text.strip()))


@pytest.mark.parametrize(
    "text",
    ["", "x", "(" * 200_000, "[" * 33 + "]" * 33, "()" * 50_000, "-" * 100_000 + "1", "9" * (MAX_DIGITS + 1), "1 2",
     "[1", "1]", "(1]", "[,]", "1,,2", "[1][0]", "'a'*9", "1+1", "{}", "{1}", "b'x'", "1j", "'a", "'" * 99_999, "...",
     "1," * (MAX_NODES + 1)],
)  # fmt: skip
def test_other_values_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        python_value(text)
