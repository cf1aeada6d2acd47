"""The kinds of quantizers of a model: by pattern, by layer, and in one line for a table."""

from functools import partial

import pytest
from torch import nn

import stableqat
from stableqat.api import prepare_and_report
from stableqat.errors import UserError
from stableqat.kinds import deployed_bytes, describe, kinds
from stableqat.quantizers import STE, StableQAT

FOUR, TWO = partial(STE, bits=4), partial(STE, bits=2)
OTHER = partial(StableQAT, bits=2)


def net():
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 4))


def described(quantizer):
    model = net()
    return describe(model, prepare_and_report(model, quantizer, ()))


@pytest.mark.parametrize(
    ("quantizer", "wanted"),
    [
        (
            {"2": FOUR, "*": TWO},
            {"method": "STE", "bits": 2.5, "quantizers": "2: STE 4-bit integer; *: STE 2-bit integer"},
        ),
        ({"1": None, "*": TWO}, {"method": "STE", "bits": 2, "quantizers": "1: FP; *: STE 2-bit integer"}),
        (
            {"2": partial(STE, bits=2, scale_init="max"), "*": TWO},
            {
                "scale_init": "mixed",
                "bits": 2,
                "quantizers": "2: STE 2-bit integer, scale_init max; "
                "*: STE 2-bit integer, scale_init signed_mse",
            },
        ),
        (
            {"2": OTHER, "*": TWO},
            {
                "method": "mixed",
                "quantizers": "2: StableQAT 2-bit integer, amplitude 0.21, harmonics 1; *: STE 2-bit integer",
            },
        ),
    ],
)
def test_a_mixed_model_is_told_by_pattern(quantizer, wanted):
    assert described(quantizer).items() >= wanted.items()


@pytest.mark.parametrize("quantizer", [TWO, {"*": TWO}, {"1": TWO, "*": TWO}])
def test_a_uniform_model_is_told_as_ever(quantizer):
    assert described(quantizer) == described(TWO)
    assert "quantizers" not in described(TWO)


def test_kinds_follow_the_order_of_the_mapping_and_count_layers():
    model = net()
    report = prepare_and_report(model, {"2": FOUR, "0": None, "*": TWO}, ())
    found = [
        (k["pattern"], k["method"], k.get("bits"), k["layers"], k["weights"]) for k in kinds(model, report)
    ]
    assert found == [("2", "STE", 4, 1, 64), ("0", "FP", None, 1, 0), ("*", "STE", 2, 1, 128)]
    assert [kind["layers"] for kind in kinds(model)] == [1, 1]  # without a report only what is there


def test_the_size_counts_bits_of_codes_and_two_bytes_of_all_else():
    model = net()  # 256 weights and 28 biases
    assert deployed_bytes(model) == 2 * (256 + 28)
    prepare_and_report(model, {"2": FOUR, "0": None, "*": TWO}, ())
    assert deployed_bytes(model) == 64 * 4 / 8 + 128 * 2 / 8 + 2 * (4 + 16) + 2 * (64 + 28)
    tied = net()
    tied[1].weight = nn.Parameter(tied[1].weight[:8].detach())
    tied.append(nn.Embedding(8, 8)).append(tied[0])
    whole = deployed_bytes(tied)
    tied[3].weight = tied[1].weight
    assert deployed_bytes(tied) == whole - 2 * 64


@pytest.mark.parametrize(
    ("quantizer", "options", "says"),
    [
        ({}, {}, "^quantizer: the mapping is empty"),
        ({}, {"bits": 2}, "^quantizer: the mapping is empty"),
        ({"*": None}, {"bits": 2}, "^quantizer: every pattern of the mapping leaves its layers as they are"),
        ({1: "ste"}, {"bits": 2}, "^quantizer: pattern 1 is not text"),
        ({"0": "stee", "*": "ste"}, {"bits": 2}, r"^quantizer: pattern 0: stee is unknown; did you mean"),
        ({"0": 3, "*": "ste"}, {"bits": 2}, "^quantizer: pattern 0: 3 makes no quantizers"),
        ({"*": "ste"}, {"bitz": 2}, r"^quantizer: pattern \*: bitz: STE has no such option"),
        ({"2": partial(STE, bits=9), "*": TWO}, {}, r"^layer 2 \(pattern 2\): bits: must be"),
        (3, {}, "^quantizer: 3 makes no quantizers"),
    ],
)
def test_a_mapping_that_cannot_be_meant_is_one_line(quantizer, options, says):
    model = net()
    with pytest.raises(UserError, match=says):
        stableqat.prepare(model, quantizer, **options)
    assert all(type(layer) is nn.Linear for layer in model)
