"""The flags of every command of :mod:`gn_det.cli`. Imports argparse alone, so that ``--help`` answers at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import NoReturn

from gn_det.engine.choice import ENGINES
from gn_det.text import as_line, shown

_OVERRIDES = "config keys after the flags, as in SOLVER.BASE_LR 0.01 or SEED=1; they win over the file"


#: Of processes, machines and the like.
_MOST = 1_000_000


class Parser(argparse.ArgumentParser):
    """A mistake in the flags is one line, like any other mistake; the usage is what --help is for."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {as_line(message, 300)}; see {self.prog} --help\n")


def _whole(least: int) -> Callable[[str], int]:
    """A type for argparse: whole numbers that a machine could have of anything, at least ``least``."""

    def read(word: str) -> int:
        number = int(word)
        if not least <= number <= _MOST:
            raise argparse.ArgumentTypeError(f"{shown(word)} must be a whole number from {least} to {_MOST}")
        return number

    read.__name__ = "int"  # argparse names the type where a word is no number at all
    return read


def _add_config(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "--config",
        "--config-file",
        metavar="FILE",
        required=required,
        help="a YAML file or the name of a shipped config (gn-det configs lists them)",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help=_OVERRIDES)


def _add_data(parser: argparse.ArgumentParser, splits: Sequence[str]) -> None:
    group = parser.add_argument_group("own data in COCO format")
    for split in splits:
        key = f"DATASETS.{split.upper()}_JSON"
        group.add_argument(f"--{split}-json", metavar="FILE", help=f"{split} annotations ({key})")
        group.add_argument(f"--{split}-images", metavar="DIR", help=f"folder of the {split} images")


def _add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="auto",
        help="auto (default) takes detectron2 where it is installed; embedded needs nothing but gn_det",
    )


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", metavar="DIR", help="OUTPUT_DIR")
    _add_engine(parser)
    parser.add_argument("--device", metavar="NAME", help="MODEL.DEVICE: auto, cpu, cuda, cuda:1")


def train_parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description="Fine-tune, train from scratch, or evaluate.")
    _add_config(parser, required=True)
    _add_data(parser, ("train", "val"))
    _add_common(parser)
    parser.add_argument("--weights", metavar="FILE", help="MODEL.WEIGHTS: initial weights, path or URI")
    parser.add_argument("--allow-partial", action="store_true", help="load of the weights what fits, report the rest")
    parser.add_argument("--epochs", type=float, metavar="N", help="train N passes over the data (SOLVER.EPOCHS)")
    parser.add_argument(
        "--max-hours",
        type=float,
        metavar="H",
        help="end after H hours, with an evaluated checkpoint (SOLVER.MAX_HOURS)",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR")
    parser.add_argument("--overwrite", action="store_true", help="start anew where OUTPUT_DIR holds an earlier run")
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS, train nothing")
    parser.add_argument("--dry-run", action="store_true", help="print all that is resolved; needs no data or weights")
    group = parser.add_argument_group("several GPUs or machines (or launch with torchrun)")
    group.add_argument("--num-gpus", type=_whole(1), default=1, metavar="N", help="GPUs on this machine")
    group.add_argument("--num-machines", type=_whole(1), default=1, metavar="N")
    group.add_argument("--machine-rank", type=_whole(0), default=0, metavar="R")
    group.add_argument("--dist-url", default="auto", metavar="URL", help="tcp://host:port of machine 0")
    return parser


def eval_parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description="Evaluate a checkpoint: COCO box and mask AP.")
    _add_config(parser, required=False)
    _add_data(parser, ("val",))
    _add_common(parser)
    parser.add_argument("--weights", metavar="FILE", required=True, help="checkpoint; brings its config along")
    return parser


def predict_parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description="Detect and draw on images.")
    parser.add_argument("inputs", nargs="+", metavar="IMAGE", help="images, folders or globs")
    parser.add_argument("--weights", metavar="FILE", required=True, help="checkpoint of gn-det train")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder for drawings and predictions.json")
    parser.add_argument("--threshold", type=float, default=0.5, metavar="P", help="lowest score shown (default 0.5)")
    parser.add_argument("--classes", metavar="A,B", help="only these classes, by name, separated by commas")
    parser.add_argument("--config", "--config-file", metavar="FILE", help="default: the config in the checkpoint")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1")
    return parser


def check_parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=prog,
        description="Find what is wrong with a dataset before training does: every problem, where it is, what to do.",
        epilog="Exit status: 0 clean (notes do not count), 1 warnings only, 2 errors: training would refuse the set or "
        "drop entries of it.",
    )
    _add_config(parser, required=False)
    _add_data(parser, ("train", "val"))
    parser.add_argument("--images", action="store_true", help="decode every image, on all cores")
    parser.add_argument("--json", metavar="FILE", help="write the report for machines")
    parser.add_argument("--html", metavar="FILE", help="write the report as one page with drawn samples")
    parser.add_argument(
        "--fix",
        metavar="FILE",
        help="write a copy of --train-json without what training drops, repairs made; the changes are listed beside it",
    )
    return parser


def pretrain_parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=prog, description="Train a classifier by the paper's recipe: a backbone with any norm for MODEL.WEIGHTS."
    )
    parser.add_argument(
        "--arch", required=True, metavar="NAME", help="resnet18|34|50|101, or resnet8|14|20 (tiny images)"
    )
    parser.add_argument("--norm", required=True, metavar="NAME", help="BN, LN, IN or GN")
    parser.add_argument(
        "--data", required=True, metavar="DIR", help="folder with train/<class>/* and val/<class>/*; or digits, shapes"
    )
    parser.add_argument("--output", metavar="DIR", help="default output/pretrain_ARCH_NORM")
    parser.add_argument("--groups", type=int, metavar="N", help="GN's groups in every layer (default 32)")
    parser.add_argument("--channels-per-group", type=int, metavar="N", help="GN's channels per group instead")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images of one process (default 32)")
    parser.add_argument(
        "--epochs", type=float, metavar="N", help="default 100; lr drops after 30, 60 and 90 %% of them"
    )
    parser.add_argument("--lr", type=float, metavar="X", help="default 0.1 for 256 images in an iteration, linear")
    parser.add_argument("--seed", type=int, metavar="N", help="default 1")
    parser.add_argument("--image-size", type=int, metavar="N", help="side of the crops (default 224)")
    parser.add_argument("--images", type=int, metavar="N", help="generated training images of --data shapes")
    parser.add_argument("--no-color", dest="color", action="store_false", default=None, help="no colour augmentation")
    parser.add_argument(
        "--stride-in-1x1",
        action="store_true",
        default=None,
        help="bottlenecks stride in the first 1x1, as the bn_* configs have it; without, as the gn_* configs",
    )
    parser.add_argument("--amp", metavar="TYPE", help="autocast: bf16, fp16 or off (default)")
    parser.add_argument("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that read images (default 4)")
    parser.add_argument(
        "--num-gpus", type=_whole(1), default=1, metavar="N", help="GPUs on this machine, or use torchrun"
    )
    parser.add_argument("--resume", action="store_true", help="go on after the last finished epoch")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run in the folder")
    parser.add_argument("--dry-run", action="store_true", help="print data, network and recipe; train nothing")
    return parser


def compare_parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=prog,
        description="Run the rows of a suite that are missing, and report them side by side with their noise.",
        epilog="Exit status: 0 all rows done, 1 a row failed (the others are done and reported), 2 refused before the "
        "first run.",
    )
    parser.add_argument("words", nargs="*", metavar="SUITE.yaml | KEY VALUE", help="a suite, and " + _OVERRIDES)
    parser.add_argument("--output", metavar="DIR", help="folder of runs and report (default output/compare/NAME)")
    parser.add_argument("--rows", metavar="A,B", help="only these rows, by id, * for any text")
    parser.add_argument("--seeds", type=int, metavar="N", help="N runs of every row, with seeds 1 to N")
    parser.add_argument(
        "--epochs", type=float, metavar="N", help="N passes over the data in every detection row (SOLVER.EPOCHS)"
    )
    parser.add_argument("--num-gpus", type=_whole(1), default=1, metavar="N", help="GPUs of each run on this machine")
    parser.add_argument("--dry-run", action="store_true", help="print the rows and what is missing; run nothing")
    parser.add_argument("--report-only", action="store_true", help="write the report of what is there; run nothing")
    parser.add_argument(
        "--any-version", action="store_true", help="finished runs of another version of gn_det count as done"
    )
    _add_engine(parser)
    _add_data(parser, ("train", "val"))
    parser.add_argument("--configs", nargs="+", metavar="FILE", help="rows on own data; the first is the baseline")
    return parser


def quickstart_parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=prog, description="Train a small GN Mask R-CNN on generated shapes, evaluate it, draw what it sees."
    )
    parser.add_argument("--output", default="output/quickstart", metavar="DIR")
    _add_engine(parser)
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help=_OVERRIDES)
    return parser


def weights_parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description="What a weights file is, where it would load, what preprocessing it wants.")
    parser.add_argument("weights", metavar="PATH|URI")
    _add_config(parser, required=False)
    return parser


def convert_parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description="Write weights of any known source in another layout, bit for bit.")
    parser.add_argument("source", metavar="IN", help="path or URI")
    parser.add_argument("target", metavar="OUT", help=".pth or .safetensors")
    parser.add_argument(
        "--to",
        default="",
        metavar="LAYOUT",
        help="detectron2 (default), torchvision, timm (backbone alone), safetensors",
    )
    parser.add_argument("--fold", action="store_true", help="fold the target's usual preprocessing into the stem")
    return parser


def configs_parser(prog: str) -> argparse.ArgumentParser:
    return Parser(prog=prog, description="List the shipped configs and what each reproduces.")


def doctor_parser(prog: str) -> argparse.ArgumentParser:
    return Parser(prog=prog, description="Versions, GPUs, engines; what is broken, and the fix.")
