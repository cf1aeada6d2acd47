"""Which linear layers of a model can be quantized, and what share of its weights that is."""

import logging
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from stableqat.errors import UserError
from stableqat.quantizers import Quantizer

logger = logging.getLogger(__name__)

HEADS = ("lm_head", "head", "head_dist", "classifier", "score")  # as transformers and timm name them


@dataclass
class SurgeryReport:
    """What `quantize_linears` did.

    Attributes:
        swapped: Names of the layers, and at the end of the parameters of fused experts, that are quantized
            now.
        fused: Number of the latter.
        skipped: Names of linear layers left alone, each with the reason.
        unmatched: Skip patterns that matched no linear layer.
        quantized_weights: Number of quantized weights.
        matrix_weights: Number of weights in matrices and convolutions. Embeddings, which are looked up, and
            heads that stay as they are do not count.
        others: Names of modules whose matrices are not quantized and are in no linear layer, each with its
            share of `matrix_weights`.
    """

    swapped: list[str] = field(default_factory=list)
    fused: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)
    quantized_weights: int = 0
    matrix_weights: int = 0
    others: dict[str, float] = field(default_factory=dict)

    @property
    def quantized_share(self) -> float:
        """Which share of the matrix weights is quantized."""
        return self.quantized_weights / max(self.matrix_weights, 1)

    def check(self) -> None:
        """Warn where less than half of the weights is quantized.

        Raises:
            UserError: If there are weights, and none is quantized.
        """
        if self.matrix_weights and not self.quantized_weights:
            reasons = dict.fromkeys(self.skipped.values()) | dict.fromkeys(self.others)
            raise UserError(
                f"none of the model's weights would be quantized: its matrices are in "
                f"{', '.join(list(reasons)[:3])}; only layers that compute what nn.Linear does are"
            )
        if self.quantized_share < 0.5:
            logger.warning("less than half of the model is quantized: %s", self)

    def __str__(self) -> str:
        reasons = "; ".join(f"{name} ({why})" for name, why in self.skipped.items())
        quantized, left = len(self.swapped) - self.fused, len(self.skipped)
        fused = f" and {self.fused} parameters of fused experts" if self.fused else ""
        largest = sorted(self.others, key=self.others.__getitem__, reverse=True)
        others = "".join(f"; {name} ({self.others[name]:.1%} of the weights)" for name in largest[:3])
        more = f" and {len(largest) - 3} more" if len(largest) > 3 else ""
        return (
            f"{quantized} linear layers{fused} quantized, {self.quantized_share:.1%} of the matrix weights "
            f"outside embeddings and heads; {left} left alone: {reasons or 'none'}{others}{more}"
        )

    def lines(self) -> str:
        """All of it, a line for each layer."""
        left = {**self.skipped, **{name: f"{part:.2%} of the weights" for name, part in self.others.items()}}
        parts = [str(self).partition(";")[0], "", "quantized:", *[f"  {name}" for name in self.swapped]]
        return "\n".join([*parts, "", "left alone:", *[f"  {k}: {why}" for k, why in left.items()], ""])

    def count(self, model: nn.Module, quantized: set[Tensor]) -> None:
        """Fill in the numbers of weights.

        Args:
            model: The model after surgery.
            quantized: Its weights that are quantized.
        """
        uncounted = {p for m in model.modules() if isinstance(m, Quantizer) for p in m.parameters()}
        for name, module in model.named_modules():
            head = isinstance(module, nn.Linear) and not {*HEADS}.isdisjoint(name.split("."))
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) or head:
                uncounted.update(set(module.parameters(recurse=False)) - quantized)
        others: dict[str, int] = {}
        for name, module in model.named_modules():
            for key, parameter in module.named_parameters(recurse=False):
                # a first dimension of one is that of a table of positions or a token
                few = parameter.ndim < 2 or parameter.shape[0] == 1 or key.endswith("bias")
                if few or parameter in uncounted:
                    continue
                uncounted.add(parameter)  # once
                self.matrix_weights += parameter.numel()
                if parameter in quantized:
                    self.quantized_weights += parameter.numel()
                elif not isinstance(module, nn.Linear):
                    others[name] = others.get(name, 0) + parameter.numel()
        self.others = {name: number / self.matrix_weights for name, number in others.items()}


def computed_from(linear: nn.Linear) -> str | None:
    """Names of the parameters that a weight is computed from; None where it is a parameter itself."""
    if "weight" in linear._parameters:
        return None
    lists = getattr(linear, "parametrizations", {})
    if "weight" in lists:
        return f"a parametrization ({', '.join(type(each).__name__ for each in lists['weight'])})"
    found = [name for name in linear._parameters if name.startswith("weight_")]
    return " and ".join(found) or "other tensors"


def is_plain(linear: nn.Linear) -> bool:
    """Whether a layer computes what `nn.Linear` does; of a subclass a trial on a tiny weight tells."""
    kind = type(linear)
    if "forward" in vars(linear):
        return False
    if kind is nn.Linear:
        return True
    alone = {*linear._parameters} <= {"weight", "bias"} and not (linear._buffers or linear._modules)
    if not alone or kind is NonDynamicallyQuantizableLinear or kind.__call__ is not nn.Linear.__call__:
        return False  # the second is for an attention that reads its weight
    if kind.forward is nn.Linear.forward:
        return True
    tiny = kind.__new__(kind)
    vars(tiny).update(vars(linear), in_features=3, out_features=2)
    weight, bias = torch.tensor([[0.3, -1.7, 0.9], [2.1, 0.4, -0.6]]), torch.tensor([0.7, -1.1])
    vars(tiny)["_parameters"] = {"weight": weight, "bias": None if linear.bias is None else bias}
    rows = torch.linspace(-2, 2, 24).sin().reshape(2, 4, 3)
    expected = F.linear(rows, weight, tiny.bias)
    try:
        with torch.random.fork_rng([]), torch.no_grad():
            for training in (True, False):
                tiny.training = training
                for x, y in ((rows, expected), (rows[0], expected[0])):
                    torch.testing.assert_close(tiny.forward(x), y, rtol=1e-6, atol=1e-6)
    except Exception:  # it wants something that a plain layer does not have
        return False
    return True
