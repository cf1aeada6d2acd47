"""Decoding on low-bit engines: what they compute, what is refused, what is written."""

import gc
import json
import shlex
import sys
import weakref
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import yaml

from stableqat.bench import decode, engines
from stableqat.bench.architecture import read_architecture
from stableqat.bench.decode import markdown
from stableqat.bench.engines import (
    OnnxRunner,
    Step,
    TinyGemm,
    TorchRunner,
    WrongResultError,
    swap_layers,
)
from stableqat.cli.main import main
from stableqat.export.packed import PackedModel, pack
from stableqat.quantizers import STE, QuantizedWeight

CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # caches have other heads than queries
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
}
FAMILIES = {
    "llama": {},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "wide": {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1},
}
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
CPU = torch.device("cpu")
COMMAND = (
    "stableqat bench --model {} --batch 1 --tokens 8 --rounds 2 --device cpu --decode 4 2 --out done.json"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decode")
    for name, change in FAMILIES.items():
        module = {"class_path": "stableqat.modules.LlamaModule", "init_args": {"config": CONFIG | change}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"model": module}))
    return folder


def packed_model(home, bits, family="llama"):
    architecture = read_architecture(str(home / f"{family}.yaml"))
    module = architecture.module(quantizer=partial(STE, bits=bits))
    torch.manual_seed(0)
    module.configure_model()
    layers = pack(module, torch.float32, torch.bfloat16)
    return PackedModel(module, layers, torch.float32, torch.bfloat16, {})


@torch.no_grad()
def greedy(model, tokens, number):
    """Logits after the prompt, and the tokens after it, with no cache at all."""
    tokens = list(tokens)
    first = model(input_ids=torch.tensor([tokens])).logits[:, -1]
    for _ in range(number):
        tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return first, tokens[-number:]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_torch_decodes_what_the_model_without_a_cache_does(home, family):
    model = packed_model(home, 4, family).plain()
    want, then = greedy(model, TOKENS, 6)
    runner = TorchRunner(model, 16)
    torch.testing.assert_close(runner.prompt(TOKENS), want, atol=1e-4, rtol=1e-4)
    assert int(runner.start[0]) == then[0]
    for _ in range(2):  # each round starts at the prompt again
        runner.decode(5)
        assert (int(runner.token), int(runner.position)) == (then[5], len(TOKENS) + 5)


@pytest.mark.parametrize("bits", [2, 4])
def test_onnxruntime_decodes_what_the_dequantized_model_does(home, bits):
    packed = packed_model(home, bits)
    want, then = greedy(packed.plain(), TOKENS, 3)
    plain, runner = OnnxRunner(packed.plain(), 16), OnnxRunner(packed.plain(), 16, packed.layers)
    torch.testing.assert_close(runner.prompt(TOKENS), want, atol=1e-4, rtol=1e-4)
    assert runner.start == (then[0], len(TOKENS))
    saved = sum(weight.codes.numel() * (4 - bits / 8) for weight in packed.layers.values())
    each = 8 if bits == 2 else 4  # a scale, and at 2 bits a zero point, both float32
    blocks = sum(weight.codes.shape[0] * each for weight in packed.layers.values())
    # 64 inputs a row are one block, 128 another; tables of positions stay
    assert plain.weight_bytes - runner.weight_bytes == pytest.approx(saved - blocks, rel=0.02)


def test_int8_activations_are_near_and_not_equal(home):
    packed = packed_model(home, 2, "wide")
    want, _ = greedy(packed.plain(), TOKENS, 1)
    logits = OnnxRunner(packed.plain(), 16, packed.layers, int8_activations=True).prompt(TOKENS)
    off = ((logits - want).abs().max() / want.abs().max()).item()
    assert 1e-4 < off < 0.2  # equal would mean that blocks are too long for the kernel, and that it is slow


@pytest.mark.parametrize("zero_point", [0.0, -0.5])
@pytest.mark.parametrize("groups", [1, 4])
def test_tinygemm_multiplies_with_every_grid(zero_point, groups):
    torch.manual_seed(0)
    codes = torch.randint(-8, 8, (48, 256), dtype=torch.int8)
    scale = (0.1 + torch.rand(48, groups)).to(torch.bfloat16).float()
    weight = QuantizedWeight(codes, scale, zero_point, 4, "any")
    bias, input = torch.randn(48), torch.randn(1, 3, 256).bfloat16()
    want = input.float() @ weight.dequantize().T + bias
    made = TinyGemm(weight, bias, CPU)(input)
    assert made.shape == (1, 3, 48)
    assert (made.float() - want).abs().max() < 0.01 * want.abs().max()


class DocumentedGemLite(torch.nn.Module):
    """GemLite as its README has it, `(W_q - zeros) * scales`; its kernels need a GPU."""

    def __init__(self, W_nbits, group_size, in_features, out_features, input_dtype, output_dtype):
        super().__init__()
        assert (input_dtype, output_dtype) == ("BF16", "BF16")
        self.top, self.shape = 2**W_nbits - 1, (out_features, in_features // group_size, group_size)

    def pack(self, W_q, scales, zeros, bias, fma_mode):
        assert W_q.dtype == torch.uint8
        assert W_q.max() == self.top
        steps = W_q.view(self.shape).float() - (zeros if isinstance(zeros, int) else zeros.float()[..., None])
        self.weight, self.bias = (steps * scales.float()[..., None]).flatten(1), bias

    def forward(self, x):
        return x @ self.weight.to(x.dtype).T + self.bias


@pytest.mark.parametrize("zero_point", [0.0, -0.5])
@pytest.mark.parametrize(("bits", "groups"), [(2, 1), (2, 4), (4, 1)])
def test_gemlite_is_given_every_grid(zero_point, bits, groups, monkeypatch):
    atomics = []
    gemlite = SimpleNamespace(
        DType=SimpleNamespace(BF16="BF16"),
        GemLiteLinear=DocumentedGemLite,
        set_native_atomic_bfp16=atomics.append,
    )
    monkeypatch.setitem(sys.modules, "gemlite", gemlite)
    torch.manual_seed(0)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (48, 256), dtype=torch.int8)
    scale = (0.1 + torch.rand(48, groups)).to(torch.bfloat16).float()
    weight = QuantizedWeight(codes, scale, zero_point, bits, "any")
    made = engines.gemlite_linear(weight, torch.zeros(48), CPU)
    assert torch.equal(made.weight, weight.dequantize())
    assert atomics == [False]


def test_an_engine_that_is_wrong_is_not_timed(home):
    packed = packed_model(home, 4)

    def shifted(weight, bias, device):
        return TinyGemm(replace(weight, zero_point=-0.5), bias, device)

    with pytest.raises(WrongResultError, match=r"model.layers.0.* is off by"):
        swap_layers(packed.plain().bfloat16(), packed.layers, shifted, CPU)


@pytest.fixture(scope="module")
def done(home):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(engines.TinyGemm, "forward", lambda self, input: input.new_zeros(1, self.rows))
        assert main(shlex.split(COMMAND.format("llama.yaml"))[1:]) == 0
    return json.loads((home / "done.json").read_text())


def test_the_command_tells_who_ran_what(done):
    arms = done["decode"]
    ran = {
        (record["engine"], record["bits"], record["activations"])
        for record in arms.values()
        if "ms" in record
    }
    assert ran == {
        ("torch", None, "bfloat16"),
        ("onnxruntime", None, "float32"),
        *(("onnxruntime", bits, activations) for bits in (4, 2) for activations in ("float32", "int8")),
    }
    for record in arms.values():
        if "ms" in record:
            assert len(record["ms"]) == len(record["bf16_ms"]) == 2
            assert min(record["ms"] + record["bf16_ms"]) > 0
    assert arms["onnxruntime 2 bits"]["weight_bytes"] < arms["onnxruntime 4 bits"]["weight_bytes"]
    assert arms["onnxruntime 2 bits"]["difference"] < 1e-4
    assert done["left_out"] == ["tinygemm does not run 2 bits, only 4"]
    assert "--decode 4 2" in done["command"]
    assert "onnxruntime" in done["versions"]


def test_a_failed_engine_is_a_row_without_times(done, home):
    assert "WrongResultError" in done["decode"]["tinygemm 4 bits"]["failed"]
    text = (home / "done.md").read_text()
    assert text == markdown(done)
    row = next(line for line in text.splitlines() if line.startswith("| tinygemm 4 bits (failed)"))
    assert set(row.split("|")[2:-1]) == {" - "}
    assert "\n- tinygemm does not run 2 bits, only 4\n" in text


def test_ratios_are_those_of_a_round(done):
    done = json.loads(json.dumps(done))
    arms = done["decode"]
    arms["onnxruntime fp32"] |= {"ms": [2.0, 6.0], "bf16_ms": [4.0, 8.0]}
    arms["onnxruntime 4 bits"] |= {"ms": [1.0, 5.0], "bf16_ms": [4.0, 10.0]}
    row = next(x for x in markdown(done).splitlines() if x.startswith("| onnxruntime 4 bits |"))
    assert "| 3.000 (1.000-5.000) | 0.38 (0.25-0.50) | 0.60 (0.40-0.80) |" in row


@pytest.mark.slow
def test_two_models_at_a_time_are_held(home, monkeypatch):
    """Bfloat16's, while the next is built and takes turns with it."""
    living, held = weakref.WeakSet(), []

    def counted(real):
        def call(*arguments):
            gc.collect()
            held.append(len(living))
            made = real(*arguments)
            if hasattr(made, "decode"):
                living.add(made)
            return made

        return call

    monkeypatch.setattr(decode, "_packed", counted(decode._packed))
    monkeypatch.setattr(decode, "_warm", counted(decode._warm))
    decode.measure_decode(read_architecture(str(home / "llama.yaml")), [4], "integer", 8, 1, CPU, print)
    assert held == [0, 0, *[1] * 6]  # before each of three models and five engines


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("--decode 3", "no engine on the cpu runs 3 bits; there are onnxruntime 2, 4, 8; tinygemm 4"),
        ("--batch 2", "must be 1 with --decode, which measures one stream, not 2"),
        ("--methods STE", "methods: applies to training steps only"),
        ("--precision bf16-true", "precision: applies to training steps only"),
        ("--tokens 33", "takes a prompt of 8 to 32 tokens"),
        ("--tokens 2", "takes a prompt of 8 to 32 tokens"),
        ("--out done.txt", "must end in .json"),
    ],
)
def test_what_is_refused(home, change, line, monkeypatch, capsys):
    monkeypatch.chdir(home)
    command = f"{COMMAND.format('llama.yaml')} {change}".replace("--out done.json", "--out other.json", 1)
    assert main(shlex.split(command)[1:]) == 2
    assert line in capsys.readouterr().err
    assert not (home / "other.json").exists()


def test_half_integers(home, monkeypatch):
    monkeypatch.chdir(home)
    command = COMMAND.format("wide.yaml").replace("4 2 --out done", "2 --grid stretched --out stretched")
    assert main(shlex.split(command)[1:]) == 0
    done = json.loads((home / "stretched.json").read_text())
    assert done["settings"]["grid"] == "stretched"
    exact, int8 = (done["decode"][f"onnxruntime 2 bits{more}"] for more in ("", ", int8 activations"))
    assert exact["difference"] < 1e-4 < int8["difference"]
    # odd integers, 4 bits wide, are what the int8 kernel multiplies with
    assert int8["weight_bytes"] > exact["weight_bytes"]


def test_training_steps_have_no_grid_of_their_own(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    command = "bench --model llama.yaml --batch 1 --device cpu --grid stretched --out other.json"
    assert main(shlex.split(command)) == 2
    assert "grid: applies to decoding only; remove it, or add --decode" in capsys.readouterr().err


def test_a_vision_transformer_decodes_nothing(at, capsys):
    assert main(shlex.split("bench --model tiny-vit --batch 1 --decode 4 --device cpu --out vit.json")) == 2
    assert "tiny-vit is not a language model" in capsys.readouterr().err


def test_an_engine_that_is_missing_is_told(monkeypatch):
    monkeypatch.setattr(decode, "find_spec", lambda name: None)
    arms, left_out = decode._arms([4, 2], torch.device("cuda"))
    assert [arm.name for arm in arms] == ["torch bf16", "tinygemm 4 bits"]
    assert left_out[0] == "gemlite is not installed: pip install gemlite"


def test_a_cache_that_may_not_be_written_is_left_alone(home):
    model = packed_model(home, 4).plain()
    cache = [torch.zeros(1, 2, 4, 16) for _ in range(4)]
    arguments = (torch.tensor([[1]]), torch.tensor([2]), *cache)
    _, *new = Step(model, in_place=False)(*arguments)
    assert not any(entry.any() for entry in cache)
    assert all(entry[:, :, 2].any() and not entry[:, :, 3].any() for entry in new)


@pytest.mark.parametrize(("more", "named"), [((), {}), (({"position": 3},), {}), ((), {"kwargs": {}})])
def test_a_cache_takes_whatever_a_release_of_transformers_adds(more, named):
    cache = engines._Cache([torch.zeros(1, 1, 4, 2) for _ in range(4)], torch.tensor([2]), in_place=True)
    keys, values = cache.update(torch.ones(1, 1, 1, 2), torch.full((1, 1, 1, 2), 2.0), 1, *more, **named)
    assert keys[0, 0].tolist() == [[0, 0], [0, 0], [1, 1], [0, 0]]
    assert values.sum() == 4
    assert not any(entry.any() for entry in cache.entries[:2])


def attend(cache):
    cache.update(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), 0)
    return SimpleNamespace(logits=torch.zeros(1, 1, 3))


@pytest.mark.parametrize(
    "forward",
    [lambda *, cache, **rest: attend(cache), lambda *, past_key_values, **rest: attend(past_key_values)],
)
def test_a_cache_goes_by_the_name_that_the_release_has_for_it(forward):
    model = torch.nn.Module()
    model.forward = forward
    cache = [torch.zeros(1, 1, 4, 2) for _ in range(2)]
    Step(model, in_place=True)(torch.tensor([[1]]), torch.tensor([2]), *cache)
    assert cache[0][0, 0].tolist() == [[0, 0], [0, 0], [1, 1], [0, 0]]
