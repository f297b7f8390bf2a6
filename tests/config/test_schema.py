"""Every key is declared once, with a check that its default passes and that nothing else does."""

from __future__ import annotations

from typing import Any

import pytest

from gn_det.config import dump_config, get_cfg, load_config, parse_config
from gn_det.config.check import check_config
from gn_det.config.defaults import flatten, set_value
from gn_det.config.kinds import Key
from gn_det.config.load import merge_overrides
from gn_det.config.schema import KEYS
from gn_det.errors import ConfigError
from gn_det.values import ANYTHING, InvalidValue, Value


def refuses(key: Key, value: Any) -> bool:
    try:
        key.check(value, key.name)
    except InvalidValue as error:
        assert error.where.startswith(key.name)
        return True
    return False


def test_every_key_is_declared_once_with_a_check_and_a_description() -> None:
    names = [name for name, _ in flatten(get_cfg())]
    assert set(names) == set(KEYS) and len(names) == len(set(names)) > 200
    for key in KEYS.values():
        assert key.doc.endswith(".") and isinstance(key.check, Value) and key.check is not ANYTHING, key.name
        assert not refuses(key, key.default)
        for engine in ("embedded", "detectron2"):
            known = key.implemented(engine)
            assert known is None or (list(known) and not any(refuses(key, value) for value in known)), key.name
    check_config(get_cfg())
    check_config(get_cfg(), "detectron2")


#: Kinds of values; a key takes those of its default's kind alone.
KINDS: dict[str, tuple[Any, ...]] = {
    "bool": (True, False),
    "number": (1, 0.5, 4, -1),
    "text": ("bf16", "GN", "name", "full"),
    "list": ([1, 2], ["res2"], [[1.0]], [["a", "b", 1.0, 1.0]], [], [True] * 4, [0.25] * 4, [[1.0] * 4]),
    "None": (None,),
    "dict": ({"a": 1},),
}


def test_values_of_another_kind_are_refused() -> None:
    kinds = {bool: "bool", int: "number", float: "number", str: "text", list: "list", tuple: "list"}
    for key in KEYS.values():
        accepted = {kind for kind, values in KINDS.items() if not all(refuses(key, value) for value in values)}
        expected = {kinds.get(type(key.default), "None")}
        assert accepted - expected == ({"number"} if key.default is None else set()), key.name


NUMERIC = [key.name for key in KEYS.values() if not refuses(key, 1) or not refuses(key, 0.5)]
NUMERIC += [key.name for key in KEYS.values() if isinstance(key.default, (list, tuple)) and key.name not in NUMERIC]


@pytest.mark.parametrize(
    "value", ["1e30", "-1e30", "1" + "0" * 30, "-1" + "0" * 30, "nan", "1e999", "[[[[1]]]]", "9" * 5000]
)
def test_no_number_is_endless(value: str) -> None:
    """Nor in a list, or in a list of lists; "nan" is the name of something in lists of names."""
    cfg = get_cfg()
    for name in [name for name in NUMERIC if value != "nan" or refuses(KEYS[name], ["nan"])]:
        for text in (value, f"[[{value}]]"):
            with pytest.raises(ConfigError) as e:
                merge_overrides(cfg, [name, text])
            assert name in str(e.value) and str(e.value).isprintable() and len(str(e.value)) < 400, name


REFUSED = {
    "MODEL.ROI_MASK_HEAD.NUM_CONV": ("100000", "an integer from 0 to 64"),
    "MODEL.RESNETS.WIDTH_PER_GROUP": ("1000000000", "an integer from 1 to 8192"),
    "MODEL.ROI_HEADS.NUM_CLASSES": ("1000000000", "an integer from 0 to 100000"),
    "MODEL.ANCHOR_GENERATOR.SIZES": (f"[{[32] * 100_000}]", "SIZES"),
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": (f"[{[1.0] * 65}]", "a list of 1 to 64 items"),
    "SOLVER.STEPS": ("none", "SOLVER.STEPS[0] is None; it must be an integer"),
    "SOLVER.CHECKPOINT_PERIOD": ("0", "from 1 to"),
    "TEST.EVAL_PERIOD": ("-1", "from 0"),
    "SOLVER.GAMMA": ("-3", "a number from 0 up to 10"),
    "SOLVER.WARMUP_FACTOR": ("-5", "a number from 0 up to 10"),
    "MODEL.RPN.SMOOTH_L1_BETA": ("-1", "from 0"),
    "INPUT.CROP.SIZE": ("[7,7]", "fractions up to 1"),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": ("-1", "above 0"),
    "MODEL.GN.NUM_GROUPS": ("0", "from 1 to"),
    "MODEL.RPN.IOU_LABELS": ("[0, 1]", "one more entry"),
    "INPUT.MIN_SIZE_TRAIN": ("(800.5,)", "MIN_SIZE_TRAIN[0] is 800.5; it must be an integer"),
    "SOLVER.WEIGHT_DECAY_BIAS": ("[1]", "None or a number from 0"),
    "MODEL.FPN.IN_FEATURES": ("[1]", "IN_FEATURES[0] is 1; it must be a name"),
    "MODEL.RPN.IN_FEATURES": ("[]", "a list of 1 to 1000 items"),
    "TEST.EXPECTED_RESULTS": (
        "[['bbox', 'AP', 1, True]]",
        "EXPECTED_RESULTS[0][3] is True; it must be a finite number",
    ),
    "OUTPUT_DIR": ("", "the path of a folder"),
    "MODEL.WEIGHTS": ("x" * 5000, "(5000 characters); it must be a path"),
    "DATASETS.TRAIN_JSON": ("a\0b", r"'a\x00b'; it must be a path"),
    "DATASETS.VAL_JSON": ("/".join(["a" * 200] * 11), "a path of at most 2048 bytes"),
    "DATASETS.VAL_IMAGES": ("a" * 300, "each part of at most 255"),
    "DATASETS.TRAIN": (r"('a\x00b',)", "TRAIN[0] is"),
    "DATASETS.TEST": ("x" * 5000, "a path of at most"),
    "MODEL.CLASS_NAMES": (f"('{'x' * 5000}',)", "a name without"),
    "MODEL.DEVICE": ("cpu\x1b[31m", r"cpu\x1b[31m"),
    "SOLVER.BASE_LR": ("(" * 100_000, "a number above 0"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_values_beyond_sense(key: str) -> None:
    value, word = REFUSED[key]
    with pytest.raises(ConfigError) as e:
        load_config("quickstart.yaml", [key, value])
    said = str(e.value)
    assert key.rpartition(".")[2] in said and word in said and said.isprintable() and len(said) < 400


#: Of every engine, at every door: a Python user sets them without any conversion.
STRICT = {
    "SOLVER.GAMMA": -3,
    "SOLVER.WARMUP_FACTOR": -5.0,
    "MODEL.RPN.SMOOTH_L1_BETA": -1,
    "INPUT.CROP.SIZE": [7, 7],
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": -1,
    "SOLVER.STEPS": (30, 20),
    "MODEL.MASK_ON": 1,
    "MODEL.FPN.FUSE_TYPE": "mean",
    "INPUT.BIT_DEPTH": "5,1",
}


@pytest.mark.parametrize("engine", ["embedded", "detectron2"])
@pytest.mark.parametrize("name", STRICT)
def test_values_set_in_python_are_checked(name: str, engine: str) -> None:
    cfg = load_config("gn_fpn")
    set_value(cfg, name, STRICT[name])
    with pytest.raises(ConfigError, match=rf"^{name}(\[1\])? is "):
        check_config(cfg, engine)


def test_a_stored_config_has_the_same_ranges() -> None:
    text = dump_config(load_config("gn_fpn"))
    assert dump_config(parse_config(text, "model.pth")) == text
    with pytest.raises(ConfigError, match=r"^model\.pth: MODEL\.ROI_BOX_HEAD\.NUM_CONV is 100000; it must be"):
        parse_config(text.replace("NUM_CONV: 4", "NUM_CONV: 100000"), "model.pth")
