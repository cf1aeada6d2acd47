"""What the verbs show on a terminal, and nowhere else."""

import io
import time

import pytest
from torch import nn

import stableqat
from stableqat import surgery, terminal


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def begin(monkeypatch):
    """A terminal in place of stderr; a fixture could not do it, as pytest puts its own there afterwards."""
    monkeypatch.setattr("sys.stderr", shown := Terminal())
    monkeypatch.setattr(terminal, "WAIT", 0.01)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return shown


def wait_for(screen, text, seconds):
    end = time.monotonic() + seconds
    while text not in screen.getvalue() and time.monotonic() < end:
        time.sleep(0.01)
    return text in screen.getvalue()


def test_work_that_takes_a_while_shows_a_bar_on_a_terminal(monkeypatch):
    screen = begin(monkeypatch)
    with terminal.progress(4, 1) as show:
        show(2, "half [red] done")
        assert wait_for(screen, "half [red] done", 30)
        show(4, "all done")
    assert "all done" in screen.getvalue()
    assert screen.getvalue().endswith("\x1b[?25h")  # the cursor is back


@pytest.mark.parametrize("why", ["quick", "another process", "no terminal"])
def test_nothing_is_shown_where_it_would_disturb(why, monkeypatch):
    screen = begin(monkeypatch)
    if why == "quick":
        monkeypatch.setattr(terminal, "WAIT", 600.0)
    elif why == "another process":
        monkeypatch.setenv("LOCAL_RANK", "1")
    else:
        monkeypatch.setattr(screen, "isatty", lambda: False)
    with terminal.progress(2) as show:
        show(1, "half done")
        assert not wait_for(screen, "half", 0.2)
    assert screen.getvalue() == ""


def test_prepare_counts_its_layers(monkeypatch):
    screen = begin(monkeypatch)

    def slow(*arguments, **options):
        assert wait_for(screen, "\x1b", 30)
        return make(*arguments, **options)

    make = surgery.make_quantizer
    monkeypatch.setattr(surgery, "make_quantizer", slow)
    stableqat.prepare(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "ste", bits=2)
    assert "quantized 2 of 2 layers" in screen.getvalue()
