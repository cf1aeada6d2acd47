"""Codes on disk return as they were, at every width."""

from functools import partial

import pytest
import torch
from torch import nn

from stableqat.errors import UserError
from stableqat.landscape.codes import codes_file, kept_codes, read_codes, write_codes
from stableqat.landscape.space import WeightSpace
from stableqat.quantizers import STE, ParetoQ
from stableqat.surgery import quantize_linears


def space(bits, **options):
    model = nn.Sequential(nn.Linear(15, 7), nn.Linear(12, 5))
    method = ParetoQ if bits == 1 else STE
    quantize_linears(model, partial(method, bits=bits, **options))
    return WeightSpace(model)


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_round_trip(bits, tmp_path):
    first, file = space(bits, group_size=3), codes_file(tmp_path, 40)
    before = list(first.quantized())
    write_codes(first, before, file)
    with first.kept() as start:
        first.move(start, (1.0, first.noise(0)))
        for found, known in zip(read_codes(first, file), before, strict=True):
            assert torch.equal(found.codes, known.codes)
            assert torch.equal(found.scale, known.scale)
            assert torch.equal(found.dequantize(), known.dequantize())
    width = {1: 1, 2: 2, 3: 4, 4: 4}.get(bits, 8)
    assert file.stat().st_size < 165 * width / 8 + 4 * 55 + 500
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_files_are_found_by_step(tmp_path):
    one = space(2)
    for step in (1_000_000, 0, 50):
        write_codes(one, one.quantized(), codes_file(tmp_path, step))
    assert list(kept_codes(tmp_path)) == [0, 50, 1_000_000]
    assert kept_codes(tmp_path / "nothing") == {}


def test_another_models_codes_and_damaged_ones_are_refused(tmp_path):
    file = codes_file(tmp_path, 0)
    write_codes(space(2), space(2).quantized(), file)
    with pytest.raises(UserError, match=r"step-000000\.safetensors: damaged, or of another model"):
        list(read_codes(space(8), file))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged, or of another model"):
        list(read_codes(space(2), file))
