"""llm-compressor's GPTQ in place of ours, on the same Hessians, grid and scales.

`python tests/ptq/foreign_gptq.py ptq MODEL --out RUN --bits 3 ...` takes the arguments of `stableqat`.
"""

from dataclasses import replace

import torch
from torch import Tensor

from stableqat import ops
from stableqat.ptq import rounding
from stableqat.ptq.gptq import Rounded, output_error
from stableqat.quantizers import Quantizer


@torch.no_grad()
def foreign_gptq(
    weight: Tensor, hessian: Tensor, quantizer: Quantizer, *, damping: float = 0.01, act_order: bool = True
) -> Rounded:
    """As `gptq`, for the integer grid."""
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    made = quantizer.quantize(weight)
    size = quantizer.group_size
    args = QuantizationArgs(
        num_bits=quantizer.bits,
        symmetric=True,
        strategy="channel" if size is None else "group",
        group_size=size,
        actorder="weight" if act_order else None,
    )
    scale = made.scale.float()
    values, _, gave_up = quantize_weight(
        weight.float()[None].clone(),
        hessian[None].clone(),
        scale[None],
        torch.zeros_like(scale, dtype=torch.int8)[None],
        None,
        args,
        percdamp=damping,
    )
    assert not gave_up.any()
    codes = ops.quantize_codes(values[0], scale, grid=quantizer.grid)
    rounded = replace(made, codes=codes)
    levels, nearest = rounded.dequantize().float(), made.dequantize().float()
    assert torch.allclose(levels, values[0], atol=1e-6)
    error, other = (output_error(weight.float() - each, hessian) for each in (levels, nearest))
    return Rounded(rounded, error, other, int((hessian.diagonal() == 0).sum()), damping)


if __name__ == "__main__":
    from stableqat.cli.main import entry

    rounding.gptq = foreign_gptq  # type: ignore[assignment]
    entry()
