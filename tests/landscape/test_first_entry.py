"""The step at which a run's deployed weights are back in the basin, from its event files."""

import pytest
from torch.utils.tensorboard import SummaryWriter

from stableqat.landscape.trajectory import first_entry, losses_over_steps


@pytest.fixture
def folder(tmp_path):
    def write(latent, deployed):
        with SummaryWriter(str(tmp_path)) as writer:
            for tag, values in (("latent", latent), ("deployed", deployed)):
                for step, value in values.items():
                    writer.add_scalar(f"landscape/loss_{tag}", value, step)
        return tmp_path

    return write


def test_the_first_step_within_the_rise_of_the_starts_loss(folder):
    run = folder({0: 2.0, 4: 1.5, 8: 1.0}, {0: 5.0, 4: 2.2, 8: 2.05, 12: 2.5, 16: 1.0})
    assert losses_over_steps(run)["deployed"][8] == pytest.approx(2.05)
    assert first_entry(run, 0.1) == 8  # the basin is the start's, not that of the present weights
    assert first_entry(run, 0.25) == 4
    assert first_entry(run, 4.0) == 0
    assert first_entry(run, 0.01) == 16


def test_none_if_it_never_enters_or_was_not_measured(folder, tmp_path):
    assert first_entry(folder({4: 2.0}, {4: 1.0}), 0.1) is None
    assert first_entry(tmp_path / "nothing", 0.1) is None
