"""An interrupted command leaves what it has finished; the same command goes on, another is refused."""

import fcntl
import os

import pytest
import torch

from stableqat.ptq import rounding
from stableqat.runs import open_run


def state(run):
    return open_run(str(run)).content["state_dict"]


def same(one, other):
    own, theirs = state(one), state(other)
    return own.keys() == theirs.keys() and all(torch.equal(own[key], theirs[key]) for key in own)


def interrupted(monkeypatch, name, after):
    """Let a function of rounding be called so many times, and then the user interrupts; count its calls."""
    real, calls = getattr(rounding, name), []

    def counted(*args, **kwargs):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(rounding, name, counted)
    return calls


@pytest.mark.parametrize(
    ("method", "name", "after", "finished", "left"),
    [
        ("gptq", "gptq", 10, 7, {"settings.json", "losses.txt", "block-0.safetensors"}),
        ("lapq", "_loss", 20, 20, {"settings.json", "losses.txt"}),
    ],
)
def test_the_same_command_goes_on(
    method, name, after, finished, left, place, ptq, tmp_path, monkeypatch, caplog
):
    def counting(out, after=1000):
        with monkeypatch.context() as patch:
            calls = interrupted(patch, name, after)
            return ptq(place / "llama", tmp_path / out, method=method), len(calls)

    code, total = counting("whole")
    assert (code, total > after) == (0, True)
    assert counting("run", after) == (130, after)
    partial = tmp_path / "run.partial"
    assert {path.name for path in partial.iterdir()} == left
    assert not (tmp_path / "run").exists()
    assert f"{partial} holds what is finished; the same command goes on from there" in caplog.messages
    assert counting("run") == (0, total - finished)
    assert same(tmp_path / "run", tmp_path / "whole")
    assert not partial.exists()


@pytest.fixture
def begun(place, ptq, tmp_path, monkeypatch):
    """A folder that an interruption has left."""
    with monkeypatch.context() as patch:
        interrupted(patch, "gptq", 10)
        assert ptq(place / "llama", tmp_path / "run") == 130
    return tmp_path / "run.partial"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"bits": 3}, "was begun with bits 2, not 3"),
        ({"method": "adaround"}, "was begun with method gptq, not adaround"),
        ({"samples": 5}, "was begun with samples 6, not 5"),
        ({"group_size": 16}, "was begun with group_size None, not 16"),
    ],
)
def test_another_command_is_refused(options, told, begun, place, ptq, tmp_path, capsys):
    before = {path: path.read_bytes() for path in begun.iterdir()}
    assert ptq(place / "llama", tmp_path / "run", **options) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]
    assert {path: path.read_bytes() for path in begun.iterdir()} == before


def test_other_weights_damage_strangers_and_another_process_are_refused(begun, place, ptq, tmp_path, capsys):
    def refusal():
        assert ptq(place / "llama", tmp_path / "run") == 2
        return capsys.readouterr().err.splitlines()[-1]

    lock = os.open(begun, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert "another process is at work" in refusal()
    os.close(lock)
    file = begun / "block-0.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert f"{file}: damaged" in refusal()
    file.write_bytes(whole)
    settings = begun / "settings.json"
    settings.write_text(settings.read_text().replace('"fingerprint": ', '"fingerprint": 1'))
    assert "other weights or data" in refusal()
    settings.unlink()
    assert "is not what an interrupted command leaves" in refusal()


def test_a_mistake_leaves_nothing(place, ptq, tmp_path, monkeypatch):
    monkeypatch.setattr(rounding, "_loss", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ptq(place / "llama", tmp_path / "run")
    assert not list(tmp_path.glob("run*"))
