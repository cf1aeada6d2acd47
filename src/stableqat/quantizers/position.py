"""Where training is: what schedules of quantizers follow."""

from dataclasses import dataclass

from stableqat.errors import UserError


@dataclass
class Position:
    """Optimizer steps done and planned; all quantizers of a model share one, see `stableqat.follow`.

    Attributes:
        step: Optimizer steps done.
        total_steps: Optimizer steps planned; None if unknown.
    """

    step: int = 0
    total_steps: int | None = None

    @property
    def progress(self) -> float:
        """Share of the planned steps that is done, in [0, 1].

        Raises:
            UserError: If the number of planned steps is unknown, as in a run that only a time limit ends.
        """
        if self.total_steps is None:
            raise UserError(
                "quantizer: its schedule follows the length of the run, which is unknown; set "
                "trainer.max_steps or trainer.max_epochs, or total_steps of stableqat.follow"
            )
        return min(self.step / max(self.total_steps, 1), 1.0)
