"""Two processes (gloo), as torchrun starts them, divide the calibration data and write one run."""

import json

import forked
import pytest
import torch
from test_divided_evaluation import as_torchrun

import starts
import words
from stableqat.runs import open_run


@pytest.mark.parametrize("method", ["gptq", pytest.param("lapq", marks=pytest.mark.slow)])
def test_two_processes_round_as_one_does(method, tmp_path, monkeypatch):
    monkeypatch.setattr(forked, "_run", as_torchrun)
    starts.model_folder(tmp_path / "model")
    words.write_text(tmp_path / "text.jsonl")
    for processes in (1, 2):
        out = tmp_path / str(processes)
        argv = ["ptq", str(tmp_path / "model"), "--out", str(out), "--method", method, "--bits", "4"]
        argv += ["--data", str(tmp_path / "text.jsonl"), "--samples", "40", "--block_size", "16"]
        forked.succeed([*argv, "--evaluations", "20", "--device", "cpu"], tmp_path / "log", processes)
    one, two = (json.loads((tmp_path / each / "ptq.json").read_text()) for each in "12")
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert [layer["rows"] for layer in two["layers"]] == [layer["rows"] for layer in one["layers"]]
    own, other = (open_run(str(tmp_path / each)).load().model for each in "12")
    for (name, tensor), theirs in zip(own.named_parameters(), other.parameters(), strict=True):
        assert (tensor != theirs).float().mean() < 0.05 or torch.allclose(tensor, theirs, rtol=1e-3), name
    assert not list(tmp_path.glob("*.partial"))
