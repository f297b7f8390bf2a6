"""TorchScript forms of gn_det's modules.

``torch.jit.script`` calls ``__prepare_scriptable__`` and compiles its result instead of the module. The modules look up
layers by name, which TorchScript does not support, so here the same layers are in lists. As with Detectron2's own
backbones, a scripted model therefore has other parameter names. So has the model that was scripted, because torch puts
these forms into it. Script a copy of a model that you want to save or train further.
"""

# mypy: disallow-subclassing-any=False, disallow-untyped-decorators=False

from __future__ import annotations

from typing import Any

from detectron2.modeling.roi_heads import BaseMaskRCNNHead
from torch import Tensor, nn
from torch.nn import functional as F

from gn_det.modeling.fpn import FPN
from gn_det.modeling.heads import BoxHead, MaskHead
from gn_det.modeling.resnet import ResNet


def _keep(form: nn.Module, module: nn.Module) -> None:
    """Keep a reference to the original module in ``form``, hidden from TorchScript.

    torch caches prepared modules by ``id``; if this one were freed, another could get its id and be mistaken for it.
    """
    form.__dict__["stands_for"] = (module,)


class ScriptableResNet(nn.Module):
    """Inference of :class:`gn_det.modeling.resnet.ResNet`."""

    def __init__(self, resnet: ResNet) -> None:
        super().__init__()
        self.size_divisibility: int = 0
        # 0: no square; TorchScript cannot infer the type of an empty dict.
        self.padding_constraints: dict[str, int] = {"square_size": 0}
        self.parts = nn.ModuleDict({name: getattr(resnet, name) for name in ("stem", *resnet.stage_names)})
        self.wanted: list[str] = list(resnet.feature_specs)
        _keep(self, resnet)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features: dict[str, Tensor] = {}
        for name, part in self.parts.items():
            x = part(x)
            if name in self.wanted:
                features[name] = x
        return features


class ScriptableFPN(nn.Module):
    """Inference of :class:`gn_det.detectron2.backbone.GNFPN`; the other arguments are its own attributes."""

    def __init__(self, fpn: FPN, bottom_up: Any, top_block: Any, square_pad: int) -> None:
        super().__init__()
        self.size_divisibility: int = fpn.size_divisibility
        self.padding_constraints: dict[str, int] = {"square_size": square_pad}
        self.average = fpn.average
        self.bottom_up = bottom_up
        coarse_first = list(reversed(fpn.levels))
        self.laterals = nn.ModuleList([getattr(fpn, f"fpn_lateral{level}") for level in coarse_first])
        self.outputs = nn.ModuleList([getattr(fpn, f"fpn_output{level}") for level in coarse_first])
        self.inputs: list[str] = list(reversed(fpn.in_features))
        self.names: list[str] = list(fpn.feature_specs)
        self.top_block = top_block
        self.source: str = "" if top_block is None else top_block.in_feature
        _keep(self, fpn)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.bottom_up(x)
        levels: list[Tensor] = []
        merged = x  # replaced before it is read
        for i, (lateral, output) in enumerate(zip(self.laterals, self.outputs)):
            own = lateral(features[self.inputs[i]])
            if i > 0:
                own = own + F.interpolate(merged, scale_factor=2.0, mode="nearest")
                if self.average:
                    own = own / 2
            merged = own
            levels.insert(0, output(merged))
        if self.top_block is not None:
            below = features[self.source] if self.source in features else levels[self.names.index(self.source)]
            levels.extend(self.top_block(below))
        named: dict[str, Tensor] = {}
        for name, level in zip(self.names, levels):
            named[name] = level
        return named


def scriptable_box_head(head: BoxHead) -> nn.Sequential:
    """Inference of a box head."""
    layers: list[nn.Module] = [*(getattr(head, name) for name in head.convs), nn.Flatten()]
    for name in head.fcs:
        layers += [getattr(head, name), nn.ReLU()]
    form = nn.Sequential(*layers)
    _keep(form, head)
    return form


class ScriptableMaskHead(BaseMaskRCNNHead):
    """Inference of a mask head; ``training`` is compiled as a constant, so that its branch is left out."""

    __constants__ = ["training"]  # noqa: RUF012 - the form that TorchScript reads

    def __init__(self, head: MaskHead) -> None:
        super().__init__()
        convs = [getattr(head, name) for name in head.convs]
        self.stack = nn.Sequential(*convs, head.deconv, nn.ReLU(), head.predictor)
        self.train(head.training)
        _keep(self, head)

    def layers(self, x: Tensor) -> Tensor:
        logits: Tensor = self.stack(x)
        return logits
