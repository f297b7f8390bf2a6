"""Detectron2's own tools, from the source tree named by ``$DETECTRON2_SOURCE`` or installed, on gn_det's configs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("detectron2.config", reason="needs an installed Detectron2")

import detectron2
from detectron2.config import get_cfg

import gn_det
from gn_det.config import shipped_configs
from tests.detectron2.cases import TINY, own_data

pytestmark = pytest.mark.detectron2

#: Everything small, in keys of Detectron2 alone.
SMALL = [*TINY, "MODEL.WEIGHTS", "", "SOLVER.MAX_ITER", "1"]


def tool(name: str) -> str:
    """Path of one of Detectron2's tools."""
    source = os.environ.get("DETECTRON2_SOURCE") or str(Path(os.path.abspath(detectron2.__file__)).parent.parent)
    path = Path(source) / "tools" / name
    if not path.is_file():
        pytest.skip(f"no {path}: set DETECTRON2_SOURCE to a checkout of Detectron2 to run its tools")
    return str(path)


def run(*words: str, cwd: Path, fails: bool = False) -> str:
    """Run a Python program; what it printed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=cwd, env=env, timeout=300)
    output = done.stdout + done.stderr
    assert (done.returncode != 0) == fails, output[-4000:]
    return output


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Keys for own sets, by ``json@images`` names."""
    flags = own_data(tmp_path_factory.mktemp("shapes"))
    train, val = f"{flags[1]}@{flags[3]}", f"{flags[5]}@{flags[7]}"
    return ["DATASETS.TRAIN", repr((train,)), "DATASETS.TEST", repr((val,)), "INPUT.MASK_FORMAT", "bitmask"]


@pytest.mark.parametrize("name", [n for n in shipped_configs() if "_ws_" not in n and "_lsj_" not in n])
def test_shipped_configs_have_detectron2s_keys_alone(name: str) -> None:
    """So every program that calls get_cfg() and merge_from_file reads them; and nothing in them scales a schedule."""
    cfg = get_cfg()
    cfg.merge_from_file(gn_det.config_file(name))
    assert cfg.SOLVER.REFERENCE_WORLD_SIZE == 0


def test_a_tool_as_it_is_reads_a_shipped_config(tmp_path: Path) -> None:
    """analyze_model.py without gn_det's runner."""
    words = [tool("analyze_model.py"), "--config-file", gn_det.config_file("gn_fpn.yaml"), "--tasks", "structure"]
    if torch.cuda.is_available():
        assert "ROIHeads" in run(*words, cwd=tmp_path)
    else:  # MODEL.DEVICE is cuda there, and the tool takes no keys after --tasks: it comes as far as the device
        assert "CUDA" in (text := run(*words, cwd=tmp_path, fails=True)) or "NVIDIA" in text
        assert "KeyError" not in text


def test_analyze_model(tmp_path: Path) -> None:
    """The structure is of gn_det's modules, with the classes of a data set that only gn_det registers."""
    words = ["-m", "gn_det.detectron2", tool("analyze_model.py"), "--config-file", "quickstart.yaml"]
    text = run(*words, "--tasks", "structure", cwd=tmp_path)
    assert "GroupNorm(32, 64, eps=1e-05, kind=GN)" in text
    assert "(cls_score): Linear(in_features=256, out_features=6" in text


def test_visualize_data(data: list[str], tmp_path: Path) -> None:
    """Pictures of own data under json@images names, by annotations and by Detectron2's mapper."""
    words = ["-m", "gn_det.detectron2", tool("visualize_data.py"), "--config-file", "gn_fpn.yaml", "--output-dir"]
    run(*words, str(tmp_path / "drawn"), "--source", "annotation", *data, cwd=tmp_path)
    assert len(list((tmp_path / "drawn").glob("*.jpg"))) == 8


def test_export_model(data: list[str], tmp_path: Path) -> None:
    """Traced for TorchScript; the file holds a program with convolutions and group norms."""
    image = str(next(Path(data[3].split("@")[1].split("'")[0]).glob("*.jpg")))
    words = ["-m", "gn_det.detectron2", tool("deploy/export_model.py"), "--config-file", "quickstart.yaml", "--output"]
    how = ["--export-method", "tracing", "--format", "torchscript", "--sample-image", image]
    run(*words, str(tmp_path / "out"), *how, *SMALL, *data, cwd=tmp_path)
    model = torch.jit.load(str(tmp_path / "out" / "model.ts"))
    assert sum(node.kind() == "aten::group_norm" for node in model.inlined_graph.nodes()) > 20


@pytest.mark.parametrize("name", ["plain_train_net.py", "train_net.py"])
def test_training_tools(name: str, data: list[str], tmp_path: Path) -> None:
    """One iteration and the evaluation, with MODEL.GN.NUM_GROUPS 8."""
    words = ["-m", "gn_det.detectron2", tool(name), "--config-file", "quickstart.yaml", *SMALL, *data]
    text = run(*words, "OUTPUT_DIR", str(tmp_path / "out"), "MODEL.GN.NUM_GROUPS", "8", cwd=tmp_path)
    assert "GroupNorm(8, 64" in text and "AP50" in text
    saved: dict[str, Any] = torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)["model"]
    assert saved["roi_heads.box_predictor.cls_score.weight"].shape[0] == 6


LAZY = """
import torch
import gn_det.detectron2 as gn
from detectron2.config import LazyCall as L
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import CosineParamScheduler

class Net(torch.nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x):
        return {"loss": sum(f.square().mean() for f in self.backbone(x).values())}

def batches():
    return [torch.zeros(1, 3, 32, 32)]

norm = {"norm": "GN"}
resnet = L(gn.GNResNet)(depth=18, out_features=["res2", "res3"], res2_channels=64, freeze_at=0, **norm)
model = L(Net)(backbone=L(gn.GNFPN)(bottom_up=resnet, in_features=["res2", "res3"], out_channels=32, **norm))
optimizer = L(torch.optim.SGD)(params=L(get_default_optimizer_params)(weight_decay_norm=0.0), lr=0.01)
lr_multiplier = L(CosineParamScheduler)(start_value=1.0, end_value=0.0)
dataloader = {"train": L(batches)()}
train = {"output_dir": "out", "init_checkpoint": "", "max_iter": 1, "amp": {"enabled": False}, "ddp": {},
         "device": "cpu", "eval_period": 0, "checkpointer": {"period": 1, "max_to_keep": 1}, "log_period": 1, "seed": 1}
"""


def test_lazyconfig_train_net(tmp_path: Path) -> None:
    """The tool as it is, on gn_det's classes with keyword arguments."""
    (tmp_path / "lazy.py").write_text(LAZY)
    run(tool("lazyconfig_train_net.py"), "--config-file", "lazy.py", cwd=tmp_path)
    saved: dict[str, Any] = torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)["model"]
    assert "backbone.fpn_lateral3.norm.weight" in saved


def test_names_and_usage(tmp_path: Path) -> None:
    """Every mistake is one line."""
    for words, text in (
        ([], "usage: python -m gn_det.detectron2 TOOL.py"),
        (["nothing.py"], "error: tool 'nothing.py' is neither a file"),
        ([__file__, "--config-file", "gn_fpm.yaml"], "did you mean 'gn_fpn.yaml'"),
    ):
        output = run("-m", "gn_det.detectron2", *words, cwd=tmp_path, fails=True)
        assert text in output and "Traceback" not in output


def test_processes_of_a_tool_have_the_keys_too(tmp_path: Path) -> None:
    """Detectron2's launcher spawns: a child must find the tool's functions, and get_cfg() with gn_det's keys."""
    (tmp_path / "script.py").write_text(
        "import multiprocessing as mp, sys\n"
        "from detectron2.config import get_cfg\n"
        "def work(queue):\n"
        "    queue.put(get_cfg().MODEL.GN.NUM_GROUPS)\n"
        "if __name__ == '__main__':\n"
        "    context = mp.get_context('spawn')\n"
        "    queue = context.Queue()\n"
        "    child = context.Process(target=work, args=(queue,))\n"
        "    child.start(); print('groups', queue.get(timeout=100), sys.argv[1]); child.join()\n"
    )
    assert "groups 32 word" in run("-m", "gn_det.detectron2", "script.py", "word", cwd=tmp_path)


def test_importing_the_plugin_changes_no_default(tmp_path: Path) -> None:
    program = "import gn_det.detectron2; from detectron2.config import get_cfg; print('GN' in get_cfg().MODEL)"
    assert "False" in run("-c", program, cwd=tmp_path)
