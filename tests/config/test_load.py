"""Configs load as Detectron2's do, and every mistake is one line that names file, key and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from gn_det import config_file
from gn_det.config import dump_config, get_cfg, load_config, parse_config, shipped_configs
from gn_det.config.load import known_keys, merge_overrides
from gn_det.errors import ConfigError


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_config_loads_and_sets_norm_decay_explicitly(name: str) -> None:
    cfg = load_config(name)
    assert cfg.SOLVER.WEIGHT_DECAY_NORM == 0.0
    text = Path(config_file(name)).read_text()
    assert "WEIGHT_DECAY_NORM: 0.0" in text
    assert "AP" in text and "Launch:" in text


def test_name_with_or_without_suffix_and_path_are_the_same(tmp_path: Path) -> None:
    by_name = load_config("gn_fpn_long.yaml")
    assert by_name == load_config("gn_fpn_long") == load_config(config_file("gn_fpn_long.yaml"))
    assert by_name.SOLVER.MAX_ITER == 270000 and tuple(by_name.SOLVER.STEPS) == (210000, 250000)


def test_base_and_overrides_win_in_order(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "SOLVER: {BASE_LR: 0.5, MAX_ITER: 7}\n")
    write(tmp_path / "b.yaml", "_BASE_: a.yaml\nSOLVER: {MAX_ITER: 8}\n")
    cfg = load_config(str(tmp_path / "b.yaml"), ["SOLVER.GAMMA", "0.3", "SEED=5"])
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER, cfg.SOLVER.GAMMA, cfg.SEED) == (0.5, 8, 0.3, 5)


def test_types_follow_the_default() -> None:
    cfg = get_cfg()
    merge_overrides(
        cfg,
        ["SOLVER.BASE_LR", "1", "SOLVER.STEPS", "[5, 6]", "OUTPUT_DIR", "2024", "MODEL.MASK_ON", "true"]
        + ["DATASETS.TRAIN", "shapes_train", "SOLVER.WEIGHT_DECAY_BIAS", "0.5", "SOLVER.GAMMA", "1e-1"],
    )
    assert cfg.SOLVER.BASE_LR == 1.0 and isinstance(cfg.SOLVER.BASE_LR, float)
    assert cfg.SOLVER.STEPS == (5, 6) and cfg.OUTPUT_DIR == "2024" and cfg.MODEL.MASK_ON is True
    assert cfg.DATASETS.TRAIN == ("shapes_train",) and cfg.SOLVER.WEIGHT_DECAY_BIAS == 0.5 and cfg.SOLVER.GAMMA == 0.1
    assert "SOLVER.BASE_LR" in cfg.SOLVER.NO_RESCALE and "SOLVER.GAMMA" not in cfg.SOLVER.NO_RESCALE


def test_dump_round_trips() -> None:
    cfg = load_config("quickstart", ["SEED", "9", "SOLVER.WEIGHT_DECAY_BIAS", "0.5"])
    text = dump_config(cfg)
    assert dump_config(parse_config(text, "checkpoint")) == text and "&id" not in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["SOLVER.BASELR", "1"], "unknown key SOLVER.BASELR; did you mean SOLVER.BASE_LR"),
        (["BASE_LR", "1"], "did you mean SOLVER.BASE_LR"),
        (["MODEL_DEVICE", "cpu"], "did you mean MODEL.DEVICE"),
        (["SOLVER.BASE_LR"], "has no value"),
        (["SOLVER.BASE_LR", "fast"], "must be of type float"),
        (["SOLVER.MAX_ITER", "1.5"], "must be of type int"),
        (["MODEL.MASK_ON", "1"], "must be of type bool"),
        (["SOLVER.STEPS", "(5,3)"], "increasing"),
        (["SOLVER.BASE_LR", "-1"], "must be above 0 and at most 1000"),
        (["SOLVER.BASE_LR", "1e999"], "finite"),
        (["SOLVER", "1"], "is a section"),
        (["--frobnicate"], "unknown option --frobnicate"),
        (["MODEL.RESNETS.NORM", "BatchNorm"], "'FrozenBN'"),
        (["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "giou"], "not implemented by the embedded engine"),
        (["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"], "not implemented by the embedded engine"),
        (["MODEL.KEYPOINT_ON", "True"], "MODEL.KEYPOINT_ON"),
        (["MODEL.RETINANET.NORM", "GN"], "MODEL.RETINANET.NORM"),
        (["MODEL.ROI_HEADS.NAME", "CascadeROIHeads"], "CascadeROIHeads"),
        (["MODEL.ROI_HEADS.NAME", "Res5ROIHeads"], "does not go with"),
        (["MODEL.RPN.IN_FEATURES", "['p2','p9']"], "'p9' is not made"),
        (["MODEL.RESNETS.DEPTH", "18"], "RES2_OUT_CHANNELS must be 64"),
        (["DATASETS.TRAIN_JSON", "a.json"], "DATASETS.TRAIN_IMAGES is missing (flag --train-images)"),
        (["SOLVER.ACCUMULATE", "3"], "multiple of SOLVER.ACCUMULATE"),
        (["INPUT.FORMAT", "L"], "INPUT.FORMAT"),
    ],
)
def test_mistakes_on_the_command_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as e:
        load_config("gn_fpn", overrides)
    assert message in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("- 1\n- 2\n", "must hold keys and values"),
        ("SOLVER: {BASE_LR: 1\n", "line"),
        ("SOLVER: {BASE_LR: 1.0}\nSOLVER: {MAX_ITER: 3}\n", "duplicate key 'SOLVER'"),
        ("_BASE_: nowhere.yaml\n", "'nowhere.yaml' does not exist"),
        ("_BASE_: gn_fpn.yaml\n", f"the shipped one is {config_file('gn_fpn.yaml')}"),
        ("_BASE_: c.yaml\n", "leads back"),
        ("SOLVER: 3\n", "SOLVER is a section"),
        ("SEED: {A: 1}\n", "SEED is a single value"),
        ("SOLVER: {BASE_LR: [1]}\n", "SOLVER.BASE_LR must be of type float"),
        ("MODEL: {ROI_BOX_HEAD: {NROM: GN}}\n", "unknown key MODEL.ROI_BOX_HEAD.NROM; did you mean"),
        ("MODEL: !!python/object/apply:os.system ['true']\n", "is not allowed"),
    ],
)
def test_mistakes_in_a_file_name_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "c.yaml", text)
    with pytest.raises(ConfigError) as e:
        load_config(str(path))
    assert message in str(e.value) and str(path) in str(e.value) and "\n" not in str(e.value)


def test_a_mistake_in_a_base_names_the_base(tmp_path: Path) -> None:
    base = write(tmp_path / "base.yaml", "SOLVRE: {BASE_LR: 0.5}\n")
    write(tmp_path / "c.yaml", "_BASE_: base.yaml\n")
    with pytest.raises(ConfigError, match=r"base\.yaml"):
        load_config(str(tmp_path / "c.yaml"))
    assert base.exists()


@pytest.mark.parametrize("name", ["gnfpn.yaml", "/nowhere/gn.yaml", "."])
def test_missing_config(name: str) -> None:
    with pytest.raises(ConfigError):
        load_config(name)


def test_every_key_is_known_once() -> None:
    keys = known_keys(get_cfg())
    assert len(keys) == len(set(keys)) > 200


@pytest.mark.parametrize("text", ["", "a: [", "- 1", "SOLVER: {NOPE: 1}"])
def test_a_damaged_stored_config_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.pth"):
        parse_config(text, "model.pth")


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("MODEL.ANCHOR_GENERATOR.SIZES", "big", "must be of type list"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[32, 64]", "must be of type list"),
        ("SOLVER.STEPS", "('a',)", "must be of type tuple"),
        ("MODEL.RPN.BBOX_REG_WEIGHTS", "(1, 1)", "must be 4 numbers > 0"),
        ("MODEL.RPN.IOU_THRESHOLDS", "[0.7, 0.3]", "must be increasing"),
        ("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "0", "must be between 1 and 256"),
        ("MODEL.ROI_MASK_HEAD.NUM_CONV", "-1", "must be between 0 and 64"),
        ("MODEL.RPN.POST_NMS_TOPK_TRAIN", "0", "must be between 1 and 1000000"),
        ("TEST.EXPECTED_RESULTS", "[['bbox', 'AP']]", "must be a list of"),
    ],
)
def test_values_that_no_model_can_have(key: str, value: str, word: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}.*{word}"):
        load_config("gn_fpn", [key, value])


@pytest.mark.parametrize("base", ["1", "null", "{}", "[1]", "''", "[Base.yaml, 2]", "true"])
def test_a_base_that_is_no_file_name_is_refused(tmp_path: Path, base: str) -> None:
    (tmp_path / "Base.yaml").write_text("SEED: 1\n")
    (tmp_path / "c.yaml").write_text(f"_BASE_: {base}\nSEED: 2\n")
    with pytest.raises(ConfigError, match=r"c\.yaml: _BASE_ must name a file or a list of files, got "):
        load_config(str(tmp_path / "c.yaml"))


@pytest.mark.parametrize("key", ["DATASETS.TRAIN", "DATASETS.TEST", "MODEL.CLASS_NAMES", "SOLVER.NO_RESCALE"])
@pytest.mark.parametrize("value", ["0", "[null]", "[a, 1]", "['']"])
def test_names_are_text(tmp_path: Path, key: str, value: str) -> None:
    """These lists are empty by default, so that their defaults do not say what belongs in them."""
    section, name = key.split(".")
    (tmp_path / "c.yaml").write_text(f"{section}:\n  {name}: {value}\n")
    with pytest.raises(ConfigError, match=rf"{section}\.{name} = .* must be a list of names"):
        load_config(str(tmp_path / "c.yaml"))
