"""Every number of a config has finite ends, and what lies beyond is one line that names key, value and ends."""

from __future__ import annotations

from typing import Any

import pytest

from gn_det.config import dump_config, get_cfg, load_config, parse_config
from gn_det.config.check import _NO_RANGES, RANGES, _least_weights, check_ranges
from gn_det.config.load import known_keys, merge_overrides
from gn_det.errors import ConfigError


def value_of(key: str) -> Any:
    node: Any = get_cfg()
    for part in key.split("."):
        node = node[part]
    return node


def is_number(value: Any) -> bool:
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return isinstance(value, (int, float)) and not isinstance(value, bool)


NUMERIC = [key for key in known_keys(get_cfg()) if is_number(value_of(key))]


def test_every_number_has_a_range() -> None:
    ranged = {key for key in NUMERIC if not key.startswith(_NO_RANGES)} | {"SOLVER.WEIGHT_DECAY_BIAS"}
    assert ranged == set(RANGES)
    assert all(-(2**63) <= r.low < r.high <= 2**63 for r in RANGES.values())
    check_ranges(get_cfg())


@pytest.mark.parametrize(
    "value", ["1e30", "-1e30", "1" + "0" * 30, "-1" + "0" * 30, "nan", "1e999", "[[[[1]]]]", "9" * 5000]
)
def test_no_number_is_endless(value: str) -> None:
    defaults = get_cfg()
    for key in NUMERIC:
        default = value_of(key)
        nested = isinstance(default, (list, tuple)) and isinstance(default[0], (list, tuple))
        cfg = defaults.clone()
        with pytest.raises(ConfigError) as e:
            merge_overrides(cfg, [key, f"[[{value}]]" if nested else value])
            check_ranges(cfg)
        assert key in str(e.value) and str(e.value).isprintable() and len(str(e.value)) < 400, key


REFUSED = {
    "MODEL.ROI_MASK_HEAD.NUM_CONV": ("100000", "between 0 and 64"),
    "MODEL.RESNETS.WIDTH_PER_GROUP": ("1000000000", "between 1 and 8192"),
    "MODEL.ROI_HEADS.NUM_CLASSES": ("1000000000", "between 0 and 100000"),
    "MODEL.ANCHOR_GENERATOR.SIZES": (f"[{[32] * 100_000}]", "SIZES"),
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": (f"[{[1.0] * 65}]", "at most 64 numbers"),
    "SOLVER.STEPS": ("none", "must be of type tuple"),
    "SOLVER.CHECKPOINT_PERIOD": ("0", "between 1"),
    "TEST.EVAL_PERIOD": ("-1", "between 0"),
    "SOLVER.GAMMA": ("-3", "between 0 and 10"),
    "SOLVER.WARMUP_FACTOR": ("-5", "between 0 and 10"),
    "MODEL.RPN.SMOOTH_L1_BETA": ("-1", "between 0"),
    "INPUT.CROP.SIZE": ("[7,7]", "parts between 0 and 1"),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": ("-1", "above 0"),
    "MODEL.GN.NUM_GROUPS": ("0", "between 1"),
    "MODEL.RPN.IOU_LABELS": ("[0, 1]", "one more entry"),
    "INPUT.MIN_SIZE_TRAIN": ("(800.5,)", "whole numbers"),
    "SOLVER.WEIGHT_DECAY_BIAS": ("[1]", "None or a number"),
    "MODEL.FPN.IN_FEATURES": ("[1]", "a list of names"),
    "MODEL.RPN.IN_FEATURES": ("[]", "names of feature maps"),
    "TEST.EXPECTED_RESULTS": ("[['bbox', 'AP', 1, True]]", "must be a list of"),
    "OUTPUT_DIR": ("", "not empty"),
    "MODEL.WEIGHTS": ("x" * 5000, "(5000 characters) must be text"),
    "DATASETS.TRAIN_JSON": ("a\0b", r"'a\x00b' must be text without control characters"),
    "DATASETS.VAL_JSON": ("/".join(["a" * 200] * 11), "a path of at most 2048 characters"),
    "DATASETS.VAL_IMAGES": ("a" * 300, "each part of at most 255"),
    "DATASETS.TRAIN": (r"('a\x00b',)", "a list of names"),
    "DATASETS.TEST": ("x" * 5000, "a list of names"),
    "MODEL.CLASS_NAMES": (f"('{'x' * 5000}',)", "a list of names"),
    "MODEL.DEVICE": ("cpu\x1b[31m", r"cpu\x1b[31m"),
    "SOLVER.BASE_LR": ("(" * 100_000, "must be of type float"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_values_beyond_sense(key: str) -> None:
    value, word = REFUSED[key]
    with pytest.raises(ConfigError) as e:
        load_config("quickstart.yaml", [key, value])
    said = str(e.value)
    assert key.rpartition(".")[2] in said and word in said and said.isprintable() and len(said) < 400


def test_groups_times_width_is_bounded() -> None:
    with pytest.raises(ConfigError, match=r"NUM_GROUPS x MODEL\.RESNETS\.WIDTH_PER_GROUP is 1048576"):
        load_config("gn_fpn", ["MODEL.RESNETS.NUM_GROUPS", "1024", "MODEL.RESNETS.WIDTH_PER_GROUP", "1024"])


def test_weights_of_a_model_are_bounded() -> None:
    """At 2^30: a box head of 32 x 32 x 256 x FC_DIM weights, and 0.03 billion of the rest."""
    keys = ["MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "32", "MODEL.ROI_BOX_HEAD.FC_DIM"]
    load_config("gn_fpn", [*keys, "3900"])
    with pytest.raises(
        ConfigError, match=r"^MODEL describes about 1\d{9} weights, and at most 1073741824 are possible"
    ):
        load_config("gn_fpn", [*keys, "4096"])


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("gn_fpn", []),
        ("gn_c4", []),
        ("gn_fpn", ["MODEL.ROI_HEADS.NUM_CLASSES", "20000"]),
        ("gn_c4", ["MODEL.ROI_HEADS.NUM_CLASSES", "20000"]),
        ("gn_fpn", ["MODEL.ROI_BOX_HEAD.NUM_CONV", "64"]),
        ("gn_fpn", ["MODEL.ROI_MASK_HEAD.NUM_CONV", "64"]),
        ("gn_fpn", ["MODEL.ROI_BOX_HEAD.FC_DIM", "8192", "MODEL.ROI_BOX_HEAD.NUM_FC", "4"]),
        ("gn_fpn", ["MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "28"]),
        ("gn_fpn", ["MODEL.RESNETS.WIDTH_PER_GROUP", "512"]),
        ("gn_fpn", ["MODEL.RESNETS.NUM_GROUPS", "32", "MODEL.RESNETS.WIDTH_PER_GROUP", "32"]),
    ],
)
def test_weights_are_counted_as_the_model_has_them(name: str, keys: list[str]) -> None:
    """The estimate is that of the model that is built, from 15 % below to 5 % above, whichever part is the largest."""
    import torch

    from gn_det.modeling import build_model

    cfg = load_config(name, ["MODEL.ROI_HEADS.NUM_CLASSES", "3", *keys])
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in build_model(cfg).parameters())
    assert 0.85 * weights < _least_weights(cfg) < 1.05 * weights


def test_types_are_those_of_the_defaults_whatever_was_set_before() -> None:
    words = [
        "SOLVER.WEIGHT_DECAY_BIAS",
        "0.5",
        "SOLVER.WEIGHT_DECAY_BIAS",
        "none",
        "SOLVER.STEPS",
        "()",
        "SOLVER.STEPS",
    ]
    cfg = load_config("gn_fpn", [*words, "(3,)"])
    assert cfg.SOLVER.WEIGHT_DECAY_BIAS is None and cfg.SOLVER.STEPS == (3,)
    with pytest.raises(ConfigError, match="must be of type tuple"):
        load_config("gn_fpn", [*words, "('a',)"])


def test_a_stored_config_has_the_same_ranges() -> None:
    text = dump_config(load_config("gn_fpn"))
    assert dump_config(parse_config(text, "model.pth")) == text
    with pytest.raises(ConfigError, match=r"^model\.pth: MODEL\.ROI_BOX_HEAD\.NUM_CONV = 100000 must be between"):
        parse_config(text.replace("NUM_CONV: 4", "NUM_CONV: 100000"), "model.pth")


def test_bytes_of_a_file_name_survive_being_stored() -> None:
    cfg = load_config("quickstart.yaml", ["OUTPUT_DIR", "caf\udce9/名前"])
    assert parse_config(dump_config(cfg), "model.pth").OUTPUT_DIR == "caf\udce9/名前"
