"""The flags of tool verbs."""

import pytest

from stableqat.cli.tool import tool_parser

BENCH = ["--model", "M", "--batch", "1"]


@pytest.mark.parametrize(
    ("verb", "flags", "key", "values"),
    [
        ("predict", ["RUN", "--images", "a", "b", "--images=c"], "images", ["a", "b", "c"]),
        ("bench", [*BENCH, "--methods", "ste", "--methods", "dsq"], "methods", ["ste", "dsq"]),
        ("bench", [*BENCH, "--modes", "graphed", "--modes", "eager"], "modes", ["graphed", "eager"]),
        ("bench", [*BENCH, "--decode", "1", "--decode", "2", "3"], "decode", [1, 2, 3]),
        ("bench", BENCH, "methods", ["all"]),
    ],
)
def test_a_list_given_again_adds_up(verb, flags, key, values):
    assert tool_parser(verb).parse_args(flags)[key] == values
