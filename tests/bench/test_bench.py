"""The command on a CPU, from the command line to its files."""

import json
import shlex

import pytest
import torch

from stableqat.cli.main import main

ARMS = ["FP", "STE", "DSQ", "rounded", "unbuilt", "late", "rivals:STE"]
COMMAND = (
    "stableqat bench --model tiny-llama --batch 2 --tokens 16 --methods STE DSQ --bits 3"
    " --rival rivals.py:rounded rivals.py:unbuilt rivals.py:late rivals.py:STE"
    " --modes eager --rounds 4 --seeds 2 --device cpu --out done.json"
)


@pytest.fixture(scope="module")
def done(place):
    """What a run wrote."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        # installed here or not, torchao is not what is tested
        patch.setattr("stableqat.bench.arms.find_spec", lambda name: None)
        assert main(shlex.split(COMMAND)[1:]) == 0
    return json.loads((place / "done.json").read_text())


def test_the_files(done, place):
    assert "| STE " in (place / "done.md").read_text()
    assert (place / "done.png").read_bytes().startswith(b"\x89PNG")
    assert not list(place.glob(".*.part"))


def test_what_has_to_be_known_to_repeat_it(done):
    assert done["command"] == COMMAND
    assert done["versions"]["torch"] == torch.__version__.split("+")[0]
    assert {"python", "stableqat", "transformers"} <= set(done["versions"])
    assert "thread" in done["device"]
    assert done["seeds"] == [0, 1]
    expected = {"model": "tiny-llama", "batch": 2, "tokens": 16, "precision": "32-true", "bits": 3}
    expected["loss"] = "full logits"
    assert done["settings"].items() >= {**expected, "items": 32, "unit": "tokens", "rounds": 4}.items()
    assert done["kernels"] is None


def test_every_arm_has_its_times(done):
    mode = done["modes"]["eager"]
    assert list(mode) == ARMS
    for name in ("FP", "STE", "DSQ", "rounded", "rivals:STE"):
        record = mode[name]
        assert record["peak_bytes"] is None  # a CPU does not tell
        assert record["path"] == ("torch" if name in ("STE", "DSQ") else None)
        times = [record[f"{part}_ms"] for part in ("forward", "backward", "forward_backward", "step")]
        for forward, backward, both, step in zip(*times, strict=True):
            assert 0 < forward < both < step
            assert forward + backward == pytest.approx(both)
        assert len(times[0]) == 4


def test_a_rival_that_fails_is_a_row(done, place):
    mode = done["modes"]["eager"]
    assert mode["unbuilt"]["failed"] == "ValueError: wants 7 bits"
    assert mode["late"]["failed"] == "RuntimeError: no such kernel"
    assert "late failed: RuntimeError: no such kernel" in (place / "done.md").read_text()


def test_images(at, capsys, monkeypatch):
    monkeypatch.setattr("stableqat.bench.arms.find_spec", lambda name: None)
    command = (
        "bench --model tiny-vit --batch 3 --methods ParetoQ --modes eager --precision bf16-true --rounds 1"
    )
    assert main(shlex.split(command)) == 0
    out, err = capsys.readouterr()
    written = json.loads((at / "bench" / "tiny-vit-3-bf16-true-cpu.json").read_text())
    assert written["settings"]["unit"] == "images"
    assert written["settings"]["items"] == 3
    assert "images/s" in out
    assert "ParetoQ is warm" in err
    assert main(shlex.split(command)) == 2  # never over an earlier result
    assert "exists already" in capsys.readouterr().err


def test_a_finished_mode_is_kept(at, monkeypatch):
    from stableqat.bench import measure

    original = measure.measure

    def killed(mode, *args):
        if mode == "compiled":
            raise KeyboardInterrupt
        return original(mode, *args)

    monkeypatch.setattr(measure, "measure", killed)
    arguments = "bench --model tiny-vit --batch 1 --methods STE --rounds 1 --out killed.json"
    assert main(shlex.split(arguments)) == 130
    assert list(json.loads((at / "killed.json").read_text())["modes"]) == ["eager"]


REFUSED = {
    "no model": (["--batch", "1"], "model: missing"),
    "an unknown model": (["--model", "tiny-lama"], "model: tiny-lama is unknown; did you mean tiny-llama?"),
    "a name of both families": (
        ["--model", "base"],
        "base may be configs/llama/base.yaml or configs/vit/base",
    ),
    "no such file": (["--model", "gone.yaml"], "model: gone.yaml: there is no such file, and no shipped"),
    "a file without a model": (["--model", "nothing.yaml"], "nothing.yaml has no model section"),
    "a file that is no YAML": (["--model", "broken.yaml"], "broken.yaml cannot be read as YAML"),
    "another class": (["--model", "stranger.yaml"], "collections.Counter is not a QATModule"),
    "a misspelt setting": (["--model", "misspelt.yaml"], "confg is not a setting of LlamaModule"),
    "nothing to quantize": (["--model", "whole"], "skip: * leaves none of the 5 linear layers to quantize"),
    "a batch of none": (["--batch", "0"], "batch: must be at least 1, not 0"),
    "no rounds": (["--rounds", "0"], "rounds: must be at least 1, not 0"),
    "inputs of one bit": (["--input_bits", "8", "1"], "input_bits: must be at least 2 and at most 8, not 1"),
    "no seeds": (["--seeds", "0"], "seeds: must be at least 1, not 0"),
    "half a batch": (["--batch", "1.5"], "batch: must be a whole number, not 1.5"),
    "too many tokens": (["--tokens", "33"], "tokens: tiny-llama takes from 2 to 32 tokens per row, not 33"),
    "tokens of an image": (["--model", "tiny-vit", "--tokens", "8"], "tokens: tiny-vit takes images"),
    "an unknown method": (["--methods", "stableqt"], "methods: stableqt is unknown; did you mean StableQAT?"),
    "an unknown mode": (["--modes", "eagre"], "modes: must be eager, compiled or graphed, not eagre"),
    "an unknown precision": (
        ["--precision", "16"],
        "precision: must be 32-true, bf16-mixed, bf16-true or null",
    ),
    "an unknown width": (["--bits", "9"], "bits: must be a whole number from 1 to 8, not 9"),
    "an unknown key": (["--batchs", "1"], "batchs: unknown key; did you mean batch?"),
    "a graph on a CPU": (["--modes", "graphed", "--device", "cpu"], "modes: graphed needs a CUDA device"),
    "an unknown device": (["--device", "gpu"], "device: gpu computes nothing here; take cpu, cuda or cuda:1"),
    "a GPU that is not there": (["--device", "cuda:99"], "device: there is no cuda:99, PyTorch sees"),
    "a rival without factory": (["--rival", "rivals.py"], "rival: rivals.py: write FILE.py:FACTORY"),
    "a rival's file": (["--rival", "rival.py:rounded"], "rival: rival.py: there is no such file"),
    "a rival's name": (["--rival", "rivals.py:round"], "rivals.py has no round; did you mean rounded?"),
    "a rival that is a number": (["--rival", "rivals.py:number"], "number in rivals.py is not a function"),
    "a rival that returns nothing": (["--rival", "rivals.py:forgetful"], "forgetful returns a NoneType"),
    "a rival's syntax": (["--rival", "syntax.py:f"], "syntax.py cannot be imported: SyntaxError"),
    "a rival twice": (["--rival", *["rivals.py:rounded"] * 3], "rivals.py:rounded is named twice"),
    "a gather by one process": (["--gather", "1", "--device", "cpu"], "gather: must be at least 2, not 1"),
    "a gather in modes": (["--gather", "2", "--device", "cpu"], "modes: does not apply to gathers; remove"),
    "another suffix": (["--out", "x.txt"], "out: x.txt must end in .json"),
    "a folder that is a file": (["--out", "rivals.py/x.json"], "out: rivals.py/x.json cannot be written"),
    "a file that is there": (["--out", "rivals.json"], "out: rivals.md exists already; name a new file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input(case, at, capsys):
    flags, expected = REFUSED[case]
    (at / "rivals.md").write_text("of somebody else")
    before = sorted(at.iterdir())
    default = {"--model": "tiny-llama", "--batch": "1", "--out": "refused.json", "--modes": "eager"}
    if case == "no model":
        del default["--model"]
    given = [word for key, value in default.items() if key not in flags for word in (key, value)]
    assert main(["bench", *given, *flags]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert len(err.splitlines()) == 1, err
    assert err.startswith("stableqat: ")
    assert expected in err
    assert len(err) < 300
    assert sorted(at.iterdir()) == [*before]


def test_inputs_are_quantized_beside_inputs_as_they_are(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr("stableqat.bench.arms.find_spec", lambda name: None)
    command = "bench --model tiny-llama --batch 1 --tokens 8 --methods STE --bits 2 --input_bits 4 8 4"
    assert (
        main(shlex.split(f"{command} --modes eager --rounds 1 --seeds 1 --device cpu --out inputs.json")) == 0
    )
    arms = json.loads((place / "inputs.json").read_text())["modes"]["eager"]
    assert list(arms) == ["FP", "STE", "STE, 4-bit inputs", "STE, 8-bit inputs"]
    # scale and offset of 14 layers' inputs and their floors, and AdamW's two averages of the first two
    more = arms["STE, 4-bit inputs"]["state_bytes"] - arms["STE"]["state_bytes"]
    assert more > 14 * 2 * 3 * 4
