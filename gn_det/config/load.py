"""Find, read and override configs: Detectron2's YAML, with ``_BASE_`` inheritance as in fvcore.

Unknown keys, duplicate keys and values that no engine accepts are errors that name file and key;
:func:`gn_det.config.check.check_config` then refuses what the chosen engine does not implement.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any

import yaml
from fvcore.common.config import BASE_KEY
from fvcore.common.config import CfgNode as CN

from gn_det.config.check import check_config, check_size, check_value
from gn_det.config.defaults import as_lists, get_cfg, set_value
from gn_det.config.reader import MAX_BYTES, parse_yaml, python_value, read_yaml
from gn_det.config.schema import KEYS
from gn_det.errors import ConfigError
from gn_det.files import shipped_folder
from gn_det.text import did_you_mean, nearest, one_line, shown, some
from gn_det.values import is_number

#: Values of keys: ``{"SEED": 1}``, or ``KEY VALUE`` pairs and ``KEY=VALUE`` arguments as on the command line.
Overrides = Mapping[str, Any] | Sequence[str]

#: Most files that a config and its bases may have.
MAX_FILES = 100

#: Dotted names of sections.
_SECTIONS = {name.rpartition(".")[0] for name in KEYS} - {""}
_SECTIONS |= {name.rpartition(".")[0] for name in _SECTIONS} - {""}


# ------------------------------------------------------------ names of files


def shipped_configs() -> list[str]:
    """Return the names of the shipped configs, without the ``Base-*.yaml`` files that they build on."""
    return sorted(p.name for p in shipped_folder("configs").glob("*.yaml") if not p.name.startswith("Base-"))


def _with_ending(name: str) -> str:
    return name if name.endswith((".yaml", ".yml")) else f"{name}.yaml"


def _by_name(folder: Path, name: str) -> Path | None:
    """Return the file of that name in ``folder``, with or without ``.yaml``."""
    wanted = _with_ending(name)
    if PurePath(wanted).anchor or "\\" in wanted or ".." in wanted.split("/"):
        return None
    return folder / wanted if os.path.isfile(folder / wanted) else None


def shipped_config(name: str) -> Path:
    """Return the path of a shipped config, with or without ``.yaml``; ConfigError suggests the nearest name."""
    folder = shipped_folder("configs")
    path = None if "/" in name else _by_name(folder, name)
    if path is None:
        hint = (
            did_you_mean(_with_ending(name), [file.name for file in folder.glob("*.yaml")])
            or "; gn-det configs lists those"
        )
        raise ConfigError(f"config {shown(name)} is neither a file nor a shipped config{hint}")
    return path


def _zoo_config(name: str) -> Path:
    """Return Detectron2's config for a name in its model zoo (``Misc/mask_rcnn_R_50_FPN_3x_gn.yaml``)."""
    try:
        spec = importlib.util.find_spec("detectron2")  # does not import it
    except (ImportError, ValueError):
        spec = None
    roots = (spec.submodule_search_locations or []) if spec else []
    folders = [Path(root) / "model_zoo" / "configs" for root in roots]
    path = next((path for folder in folders if (path := _by_name(folder, name))), None)
    if path is None:
        names = [p.relative_to(folder).as_posix() for folder in folders for p in folder.glob("*/*.yaml")]
        hint = did_you_mean(name, names) if names else ", which needs Detectron2 installed"
        raise ConfigError(f"config {shown(name)} is neither a file nor in Detectron2's model zoo{hint}")
    return path


def resolve_config(name_or_path: str) -> Path:
    """Return the path if the file exists, otherwise that of the config of that name; ConfigError suggests the nearest.

    ``gn_fpn_long.yaml`` is gn_det's; ``Misc/mask_rcnn_R_50_FPN_3x_gn.yaml`` is Detectron2's, if that is installed.
    """
    path = Path(os.path.expanduser(name_or_path))
    if os.path.isfile(path):
        return path
    try:
        if len(path.parts) > 1 and path.parts[0] != "configs":
            return _zoo_config(name_or_path)
        return shipped_config(path.name)
    except ConfigError:
        if os.path.exists(path):
            kind = "folder" if os.path.isdir(path) else "pipe or device"
            raise ConfigError(f"config {shown(name_or_path)} is a {kind}; name a .yaml file") from None
        raise


# ------------------------------------------------------------ keys and values

#: GPUs and batch that the schedules of shipped configs, and of configs based on them, are written for (0: no scaling).
#: Not in the YAML, because Detectron2 would then also scale what its user sets in Python.
_WRITTEN_FOR = {
    "Base-RCNN-FPN.yaml": (8, 16),
    "Base-RCNN-C4.yaml": (8, 8),
    "bn_c4_tuned.yaml": (8, 16),
    "gn_fpn_scratch_9x.yaml": (0, 64),
    "quickstart.yaml": (0, 0),
}


def _unknown_key(name: str, source: str) -> ConfigError:
    """Return the error for an unknown key, suggesting keys with the same last part or a similar spelling."""
    last, tails = name.rpartition(".")[2].upper(), {key: key.rpartition(".")[2] for key in KEYS}
    close = nearest(last, tails.values(), 1)
    exact = [key for key in KEYS if tails[key] == last]
    near = exact or nearest(name.upper(), KEYS, 1, 0.75) or [key for key in KEYS if tails[key] in close]
    hint = f"did you mean {' or '.join(near[:3])}?" if near else "gn-det configs --keys lists all keys"
    return ConfigError(f"{source}: unknown key {one_line(name)}; {hint}")


def _known(loaded: Mapping[str, Any], source: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values of nested sections; raise for unknown keys."""
    for part, value in loaded.items():
        name = f"{prefix}{part}"
        if name not in KEYS and name not in _SECTIONS:
            raise _unknown_key(name, source)
        if (name in _SECTIONS) != isinstance(value, Mapping):
            keys = [key.removeprefix(f"{name}.") for key in KEYS if key.startswith(f"{name}.")]
            problem = f"is a section; set one of its keys ({some(keys)})" if keys else "is a single value"
            raise ConfigError(f"{source}: {name} {problem}, got {shown(value)}")
        if isinstance(value, Mapping):
            yield from _known(value, source, f"{name}.")
        else:
            yield name, value


def _typed(value: Any, default: Any) -> Any:
    """Convert ``value`` to the type of ``default`` if possible; text is parsed as Python, integers become floats."""
    if isinstance(default, str):
        return str(value) if isinstance(value, (str, int, float, os.PathLike)) else value
    if isinstance(value, str):
        words = {"true": True, "false": False, "none": None}
        with suppress(ValueError):  # a name, for a list of names
            value = words[value.lower()] if value.lower() in words else python_value(value)
    if isinstance(default, (tuple, list)):
        return type(default)(value if isinstance(value, (tuple, list)) else (value,))
    if isinstance(default, float) and is_number(value) and abs(value) < 1e300:
        return float(value)
    return value


def _set(cfg: CN, name: str, value: Any, source: str) -> None:
    value = _typed(value, KEYS[name].default)
    check_value(name, value, source)
    set_value(cfg, name, value)


# ------------------------------------------------------------ files


#: A file, and the folder of its bases (for a link, that of the link).
_Place = tuple[Path, Path]


class _Files:
    """A config file and its bases, each read once; ``written_for``: of the outermost shipped file."""

    def __init__(self) -> None:
        self.written_for: tuple[int, int] | None = None
        self._read: dict[_Place, dict[str, tuple[Any, str]]] = {}
        self._left = MAX_BYTES

    def load(self, path: Path, chain: tuple[_Place, ...] = ()) -> dict[str, tuple[Any, str]]:
        """Merge a file over its bases, in fvcore's order; return each value with its file."""
        source = f"config file {one_line(str(path), 300)}"
        place = (Path(os.path.realpath(path)), Path(os.path.realpath(path.parent)))
        with suppress(OSError):  # deleted meanwhile
            self._left -= path.stat().st_size
        if place in chain:
            raise ConfigError(f"{source}: {BASE_KEY} leads back to the file itself")
        if place in self._read:
            return self._read[place]
        if len(self._read) + len(chain) >= MAX_FILES or self._left < 0:
            raise ConfigError(f"{source}: {BASE_KEY} leads to more than {MAX_FILES} files or {MAX_BYTES // 1024} kB")
        loaded = read_yaml(path)
        bases = loaded.pop(BASE_KEY, [])
        bases = bases if isinstance(bases, list) else [bases]
        if not all(isinstance(base, str) and base for base in bases):
            raise ConfigError(f"{source}: {BASE_KEY} must name a file or a list of files, got {shown(bases)}")
        own = {name: (value, str(path)) for name, value in _known(loaded, str(path))}
        values: dict[str, tuple[Any, str]] = {}
        for base in bases:
            values |= self.load(_base_path(path, base, source), (*chain, place))
        if place[0].parent == shipped_folder("configs"):
            self.written_for = _WRITTEN_FOR.get(place[0].name, self.written_for)
        self._read[place] = values | own
        return self._read[place]


def _base_path(path: Path, base: str, source: str) -> Path:
    """Resolve a base: a file relative to the folder of the file that names it, or a shipped config."""
    if "://" in base:
        raise ConfigError(f"{source}: {BASE_KEY} {shown(base)} is a URL; download the file and name its path")
    found = Path(os.path.join(path.parent, os.path.expanduser(base)))
    if os.path.isfile(found):
        return found
    try:
        return shipped_config(base)
    except ConfigError as error:
        raise ConfigError(f"{source}: {BASE_KEY} (looked for {one_line(str(found), 300)}): {error}") from None


def merge_overrides(cfg: CN, overrides: Overrides, source: str = "command line") -> set[str]:
    """Set the keys in ``overrides`` and return them; schedule keys among them are not rescaled.

    ``source`` names their origin in errors.
    """
    pairs = dict(_known(overrides if isinstance(overrides, Mapping) else dict(_pairs(overrides)), source))
    for name, value in pairs.items():
        _set(cfg, name, value, source)
        if KEYS[name].rescaled and name not in cfg.SOLVER.NO_RESCALE:
            cfg.SOLVER.NO_RESCALE = (*cfg.SOLVER.NO_RESCALE, name)
    return set(pairs)


def _pairs(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    it = iter(argv)
    for argument in it:
        if argument.startswith("-"):
            raise ConfigError(
                f"command line: unknown option {one_line(argument)}; see --help (config keys are written KEY VALUE)"
            )
        key, equals, text = argument.partition("=")
        value = text if equals else next(it, None)
        if value is None:
            raise ConfigError(f"command line: key {one_line(argument)} has no value; write KEY VALUE")
        yield key, value


def load_config(name_or_path: str | os.PathLike[str], overrides: Overrides = (), *, check: bool = True) -> CN:
    """Read a config by path or shipped name, apply overrides, and check it.

    Args:
        check: refuse what the embedded engine does not implement, and values that contradict each other.

    Raises:
        ConfigError: missing file, invalid YAML, unknown or duplicate key, or invalid value.
    """
    cfg, files = get_cfg(), _Files()
    values = files.load(resolve_config(os.fspath(name_or_path)))
    if files.written_for is not None:
        # Before the values of the files, so that these keys keep what any file gives them.
        cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.REFERENCE_BATCH = files.written_for
        # A length in the user's own YAML is kept.
        cfg.SOLVER.AUTO_EPOCHS = Path(values["SOLVER.MAX_ITER"][1]).resolve().parent == shipped_folder("configs")
    for name, (value, source) in values.items():
        _set(cfg, name, value, source)
    merge_overrides(cfg, overrides)
    if check:
        check_config(cfg)
    return cfg


# ------------------------------------------------------------ text


def dump_config(cfg: CN, *, implemented_only: bool = False) -> str:
    """Return YAML text that :func:`parse_config` and Detectron2 can read.

    ``implemented_only`` omits the sections of models that the embedded engine lacks.
    """

    def plain(value: Any, name: str) -> Any:
        if isinstance(value, Mapping):
            if implemented_only and name and not _implemented(name):
                return {}
            inner = {part: plain(v, f"{name}.{part}".lstrip(".")) for part, v in value.items()}
            return {part: v for part, v in inner.items() if v != {}}
        return as_lists(value)

    return yaml.safe_dump(plain(cfg, ""), sort_keys=False, allow_unicode=True, default_flow_style=None)


def _implemented(section: str) -> bool:
    """Return whether the embedded engine accepts non-default values for any key of a section."""
    keys = [key for key in KEYS.values() if key.name.startswith(f"{section}.")]
    return not keys or any(key.implemented("embedded") != (key.default,) for key in keys)


def parse_config(text: str, source: str) -> CN:
    """Parse a config from YAML text, such as that stored in a checkpoint; unknown keys are an error."""
    cfg = get_cfg()
    try:
        loaded = parse_yaml(text, "its YAML")
        if not isinstance(loaded, dict):
            raise ConfigError("it has no keys")
    except ConfigError as error:
        raise ConfigError(f"{source}: the stored config is not readable ({error}); name one with --config") from None
    for name, value in _known(loaded, source):
        _set(cfg, name, value, source)
    check_size(cfg, source)
    return cfg
