"""Lower bounds that keep known faults out, and the versions that were tested together."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDED = {need.name: need for need in map(Requirement, PROJECT["dependencies"])}
EXTRAS = PROJECT["optional-dependencies"]
LOCKED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())


@pytest.mark.parametrize(
    ("name", "refused", "taken"),
    [
        ("lightning", "2.6.3", "2.6.6"),  # 2.6.2 and 2.6.3 were compromised uploads
        ("jsonargparse", "5.0", "4.53"),
        ("jsonargparse", "4.51", "4.52"),  # builds what any file names
        ("omegaconf", "2.3.0", "2.4.0"),
        ("datasets", "4.8.3", "5.2"),  # looks for what torchvision has dropped
        ("transformers", "4.57", "5.23"),
        ("timm", "1.0.25", "1.0.31"),  # unpickles what it finds beside a model
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


@pytest.mark.parametrize(
    "need", [*PROJECT["dependencies"], *(need for extra in EXTRAS.values() for need in extra)]
)
def test_what_is_needed_is_locked_at_a_version_within_its_bounds(need):
    need = Requirement(need)
    if need.name != PROJECT["name"]:  # an extra of its own
        (version,) = (
            v for name, v in LOCKED.items() if canonicalize_name(name) == canonicalize_name(need.name)
        )
        assert version in need.specifier


def test_the_lock_is_for_any_machine():
    """No address, file, hash or build of one machine; what a build of torch needs, torch says."""
    assert all(re.fullmatch(r"[\w.-]+", name) for name in LOCKED)
    assert all(re.fullmatch(r"\d[\w.]*", version) for version in LOCKED.values())
    assert not [name for name in LOCKED if name.startswith(("nvidia", "cuda", "triton"))]


def test_every_way_to_install_takes_the_lock():
    assert "install --quiet -e '.[dev]' -c constraints.txt" in (ROOT / "Makefile").read_text()
    *_, pip = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert pip == {"pip": ["-e .[dev]", "-c constraints.txt"]}
    assert "make test" in (ROOT / ".ci" / "run").read_text()
