"""Write a trained detector as ONNX, a torch.export program or a compiled package."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from gn_det.cli import flags

#: An example of an output by format.
_NAMES = {"onnx": "model.onnx", "pt2": "model.pt2", "aoti": "model.pt2"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--weights", metavar="FILE", required=True, help="checkpoint of gn-det train")
    add("--output", metavar="FILE", required=True, help="file to write")
    text = "onnx (default); pt2: a torch.export program; aoti: the same, compiled for this CPU (needs --check)"
    add("--to", choices=tuple(_NAMES), default="onnx", help=text)
    shape = parser.add_mutually_exclusive_group()
    text = "fixed height and width of the input, such as 800x1344"
    shape.add_argument("--size", metavar="HxW", type=_size, help=text)
    shape.add_argument("--dynamic", action="store_true", help="any height and width (default)")
    add("--batch", type=flags.whole(1), metavar="N", help="fixed number of images (default: any; 1 with --size)")
    add("--opset", type=flags.whole(1), default=18, metavar="N", help="of ONNX (default 18)")
    add("--fp16", action="store_true", help="half-precision weights and convolutions; boxes stay float32")
    add("--paste", action="store_true", help="masks at the size of the input, not 28x28 within the boxes")
    flags.add_config(parser, overrides=False)
    check = parser.add_argument_group("comparison with the original")
    check.add_argument("--check", nargs="+", metavar="IMAGE", help="images, folders or globs to compare on")
    check.add_argument("--check-json", metavar="FILE", help="COCO json of these images: compare AP, too")
    text = "what runs the ONNX file: cpu, cuda, tensorrt, openvino"
    check.add_argument("--provider", default="cpu", metavar="NAME", help=text)


def _size(word: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,6})x(\d{1,6})", word)
    if found is None:
        raise argparse.ArgumentTypeError(f"{word!r} is not HEIGHTxWIDTH, such as 800x1344")
    return int(found[1]), int(found[2])


def _check_output(name: str, to: str) -> None:
    """Refuse a folder, and the extension of another format."""
    from gn_det.errors import ConfigError
    from gn_det.text import one_line

    path, where = Path(name).expanduser(), f"--output {one_line(name, 400)}"
    if path.is_dir():
        raise ConfigError(f"{where}: it is a folder; name a file, such as {path / _NAMES[to]}")
    suffix = path.suffix.lower()
    if suffix in (".onnx", ".pt2") and not _NAMES[to].endswith(suffix):
        other = "--to pt2 or aoti" if suffix == ".pt2" else "--to onnx"
        raise ConfigError(f"{where}: --to {to} writes another format; use {other}, or a name like {_NAMES[to]}")


def run(args: argparse.Namespace) -> int:
    from gn_det.data.inputs import collect_images
    from gn_det.deploy.detector import find_provider
    from gn_det.deploy.export import Options, export
    from gn_det.errors import ConfigError, UserError
    from gn_det.terminal import say

    if args.check_json and not args.check:
        raise ConfigError("--check-json needs --check with the images")
    if args.to == "aoti" and not args.check:
        raise ConfigError("--to aoti needs --check with some images: a compiled model is compared with the original")
    # An export takes minutes: everything that can be wrong without it is refused before.
    _check_output(args.output, args.to)
    if args.check:
        from gn_det.deploy.parity import compare, image_ids

        paths, _ = collect_images(args.check)
        if args.to == "onnx":
            find_provider(args.provider)
        if args.check_json:
            image_ids(args.check_json, paths)
    options = Options(args.to, args.size, args.batch, args.opset, args.fp16, args.paste)
    exported = export(args.weights, args.output, options, config=args.config)
    names = ("batch", "height", "width")
    shape = " x ".join(str(fixed or name) for fixed, name in zip(exported.shape, names))
    say(f"{exported.path}: {args.to}, {exported.path.stat().st_size / 2**20:.1f} MiB, images {shape} (uint8 RGB)")
    if args.check:
        parity = compare(exported, args.check, ground_truth=args.check_json, provider=args.provider)
        for line in parity.lines():
            say(line)
        if not parity.ok:
            raise UserError(f"{exported.path}: differs from {args.weights} by more than the tolerance")
    return 0
