"""Lower bounds that keep known faults out."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
NEEDED = {need.name: need for need in map(Requirement, PROJECT["dependencies"])}


@pytest.mark.parametrize(
    ("name", "refused", "taken"),
    [
        ("lightning", "2.6.3", "2.6.6"),  # 2.6.2 and 2.6.3 were compromised uploads
        ("jsonargparse", "5.0", "4.53"),
        ("jsonargparse", "4.41", "4.42"),
        ("omegaconf", "2.3.0", "2.4.0"),
        ("datasets", "3.6", "5.2"),  # loading scripts
        ("transformers", "4.57", "5.23"),
    ],
)
def test_versions(name, refused, taken):
    assert refused not in NEEDED[name].specifier
    assert taken in NEEDED[name].specifier


def test_extras():
    """lightning does not bring jsonargparse; its own extra would hold omegaconf back."""
    assert NEEDED["jsonargparse"].extras == {"signatures"}
    assert not NEEDED["lightning"].extras


def test_torchvision_is_resolved_together_with_torch():
    """timm needs it, built against the same torch."""
    assert {"torch", "torchvision", "timm"} <= NEEDED.keys()
