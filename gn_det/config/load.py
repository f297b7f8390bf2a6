"""Finding, reading and overriding configs, with every mistake named.

A config is a Detectron2 YAML file with ``_BASE_`` inheritance as in fvcore. Unknown keys, duplicate keys and wrong
types are errors that name file and key; :mod:`gn_det.config.check` then refuses what the embedded engine does not
implement.
"""

from __future__ import annotations

import copy
import difflib
import functools
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import yaml
from fvcore.common.config import BASE_KEY
from fvcore.common.config import CfgNode as CN

from gn_det.config.check import OTHER_MODELS, check_config, check_ranges
from gn_det.config.defaults import get_cfg
from gn_det.config.reader import MAX_BYTES, MAX_DEPTH, parse_yaml, python_value, read_yaml
from gn_det.errors import ConfigError
from gn_det.text import one_line, shown

#: Files that a config and its bases may be.
MAX_FILES = 100


def _configs_dir() -> Path:
    """Folder of the shipped configs: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def shipped_configs() -> list[str]:
    """Names of the experiments that ship with gn_det (the ``Base-*.yaml`` files are their building blocks)."""
    return sorted(p.name for p in _configs_dir().glob("*.yaml") if not p.name.startswith("Base-"))


def _by_name(folder: Path, name: str) -> Path | None:
    """The file of a name inside ``folder``, with or without ``.yaml``; None where there is none."""
    wanted = name if name.endswith((".yaml", ".yml")) else f"{name}.yaml"
    if PurePath(wanted).anchor or "\\" in wanted or ".." in wanted.split("/"):
        return None
    return folder / wanted if os.path.isfile(folder / wanted) else None


def _near(name: str, names: Sequence[str], n: int = 3, cutoff: float = 0.6) -> list[str]:
    """The names that are most like one; nothing is like a very long one."""
    return difflib.get_close_matches(name, names, n, cutoff) if len(name) <= 200 else []


def shipped_config(name: str) -> Path:
    """Path of a shipped config by its bare name, with or without ``.yaml``.

    Raises:
        ConfigError: there is none; the message lists the nearest names.
    """
    path = None if "/" in name else _by_name(_configs_dir(), name)
    if path is not None:
        return path
    names = shipped_configs()
    near = _near(name if name.endswith((".yaml", ".yml")) else f"{name}.yaml", names) or names
    raise ConfigError(f"config {shown(name)} is neither a file nor a shipped config; did you mean {', '.join(near)}?")


def _zoo_dir() -> Path | None:
    """Folder of Detectron2's own YAML files where it is installed; found without importing it."""
    try:
        spec = importlib.util.find_spec("detectron2")
    except (ImportError, ValueError):
        return None
    for root in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(root) / "model_zoo" / "configs"
        if folder.is_dir():
            return folder
    return None


def zoo_config(name: str) -> Path | None:
    """Detectron2's own config of a name as in its model zoo (``Misc/mask_rcnn_R_50_FPN_3x_gn.yaml``), or None."""
    folder = _zoo_dir()
    return None if folder is None else _by_name(folder, name)


def _no_zoo_config(name: str) -> ConfigError:
    """The error for a name with a folder in it that is no file: near names of Detectron2's zoo, where it is there."""
    folder = _zoo_dir()
    names = [] if folder is None else [p.relative_to(folder).as_posix() for p in folder.glob("*/*.yaml")]
    if name.partition("/")[0] not in {n.partition("/")[0] for n in names}:
        missing = "" if folder else " (names of Detectron2's model zoo need Detectron2 installed)"
        return ConfigError(f"config {shown(name)} does not exist{missing}")
    near = _near(name, names)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    return ConfigError(f"config {shown(name)} is neither a file nor in Detectron2's model zoo{hint}")


def resolve_config(name_or_path: str) -> Path:
    """A path as given where a file is there, otherwise the config of that name.

    ``gn_fpn_long.yaml`` is one of gn_det's; ``Misc/mask_rcnn_R_50_FPN_3x_gn.yaml`` is found among Detectron2's own,
    where Detectron2 is installed.

    Raises:
        ConfigError: neither; the message lists the nearest names.
    """
    path = Path(os.path.expanduser(name_or_path))
    if os.path.isfile(path):
        return path
    if os.path.isdir(path):
        raise ConfigError(f"config {shown(name_or_path)} is a folder; name a .yaml file")
    if os.path.exists(path):
        raise ConfigError(f"config {shown(name_or_path)} is a pipe or device; name a .yaml file")
    if len(path.parts) > 1 and path.parts[0] != "configs":
        zoo = zoo_config(name_or_path)
        if zoo is None:
            raise _no_zoo_config(name_or_path)
        return zoo
    return shipped_config(path.name)


#: Keys that scaling to another batch rewrites, unless they were given on the command line.
_SCHEDULE_KEYS = (
    "SOLVER.BASE_LR",
    "SOLVER.MAX_ITER",
    "SOLVER.STEPS",
    "SOLVER.WARMUP_ITERS",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.IMS_PER_BATCH",
    "TEST.EVAL_PERIOD",
)


#: What the schedules of shipped configs, and of configs built on them, are written for: GPUs and images of a batch (0:
#: not scaled by it). This is no part of the YAML: Detectron2 would scale by it what its user sets in Python.
_WRITTEN_FOR = {
    "Base-RCNN-FPN.yaml": (8, 16),
    "Base-RCNN-C4.yaml": (8, 8),
    "bn_c4_tuned.yaml": (8, 16),
    "gn_fpn_scratch_9x.yaml": (0, 64),
    "quickstart.yaml": (0, 0),
}


def known_keys(cfg: CN) -> list[str]:
    """All dotted leaf keys of a config."""
    return [key for key, _ in _leaves(cfg)]


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        dotted = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{dotted}.")
        else:
            yield dotted, value


def _lookup(cfg: CN, dotted: str) -> Any:
    node: Any = cfg
    for part in dotted.split("."):
        if not isinstance(node, Mapping) or part not in node:
            raise KeyError(dotted)
        node = node[part]
    return node


def _unknown_key(dotted: str, cfg: CN, source: str) -> ConfigError:
    """The error for an unknown key, with the nearest known one: by full name, else by its last part."""
    keys = known_keys(cfg)
    last = dotted.rpartition(".")[2].upper()
    near = [k for k in keys if k.rpartition(".")[2] == last]
    near = near or _near(dotted.upper(), keys, n=1, cutoff=0.75)
    if not near:
        tails = sorted({k.rpartition(".")[2] for k in keys})
        close = _near(last, tails, n=1)
        near = [k for k in keys if close and k.rpartition(".")[2] == close[0]]
    hint = f"did you mean {' or '.join(near[:3])}?" if near else "see gn_det/config/defaults.py for all keys"
    return ConfigError(f"{source}: unknown key {one_line(dotted)}; {hint}")


def _check_keys(loaded: Mapping[str, Any], cfg: CN, source: str, prefix: str = "") -> None:
    for name, value in loaded.items():
        dotted = f"{prefix}{name}"
        try:
            known = _lookup(cfg, dotted)
        except KeyError:
            raise _unknown_key(dotted, cfg, source) from None
        if isinstance(known, Mapping) != isinstance(value, Mapping):
            kind = "a section with keys of its own" if isinstance(known, Mapping) else "a single value"
            raise ConfigError(f"{source}: {dotted} is {kind}, got {shown(value)}")
        if isinstance(value, Mapping):
            _check_keys(value, cfg, source, f"{dotted}.")


#: A file, and the folder in which its bases are looked for (another one than the file's where it is a link).
_Place = tuple[Path, Path]


@dataclass
class _Files:
    """A config file and its bases: each is read and checked once, however many files name it."""

    cfg: CN
    merged: dict[_Place, dict[str, Any]] = field(default_factory=dict)
    left: int = MAX_BYTES

    def load(self, path: Path, chain: tuple[_Place, ...] = ()) -> dict[str, Any]:
        """Keys and values of a file over those of its bases, in fvcore's order."""
        source = f"config file {one_line(str(path), 300)}"
        try:
            place = (path.resolve(), path.parent.resolve())
            self.left -= path.stat().st_size
        except (OSError, RuntimeError, ValueError):  # it is gone, or a name that no file can have
            place = (path, path.parent)
        if place in chain:
            raise ConfigError(f"{source}: {BASE_KEY} leads back to the file itself")
        if place in self.merged:
            return copy.deepcopy(self.merged[place])
        if len(self.merged) + len(chain) >= MAX_FILES or self.left < 0:
            raise ConfigError(f"{source}: {BASE_KEY} leads to more than {MAX_FILES} files or {MAX_BYTES // 1024} kB")
        loaded = read_yaml(path)
        bases = _bases(loaded.pop(BASE_KEY, []), source)
        _check_keys(loaded, self.cfg, str(path))
        merged: dict[str, Any] = {}
        for base in bases:
            _merge(self.load(_base_path(path, base, source), (*chain, place)), merged)
        _merge(loaded, merged)
        if place[0].name in _WRITTEN_FOR and place[0].parent == _configs_dir().resolve():
            # The outermost such file decides; what a YAML says itself is set later and wins.
            self.cfg.SOLVER.REFERENCE_WORLD_SIZE, self.cfg.SOLVER.REFERENCE_BATCH = _WRITTEN_FOR[place[0].name]
        self.merged[place] = merged
        return copy.deepcopy(merged)


def _bases(value: Any, source: str) -> list[str]:
    bases = value if isinstance(value, list) else [value]
    if not all(isinstance(base, str) and base for base in bases):
        raise ConfigError(f"{source}: {BASE_KEY} must name a file or a list of files, got {shown(value)}")
    return bases


def _base_path(path: Path, base: str, source: str) -> Path:
    """Where a base lies: relative to the folder of the file that names it; ``~`` is the home folder."""
    if "://" in base:
        raise ConfigError(f"{source}: {BASE_KEY} {shown(base)} is a URL; download the file and name its path")
    found = Path(os.path.join(path.parent, os.path.expanduser(base)))
    if not os.path.isfile(found):
        shipped = None if "/" in base else _by_name(_configs_dir(), base)
        hint = f"; the shipped one is {shipped}" if shipped else ""
        looked = one_line(str(found), 300)
        raise ConfigError(f"{source}: {BASE_KEY} {shown(base)} does not exist (looked for {looked}){hint}")
    return found


def _merge(source: Mapping[str, Any], into: dict[str, Any]) -> None:
    for name, value in source.items():
        if isinstance(value, dict) and name in into:
            _merge(value, into[name])
        else:
            into[name] = value


@functools.lru_cache(maxsize=1)
def _default_values() -> dict[str, Any]:
    return dict(_leaves(get_cfg()))


def _typed(value: Any, default: Any) -> Any:
    """``value`` as the type of ``default``; text is read as Python, whole numbers pass for floats.

    Raises:
        TypeError: the value cannot stand for a value of that type.
    """
    if isinstance(default, str):
        if isinstance(value, (dict, list, tuple)) or value is None:
            raise TypeError
        return str(value)
    if isinstance(value, str):
        words = {"true": True, "false": False, "none": None}
        try:
            value = words[value.lower()] if value.lower() in words else python_value(value)
        except ValueError:
            if not isinstance(default, (tuple, list)):
                raise TypeError from None
    if default is None:
        if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
            return value
        raise TypeError
    if isinstance(default, (tuple, list)):
        items = type(default)(value if isinstance(value, (tuple, list)) else (value,))
        if not _is_plain(items) or (default and not all(_same_kind(item, default[0]) for item in items)):
            raise TypeError
        return items
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise TypeError from None
    if type(value) is not type(default):
        raise TypeError
    return value


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Whether a list holds only values that a config can have."""
    if isinstance(value, (list, tuple)):
        return depth < MAX_DEPTH and all(_is_plain(item, depth + 1) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _same_kind(item: Any, example: Any) -> bool:
    """Whether an element of a list is of the kind of the default's first one: number, text, bool or list of such."""
    if isinstance(example, (tuple, list)):
        return isinstance(item, (tuple, list)) and all(_same_kind(i, example[0]) for i in item if example)
    if isinstance(example, (int, float)) and not isinstance(example, bool):
        return isinstance(item, (int, float)) and not isinstance(item, bool)
    return isinstance(item, type(example))


def _set(cfg: CN, dotted: str, value: Any, source: str) -> None:
    section, _, name = dotted.rpartition(".")
    node = _lookup(cfg, section) if section else cfg
    default = _default_values().get(dotted, node[name])
    try:
        node[name] = _typed(value, default)
    except TypeError:
        kind = "None or a number" if default is None else type(default).__name__
        raise ConfigError(
            f"{source}: {dotted} must be of type {kind} (such as {default!r}), got {shown(value)}"
        ) from None


def merge_file(cfg: CN, path: Path) -> None:
    """Merge a config file with its bases into ``cfg``; see :func:`load_config` for the errors."""
    for dotted, value in _leaves(_Files(cfg).load(path)):
        _set(cfg, dotted, value, str(path))


def merge_overrides(cfg: CN, overrides: Sequence[str], source: str = "command line") -> None:
    """Merge ``KEY VALUE`` pairs and ``KEY=VALUE`` words; keys of the schedule are then taken literally.

    ``source`` says in an error where the words come from.
    """
    for dotted, text in _pairs(overrides):
        try:
            known = _lookup(cfg, dotted)
        except KeyError:
            raise _unknown_key(dotted, cfg, source) from None
        if isinstance(known, Mapping):
            raise ConfigError(f"{source}: {dotted} is a section, name one of its keys ({', '.join(known)})")
        _set(cfg, dotted, text, source)
        if dotted in _SCHEDULE_KEYS and dotted not in cfg.SOLVER.NO_RESCALE:
            cfg.SOLVER.NO_RESCALE = (*cfg.SOLVER.NO_RESCALE, dotted)


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    it = iter(words)
    for word in it:
        if word.startswith("-"):
            raise ConfigError(
                f"command line: unknown option {one_line(word)}; see --help (config keys are written KEY VALUE)"
            )
        key, equals, value = word.partition("=")
        if not equals:
            try:
                value = next(it)
            except StopIteration:
                raise ConfigError(f"command line: key {one_line(word)} has no value; write KEY VALUE") from None
        yield key, value


def load_config(name_or_path: str, overrides: Sequence[str] = (), *, check: bool = True) -> CN:
    """Read a config by path or shipped name, apply overrides, check it.

    Args:
        name_or_path: see :func:`resolve_config`.
        overrides: ``["SOLVER.BASE_LR", "0.01", "SEED=1"]``.
        check: refuse what the embedded engine does not implement.

    Raises:
        ConfigError: missing file, invalid YAML, unknown or duplicate key, wrong type, unsupported value.
    """
    cfg = get_cfg()
    merge_file(cfg, resolve_config(name_or_path))
    merge_overrides(cfg, overrides)
    if check:
        check_config(cfg)
    return cfg


class _PlainDumper(yaml.SafeDumper):
    """No ``&id001`` anchors for values that happen to be the same Python object."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def dump_config(cfg: CN, *, implemented_only: bool = False) -> str:
    """YAML text that :func:`parse_config` and Detectron2 read back.

    Args:
        cfg: any config.
        implemented_only: leave out the sections of models that the embedded engine does not have.
    """

    def plain(value: Any, dotted: str) -> Any:
        if isinstance(value, Mapping):
            inner = {name: plain(v, f"{dotted}.{name}".lstrip(".")) for name, v in value.items()}
            return {name: v for name, v in inner.items() if v != {}}
        if implemented_only and dotted.startswith(OTHER_MODELS):
            return {}
        return [plain(v, "") for v in value] if isinstance(value, (list, tuple)) else value

    return yaml.dump(plain(cfg, ""), Dumper=_PlainDumper, sort_keys=False, allow_unicode=True, default_flow_style=None)


def parse_config(text: str, source: str) -> CN:
    """A config from its YAML text, such as the one stored in a checkpoint; unknown keys are an error."""
    cfg = get_cfg()
    try:
        loaded = parse_yaml(text, "its YAML")
    except ConfigError as error:
        raise ConfigError(f"{source}: the stored config is not readable ({error}); name one with --config") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{source}: the stored config is not readable; name one with --config")
    _check_keys(loaded, cfg, source)
    for dotted, value in _leaves(loaded):
        _set(cfg, dotted, value, source)
    check_ranges(cfg, f"{source}: ")
    return cfg
