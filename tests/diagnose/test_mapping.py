"""Mixed widths as patterns: the first that matches a layer has its width."""

import random

import pytest
import yaml

from stableqat.diagnose.mapping import overlay, patterns_of
from stableqat.surgery import matches

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
NAMES = [f"model.layers.{block}.{kind}" for block in range(12) for kind in KINDS]


@pytest.mark.parametrize("seed", range(8))
def test_every_layer_has_its_width_and_every_pattern_a_layer(seed):
    chance = random.Random(seed)
    widths = {name: chance.choices((2, 3, 4), (1, 5, chance.randrange(6)))[0] for name in NAMES}
    patterns = patterns_of(widths)
    first = {name: next(each for each in patterns if matches(name, each)) for name in NAMES}
    assert {name: patterns[each] for name, each in first.items()} == widths
    assert set(first.values()) == set(patterns)
    assert len(patterns) < len(widths)


def test_what_can_be_said_briefly_is():
    assert patterns_of(dict.fromkeys(NAMES, 3)) == {"*": 3}
    by_kind = {name: 4 if "down" in name else 2 for name in NAMES}
    assert patterns_of(by_kind) == {"model.layers.*.mlp.down_proj": 4, "*": 2}
    assert patterns_of(by_kind | {NAMES[0]: 8}) == {NAMES[0]: 8, "model.layers.*.mlp.down_proj": 4, "*": 2}


def test_the_overlay_is_what_a_configuration_holds():
    text = overlay({"a.*": 4, "*": 2}, "STE", {"group_size": 64}, ["head"], ["one", "two"])
    assert text.startswith("# one\n# two\nmodel:\n")
    made = yaml.safe_load(text)["model"]["init_args"]
    assert made["skip"] == ["head"]
    assert list(made["quantizer"]) == ["a.*", "*"]
    first = {"class_path": "stableqat.quantizers.STE", "init_args": {"bits": 4, "group_size": 64}}
    assert made["quantizer"]["a.*"] == first
    assert "skip" not in yaml.safe_load(overlay({"*": 2}, "STE", {}, None, []))["model"]["init_args"]
