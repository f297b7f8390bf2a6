"""Finding, reading and overriding configs, with every mistake named.

A config is a Detectron2 YAML file (``_BASE_`` inheritance by fvcore). Unknown keys, duplicate keys and wrong types are
errors that name file and key; :mod:`gn_det.config.check` then refuses what the embedded engine does not implement.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import BASE_KEY
from fvcore.common.config import CfgNode as CN

from gn_det.config.check import OTHER_MODELS, check_config
from gn_det.config.defaults import get_cfg
from gn_det.errors import ConfigError


def _configs_dir() -> Path:
    """Folder of the shipped configs: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def shipped_configs() -> list[str]:
    """Names of the experiments that ship with gn_det (the ``Base-*.yaml`` files are their building blocks)."""
    return sorted(p.name for p in _configs_dir().glob("*.yaml") if not p.name.startswith("Base-"))


def shipped_config(name: str) -> Path:
    """Path of a shipped config by its bare name, with or without ``.yaml``.

    Raises:
        ConfigError: there is none; the message lists the nearest names.
    """
    wanted = name if name.endswith((".yaml", ".yml")) else f"{name}.yaml"
    path = _configs_dir() / wanted
    if path.is_file() and path.parent == _configs_dir():
        return path
    names = shipped_configs()
    near = difflib.get_close_matches(wanted, names, n=3) or names
    raise ConfigError(f"config '{name}' is neither a file nor a shipped config; did you mean {', '.join(near)}?")


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
    if folder is None or Path(name).is_absolute() or ".." in Path(name).parts:
        return None
    wanted = folder / (name if name.endswith((".yaml", ".yml")) else f"{name}.yaml")
    return wanted if wanted.is_file() else None


def _no_zoo_config(name: str) -> ConfigError:
    """The error for a name with a folder in it that is no file: near names of Detectron2's zoo, where it is there."""
    folder = _zoo_dir()
    names = [] if folder is None else [p.relative_to(folder).as_posix() for p in folder.glob("*/*.yaml")]
    if name.partition("/")[0] not in {n.partition("/")[0] for n in names}:
        missing = "" if folder else " (names of Detectron2's model zoo need Detectron2 installed)"
        return ConfigError(f"config '{name}' does not exist{missing}")
    near = difflib.get_close_matches(name, names, n=3)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    return ConfigError(f"config '{name}' is neither a file nor in Detectron2's model zoo{hint}")


def resolve_config(name_or_path: str) -> Path:
    """A path as given where a file is there, otherwise the config of that name.

    ``gn_fpn_long.yaml`` is one of gn_det's; ``Misc/mask_rcnn_R_50_FPN_3x_gn.yaml`` is found among Detectron2's own,
    where Detectron2 is installed.

    Raises:
        ConfigError: neither; the message lists the nearest names.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise ConfigError(f"config '{name_or_path}' is a folder; name a .yaml file")
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


class _StrictLoader(yaml.SafeLoader):
    """A safe loader to which a key that stands twice is an error (plain YAML silently keeps the last)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"config file {path} cannot be read: {e}") from None
    try:
        loaded = yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"config file {path}{where}: {e.problem or 'not valid YAML'}") from None
    except yaml.YAMLError as e:
        raise ConfigError(f"config file {path} is not valid YAML: {' '.join(str(e).split())}") from None
    if loaded is None:
        raise ConfigError(f"config file {path} is empty")
    if not isinstance(loaded, dict):
        raise ConfigError(f"config file {path} must hold keys and values, not a {type(loaded).__name__}")
    return loaded


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
    near = near or difflib.get_close_matches(dotted.upper(), keys, n=1, cutoff=0.75)
    if not near:
        tails = sorted({k.rpartition(".")[2] for k in keys})
        close = difflib.get_close_matches(last, tails, n=1)
        near = [k for k in keys if close and k.rpartition(".")[2] == close[0]]
    hint = f"did you mean {' or '.join(near[:3])}?" if near else "see gn_det/config/defaults.py for all keys"
    return ConfigError(f"{source}: unknown key {dotted}; {hint}")


def _check_keys(loaded: Mapping[str, Any], cfg: CN, source: str, prefix: str = "") -> None:
    for name, value in loaded.items():
        if name == BASE_KEY:
            continue
        dotted = f"{prefix}{name}"
        try:
            known = _lookup(cfg, dotted)
        except KeyError:
            raise _unknown_key(dotted, cfg, source) from None
        if isinstance(known, Mapping) != isinstance(value, Mapping):
            kind = "a section with keys of its own" if isinstance(known, Mapping) else "a single value"
            raise ConfigError(f"{source}: {dotted} is {kind}, got {value!r}")
        if isinstance(value, Mapping):
            _check_keys(value, cfg, source, f"{dotted}.")


def _check_files(path: Path, cfg: CN, chain: tuple[Path, ...] = ()) -> None:
    """Check keys of a config file and of all its bases, so that an error names the file that holds the key.

    What a shipped file among them is written for is set in ``cfg``; the outermost such file decides.
    """
    path = path.resolve()
    if path in chain:
        raise ConfigError(f"config file {path}: {BASE_KEY} leads back to the file itself")
    loaded = read_yaml(path)
    bases = loaded.get(BASE_KEY, [])
    bases = bases if isinstance(bases, list) else [bases]
    if not all(isinstance(base, str) and base for base in bases):
        raise ConfigError(
            f"config file {path}: {BASE_KEY} must name a file or a list of files, got {loaded[BASE_KEY]!r}"
        )
    for base in bases:
        base_path = path.parent / Path(base).expanduser()
        if not base_path.is_file():
            shipped = _configs_dir() / str(base)
            hint = f"; the shipped one is {shipped}" if shipped.is_file() else ""
            raise ConfigError(f"config file {path}: {BASE_KEY} '{base}' does not exist (looked for {base_path}){hint}")
        _check_files(base_path, cfg, (*chain, path))
    _check_keys(loaded, cfg, str(path))
    if path.name in _WRITTEN_FOR and path.parent == _configs_dir().resolve():
        cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.REFERENCE_BATCH = _WRITTEN_FOR[path.name]


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
            value = words[value.lower()] if value.lower() in words else ast.literal_eval(value)
        except (ValueError, SyntaxError):
            if not isinstance(default, (tuple, list)):
                raise TypeError from None
    if default is None:
        return value
    if isinstance(default, (tuple, list)):
        items = type(default)(value if isinstance(value, (tuple, list)) else (value,))
        if default and not all(_same_kind(item, default[0]) for item in items):
            raise TypeError
        return items
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise TypeError
    return value


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
    try:
        node[name] = _typed(value, node[name])
    except TypeError:
        kind = "None or a number" if node[name] is None else type(node[name]).__name__
        raise ConfigError(
            f"{source}: {dotted} must be of type {kind} (such as {node[name]!r}), got {value!r}"
        ) from None


def merge_file(cfg: CN, path: Path) -> None:
    """Merge a config file with its bases into ``cfg``; see :func:`load_config` for the errors."""
    _check_files(path, cfg)
    for dotted, value in _leaves(CN.load_yaml_with_base(str(path))):
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
            raise ConfigError(f"command line: unknown option {word}; see --help (config keys are written KEY VALUE)")
        key, equals, value = word.partition("=")
        if not equals:
            try:
                value = next(it)
            except StopIteration:
                raise ConfigError(f"command line: key {word} has no value; write {word} VALUE") from None
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
        loaded = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError:
        loaded = None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{source}: the stored config is not readable; name one with --config")
    _check_keys(loaded, cfg, source)
    for dotted, value in _leaves(loaded):
        _set(cfg, dotted, value, source)
    return cfg
