"""The clock of a training run: gives quantizers the progress of training, their penalties and their steps.

`follow` is the one call that any trainer makes: it hooks into the optimizer's step. The gradient of a
quantizer's `penalty` joins the gradient of the loss once per optimizer step, however many micro-batches that
step accumulates, so logged losses stay those of the data. The trade-off: a trainer that clips gradients
before the optimizer's step does not clip the penalty's, unless it calls `Clock.penalize` first, as this
suite's training systems do.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from stableqat.errors import UserError
from stableqat.layers.latent import latent_weights
from stableqat.quantizers import Quantizer
from stableqat.quantizers.oscillation import dampening
from stableqat.quantizers.position import Position
from stableqat.quantizers.shard import local


def follow(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    total_steps: int | None = None,
    *,
    step: int = 0,
) -> "Clock":
    """Let the quantizers of a model follow its training; call it once, before the first step.

    Methods without a schedule, a penalty or a step of their own do not need it, and it costs them nothing. A
    quantizer follows one clock: a second call, as for another training, replaces the first. With a loss
    scaler, a step that it skips does not count.

    Args:
        model: A model with quantized layers.
        optimizer: The optimizer, or several; their steps are counted together.
        total_steps: Optimizer steps of the whole run; None if unknown: methods with a schedule then refuse.
        step: Optimizer steps done before, where training resumes.

    Returns:
        The clock; `remove` takes its hooks away.
    """
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    return Clock(model, optimizers, Position(step, total_steps))


class Clock:
    """Advances with the steps of optimizers; made by `follow`.

    Args:
        model: Holds the quantizers.
        optimizers: Their steps are counted.
        position: Where training is; shared with the quantizers.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer], position: Position) -> None:
        self.position = position
        self._penalized: set[Optimizer] = set()  # the step to come has its penalties
        self._by_optimizer: dict[Optimizer, list[_Followed]] = {each: [] for each in optimizers}
        for weight in latent_weights(model).values():
            followed = _Followed(*weight)
            followed.quantizer.position = position
            if followed.penalizes or followed.acts:
                self._file(followed)
            if position.step == 0:
                followed.begin()
        self._hooks: list[RemovableHandle] = []
        for optimizer, own in self._by_optimizer.items():
            # a fused one would undo a loss scale inside its step: too late for clipping, guard and penalty
            vars(optimizer)["_step_supports_amp_scaling"] = False
            self._hooks.append(optimizer.register_step_post_hook(self._after))
            if any(each.penalizes for each in own):
                self._hooks.append(optimizer.register_step_pre_hook(self._before))

    def at(self, step: int) -> None:
        """Say where training is, as a trainer that counts skipped steps, too, knows best.

        Args:
            step: Optimizer steps done.
        """
        self.position.step = step
        self._penalized.clear()

    def penalize(self, optimizer: Optimizer) -> None:
        """Add the gradients of the penalties to those of the loss; the step that follows adds them no more.

        A trainer that clips calls it once per step, after a loss scaler has unscaled. A parameter without a
        gradient is left alone: its step was dropped, or it was not used.

        Args:
            optimizer: Whose step comes next.
        """
        self._penalized.add(optimizer)
        for followed in self._followed(optimizer):
            followed.penalize()

    def remove(self) -> None:
        """Take the hooks away; quantizers stay where training is."""
        for hook in self._hooks:
            hook.remove()

    def _followed(self, optimizer: Optimizer) -> "Iterator[_Followed]":
        """What an optimizer trains, but for quantizers that a later clock has taken."""
        own = self._by_optimizer[optimizer]
        return (followed for followed in own if followed.quantizer.position is self.position)

    def _file(self, followed: "_Followed") -> None:
        """Find the optimizer that trains a weight or, if it is frozen, its quantizer."""
        for parameter in (followed.parameter, *followed.quantizer.parameters()):
            for optimizer, own in self._by_optimizer.items():
                for number, group in enumerate(optimizer.param_groups):
                    if any(parameter is each for each in group["params"]):
                        own.append(followed._replace(group=number))
                        return
        raise UserError(
            f"quantizer: {type(followed.quantizer).__name__} acts on each step, and no optimizer has its "
            "weight; make the optimizer from stableqat.parameter_groups(model)"
        )

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Step pre-hook: penalize, after the closure if gradients come from one."""
        _, *rest = args  # the optimizer itself comes first
        closure = kwargs.get("closure", rest[0] if rest else None)
        if closure is None:
            if optimizer not in self._penalized:
                self.penalize(optimizer)
            return None

        def with_penalty() -> Any:
            self._penalized.discard(optimizer)
            loss = closure()
            if optimizer not in self._penalized:  # a trainer may, inside
                self.penalize(optimizer)
            return loss

        return (optimizer, with_penalty, *rest[1:]), {key: x for key, x in kwargs.items() if key != "closure"}

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Step post-hook: advance, and let quantizers act on the new weights."""
        self._penalized.discard(optimizer)
        self.position.step += 1
        for followed in self._followed(optimizer):
            if followed.acts:
                followed.step(optimizer.param_groups[followed.group]["lr"], self.position.progress)


class _Followed(NamedTuple):
    """A `LatentWeight`, and the number of the parameter group that has it."""

    quantizer: Quantizer
    parameter: Tensor
    to_rows: Callable[[Tensor], Tensor]
    from_rows: Callable[[Tensor], Tensor]
    group: int = 0

    @property
    def penalizes(self) -> bool:
        return self._overrides("penalty") or self.quantizer.dampening > 0

    @property
    def acts(self) -> bool:
        return self._overrides("after_step") or self.quantizer.freezing is not None

    def _overrides(self, name: str) -> bool:
        return getattr(type(self.quantizer), name) is not getattr(Quantizer, name)

    @torch.no_grad()
    def begin(self) -> None:
        if self.quantizer.freezing is not None:
            self.quantizer.freezing.begin(self.quantizer, self.to_rows(local(self.parameter)))

    @torch.enable_grad()
    def penalize(self) -> None:
        leaf = local(self.parameter).detach().requires_grad_(self.parameter.requires_grad)
        rows = self.to_rows(leaf)
        penalty = self.quantizer.penalty(rows)
        if self.quantizer.dampening > 0:
            dampened = dampening(self.quantizer, rows)
            penalty = dampened if penalty is None else penalty + dampened
        if penalty is None or not penalty.requires_grad:
            return
        owners = [self.parameter, *(p for p in self.quantizer.parameters() if p.requires_grad)]
        leaves = [leaf, *owners[1:]]
        learned = [(owner, x) for owner, x in zip(owners, leaves, strict=True) if x.requires_grad]
        found = torch.autograd.grad(penalty, [x for _, x in learned], allow_unused=True)
        for (owner, _), gradient in zip(learned, found, strict=True):
            if gradient is not None and owner.grad is not None:
                local(owner.grad).add_(local(gradient))

    @torch.no_grad()
    def step(self, lr: float | Tensor, progress: float) -> None:
        weight = local(self.parameter)
        rows = self.to_rows(weight)
        self.quantizer.after_step(rows, float(lr), progress)
        if self.quantizer.freezing is not None:
            self.quantizer.freezing.step(self.quantizer, rows, progress)
        if rows.data_ptr() != weight.data_ptr():  # a copy: transposed experts
            weight.copy_(self.from_rows(rows))
