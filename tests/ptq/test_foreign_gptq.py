"""GPTQ against llm-compressor's, where that is installed."""

import pytest
import torch
from test_gptq import correlated

from stableqat.ptq.gptq import gptq
from stableqat.quantizers import STE

pytest.importorskip("llmcompressor")


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("scale_init", ["mse", "signed_mse"])
@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 2}, {"bits": 3, "group_size": 64}])
def test_it_is_as_good_as_llm_compressors(options, scale_init, act_order):
    from foreign_gptq import foreign_gptq

    hessian, _ = correlated(256, rows=1024)
    weight = torch.randn(24, 256, generator=torch.Generator().manual_seed(1))
    quantizer = STE(weight, scale_init=scale_init, **options)
    own, theirs = (each(weight, hessian, quantizer, act_order=act_order) for each in (gptq, foreign_gptq))
    if act_order or "group_size" not in options:  # else the groups' scales follow the weights
        assert (own.weight.codes != theirs.weight.codes).float().mean() < 1e-2
    assert own.error <= 1.001 * theirs.error
