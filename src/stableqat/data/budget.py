"""A budget: a number of tokens, as a user writes it (300000, 20_000_000, 20M, 1.5B), and its checks.

`data sample` draws raw text until a budget is met, a mixture cuts its epochs to whole rows of one, and a run
that would take more is refused before its first step.
"""

import math
import re
from typing import TYPE_CHECKING

from stableqat.errors import UserError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

#: Of English text with a byte-level BPE; tokenizers of 32k entries and more need slightly fewer tokens.
CHARACTERS_PER_TOKEN = 4
_SCALE = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9}
_WRITTEN = re.compile(r"(\d+(?:\.\d+)?(?:e\d+)?)([kmbg]?)")


class Budget:
    """A number of tokens to draw or to train on.

    Args:
        written: A whole number, or how a user writes one; K, M and B (or G) are powers of 1000.
        key: The setting that holds it, for messages.

    Attributes:
        tokens: The number.
        characters: The length of raw text with about as many tokens.

    Raises:
        UserError: If `written` is not a number of at least 1.
    """

    def __init__(self, written: int | str, key: str = "tokens"):
        match = _WRITTEN.fullmatch(str(written).strip().replace("_", "").lower())
        self.tokens = round(float(match[1]) * _SCALE[match[2]]) if match else 0
        if self.tokens < 1:
            raise UserError(f"{key}: must be a number such as 300000, 20M or 1.5B, not {written}")
        self.characters = self.tokens * CHARACTERS_PER_TOKEN
        self.key = key

    def rows(self, block_size: int) -> int:
        """The number of whole rows of `block_size` tokens in the budget.

        Raises:
            UserError: If there is not even one.
        """
        if self.tokens < block_size:
            raise UserError(
                f"{self.key} {self.tokens} is less than a row of block_size {block_size}: raise it"
            )
        return self.tokens // block_size

    def more_than(self, there: str, otherwise: str) -> UserError:
        """The error for a source that holds too little.

        Args:
            there: Which source holds how many tokens.
            otherwise: What to do other than lower the budget.
        """
        return UserError(f"{self.key} {self.tokens} is more than {there}: lower {self.key}, or {otherwise}")

    def check_step(self, factors: dict[str, int]) -> None:
        """Refuse an optimizer step that takes more or fewer tokens than the budget declares.

        Args:
            factors: The settings whose product is the tokens of a step.

        Raises:
            UserError: If the numbers differ.
        """
        if (step := math.prod(factors.values())) != self.tokens:
            product = " x ".join(f"{name} {number}" for name, number in factors.items())
            declared = f"{self.key} {self.tokens} is declared, but a step takes {step}"
            raise UserError(f"{declared}: {product}; change one of them")

    def check_run(self, trainer: "Trainer", step: int, batches: int) -> None:
        """Refuse a run that takes more than the budget, by its steps or else by its epochs.

        Args:
            trainer: Has the numbers of steps and epochs.
            step: Tokens per optimizer step.
            batches: Batches per epoch.

        Raises:
            UserError: If the run takes more.
        """
        steps, epochs, limit = trainer.max_steps, trainer.max_epochs, trainer.limit_train_batches
        declared = f"{self.key} {self.tokens} is declared, but trainer."
        if steps * step > self.tokens:
            raise UserError(
                f"{declared}max_steps {steps} takes {steps * step}: lower max_steps (-1 with max_epochs 1 "
                "ends with the budget), or set repeat: true"
            )
        assert epochs is not None
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        taken = epochs * batches * step // trainer.accumulate_grad_batches
        if steps == -1 and (epochs == -1 or taken > self.tokens):
            raise UserError(
                f"{declared}max_epochs {epochs} takes {'more' if epochs == -1 else taken}: lower max_epochs "
                "(1 ends with the budget), or set repeat: true"
            )
