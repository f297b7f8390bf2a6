"""Configs made of the schema, and values by dotted key."""

from __future__ import annotations

from fvcore.common.config import CfgNode

from gn_det.config.defaults import add_gn_keys, flatten, get_cfg, get_value, set_value
from gn_det.config.schema import KEYS


def test_configs_do_not_share_values() -> None:
    get_cfg().MODEL.ANCHOR_GENERATOR.SIZES[0].append(1)
    sizes = [[32, 64, 128, 256, 512]]
    assert get_cfg().MODEL.ANCHOR_GENERATOR.SIZES == KEYS["MODEL.ANCHOR_GENERATOR.SIZES"].default == sizes


def test_values_by_dotted_key() -> None:
    cfg = get_cfg()
    set_value(cfg, "SEED", 3)
    set_value(cfg, "SOLVER.AMP.DTYPE", "fp16")
    assert (get_value(cfg, "SEED"), get_value(cfg, "SOLVER.AMP.DTYPE"), cfg.SOLVER.AMP.DTYPE) == (3, "fp16", "fp16")
    assert get_value(cfg, "SOLVER.AMP") == {"ENABLED": False, "DTYPE": "fp16"}
    assert get_value(cfg, "SOLVER.NOPE") is get_value(cfg, "SEED.NOPE") is get_value({}, "A.B") is None
    assert dict(flatten({"A": {"B": 1, "C": {}}, "D": {"E": {"F": [2]}}})) == {"A.B": 1, "D.E.F": [2]}


def test_gn_dets_own_keys_are_added_to_any_config() -> None:
    """Sections that are missing have the class of the config."""

    class Own(CfgNode):
        pass

    cfg = Own({"SOLVER": Own({"GAMMA": 0.5})})
    add_gn_keys(cfg)
    assert dict(flatten(cfg)) == {"SOLVER.GAMMA": 0.5} | {n: k.default for n, k in KEYS.items() if k.ours}
    assert type(cfg.MODEL.GN) is Own
