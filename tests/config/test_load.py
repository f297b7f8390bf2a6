"""Configs load as Detectron2's do, and every mistake is one line that names file, key and what to do."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from fvcore.common.config import CfgNode

from gn_det import config_file
from gn_det.config import dump_config, get_cfg, load_config, parse_config, shipped_configs
from gn_det.config import load as loading
from gn_det.config.check import check_config
from gn_det.config.defaults import flatten
from gn_det.config.load import merge_overrides, resolve_config, shipped_config
from gn_det.errors import ConfigError
from tests.test_configs import EMBEDDED


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_config_loads_and_sets_norm_decay_explicitly(name: str) -> None:
    cfg = load_config(name, check=name in EMBEDDED)
    check_config(cfg, "detectron2")
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
        (["SOLVER.BASE_LR", "fast"], "is 'fast'; it must be a number above 0"),
        (["SOLVER.MAX_ITER", "1.5"], "is 1.5; it must be an integer"),
        (["MODEL.MASK_ON", "1"], "is 1; it must be True or False"),
        (["SOLVER.STEPS", "(5,3)"], "increasing"),
        (["SOLVER.BASE_LR", "-1"], "must be a number above 0 up to 1000"),
        (["SOLVER.BASE_LR", "1e999"], "is inf; it must be"),
        (["SOLVER", "1"], "is a section"),
        (["--frobnicate"], "unknown option --frobnicate"),
        (["MODEL.RESNETS.NORM", "BatchNorm"], "use '' or 'GN' or 'LN' or 'IN' or 'BN' or 'SyncBN' or 'FrozenBN'"),
        (["MODEL.RESNETS.NORM", "FrozenBn"], "did you mean 'FrozenBN'?"),
        (["SOLVER.AMP.DTYPE", "bf61"], "is 'bf61', did you mean 'bf16'?; it must be one of 'bf16', 'fp16'"),
        (["MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", "True"], "not implemented by the embedded engine"),
        (["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "gio"], "did you mean 'giou'?"),
        (["MODEL.KEYPOINT_ON", "True"], "MODEL.KEYPOINT_ON"),
        (["MODEL.RETINANET.NORM", "GN"], "MODEL.RETINANET.NORM"),
        (["MODEL.ROI_HEADS.NAME", "CascadeROIHeads"], "needs MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG True"),
        (["MODEL.ROI_HEADS.NAME", "Res5ROIHeads"], "does not work with"),
        (["MODEL.RPN.IN_FEATURES", "['p2','p9']"], "has no 'p9'"),
        (["MODEL.RESNETS.DEPTH", "18"], "RES2_OUT_CHANNELS must be 64"),
        (["DATASETS.TRAIN_JSON", "a.json"], "DATASETS.TRAIN_IMAGES is missing (flag --train-images)"),
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
        ("", "but holds nothing"),
        ("- 1\n- 2\n", "must hold keys and values"),
        ("SOLVER: {BASE_LR: 1\n", "line"),
        ("SOLVER: {BASE_LR: 1.0}\nSOLVER: {MAX_ITER: 3}\n", "duplicate key 'SOLVER'"),
        ("_BASE_: nowhere.yaml\n", "nowhere.yaml): config 'nowhere.yaml' is neither a file"),
        ("_BASE_: gn_fpm.yaml\n", "nor a shipped config; did you mean 'gn_fpn.yaml'?"),
        ("_BASE_: Base-RCNN-FPN-NG.yaml\n", "did you mean 'Base-RCNN-FPN-GN.yaml'?"),
        ("_BASE_: c.yaml\n", "leads back"),
        ("SOLVER: 3\n", "SOLVER is a section"),
        ("MODEL:\n", "set one of its keys (META_ARCHITECTURE, DEVICE, MASK_ON, KEYPOINT_ON, LOAD_PROPOSALS and "),
        ("SEED: {A: 1}\n", "SEED is a single value"),
        ("SOLVER: {BASE_LR: [1]}\n", "SOLVER.BASE_LR is [1]; it must be a number above 0"),
        ("MODEL: {ROI_BOX_HEAD: {NROM: GN}}\n", "unknown key MODEL.ROI_BOX_HEAD.NROM; did you mean"),
        ("MODEL: !!python/object/apply:os.system ['true']\n", "is not allowed"),
    ],
)
def test_mistakes_in_a_file_name_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "c.yaml", text)
    with pytest.raises(ConfigError) as e:
        load_config(str(path))
    assert message in str(e.value) and str(path) in str(e.value) and "\n" not in str(e.value)


def test_a_base_may_be_a_shipped_config(tmp_path: Path) -> None:
    """By name, unless a file of that name is beside the config; schedules are written for the GPUs of the base."""
    path = write(tmp_path / "c.yaml", "_BASE_: gn_fpn.yaml\nSEED: 5\n")
    cfg, shipped = load_config(str(path)), load_config("gn_fpn", ["SEED", "5"])
    assert cfg == shipped and cfg.SOLVER.REFERENCE_WORLD_SIZE == 8
    write(path, "_BASE_: [gn_fpn_long, other.yaml]\n")
    write(tmp_path / "other.yaml", "SEED: 6\n")
    assert (load_config(str(path)).SOLVER.MAX_ITER, load_config(str(path)).SEED) == (270000, 6)
    write(path, "_BASE_: gn_fpn.yaml\n")
    write(tmp_path / "gn_fpn.yaml", "SEED: 7\n")
    assert load_config(str(path)).SEED == 7 and load_config(str(path)).SOLVER.MAX_ITER == 40000


def test_a_value_in_any_file_wins_over_what_follows_from_shipped_files(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "_BASE_: gn_fpn.yaml\nSOLVER: {AUTO_EPOCHS: true}\n")
    longer = write(tmp_path / "longer.yaml", "_BASE_: base.yaml\nSOLVER: {MAX_ITER: 2000}\n")
    assert load_config(str(longer)).SOLVER.AUTO_EPOCHS
    write(tmp_path / "base.yaml", "_BASE_: gn_fpn.yaml\n")
    assert not load_config(str(longer)).SOLVER.AUTO_EPOCHS
    write(tmp_path / "unscaled.yaml", "SOLVER: {REFERENCE_WORLD_SIZE: 0, REFERENCE_BATCH: 0}\n")
    both = load_config(str(write(tmp_path / "both.yaml", "_BASE_: [unscaled.yaml, gn_fpn.yaml]\n"))).SOLVER
    assert (both.REFERENCE_WORLD_SIZE, both.REFERENCE_BATCH, both.AUTO_EPOCHS) == (0, 0, True)


def test_a_value_of_a_base_names_the_base(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "SOLVER: {GAMMA: -3}\n")
    path = write(tmp_path / "c.yaml", "_BASE_: base.yaml\nSEED: 1\n")
    with pytest.raises(ConfigError, match=r"base\.yaml: SOLVER\.GAMMA is -3\.0; it must be a number from 0 up to 10$"):
        load_config(str(path))


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


@pytest.mark.parametrize("text", ["", "a: [", "- 1", "SOLVER: {NOPE: 1}"])
def test_a_damaged_stored_config_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.pth"):
        parse_config(text, "model.pth")


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("MODEL.ANCHOR_GENERATOR.SIZES", "big", r"\[0\] is 'big'; it must be a list of 1 to 64 items"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[32, 64]", r"\[0\] is 32; it must be a list of 1 to 64 items"),
        ("SOLVER.STEPS", "('a',)", r"\[0\] is 'a'; it must be an integer"),
        ("MODEL.RPN.BBOX_REG_WEIGHTS", "(1, 1)", "must be a list of 4 items"),
        ("MODEL.RPN.IOU_THRESHOLDS", "[0.7, 0.3]", "must be in increasing order"),
        ("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "0", "must be an integer from 1 to 256"),
        ("MODEL.ROI_MASK_HEAD.NUM_CONV", "-1", "must be an integer from 0 to 64"),
        ("MODEL.RPN.POST_NMS_TOPK_TRAIN", "0", "must be an integer from 1 to 1000000"),
        ("TEST.EXPECTED_RESULTS", "[['bbox', 'AP']]", r"\[0\] is .*must be a list of 4"),
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
    with pytest.raises(ConfigError, match=rf"{section}\.{name}\[[01]\] is .*; it must be a (name|path)"):
        load_config(str(tmp_path / "c.yaml"))


def test_keys_of_the_schedule_alone_are_taken_literally() -> None:
    """Everything that scaling to another batch would rewrite."""
    schedule = ["SOLVER.BASE_LR", "SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.WARMUP_ITERS", "SOLVER.CHECKPOINT_PERIOD",
                "SOLVER.IMS_PER_BATCH", "TEST.EVAL_PERIOD"]  # fmt: skip
    cfg = get_cfg()
    merge_overrides(cfg, [word for key in [*schedule, "SEED", "SOLVER.GAMMA"] for word in (key, "1")])
    assert list(cfg.SOLVER.NO_RESCALE) == schedule


def test_true_is_no_number() -> None:
    with pytest.raises(ConfigError, match="BASE_LR is True; it must be a number"):
        merge_overrides(get_cfg(), ["SOLVER.BASE_LR", "True"])


def test_a_shipped_config_is_found_from_anywhere_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = resolve_config("gn_fpn.yaml")
    assert resolve_config("configs/gn_fpn.yaml") == resolve_config("configs/gn_fpn") == wanted
    with pytest.raises(ConfigError, match="neither a file nor"):
        resolve_config("gn_fpn.yml")
    with pytest.raises(ConfigError, match="neither a file nor"):
        shipped_config("../configs/gn_fpn.yaml")


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
    with pytest.raises(ConfigError, match=r"STEPS\[0\] is 'a'; it must be an integer"):
        load_config("gn_fpn", [*words, "('a',)"])


def test_bytes_of_a_file_name_survive_being_stored() -> None:
    cfg = load_config("quickstart.yaml", ["OUTPUT_DIR", "caf\udce9/名前"])
    assert parse_config(dump_config(cfg), "model.pth").OUTPUT_DIR == "caf\udce9/名前"


# ------------------------------------------------------------ _BASE_


def merged(path: Path) -> dict[str, Any]:
    return {name: value for name, (value, _) in loading._Files().load(path).items()}


@pytest.mark.parametrize("name", shipped_configs())
def test_bases_merge_as_in_fvcore(name: str) -> None:
    path = Path(config_file(name))
    assert merged(path) == dict(flatten(CfgNode.load_yaml_with_base(str(path))))


def test_lists_of_bases_and_links_merge_as_in_fvcore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later bases win over earlier ones; a link's bases are looked for beside the link; ``~`` is the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in ("there", "here"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.yaml").write_text(f"OUTPUT_DIR: {folder}\nSOLVER: {{GAMMA: 0.5, MAX_ITER: 3}}\n")
    (tmp_path / "b.yaml").write_text("SOLVER: {MAX_ITER: 4, STEPS: [1, 2]}\n")
    (tmp_path / "there" / "c.yaml").write_text("_BASE_: [a.yaml, ~/b.yaml]\nSOLVER: {STEPS: [3]}\n")
    link = tmp_path / "here" / "c.yaml"
    link.symlink_to(tmp_path / "there" / "c.yaml")
    assert merged(link) == dict(flatten(CfgNode.load_yaml_with_base(str(link))))
    assert merged(link) == {"OUTPUT_DIR": "here", "SOLVER.GAMMA": 0.5, "SOLVER.MAX_ITER": 4, "SOLVER.STEPS": [3]}


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are read from now on."""
    read: list[Path] = []
    real = loading.read_yaml

    def read_yaml(path: Path, *words: Any) -> dict[str, Any]:
        read.append(path)
        return real(path, *words)

    monkeypatch.setattr(loading, "read_yaml", read_yaml)
    return read


def test_a_diamond_is_read_once_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """24 levels of two files, each with both files of the next level as bases: 2^24 paths."""
    for level in range(24):
        bases = "" if level == 23 else f"_BASE_: [a{level + 1}.yaml, b{level + 1}.yaml]\n"
        for name in "ab":
            (tmp_path / f"{name}{level}.yaml").write_text(f"{bases}SOLVER: {{MAX_ITER: {level + 1}}}\n")
    read = counted(monkeypatch)
    assert load_config(str(tmp_path / "a0.yaml")).SOLVER.MAX_ITER == 1
    assert len(read) == len(set(read)) == 47


@pytest.mark.parametrize("size", [0, 30_000])
def test_endless_bases_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    for number in range(150):
        text = f"_BASE_: {number + 1}.yaml\n#{'x' * size}\n"
        (tmp_path / f"{number}.yaml").write_text(text)
    read = counted(monkeypatch)
    with pytest.raises(ConfigError, match="leads to more than 100 files or 512 kB"):
        load_config(str(tmp_path / "0.yaml"))
    assert len(read) <= (100 if size == 0 else 18)


@pytest.mark.parametrize(
    ("base", "word"),
    [
        ("http://host/c.yaml", "is a URL"),
        ("s3://bucket/c.yaml", "is a URL"),
        ("sub/c.yaml", "leads back to the file itself"),
        ("pipe", "is neither a file"),
        ("/dev/zero", "is neither a file"),
        (".", "is neither a file"),
        ("~nobody-here/c.yaml", "is neither a file"),
        ("x" * 5000, "is neither a file"),
        ("[a.yaml, [b.yaml]]", "must name a file"),
    ],
)
def test_bases_that_are_no_file(tmp_path: Path, base: str, word: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.yaml").write_text("SEED: 1\n")
    (tmp_path / "sub").symlink_to(tmp_path)
    (tmp_path / "c.yaml").write_text(f"_BASE_: {base}\n")
    with pytest.raises(ConfigError) as e:
        load_config(str(tmp_path / "c.yaml"))
    assert word in str(e.value) and str(e.value).isprintable() and len(str(e.value)) < 800


def test_a_base_inside_a_section_is_an_unknown_key(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("SOLVER: {_BASE_: c.yaml}\n")
    with pytest.raises(ConfigError, match=r"unknown key SOLVER\._BASE_"):
        load_config(str(tmp_path / "c.yaml"))


# ------------------------------------------------------------ names of files


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Detectron2 that cannot be imported, with two YAML files in its model zoo."""
    folder = tmp_path / "site" / "detectron2" / "model_zoo" / "configs"
    (folder / "Misc").mkdir(parents=True)
    (tmp_path / "site" / "detectron2" / "__init__.py").write_text("raise RuntimeError('config must not import this')\n")
    (folder / "Base.yaml").write_text("SOLVER: {MAX_ITER: 7, BASE_LR: 0.5}\n")
    (folder / "Misc" / "mask_gn.yaml").write_text('_BASE_: "../Base.yaml"\nSOLVER: {MAX_ITER: 8}\n')
    monkeypatch.delitem(sys.modules, "detectron2", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return folder


def test_zoo_names_resolve_without_importing_detectron2(zoo: Path) -> None:
    assert resolve_config("Misc/mask_gn.yaml") == resolve_config("Misc/mask_gn") == zoo / "Misc" / "mask_gn.yaml"
    cfg = load_config("Misc/mask_gn.yaml", ["SEED", "3"])
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR, cfg.SEED) == (8, 0.5, 3)
    assert "detectron2" not in sys.modules


def test_files_and_shipped_names_come_first(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Misc").mkdir()
    (tmp_path / "Misc" / "mask_gn.yaml").write_text("SEED: 5\n")
    assert load_config("Misc/mask_gn.yaml").SEED == 5
    assert resolve_config("gn_fpn.yaml") == resolve_config("configs/gn_fpn.yaml")
    assert zoo not in resolve_config("gn_fpn.yaml").parents


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Misc/mask_gnn.yaml", "neither a file nor in Detectron2's model zoo; did you mean 'Misc/mask_gn.yaml'?"),
        ("Misc/zzz", "neither a file nor in Detectron2's model zoo"),
        ("runs/mask_gn.yaml", "config 'runs/mask_gn.yaml' is neither a file nor in Detectron2's model zoo"),
        ("Misc/../../secret.yaml", "neither a file nor in"),
        ("/nowhere/Misc/mask_gn.yaml", "neither a file nor in"),
        ("mask_gn.yaml", "neither a file nor a shipped config"),
        ("gn-fpn", "neither a file nor a shipped config; did you mean 'gn_fpn.yaml'?"),
        ("Misc/" + "x" * 5000, "(5005 characters) is neither a file nor in"),
        ("x" * 5000, "(5000 characters) is neither a file nor a shipped config; gn-det configs lists those"),
        ("Misc/a\0b.yaml", "neither a file nor in"),
        ("/dev/zero", "config '/dev/zero' is a pipe or device; name a .yaml file"),
        (".", "config '.' is a folder; name a .yaml file"),
        ("Misc/", "config 'Misc/' is a folder; name a .yaml file"),
    ],
)
def test_unknown_names_are_one_line(zoo: Path, name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (zoo.parent / "secret.yaml").write_text("SEED: 1\n")
    (zoo.parent / "Misc").mkdir()
    monkeypatch.chdir(zoo.parent)
    with pytest.raises(ConfigError) as e:
        resolve_config(name)
    assert message in str(e.value) and "\n" not in str(e.value)


def test_without_detectron2_the_line_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "detectron2", None)  # blocked: find_spec raises ValueError
    with pytest.raises(ConfigError, match=r"neither a file nor in .* zoo, which needs Detectron2 installed"):
        resolve_config("Misc/mask_rcnn_R_50_FPN_3x_gn.yaml")
