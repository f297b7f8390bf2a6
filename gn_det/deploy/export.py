"""Write a trained detector as ONNX, as a ``torch.export`` program, or as an AOTInductor package."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gn_det.config.defaults import get_value
from gn_det.deploy.detector import LEAST, NAME, STORED, Metadata
from gn_det.deploy.graph import GraphDetector, onnx_nms, portable_nms
from gn_det.engine import choice
from gn_det.errors import ConfigError, UserError
from gn_det.files import StrPath, atomic_write
from gn_det.modeling.mask_rcnn import MaskRCNN
from gn_det.prediction.predictor import Predictor, load_predictor
from gn_det.text import one_line

#: Below 21, a GN is InstanceNormalization and BatchNormalization; from 21 on, GroupNormalization, which ONNX defines
#: by E[x^2] - E[x]^2, and onnxruntime's CPU computes it so: where the mean is 30 standard deviations it is wrong by
#: 2e-3, InstanceNormalization by 2e-5.
OPSETS = (18, 19, 20, 21, 22, 23)
#: torch 2.6 cannot export graphs whose sizes depend on the data.
_LEAST_TORCH = (2, 7)
#: Largest batch and side of a dynamic graph.
_MOST_IMAGES, _MOST_SIDE = 1024, 16384


@dataclass(frozen=True)
class Options:
    """Options of an export."""

    to: str = "onnx"  # or "pt2", "aoti"
    size: tuple[int, int] | None = None  # height and width of the input in pixels; None: dynamic
    batch: int | None = None  # images per batch; None: dynamic, or 1 with a ``size``
    opset: int = 18  # of ONNX
    fp16: bool = False  # store and compute convolutions in half precision
    paste: bool = False  # return masks at the size of the input


@dataclass(frozen=True)
class Exported:
    """An exported file and its original model."""

    path: Path
    options: Options
    metadata: Metadata
    predictor: Predictor  # the original model
    outputs: tuple[str, ...]  # names, in order

    @property
    def shape(self) -> tuple[int | None, int | None, int | None]:
        """Batch, height and width of the input; None if dynamic."""
        height, width = self.options.size or (None, None)
        return self.options.batch or (None if height is None else 1), height, width


def export(weights: StrPath, output: StrPath, options: Options = Options(), *, config: str | None = None) -> Exported:
    """Write the detector in ``weights``, atomically.

    Args:
        weights: a checkpoint of gn_det, or other weights with ``config``.
        config: path or shipped name; None uses the config stored in the checkpoint.

    Raises:
        UserError: the options do not fit the model, the weights cannot be used, or torch cannot export.
    """
    path = Path(os.path.expanduser(output))
    # by numbers: to TorchVersion the 2.7.0a0 of NVIDIA's containers is older than 2.7
    if tuple(map(int, torch.__version__.split(".")[:2])) < _LEAST_TORCH:
        least, remedy = ".".join(map(str, _LEAST_TORCH)), "pip install -U torch torchvision"
        raise ConfigError(f"export needs torch {least} or newer; this is {torch.__version__}: {remedy}")
    if options.to == "onnx" and options.opset not in OPSETS:
        raise ConfigError(f"--opset {options.opset}: use one of {', '.join(map(str, OPSETS))}")
    engine = choice.load(choice.Choice("embedded", ""))
    predictor = load_predictor(weights, config=config, overrides=("TEST.AMP", "False"), device="cpu", engine=engine)
    model, cfg = predictor.module, predictor.config
    assert isinstance(model, MaskRCNN) and cfg is not None
    divisor = max(model.backbone.size_divisibility, 1)
    size, most = options.size or (), _MOST_SIDE // divisor * divisor
    good = [min(max(-(-side // divisor) * divisor, LEAST), most) for side in size]
    if good != [*size]:
        raise ConfigError(
            f"--size {'x'.join(map(str, size))}: this model takes sides from {LEAST} to {_MOST_SIDE} that are "
            f"multiples of {divisor}; use {'x'.join(map(str, good))}"
        )
    for section in ("ROI_BOX_HEAD", "ROI_MASK_HEAD"):
        if options.to == "onnx" and cfg.MODEL[section].POOLER_TYPE == "ROIPool":
            pooler = f"MODEL.{section}.POOLER_TYPE ROIPool"
            raise ConfigError(f"{pooler} cannot be exported to ONNX; use --to pt2, or train with ROIAlignV2")
    graph = GraphDetector(
        model,
        cfg.INPUT.FORMAT,
        half=options.fp16,
        paste=options.paste,
        suppress=onnx_nms if options.to == "onnx" else portable_nms,
    )
    kind = "none" if model.roi_heads.mask_head is None else "image" if options.paste else "box"
    metadata = Metadata(
        class_names=tuple(predictor.class_names),
        category_ids=tuple(predictor.category_ids),
        divisor=divisor,
        masks=kind,
        precision="fp16" if options.fp16 else "fp32",
        keys={key: get_value(cfg, key) for key in STORED},
        thresholds=tuple(predictor.thresholds),
    )
    with quiet():
        try:
            program = trace(graph, len(cfg.MODEL.PIXEL_MEAN), options, divisor)
            if options.to == "onnx":
                content = _onnx(program, list(graph.outputs), metadata, options.opset)
            elif options.to == "aoti":
                content = _aoti(program, metadata.to_json())
            else:
                file = io.BytesIO()
                torch.export.save(program, file, extra_files={NAME: metadata.to_json()})
                content = file.getvalue()
        except (UserError, KeyboardInterrupt, MemoryError):
            raise
        except Exception as error:  # the exporters raise exceptions of any type
            problem = f"torch {torch.__version__} cannot export this model to {options.to}"
            raise UserError(f"{problem} ({one_line(error, 300)}); use a newer torch") from error
    atomic_write(path, content)
    return Exported(path, options, metadata, predictor, graph.outputs)


def trace(graph: GraphDetector, channels: int, options: Options, divisor: int) -> torch.export.ExportedProgram:
    """Export ``graph`` as a program for the inputs in ``options``, without traces of this machine."""
    free = options.size is None
    batch = options.batch or (2 if free else 1)
    height, width = options.size or (8 * LEAST, 10 * LEAST)
    image = torch.zeros((batch, height, width, channels), dtype=torch.uint8)
    size = torch.tensor([[height, width]] * batch)
    images: dict[int, Any] = {}
    if free and options.batch is None:
        images[0] = torch.export.Dim("batch", min=1, max=_MOST_IMAGES)
    shapes = dict(images)
    if free:
        for axis, name in ((1, "height"), (2, "width")):
            dim = torch.export.Dim(name, min=-(-LEAST // divisor), max=_MOST_SIDE // divisor)
            shapes[axis] = divisor * dim if divisor > 1 else dim
    with torch.no_grad():
        program = torch.export.export(
            graph, (image, size), dynamic_shapes={"image": shapes, "size": images}, strict=False
        )
    for node in program.graph.nodes:
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn"):
            node.meta.pop(key, None)
    return program


def translations(opset: int) -> dict[Any, Any]:
    """ONNX nodes of operators that the exporter would translate otherwise, as its ``custom_translation_table``."""
    import onnx_ir
    from onnxscript import opset18

    op: Any = opset18

    def suppress(boxes: Any, scores: Any, iou: float) -> Any:
        limits = [op.Constant(value_int=2**62), *(op.Constant(value_float=v) for v in (iou, -3e38))]
        return op.NonMaxSuppression(boxes, scores, *limits)

    def group_norm(x: Any, groups: int, weight: Any, bias: Any, eps: float = 1e-5, _: bool = True) -> Any:
        # BatchNormalization with mean 0 and variance 1 applies gamma and beta in one pass, Mul and Add need two.
        zero, one = (onnx_ir.tensor([v], dtype=x.dtype) for v in (0.0, 1.0))
        of_groups, of_channels = op.Constant(value_ints=[groups]), op.Shape(weight)
        grouped = op.Reshape(x, op.Constant(value_ints=[0, groups, -1]))
        scale, shift = (op.ConstantOfShape(of_groups, value=v) for v in (one, zero))
        normal = op.Reshape(op.InstanceNormalization(grouped, scale, shift, epsilon=eps), op.Shape(x))
        mean, variance = (op.ConstantOfShape(of_channels, value=v) for v in (zero, one))
        return op.BatchNormalization(normal, weight, bias, mean, variance, epsilon=0.0)

    table: dict[Any, Any] = {torch.ops.gn_det.onnx_nms.default: suppress}
    if opset < 21:
        table[torch.ops.aten.group_norm.default] = group_norm
    return table


def _onnx(program: torch.export.ExportedProgram, outputs: list[str], metadata: Metadata, opset: int) -> bytes:
    try:
        import onnx_ir

        table = translations(opset)
    except ImportError:
        raise ConfigError("export to ONNX needs onnx and onnxscript: pip install 'gn-det[export]'") from None
    made = torch.onnx.export(
        program,
        (),
        dynamo=True,
        optimize=True,
        opset_version=opset,
        verbose=False,
        custom_translation_table=table,
        input_names=["image", "size"],
        output_names=outputs,
    )
    assert made is not None
    model = made.model
    model.metadata_props[NAME] = metadata.to_json()
    model.producer_name, model.producer_version = "gn_det", metadata.version
    for node in model.graph.all_nodes():  # names of Python objects and lines of source
        node.metadata_props.clear()
        node.doc_string = None
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    _check_reacts(model.graph)
    _name_axes(model.graph)
    return bytes(onnx_ir.to_proto(model).SerializeToString())


def _check_reacts(graph: Any) -> None:
    """Raise UserError if an output does not depend on every input, because the exporter made one a constant."""
    for output in graph.outputs:
        seen, left = set(), [output]
        while left:
            value = left.pop()
            if value is not None and value not in seen:
                seen.add(value)
                left += value.producer().inputs if value.producer() is not None else ()
        if not seen.issuperset(graph.inputs):
            raise UserError(f"the graph's output {output.name} does not depend on its inputs; use a newer torch")


def _name_axes(graph: Any) -> None:
    """Give the dynamic axes of inputs and outputs readable names."""
    import onnx_ir

    names = {"image": ("batch", "height", "width"), "size": ("batch",), "counts": ("batch",)}
    for value in (*graph.inputs, *graph.outputs):
        axes = names.get(value.name, ("detections", "height", "width"))
        dims = [d if isinstance(d, int) else axis for d, axis in zip(value.shape, (*axes, None))]
        value.shape = onnx_ir.Shape([*dims, *list(value.shape)[len(dims) :]])


def _aoti(program: torch.export.ExportedProgram, metadata: str) -> bytes:
    from torch._inductor import aoti_compile_and_package, config

    # With it, a convolution after a transposed one gives wrong values where the batch, here the number of detections,
    # depends on the data (torch 2.14.1, CPU).
    changes = {"layout_optimization": False, "aot_inductor.metadata": {NAME: metadata}}
    with tempfile.TemporaryDirectory() as folder, config.patch(changes):
        path = aoti_compile_and_package(program, package_path=os.path.join(folder, "model.pt2"))
        return Path(path).read_bytes()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide notes that do not concern the user."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
