"""Parser, common flags, and the config that they describe.

A flag that sets a config key has the key as its ``dest``. Nothing heavy is imported at the top, so ``--help`` is quick.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from gn_det.engine.choice import ENGINES
from gn_det.errors import ConfigError
from gn_det.text import as_line, did_you_mean, shown

if TYPE_CHECKING:
    from fvcore.common.config import CfgNode

OVERRIDES = "config keys, such as SOLVER.BASE_LR 0.01 or SEED=1; they override flags and the config file"


class Parser(argparse.ArgumentParser):
    """Parser whose errors are one line, like any other error; --help shows the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {as_line(message, 300)}; see {self.prog} --help\n")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse flags and positionals in any order; an unknown flag is an error that names the nearest one."""
        args, extra = self.parse_known_intermixed_args(argv)
        if extra:
            near = did_you_mean(extra[0].partition("=")[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(extra)[:150]}{near}")
        return args


def whole(least: int, most: int = 1_000_000) -> Callable[[str], int]:
    """Return an argparse type for whole numbers from ``least`` to ``most``, a million by default."""

    def read(word: str) -> int:
        number = int(word)
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{shown(word)} must be a whole number from {least} to {most}")
        return number

    read.__name__ = "int"  # the name that argparse prints for a word that is not a number
    return read


def batch(word: str) -> int | str:
    """Argparse type of --batch: "auto" or a number of images."""
    return word if word == "auto" else whole(1)(word)


def add_config(parser: argparse.ArgumentParser, *, required: bool = False, overrides: bool = True) -> None:
    text = "YAML file or name of a shipped config (see gn-det configs)"
    parser.add_argument("--config", "--config-file", metavar="FILE", required=required, help=text)
    if overrides:
        parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help=OVERRIDES)


def add_key(parser: Any, flag: str, key: str, text: str, **options: Any) -> None:
    """Add a flag that sets the config key ``key``; ``options`` as for ``add_argument``."""
    parser.add_argument(flag, dest=key, help=f"{text} ({key})", **options)


def add_data(parser: argparse.ArgumentParser, *splits: str) -> None:
    group = parser.add_argument_group("your own data in COCO format")
    for split in splits:
        key, name = f"DATASETS.{split.upper()}", {"train": "training", "val": "validation"}[split]
        add_key(group, f"--{split}-json", f"{key}_JSON", f"{name} annotations", metavar="FILE")
        add_key(group, f"--{split}-images", f"{key}_IMAGES", f"folder of {name} images", metavar="DIR")


def add_own_data(parser: argparse.ArgumentParser) -> None:
    """Add the flags of one's own data that train and check share."""
    text = "folder that Roboflow, CVAT or Label Studio exported in COCO format"
    parser.add_argument("--data", metavar="DIR", help=text)
    add_data(parser, "train", "val")


def add_augment(parser: Any) -> None:
    text = "none, light, strong or lsj: replaces the augmentation of the config"
    parser.add_argument("--augment", metavar="PRESET", help=text)


def add_engine(parser: argparse.ArgumentParser) -> None:
    text = "auto (default) uses Detectron2 if it is installed; embedded does not need it"
    parser.add_argument("--engine", choices=ENGINES, default="auto", help=text)


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the flags that train and eval share."""
    add_key(parser, "--output", "OUTPUT_DIR", "output folder", metavar="DIR")
    add_engine(parser)
    add_key(parser, "--device", "MODEL.DEVICE", "auto, cpu, cuda or cuda:1", metavar="NAME")
    add_verbose(parser)


def add_verbose(parser: argparse.ArgumentParser) -> None:
    text = "show what log.txt holds: all losses, tables of norm layers and parameter groups"
    parser.add_argument("--verbose", action="store_true", help=text)


def add_gpus(parser: Any, text: str = "GPUs on this machine") -> None:
    parser.add_argument("--num-gpus", type=whole(1), default=1, metavar="N", help=text)


def add_restart(parser: argparse.ArgumentParser, *, dry_run: str) -> None:
    """Add the flags of a run that can be interrupted."""
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in the output folder")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run in the output folder")
    parser.add_argument("--dry-run", action="store_true", help=dry_run)


def comma_separated(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def names(word: str) -> str:
    """Argparse type of comma-separated names as the value of a key."""
    return repr(tuple(comma_separated(word)))


def flag_keys(args: argparse.Namespace) -> list[str]:
    """Return the keys set by flags, as overrides: KEY, VALUE, KEY, VALUE ..."""
    given = ((key, value) for key, value in vars(args).items() if key.isupper() and value is not None)
    return [word for key, value in given for word in (key, str(value))]


def config_from_args(args: argparse.Namespace, engine: str = "embedded") -> CfgNode:
    """Return the config named by ``--config`` with flags and overrides applied, checked for ``engine``.

    Flags win over the YAML, overrides win over flags. Without ``--config``, ``eval`` reads the checkpoint's own config.
    """
    from gn_det.config import load_config
    from gn_det.config.check import check_config
    from gn_det.config.load import merge_overrides

    given = vars(args)
    if args.config is None:
        from gn_det.checkpoint.meta import config_of_checkpoint

        cfg = config_of_checkpoint(given["MODEL.WEIGHTS"])
    else:
        cfg = load_config(args.config, check=False)
    keys = _data_keys(args)
    merge_overrides(cfg, keys)
    merge_overrides(cfg, flag_keys(args))
    if cfg.DATASETS.TRAIN_JSON and not cfg.DATASETS.VAL_JSON and (keys or given.get("DATASETS.TRAIN_JSON")):
        cfg.DATASETS.TEST = ()  # the config's own test set belongs to its own training set
    merge_overrides(cfg, _training_keys(given))
    literal = merge_overrides(cfg, args.overrides)
    if given.get("augment") is not None:
        from gn_det.config.presets import apply_augmentation

        apply_augmentation(cfg, args.augment, literal)
    if given.get("allow_partial"):
        from gn_det.checkpoint.weights_uri import with_option

        cfg.MODEL.WEIGHTS = with_option(cfg.MODEL.WEIGHTS, "allow_partial=True")
    check_config(cfg, engine)
    return cfg


def _training_keys(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config keys of --balance and --batch, each of which sets more than its value."""
    keys: dict[str, Any] = {}
    if given.get("balance") is not None:
        keys["DATALOADER.SAMPLER_TRAIN"] = "RepeatFactorTrainingSampler"
        keys["DATALOADER.REPEAT_THRESHOLD"] = given["balance"]
    if given.get("batch") == "auto":
        keys["SOLVER.AUTO_BATCH"] = True
    elif given.get("batch") is not None:
        keys["SOLVER.IMS_PER_BATCH"] = given["batch"]
    return keys


def _data_keys(args: argparse.Namespace) -> dict[str, Any]:
    """Return the config keys for the folder given by ``--data``; if it has one json, 20% of the images are held out."""
    given = vars(args)
    if not given.get("data"):
        return {}
    if given["DATASETS.TRAIN_JSON"] or given["DATASETS.VAL_JSON"]:
        raise ConfigError("--data finds the json files itself; give it, or --train-json and --val-json")
    from gn_det.data.layouts import find_layout

    keys: dict[str, Any] = find_layout(args.data)
    if "DATASETS.VAL_JSON" not in keys and "DATASETS.VAL_FRACTION" in given:
        keys["DATASETS.VAL_FRACTION"] = 0.2
    return keys
