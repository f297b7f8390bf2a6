"""Push a trained model to the Hugging Face Hub; ``hf://owner/name/model.pth`` loads it again.

``huggingface_hub`` handles the account (``hf auth login``, or the variable HF_TOKEN); gn_det never sees it.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gn_det.checkpoint.io import read_any
from gn_det.checkpoint.meta import config_of_checkpoint, read_meta
from gn_det.checkpoint.open_weights import NORM_KEYS
from gn_det.checkpoint.weights_uri import local_path
from gn_det.config import dump_config
from gn_det.config.defaults import get_value
from gn_det.errors import ConfigError, UserError, WeightsError
from gn_det.files import StrPath, open_regular
from gn_det.text import one_line, shown, some

if TYPE_CHECKING:
    from fvcore.common.config import CfgNode

#: Name of the checkpoint in the repository.
MODEL = "model.pth"


def push(weights: StrPath, repo: str, *, private: bool = False, license_name: str = "") -> str:
    """Create the repository if it does not exist, and upload the checkpoint, its config and a model card.

    Args:
        weights: checkpoint of gn_det.
        repo: ``owner/name``.
        private: make a new repository private.
        license_name: a license identifier of the Hub, such as ``apache-2.0``; "" for none.

    Returns:
        URL of the commit.

    Raises:
        ConfigError: ``huggingface_hub`` is not installed, or ``repo`` is not owner/name.
        UserError: the Hub refuses (no account, no permission, no network).
        WeightsError: the checkpoint is unreadable or stores no config.
    """
    if not re.fullmatch(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", repo):
        raise ConfigError(f"--repo {shown(repo)}: give OWNER/NAME")
    try:
        from huggingface_hub import CommitOperationAdd, HfApi
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise ConfigError("gn-det push needs huggingface_hub: pip install huggingface_hub") from None
    path = Path(local_path(weights))
    payload = read_any(path)
    cfg, meta = config_of_checkpoint(path), read_meta(payload, path)
    assert meta is not None  # it holds the config
    if "optimizer" in payload:
        raise WeightsError(f"{path}: contains optimizer state; push model_best.pth, which is half as large")
    cfg.defrost()
    for key in ("TRAIN_JSON", "TRAIN_IMAGES", "VAL_JSON", "VAL_IMAGES"):  # paths of the training machine
        cfg.DATASETS[key] = ""
    card = model_card(repo, cfg, meta, _metrics(path), license_name)
    files: dict[str, Any] = {MODEL: path, "config.yaml": dump_config(cfg).encode(), "README.md": card.encode()}
    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        return str(api.create_commit(repo, operations, commit_message="Model trained with gn_det").commit_url)
    except (HfHubHTTPError, OSError, ValueError) as error:
        remedy = "log in with 'hf auth login', and check the name and the network"
        raise UserError(f"{repo}: the Hub refused the upload ({one_line(error, 300)}); {remedy}") from None


def _metrics(weights: Path) -> dict[str, float]:
    """Return the AP of the best evaluation in the checkpoint's folder, by mask AP or else box AP."""
    with contextlib.suppress(OSError, ValueError), open_regular(weights.parent / "metrics.json") as file:
        lines = (entry.items() for entry in map(json.loads, file) if isinstance(entry, dict))
        found = [{name: v for name, v in line if isinstance(v, (int, float))} for line in lines]
        rated = (entry for entry in found if "bbox/AP" in entry)
        return max(rated, key=lambda entry: entry.get("segm/AP", entry["bbox/AP"]), default={})
    return {}


def model_card(
    repo: str, cfg: CfgNode, meta: Mapping[str, Any], metrics: Mapping[str, float], license_name: str
) -> str:
    """Return README.md of the repository: classes, norms, data, AP, and how to use the model."""
    parts = ("backbone", "FPN", "box head", "mask head")
    names = {part: str(get_value(cfg, key)) or "none" for part, key in zip(parts, NORM_KEYS)}
    if not cfg.MODEL.MASK_ON:
        del names["mask head"]
    data = some([*cfg.DATASETS.TRAIN]) if any(cfg.DATASETS.TRAIN) else "own data"
    front = ["library_name: gn_det", "pipeline_tag: object-detection"]
    front += ["tags: [mask-rcnn, group-normalization, instance-segmentation]"]
    front += [f"license: {license_name}"] * bool(license_name)
    rows = [(f"{task} AP", metrics.get(key)) for task, key in (("box", "bbox/AP"), ("mask", "segm/AP"))]
    scores = [f"| {name} | {value:.1f} |" for name, value in rows if value is not None]
    if scores:
        scores = ["COCO metrics on the validation set:", "", "| metric | value |", "|---|---:|", *scores, ""]
    classes = [f"- {one_line(name, 100)}".replace("<", "&lt;") for name in meta["class_names"]]
    lines = [
        "---", *front, "---", "",
        f"# {repo.partition('/')[2]}", "",
        f"Mask R-CNN ({cfg.MODEL.BACKBONE.NAME}, ResNet-{cfg.MODEL.RESNETS.DEPTH}), trained with gn_det "
        f"{meta['version']} on {data}.", "",
        "| part | norm |", "|---|---|", *(f"| {part} | {norm} |" for part, norm in names.items()), "",
        *scores,
        "```", f"gn-det predict --weights hf://{repo}/{MODEL} photos/ --output out/", "```", "",
        "## Classes", "", *classes, "",
    ]  # fmt: skip
    return "\n".join(lines)
