"""Verdicts by the share of the tolerance that a layer's weights have."""

import pytest

from stableqat.diagnose.verdict import in_words, rows, summary


def layer(name, weights, rtn, gptq, predicted=0.005):
    """A layer whose rises beyond the slope are known."""
    kinds = {"rtn": rtn, "gptq": gptq}
    own = {
        each: {"slope": -0.5, "curvature": 2 * predicted, "rise": rise - 0.5} for each, rise in kinds.items()
    }
    return {
        "name": name,
        "block": 0,
        "weights": weights,
        "width": 0.5,
        "settings": {"2": {"step": 1.0, **own}},
    }


MEASURED = {
    "loss": 3.0,
    "layers": [
        layer("a", 300, rtn=0.07, gptq=0.01),
        layer("b", 100, rtn=0.07, gptq=0.02),
        layer("c", 300, rtn=0.09, gptq=0.08),
        layer("d", 300, rtn=0.01, gptq=0.01, predicted=0.25),
    ],
    "model": {"2": {"rtn": 3.5, "gptq": 3.25}},
}


def test_a_layer_may_cost_its_share():
    table = rows(MEASURED, 0.25)  # 0.075 for 300 of 1000 weights, 0.025 for 100
    verdicts = {row["layer"]: row["verdict"] for row in table}
    assert verdicts == {"a": "RTN is enough", "b": "GPTQ is enough", "c": "needs QAT", "d": "needs QAT"}
    assert {row["step / width"] for row in table} == {2.0}
    (line,) = summary(MEASURED, table)
    assert (line["rtn actual"], line["gptq actual"]) == (0.5, 0.25)
    assert line["gptq sum of layers"] == pytest.approx(0.12)
    assert line["rtn predicted"] == pytest.approx(0.265)
    assert [row["gptq score"] for row in table] == pytest.approx([0.01, 0.02, 0.08, 0.25])
    assert [line[each] for each in ("RTN is enough", "GPTQ is enough", "needs QAT")] == [1, 1, 2]
    assert list(in_words(table)) == [
        "2 bits: RTN is enough for 1 of 4 layers; GPTQ is enough for 1 of 4 layers; QAT is needed for 2 of 4 "
        "layers, most for d"
    ]
    assert list(in_words(rows(MEASURED, 1e9))) == ["2 bits: RTN is enough for all layers"]
