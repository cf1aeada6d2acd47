"""Lightning's Trainer with two settings that may be left to the machine and to the length of the run."""

from typing import Any, Literal

import lightning as L
from lightning.fabric.connector import _PRECISION_INPUT


class Trainer(L.Trainer):
    """The Trainer of fit, validate, test and predict.

    Args:
        precision: Lightning's; auto is bf16-mixed on a GPU that has bfloat16, and float32 elsewhere.
        val_check_interval: Lightning's; auto validates five times in a run of max_steps, or in its one epoch,
            and otherwise after each epoch.
        options: Those of Lightning's Trainer.
    """

    def __init__(
        self,
        *,
        precision: _PRECISION_INPUT | Literal["auto"] | None = None,
        val_check_interval: int | float | str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(precision=precision, val_check_interval=val_check_interval, **options)  # type: ignore[arg-type]
