"""Checkpoints laid out as the released codes leave them become runs that deploy the same weights."""

import json
import math
import re
import resource
import shutil
import struct
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import tiny
from stableqat.cli.main import main
from stableqat.importing.checkpoint import read_config
from stableqat.layers.linear import quantized_layers
from stableqat.modules import LlamaModule
from stableqat.quantizers import DSQ, STE, ParetoQ, StableQAT

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SURROGATE = {"enable": True, "amplitude": [0.21]}


def released(w: Tensor, clip: Tensor, code: str, bits: int, sharpness: Tensor | None = None) -> Tensor:
    """The forward of the released layers, operation by operation in the type of the weights."""
    alpha = torch.where(clip > 1e-5, clip, torch.tensor(1e-5))
    if bits == 1:
        return w.sign() * alpha
    if code == "paretoq" and bits in (0, 2):
        n, shift = (1.5, 0) if bits == 0 else (2, 0.5)
        inner = torch.clamp(w / alpha, -(1 - 1e-2), 1 - 1e-2) * n
        return (torch.round(inner - shift) + shift) / n * alpha
    q_min, q_max = (-1, 1) if bits == 0 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    v = w / alpha
    if sharpness is None:
        if code == "efficient":
            v = w * (1 / alpha)
        return v.round().clamp(q_min, q_max) * alpha
    sharpness = torch.where(sharpness >= 2, torch.tensor([2.0]), sharpness)  # float32 from here on
    below = torch.floor(v - q_min) + q_min  # the level under v, and a soft step from it to the next
    phi = torch.tanh((v - (below + 0.5)) * (2 / sharpness - 1).log()) * (1 / (1 - sharpness))
    side = (phi / (phi.max() - phi.min()) + 0.5).round() * 2 - 1
    q = side / 2 + 0.5 + below
    q = q + torch.relu(q_min - q)
    return ((q - torch.relu(q - q_max)) * alpha).to(w.dtype)


def released_start(w: Tensor, code: str, bits: int) -> Tensor:
    """Clip values as after some training; one below zero, where the layer's floor acts, in every matrix."""
    largest = w.float().abs().amax(-1, keepdim=True)
    share = {0: 0.7, 1: 0.5, 2: 0.8 if code == "paretoq" else 0.35, 3: 0.2, 4: 0.1}[bits]
    clip = largest * share * torch.empty(len(w), 1).uniform_(0.8, 1.2)
    clip[3] = -0.01
    return clip.to(w.dtype)


def make(
    folder: Path,
    code: str = "paretoq",
    bits: int = 2,
    dtype: torch.dtype = torch.float32,
    family: str = "llama",
    files: str = "safetensors",
    dsq: bool = False,
    heads: int = 2,
    **extras,
) -> dict[str, Tensor]:
    """Write a checkpoint; return its tensors."""
    torch.manual_seed(0)
    sizes = {k: v for k, v in tiny.LLAMA.items() if k != "model_type"} | {"vocab_size": 300}
    config = AutoConfig.for_model(family, **sizes, num_key_value_heads=heads, initializer_range=0.15)
    state = AutoModelForCausalLM.from_config(config, dtype=dtype).state_dict()
    for name in [name for name in state if name.endswith(tuple(f"{p}.weight" for p in PROJECTIONS))]:
        state[f"{name}_clip_val"] = released_start(state[name], code, bits)
        if dsq:
            sharpness = torch.tensor([0.1 + 0.05 * (len(state) % 9)], dtype=dtype)
            state[name.replace(".weight", ".alpha_dsq")] = sharpness
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    rewrite(folder / "config.json", w_bits=bits, **extras)
    write(folder, state, files)
    return state


def write(folder: Path, state: dict[str, Tensor], files: str = "safetensors") -> None:
    state = {key: value.clone() for key, value in state.items()}
    if files == "safetensors":
        del state["lm_head.weight"]  # tied
        save_file(state, folder / "model.safetensors")
    elif files == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        parts = {f"part-{n}.bin": dict(list(state.items())[n::2]) for n in (0, 1)}
        for part, held in parts.items():
            torch.save(held, folder / part)
        index = {"weight_map": {key: part for part, held in parts.items() for key in held}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def rewrite(path: Path, **settings) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def imported(folder: Path, code: str, *flags: str) -> LlamaModule:
    run = folder.parent / "runs" / "imported"
    assert main(["import", "--from", code, str(folder), "--out", str(run), *flags]) == 0
    return LlamaModule.load_from_checkpoint(run / "checkpoints" / "last.ckpt", weights_only=True)


CASES = [
    ("paretoq", 0, "ternary", ParetoQ, {}),
    ("paretoq", 1, "binary", ParetoQ, {}),
    ("paretoq", 2, "stretched", ParetoQ, {}),
    ("paretoq", 3, "integer", ParetoQ, {}),
    ("paretoq", 4, "integer", ParetoQ, {}),
    ("stableqat", 0, "ternary", StableQAT, {}),
    ("stableqat", 1, "binary", StableQAT, {}),
    ("stableqat", 2, "integer", StableQAT, {"sine_soft_q": SURROGATE, "efficient": True}),
    ("stableqat", 3, "integer", StableQAT, {"sine_soft_q": SURROGATE, "efficient": False}),
    ("stableqat", 4, "integer", STE, {"sine_soft_q": {"enable": False, "amplitude": None}}),
    ("stableqat", 2, "integer", DSQ, {"dsq": True}),
    ("stableqat", 4, "integer", DSQ, {"dsq": True}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("code", "bits", "grid", "method", "options"), CASES)
def test_deployed_weights_are_those_of_the_released_layer(code, bits, grid, method, options, dtype, tmp_path):
    state = make(tmp_path / "theirs", code, bits, dtype, **options)
    module = imported(tmp_path / "theirs", code).eval()
    layers = quantized_layers(module.model)
    assert len(layers) == 14
    plain = AutoModelForCausalLM.from_config(module.config, dtype=torch.float32).eval()
    plain.load_state_dict({k: v.float() for k, v in state.items() if "clip" not in k and "dsq" not in k})
    for name, layer in layers.items():
        quantizer = layer.weight_quantizer
        assert type(quantizer) is method
        assert quantizer.grid.name == grid
        formula = "efficient" if options.get("efficient") else code
        sharpness = state.get(f"{name}.alpha_dsq")
        weight, clip = state[f"{name}.weight"], state[f"{name}.weight_clip_val"]
        theirs = released(weight, clip, formula, bits, sharpness)
        ours = quantizer.quantize(layer.weight).dequantize()
        assert ours.dtype == torch.float32
        assert torch.equal(ours.to(dtype), theirs)  # in bfloat16 theirs are rounded products, ours exact
        assert 1 < len(theirs[0].unique()) <= (3 if bits == 0 else 2**bits)
        untouched = layer.weight == weight.float()
        assert untouched.float().mean() > 0.97
        assert torch.equal(layer.weight[~untouched].to(theirs.dtype), theirs[~untouched])
        if sharpness is not None:
            assert torch.allclose(quantizer.a_logit.sigmoid(), sharpness.float())
        assert torch.equal(quantizer.scale_floor, quantizer.scale * 1e-4)
        with torch.no_grad():
            plain.get_submodule(name).weight.copy_(ours)
    tokens = torch.arange(32).reshape(2, 16)
    with torch.no_grad():
        assert torch.equal(module(tokens), plain(tokens).logits)


def test_what_was_moved_is_told(tmp_path, capsys):
    """Rounding to bfloat16 around the division decides a level now and then, to float32 none."""
    told = {}
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype)[6:]
        make(folder / "theirs", "paretoq", 2, dtype)
        imported(folder / "theirs", "paretoq")
        told[dtype] = capsys.readouterr().out.splitlines()
    moved = {dtype: int(lines[0].split("; ")[1].split()[0]) for dtype, lines in told.items()}
    assert moved[torch.float32] == 0
    assert 0 < moved[torch.bfloat16] < 0.02 * 20_480
    assert "ParetoQ, bits=2, grid=stretched, 14 layers" in told[torch.float32][0]
    assert "of 20480 weights" in told[torch.float32][0]


def test_weights_of_exactly_zero_at_one_bit_are_told(tmp_path, capsys):
    state = make(tmp_path / "theirs", "paretoq", 1)
    name = "model.layers.0.mlp.up_proj"
    state[f"{name}.weight"][0, :5] = 0
    write(tmp_path / "theirs", state)
    layer = quantized_layers(imported(tmp_path / "theirs", "paretoq").model)[name]
    assert "5 on none of its levels" in capsys.readouterr().out
    ours = layer.weight_quantizer.quantize(layer.weight).dequantize()
    theirs = released(state[f"{name}.weight"], state[f"{name}.weight_clip_val"], "paretoq", 1)
    assert (ours != theirs).nonzero().tolist() == [[0, n] for n in range(5)]


@pytest.mark.parametrize("files", ["safetensors", "bin", "sharded"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_files_and_families(family, files, tmp_path):
    """The head of a tied model is in a .bin a second time, and not in safetensors."""
    state = make(tmp_path / "theirs", "stableqat", 3, torch.float16, family, files, efficient=True)
    module = imported(tmp_path / "theirs", "stableqat")
    assert module.config.model_type == family
    assert module.model.lm_head.weight is module.model.model.embed_tokens.weight
    assert torch.equal(module.model.lm_head.weight, state["lm_head.weight"].float())
    formula = "efficient" if family == "llama" else "stableqat"  # its Qwen3 never hands the setting on
    for name, layer in quantized_layers(module.model).items():
        theirs = released(state[f"{name}.weight"], state[f"{name}.weight_clip_val"], formula, 3)
        assert torch.equal(layer.weight_quantizer(layer.weight).half(), theirs)


def test_a_run_like_any_other(tmp_path, monkeypatch, capsys):
    """It validates, training starts from it, also with its learned scales, and its tokenizer is found."""
    monkeypatch.chdir(tmp_path)
    words = ["grid", "scale", "level", "bits", "round", "clamp", "weight", "latent", "step", "rate", "code"]
    documents = [" ".join(words[(n * 5 + k * (n % 7 + 1)) % 11] for k in range(30)) for n in range(40)]
    Path("text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    make(tmp_path / "theirs", "paretoq", 2)
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: n for n, word in enumerate([*words, "<unk>", "</s>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained("theirs")
    run = "logs/imported/b2"
    assert main(["import", "--from", "paretoq", "theirs", "--out", run]) == 0
    settings = yaml.safe_load(Path(run, "config.yaml").read_text())
    assert settings["data"] == {"class_path": "stableqat.data.TextDataModule", "init_args": {}}
    assert Path(run, "tokenizer", "tokenizer.json").is_file()
    shutil.rmtree("theirs")
    assert capsys.readouterr().out.splitlines()[1].startswith(f"stableqat validate -c {run}/config.yaml")

    data = ["--data.source", "text.jsonl", "--data.block_size", "16", "--data.batch_size", "4"]
    common = ["-c", f"{run}/config.yaml", *data, "--data.cache_dir", "cache"]
    quiet = {"accelerator": "cpu", "enable_progress_bar": "false", "enable_model_summary": "false"}
    common += [part for key, value in quiet.items() for part in (f"--trainer.{key}", value)]
    assert main(["validate", *common, "--ckpt_path", "last"]) == 0
    assert "val/perplexity" in capsys.readouterr().out

    began = torch.load(Path(run, "checkpoints/last.ckpt"), weights_only=True)["state_dict"]
    key = "model.model.layers.0.mlp.up_proj.weight_quantizer.scale"
    steps = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "1"]
    fresh = ["--model.init_from", run, "--trainer.logger.version", "fresh"]
    random = ["--baseline.stop_at_chance", "false"]
    assert main(["fit", *common, *steps, *fresh, *random]) == 0
    scales = torch.load("logs/imported/fresh/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert not torch.allclose(scales[key], began[key], rtol=0.05)  # set from the latent weights

    assert main(["fit", *common, *steps, "--ckpt_path", "last"]) == 0
    after = torch.load(Path(run, "checkpoints/last.ckpt"), weights_only=True)
    assert after["global_step"] == 2
    acts = began[key] > 1e-3  # a scale at the released floor is smaller than the steps
    assert torch.allclose(after["state_dict"][key][acts], began[key][acts], rtol=0.05)
    assert not torch.equal(after["state_dict"][key], began[key])


def test_names_of_transformers_4_arrive_and_only_strange_ones_are_told(tmp_path, caplog):
    make(tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    of_old = {"rope_theta": 500.0, "rope_scaling": None, "torch_dtype": "float32"}
    kept = {
        key: x for key, x in json.loads(path.read_text()).items() if key not in ("rope_parameters", "dtype")
    }
    path.write_text(json.dumps(kept | of_old))
    config, _ = read_config(tmp_path / "theirs")
    assert config["rope_parameters"]["rope_theta"] == 500
    assert not caplog.records
    rewrite(path, quiet=True)
    read_config(tmp_path / "theirs")
    assert caplog.messages[0].endswith("ignores keys that its architecture does not have: ['quiet']")


# -- refusals -----------------------------------------------------------------------------------

LAYER = "model.layers.1.self_attn.k_proj"


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def edit(change):
    def damage(folder: Path, state: dict[str, Tensor]) -> None:
        change(state)
        write(folder, state)

    return damage


def cut(folder: Path, state: dict[str, Tensor]) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def trap(folder: Path, state: dict[str, Tensor]) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({**state, "trap": Trap(folder / "sprung")}, folder / "pytorch_model.bin")


def put(key, value):
    return edit(lambda state: state.update({key: value(state[key])}))


def with_nan(tensor: Tensor) -> Tensor:
    return tensor.clone().index_fill_(0, torch.tensor([2]), torch.nan)


def index(content: str):
    def damage(folder: Path, state: dict[str, Tensor]) -> None:
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        (folder / "model.safetensors.index.json").write_text(content)

    return damage


def settings(**changes):
    return lambda folder, state: rewrite(folder / "config.json", **changes)


def surrogate(value):
    return settings(sine_soft_q=value)


def in_bin(change):
    def damage(folder: Path, state: dict[str, Tensor]) -> None:
        (folder / "model.safetensors").unlink()
        torch.save(change(state), folder / "pytorch_model.bin")

    return damage


def header(**changes):
    def damage(folder: Path, state: dict[str, Tensor]) -> None:
        content = (folder / "model.safetensors").read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        described = json.loads(content[8 : 8 + size])
        described[f"{LAYER}.weight"].update(changes)
        text = json.dumps(described).encode()
        lies = struct.pack("<Q", len(text)) + text + content[8 + size :]
        (folder / "model.safetensors").write_bytes(lies)

    return damage


DAMAGE = {
    "a clip value missing": (
        edit(lambda s: s.pop(f"{LAYER}.weight_clip_val")),
        rf"{LAYER}\.weight_clip_val is missing",
    ),
    "all clip values missing": (
        edit(lambda s: [s.pop(k) for k in list(s) if "clip" in k]),
        "start from it with model.init_from",
    ),
    "a weight missing": (edit(lambda s: s.pop(f"{LAYER}.weight")), rf"{LAYER}\.weight is missing"),
    "a norm missing": (edit(lambda s: s.pop("model.norm.weight")), r"norm\.weight is missing"),
    "a tensor too many": (
        edit(lambda s: s.update({"lm_head.weight_clip_val": torch.ones(300, 1)})),
        r"lm_head\.weight_clip_val is not in the model",
    ),
    "clip value NaN": (put(f"{LAYER}.weight_clip_val", with_nan), r"clip_val holds NaN"),
    "weight infinite": (put(f"{LAYER}.weight", lambda w: w / 0), r"k_proj\.weight holds NaN or inf"),
    "embedding NaN": (put("model.embed_tokens.weight", with_nan), r"embed_tokens\.weight holds NaN"),
    "one clip value": (
        put(f"{LAYER}.weight_clip_val", lambda c: c[:1]),
        r"shape \(1, 1\), not one value per row",
    ),
    "flat clip values": (
        put(f"{LAYER}.weight_clip_val", lambda c: c[:, 0]),
        r"not one value per row, \(32, 1\)",
    ),
    "weight of another shape": (
        edit(
            lambda s: s.update(
                {f"{LAYER}.weight": torch.ones(16, 32), f"{LAYER}.weight_clip_val": torch.ones(16, 1)}
            )
        ),
        r"k_proj.* has shape \(16,",
    ),
    "a file cut short": (cut, r"model\.safetensors: missing, cut short or damaged"),
    "an index cut short": (
        index('{"weight_map": {"a": "part'),
        r"index\.json: not readable as JSON; get",
    ),
    "an index of something else": (
        index('{"weight_map": ["a"]}'),
        r"index\.json: not an index of weight files",
    ),
    "an index of numbers": (index('{"weight_map": {"a": 1}}'), r"index\.json: not an index of weight files"),
    "an index of a missing file": (index('{"weight_map": {"a": "b.bin"}}'), r"b\.bin: missing, cut short"),
    "a pickle that runs code": (trap, r"pytorch_model\.bin: holds more than tensors"),
    **{
        f"amplitude {value!r}": (surrogate({"enable": True, "amplitude": value}), r"sine_soft_q\.amplitude: ")
        for value in (
            0.21,
            "0.21",
            True,
            [],
            ["0.21"],
            [None],
            [[0.2]],
            {"a": 1},
            [0.1, 0.1],
            [5.0],
            [math.nan],
        )
    },
    **{
        f"surrogate {value!r}": (surrogate(value), "sine_soft_q: must be a mapping with enable")
        for value in (True, [0.21], "yes", {"enable": "false"}, {"enable": 1})
    },
    "efficient in words": (settings(efficient="no"), "efficient: must be true or false, not 'no'"),
    "bits in words": (settings(w_bits="2"), "w_bits: must be a whole number, not '2'"),
    **{
        f"{key} {value}": (settings(**{key: value}), rf"config\.json: .*({key}|hidden size \(-1\))")
        for key in (
            "hidden_size",
            "intermediate_size",
            "vocab_size",
            "num_hidden_layers",
            "num_key_value_heads",
        )
        for value in (-1, 10**18, "32")
    },
    "no positions": (settings(max_position_embeddings=0), r"config\.json: max_position_embeddings: must be"),
    "no heads": (settings(num_attention_heads=0), r"config\.json: num_attention_heads: must be from 1"),
    "activation unknown": (settings(hidden_act="none_such"), r"config\.json: hidden_act: .*none_such"),
    "rope unknown": (settings(rope_parameters={"rope_type": "none_such"}), r"config\.json: .*none_such"),
    "epsilon NaN": (settings(rms_norm_eps=math.nan), "the model computes NaN or infinity; look at rms_norm"),
    "a config that is a list": (
        lambda f, s: (f / "config.json").write_text("[1]"),
        r"json: does not hold a mapping",
    ),
    "a config without end": (
        lambda f, s: (f / "config.json").write_text('{"model_type":' + "[" * 100_000),
        r"config\.json: not readable as JSON",
    ),
    **{
        f"a weight of {dtype}": (
            put(f"{LAYER}.weight", lambda w, t=dtype: w.to(t)),
            rf"k_proj\.weight \({name}\)",
        )
        for dtype, name in (
            (torch.complex64, "complex64"),
            (torch.int8, "int8"),
            (torch.float8_e4m3fn, "float8_e4m3fn"),
            (torch.float64, "float64"),
        )
    },
    "a clip value of bool": (
        put(f"{LAYER}.weight_clip_val", lambda c: c > 0),
        r"clip_val \(bool\) is not a plain",
    ),
    "a weight that is one number": (
        put(f"{LAYER}.weight", lambda w: w[0, 0]),
        r"k_proj\.weight is not a matrix",
    ),
    "a sparse weight": (
        in_bin(lambda s: {**s, f"{LAYER}.weight": s[f"{LAYER}.weight"].to_sparse()}),
        "sparse_coo",
    ),
    "a weight without values": (
        in_bin(lambda s: {k: v.to("meta") for k, v in s.items()}),
        "is not a plain tensor",
    ),
    "a key that is a number": (
        in_bin(lambda s: {**s, 1: torch.ones(2)}),
        r"bin: 1 \(float32\) is not a plain tensor",
    ),
    "an empty state dict": (in_bin(lambda s: {}), r"embed_tokens\.weight is missing or not a matrix"),
    "an index of nothing": (index('{"weight_map": {}}'), r"index\.json: not an index of weight files"),
    "an index of a file elsewhere": (
        index('{"weight_map": {"a": "../theirs/part.safetensors"}}'),
        r"index\.json: not an index of weight files",
    ),
    "an index of a folder": (
        index('{"weight_map": {"a": "."}}'),
        r"index\.json: not an index of weight files",
    ),
    "an index without end": (index("[" * 100_000), r"index\.json: not readable as JSON"),
    "a header of another shape": (header(shape=[1, 1]), r"model\.safetensors: missing, cut short or damaged"),
    "a header of integers": (header(dtype="I32"), r"k_proj\.weight \(int32\) is not a plain"),
    "a header of no type": (header(dtype="F99"), r"model\.safetensors: missing, cut short or damaged"),
    "a header without bounds": (
        header(data_offsets=[0, 2**60]),
        r"safetensors: missing, cut short or damaged",
    ),
    "no weights": (lambda f, s: (f / "model.safetensors").unlink(), r"neither model\.safetensors nor"),
    "no config": (lambda f, s: (f / "config.json").unlink(), r"has no config\.json"),
    "mixed bits": (lambda f, s: rewrite(f / "config.json", w_bits=[2, 4]), "mixed bits cannot be imported"),
    "bits by layer": (lambda f, s: rewrite(f / "config.json", w_bits={"mlp": 2}), "mixed bits"),
    "full precision": (lambda f, s: rewrite(f / "config.json", w_bits=16), r"bits: .* not 16"),
    "bits unknown": (lambda f, s: rewrite(f / "config.json", w_bits=None), "bits: .* say with --bits"),
    "another architecture": (
        lambda f, s: rewrite(f / "config.json", model_type="gpt2"),
        "choose llama or qwen3",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bad_checkpoint_is_one_line_and_no_run(damage, tmp_path, capsys):
    do, message = DAMAGE[damage]
    state = make(tmp_path / "theirs")
    do(tmp_path / "theirs", state)
    code = "stableqat" if damage.startswith(("amplitude", "surrogate", "efficient")) else "paretoq"
    assert main(["import", "--from", code, str(tmp_path / "theirs"), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert re.search(message, said), said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["theirs"]
    assert not (tmp_path / "theirs" / "sprung").exists()


def test_sharpness_that_makes_nan_is_refused(tmp_path, capsys):
    state = make(tmp_path / "theirs", "stableqat", 2, dsq=True)
    state[f"{LAYER}.alpha_dsq"] -= 1  # the logarithm of a negative number
    write(tmp_path / "theirs", state)
    assert (
        main(["import", "--from", "stableqat", str(tmp_path / "theirs"), "--out", str(tmp_path / "run")]) == 2
    )
    assert f"{LAYER}: the released layer computes NaN" in capsys.readouterr().err


def test_heads_that_do_not_share_are_refused(tmp_path, capsys):
    """As Qwen3's defaults have them, where config.json names the query heads alone."""
    make(tmp_path / "theirs", family="qwen3", heads=32)
    asked = ["import", "--from", "paretoq", str(tmp_path / "theirs"), "--out", str(tmp_path / "run")]
    assert main(asked) == 2
    said = capsys.readouterr().err
    assert "config.json: num_key_value_heads: 32 does not divide num_attention_heads 2" in said


def test_what_the_flags_and_the_file_say_must_agree(tmp_path, capsys):
    make(tmp_path / "theirs", bits=3)
    asked = ["import", "--from", "paretoq", str(tmp_path / "theirs"), "--out", str(tmp_path / "run")]
    assert main([*asked, "--bits", "2"]) == 2
    assert "w_bits 3; leave it out" in capsys.readouterr().err
    rewrite(tmp_path / "theirs" / "config.json", w_bits=None)
    assert main([*asked, "--bits", "3"]) == 0
    capsys.readouterr()
    assert main([*asked, "--bits", "3"]) == 2  # the run is there
    assert "exists already" in capsys.readouterr().err


def test_a_disk_that_cannot_be_written_leaves_nothing(tmp_path, capsys):
    make(tmp_path / "theirs")

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        argv = ["import", "--from", "paretoq", str(tmp_path / "theirs"), "--out", str(tmp_path / "run")]
        assert main(argv) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot be written" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["theirs"]


def test_help_tells_the_flags(capsys):
    assert main(["import", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--from {stableqat,paretoq}" in text
    assert "from_" not in text
    assert main(["import", "theirs", "--out", "run"]) == 2
    assert "from" in capsys.readouterr().err
