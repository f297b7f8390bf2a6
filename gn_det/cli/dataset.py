"""Convert annotations of YOLO, Pascal VOC, LabelMe, CVAT or PNG masks to COCO json and back, and split datasets."""

from __future__ import annotations

import argparse
from pathlib import Path

from gn_det.cli import flags
from gn_det.data.formats import FORMATS


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="annotation file or folder of the dataset")
    parser.add_argument("--output", type=Path, metavar="DIR", required=True, help="folder for the converted dataset")
    parser.add_argument("--from", dest="given", choices=FORMATS, help="format of the source (default: detected)")
    parser.add_argument("--to", choices=FORMATS, default="coco", help="format to write (default coco)")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of the images")
    parser.add_argument("--classes", metavar="A,B", help="all class names in their order, separated by commas")
    parser.add_argument("--split", metavar="P,P", help="shares of train and val (and test), such as 0.8,0.2")
    parser.add_argument("--seed", type=flags.whole(0), default=0, metavar="N", help="of the split (default 0)")
    parser.add_argument("--copy-images", action="store_true", help="copy the images into the output folder")
    parser.add_argument("--max-bad", type=flags.whole(0), default=0, metavar="N", help="wrong entries left out")


def run(args: argparse.Namespace) -> int:
    from gn_det.data.formats import exchange
    from gn_det.errors import ConfigError
    from gn_det.terminal import say

    try:
        shares = [float(word) for word in flags.comma_separated(args.split)]
    except ValueError:
        raise ConfigError(f"--split {args.split}: give numbers such as 0.8,0.2") from None
    name = args.given or exchange.detect_format(args.source)
    document, bad = exchange.read(
        name, args.source, args.images, flags.comma_separated(args.classes), max_bad=args.max_bad
    )
    for line in bad:
        say(f"left out: {line}")
    root = args.images or _images_of(args.source)
    parts = exchange.split(document, shares, args.seed) if args.split is not None else {"": document}
    for part, content in parts.items():
        folder = args.output / part
        if args.copy_images:
            exchange.copy_images(content, root, folder / "images")
        for note in exchange.write(args.to, content, folder, folder / "images" if args.copy_images else root):
            say(f"note: {note}")
        say(f"{folder}: {args.to}, {exchange.summary(content)}")
    return 0


def _images_of(source: Path) -> Path:
    """Where a format keeps its images beside the annotations."""
    folder = source if source.is_dir() else source.parent
    return next((folder / name for name in ("images", "JPEGImages") if (folder / name).is_dir()), folder)
