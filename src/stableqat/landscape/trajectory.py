"""The losses of latent and deployed weights over a run, as the `Trajectory` callback has logged them."""

from pathlib import Path

from stableqat.events import read_run

LOSSES = {"landscape/loss_latent": "latent", "landscape/loss_deployed": "deployed"}


def losses_over_steps(folder: Path) -> dict[str, dict[int, float]]:
    """The latent and the deployed loss by step; empty if the run did not log them.

    Args:
        folder: The run's folder.
    """
    scalars = read_run(folder, ("landscape/",)).scalars
    return {name: scalars[tag] for tag, name in LOSSES.items() if tag in scalars}


def first_entry(folder: Path, rise: float) -> int | None:
    """The first measured step at which the deployed model is in the basin of the start.

    Args:
        folder: The run's folder.
        rise: The basin is where the loss is at most this much above the start's.

    Returns:
        The step; None if there is none, or if the start was not measured.
    """
    found = losses_over_steps(folder)
    if 0 not in found.get("latent", {}):
        return None
    limit = found["latent"][0] + rise
    return next((step for step, loss in found["deployed"].items() if loss <= limit), None)
