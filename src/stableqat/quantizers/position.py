"""The position in training, which the schedules of quantizers follow."""

from stableqat.errors import UserError


class Position:
    """Optimizer steps done and planned; all quantizers of a model share one, see `stableqat.follow`.

    Args:
        step: Optimizer steps done.
        total_steps: Optimizer steps planned; None if unknown.
    """

    def __init__(self, step: int = 0, total_steps: int | None = None) -> None:
        self.total_steps = total_steps
        self.step = step

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        self._step = step
        # torch.compile takes a float that changes as an input of its graph, but an int as a constant of it:
        # the share, computed in the graph, would compile the model anew at every step
        self._share = min(step / max(self.total_steps or 0, 1), 1.0)

    @property
    def progress(self) -> float:
        """Share of the planned steps that are done, in [0, 1].

        Raises:
            UserError: If the number of planned steps is unknown, as in a run that ends by a time limit.
        """
        if self.total_steps is None:
            raise UserError(
                "quantizer: its schedule follows the length of the run, which is unknown; set "
                "trainer.max_steps, trainer.max_epochs, or total_steps of stableqat.follow"
            )
        return self._share
