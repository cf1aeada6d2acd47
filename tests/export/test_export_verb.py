"""The verb: from a run or checkpoint to a folder that holds files, or to one line and nothing."""

import hashlib
import json
import re
import resource
import shutil
from contextlib import nullcontext
from functools import partial

import pytest
import timm
import tiny_packed as models
import torch
import yaml
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

import tiny
from stableqat.cli.main import main
from stableqat.data.embedded import DIGITS_MEAN, DIGITS_STD
from stableqat.export import command, source
from stableqat.modules import LlamaModule, ViTModule
from stableqat.quantizers import STE
from stableqat.runs import open_run


def checkpoint(folder, family="llama", **options):
    """A checkpoint of a module as `models` makes them, after two steps of training."""
    module = models.module(family, **options)
    data = tiny.loader("vit" if family == "vit" else "llama", count=8, batch_size=4)
    trainer = tiny.trainer(max_steps=2)
    trainer.fit(module.train(), data)
    path = folder / f"{family}.ckpt"
    trainer.save_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def refused(tmp_path, capsys):
    """Call the verb, expect exit code 2 and nothing on disk, return the line."""

    def call(source, *options, format="compressed-tensors"):
        out = tmp_path / "out"
        code = main(["export", str(source), "--format", format, "--out", str(out / "model"), *options])
        assert code == 2
        assert not out.exists() or not list(out.iterdir())
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("stableqat: ")
        return error

    return call


def test_a_report_lies_beside_the_files(trained, tmp_path, capsys, monkeypatch):
    shown = []
    monkeypatch.setattr(command, "progress", lambda total: nullcontext(lambda now, _: shown.append(now)))
    pytest.importorskip("compressed_tensors")
    out = tmp_path / "deep" / "model"
    assert main(["export", str(trained), "--format", "compressed-tensors", "--out", str(out)]) == 0
    assert shown == [0, 1, 3, 5, 6, 8]  # by the time that a part takes
    told = capsys.readouterr().out
    report = json.loads((out / "export.json").read_text())
    assert report["dtype"] == "fp16"  # in which vLLM computes then
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"
    assert report["max_weight_difference"] == 0
    assert report["max_logit_difference"] < 1e-5
    assert report["bytes"] == (out / "model.safetensors").stat().st_size
    assert report["layers_packed"] == 7
    assert report["layers_left"] == ["model.embed_tokens"]
    assert report["step"] == 2
    # 2 bits a code, 16 a row, and names and shapes, which weigh in a file as small as this
    assert 2 < report["bits_a_weight"] < 4
    assert abs(report["loss"]["file"] - report["loss"]["trained"]) < 1e-3
    for name, digest in report["sha256"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    assert {"model.safetensors", "config.json", "README.md"} <= set(report["sha256"])
    assert "weights differ by 0" in told
    assert "no tokenizer, which most programs need: name one with --tokenizer" in told
    assert "random rows: the checkpoint is in no run folder" in told
    card = (out / "README.md").read_text()
    assert "2-bit integer" in card
    assert f"| loss on the comparison batch | {report['loss']['file']:.4g} (" in card
    assert [p.name for p in out.parent.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("named", "types"), [("config", {"hf": "bf16", "onnx": "fp32"}), ("start", {"hf": "bf16"})]
)
def test_what_is_not_quantized_has_the_type_of_the_start(named, types, tmp_path, capsys):
    """Of a bfloat16 model that a run starts from, whether the run takes its architecture or gives it."""
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**models.CONFIGS["llama"]))
    plain.to(torch.bfloat16).save_pretrained(tmp_path / "start")
    given = {"config": models.CONFIGS["llama"] if named == "config" else None}
    made = LlamaModule(**given, init_from=str(tmp_path / "start"), quantizer=partial(STE, bits=2))
    trainer = tiny.trainer(max_steps=1)
    trainer.fit(made, tiny.loader("llama", count=4, batch_size=4))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    assert {parameter.dtype for parameter in made.parameters()} == {torch.float32}

    for format, own in types.items():
        out = tmp_path / format
        assert main(["export", str(tmp_path / "run.ckpt"), "--format", format, "--out", str(out)]) == 0
        assert json.loads((out / "export.json").read_text())["dtype"] == own
        assert f"left, in {own}: model.embed_tokens" in capsys.readouterr().out
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    options = ["--format", "hf", "--dtype", "fp32", "--out", str(tmp_path / "asked")]
    assert main(["export", str(tmp_path / "run.ckpt"), *options]) == 0
    assert json.loads((tmp_path / "asked" / "export.json").read_text())["dtype"] == "fp32"


def test_constants_too_large_for_one_onnx_file_lie_beside_it(trained, tmp_path, monkeypatch):
    onnx = pytest.importorskip("stableqat.export.onnx")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(onnx, "LARGEST", 10_000)
    out = tmp_path / "model"
    assert main(["export", str(trained), "--format", "onnx", "--out", str(out)]) == 0
    report = json.loads((out / "export.json").read_text())
    assert {"model.onnx", "model.onnx.data"} <= set(report["sha256"])
    sizes = [(out / name).stat().st_size for name in ("model.onnx", "model.onnx.data")]
    assert report["bytes"] == sum(sizes)
    assert sizes[1] > 10_000


@pytest.fixture
def run(tmp_path):
    """A run's folder: its configuration, with a text, and its best checkpoint."""
    words = ["grid", "scale", "level", "bits", "round", "clamp", "weight"]
    documents = [" ".join(words[(n * 5 + k * (n % 3 + 1)) % 7] for k in range(40)) for n in range(40)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    settings = {"source": str(tmp_path / "text.jsonl"), "block_size": 16, "batch_size": 2, "vocab_size": 300}
    settings["cache_dir"] = str(tmp_path / "cache")
    data = {"class_path": "stableqat.data.TextDataModule", "init_args": settings}
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    checkpoint(tmp_path, config={"vocab_size": 300}).rename(folder / "checkpoints" / "best.ckpt")
    return folder


def test_a_run_brings_its_data_and_tokenizer(run, tmp_path, capsys):
    assert main(["export", str(run), "--format", "hf", "--out", str(tmp_path / "model")]) == 0
    assert "loss on validation data of the run" in capsys.readouterr().out
    report = json.loads((tmp_path / "model" / "export.json").read_text())
    assert report["source"].endswith("best.ckpt")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer("grid scale level", return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] > ids.shape[1]


def test_a_gguf_holds_the_tokenizer(run, tmp_path):
    gguf = pytest.importorskip("gguf")
    out = tmp_path / "model"
    assert main(["export", str(run), "--format", "gguf", "--out", str(out)]) == 0
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(out, gguf_file="model.gguf")
    ours = AutoTokenizer.from_pretrained(out)
    assert theirs("scale the grid: 4 bits!").input_ids == ours("scale the grid: 4 bits!").input_ids
    reader = gguf.GGUFReader(out / "model.gguf")
    assert len(reader.get_field("tokenizer.ggml.tokens").contents()) == 300
    assert reader.get_field("tokenizer.ggml.eos_token_id").contents() == ours.eos_token_id
    # rows of 64 and 96 weights in Q4_0 alone: 32 codes of 4 bits and a scale of 16, whatever the vocabulary
    assert json.loads((out / "export.json").read_text())["bits_a_weight"] == 4.5
    assert "| bits per quantized weight | 4.5 |" in (out / "README.md").read_text()


def test_a_template_is_read_once_and_gives_the_tokenizer(run, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    from stableqat.export import gguf_header

    first, opened, read = tmp_path / "first", [], gguf_header.read
    command = ["export", str(run), "--format", "gguf", "--out"]
    assert main([*command, str(first)]) == 0
    monkeypatch.setattr(gguf_header, "read", lambda path: opened.append(path.name) or read(path))
    (first / "model.gguf").rename(tmp_path / "template.gguf")
    second = tmp_path / "second"
    assert main([*command, str(second), "--template", str(tmp_path / "template.gguf")]) == 0
    assert opened == ["template.gguf", "model.gguf"]
    assert (second / "model.gguf").read_bytes() == (tmp_path / "template.gguf").read_bytes()


@pytest.mark.parametrize("bits", [4, 8])
def test_embeddings_at_export(trained, bits, tmp_path, capsys):
    pytest.importorskip("gguf")
    out = tmp_path / "model"
    options = ["--format", "gguf", "--embedding_bits", str(bits), "--out", str(out)]
    assert main(["export", str(trained), *options]) == 0
    report = json.loads((out / "export.json").read_text())
    assert report["layers_left"] == []
    assert report["layers_packed"] == 8
    assert report["loss"]["embeddings_quantized"] != report["loss"]["trained"]
    assert report["loss"]["file"] == pytest.approx(report["loss"]["embeddings_quantized"], abs=1e-3)
    assert f"{bits}-bit integer" in capsys.readouterr().out


def test_a_file_that_is_mostly_embedding_says_so(capsys):
    report = {"bytes": 100, "bytes_left": 70, "format": "gguf", "dtype": "fp32", "loss": {}}
    remedy = "--dtype bf16 and --embedding_bits 8 make it smaller"
    assert command._of_rest(report) == [f"70% of the file is what is left; {remedy}"]
    assert command._of_rest({**report, "format": "hf"}) == [
        "70% of the file is what is left; --dtype bf16 makes it smaller"
    ]
    assert command._of_rest({**report, "bytes_left": 30}) == []
    done = {"dtype": "bf16", "loss": {"embeddings_quantized": 1.0}}
    assert command._of_rest({**report, **done}) == []


def test_an_untied_embedding_and_its_head(tmp_path):
    source = checkpoint(tmp_path, "qwen3")
    out = tmp_path / "model"
    assert main(["export", str(source), "--format", "hf", "--embedding_bits", "4", "--out", str(out)]) == 0
    state = load_file(out / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert all(len(row.unique()) <= 16 for row in state[name])


def test_an_existing_folder_stays(trained, tmp_path, capsys):
    (tmp_path / "kept").mkdir()
    assert main(["export", str(trained), "--format", "hf", "--out", str(tmp_path / "kept")]) == 2
    assert "exists already; name a new folder" in capsys.readouterr().err
    assert not list((tmp_path / "kept").iterdir())


@pytest.mark.parametrize(
    "out", ["", ".", "..", "/", "a file", "a link", "a file/below", "new/..", "/proc/none", "long"]
)
def test_a_place_that_cannot_be_written_is_one_line_before_anything_is_read(
    out, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").touch()
    (tmp_path / "a link").symlink_to("nowhere")
    out = "x" * 300 if out == "long" else out
    monkeypatch.setattr(source, "load_source", None)
    assert main(["export", str(tmp_path), "--format", "hf", "--out", out]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "out: " in said
    assert "exists already; name a new folder" in said or "cannot be written" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a file", "a link"]


def test_two_exports_to_one_folder(trained, tmp_path, capsys, monkeypatch):
    """The second one to end is refused and leaves the folder of the first as it is."""
    from stableqat.export import hf

    out, read = tmp_path / "out", hf.read

    def other(packed, folder):
        (out / "theirs").mkdir(parents=True)
        return read(packed, folder)

    monkeypatch.setattr(hf, "read", other)
    assert main(["export", str(trained), "--format", "hf", "--out", str(out)]) == 2
    assert "cannot be written (File exists); nothing is left of it, name" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert [p.name for p in out.iterdir()] == ["theirs"]


def test_a_missing_source(refused, tmp_path):
    assert "there is no such run or checkpoint" in refused(tmp_path / "nothing.ckpt")
    (tmp_path / "empty").mkdir()
    assert "neither a run folder nor a checkpoint" in refused(tmp_path / "empty")
    assert not (tmp_path / "out").exists()  # nor is the folder that would have held it


@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_a_checkpoint_that_is_cut_short(trained, tmp_path, refused, keep):
    whole = trained.read_bytes()
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(whole[: int(len(whole) * keep)])
    assert "cut short or damaged" in refused(cut)


def test_a_checkpoint_with_another_byte(trained, tmp_path, refused):
    content = bytearray(trained.read_bytes())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "flipped.ckpt").write_bytes(content)
    assert "damaged" in refused(tmp_path / "flipped.ckpt")


def changed(trained, folder, change):
    read = torch.load(trained, weights_only=True)
    change(read["state_dict"])
    torch.save(read, folder / "changed.ckpt")
    return folder / "changed.ckpt"


def named(state, end):
    return next(name for name in state if name.endswith(end))


def test_a_checkpoint_without_a_scale(trained, tmp_path, refused):
    source = changed(
        trained, tmp_path, lambda state: state.pop(named(state, "up_proj.weight_quantizer.scale"))
    )
    line = refused(source)
    assert "damaged, or written by another version" in line
    assert "up_proj.weight_quantizer.scale" in line


@pytest.mark.parametrize("what", ["up_proj.weight", "up_proj.weight_quantizer.scale", "norm.weight"])
def test_a_diverged_run(trained, tmp_path, refused, what):
    source = changed(trained, tmp_path, lambda state: state[named(state, what)].fill_(torch.nan))
    assert "holds NaN or infinity: the run diverged" in refused(source)


def test_a_scale_below_half_precision(trained, tmp_path, refused):
    def shrink(state):
        for end in ("scale", "scale_floor"):
            state[named(state, f"up_proj.weight_quantizer.{end}")].fill_(3e-5)

    source = changed(trained, tmp_path, shrink)
    line = refused(source, format="gguf")
    assert "up_proj: a scale of 3.00e-05 lies outside fp16's normal range" in line
    assert "--scale_dtype bf16" in line
    out = tmp_path / "bf16"
    options = ["--format", "compressed-tensors", "--scale_dtype", "bf16", "--out", str(out)]
    assert main(["export", str(source), *options]) == 0


@pytest.mark.parametrize(
    ("scale", "dtype", "remedy"),
    [
        (1e-6, "fp16", "take --scale_dtype bf16"),
        (1e6, "fp16", "take --scale_dtype bf16"),
        (0.0, "fp16", "collapsed or diverged: take an earlier checkpoint"),
        (1e-40, "fp16", "collapsed or diverged: take an earlier checkpoint"),
        (1e-39, "bf16", "collapsed or diverged: take an earlier checkpoint"),
        (1e-39, "fp32", "collapsed or diverged: take an earlier checkpoint"),
    ],
)
def test_a_scale_beyond_a_type_is_refused_with_what_helps(scale, dtype, remedy, trained, tmp_path, refused):
    def put(state):
        for end in ("scale", "scale_floor"):
            state[named(state, f"up_proj.weight_quantizer.{end}")][0] = scale

    line = refused(changed(trained, tmp_path, put), "--scale_dtype", dtype)
    assert f"up_proj: a scale of {scale:.2e} lies outside {dtype}'s normal range" in line
    assert line.endswith(remedy) or f"{remedy}, in a format" in line


def test_zeros_are_exported_as_zeros(trained, tmp_path):
    """A pruned row, and padding of the vocabulary that export quantizes."""

    def prune(state):
        state[named(state, "up_proj.weight")][2] = 0
        for end in ("embed_tokens.weight", "lm_head.weight"):
            state[named(state, end)][5:9] = 0

    out = tmp_path / "out"
    source = str(changed(trained, tmp_path, prune))
    assert main(["export", source, "--format", "hf", "--embedding_bits", "4", "--out", str(out)]) == 0
    state = load_file(out / "model.safetensors")
    assert not state["model.layers.0.mlp.up_proj.weight"][2].any()
    assert not state["model.embed_tokens.weight"][5:9].any()
    assert state["model.embed_tokens.weight"][9].any()


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.bool])
def test_weights_that_are_no_real_numbers(dtype, trained, tmp_path, refused):
    key = "up_proj.weight"
    source = changed(trained, tmp_path, lambda s: s.update({named(s, key): s[named(s, key)].to(dtype)}))
    assert f"up_proj.weight holds {dtype}, not torch.float32" in refused(source, format="hf")


def test_data_of_another_kind_is_not_taken(run, tmp_path, capsys):
    (run / "config.yaml").write_text("data: {class_path: stableqat.data.ImageDataModule, init_args: {}}")
    assert main(["export", str(run), "--format", "hf", "--out", str(tmp_path / "model")]) == 0
    assert "random rows: the run's data does not fit its model" in capsys.readouterr().out


def test_full_precision(tmp_path, refused):
    module = tiny.configured("llama", "fp")
    trainer = tiny.trainer(max_steps=1)
    trainer.fit(module, tiny.loader("llama"))
    trainer.save_checkpoint(tmp_path / "fp.ckpt")
    assert "trained in full precision; export a quantized run" in refused(tmp_path / "fp.ckpt")


def test_wrong_shapes_for_a_format(tmp_path, refused):
    source = checkpoint(tmp_path, config={"intermediate_size": 72})
    line = refused(source, format="gguf")
    assert "down_proj: its rows of 72 weights are not a multiple of 32; take compressed-tensors" in line


def test_options_that_do_not_belong(trained, refused, tmp_path):
    assert "template: is for gguf, not for" in refused(trained, "--template", "x.gguf")
    assert "int8_activations: is for onnx, not for" in refused(trained, "--int8_activations", "true")
    assert "storage_bits: is for compressed-tensors" in refused(trained, "--storage_bits", "4", format="hf")
    assert "target: is for gguf, not for" in refused(trained, "--target", "gpu")
    assert "cannot be read as GGUF" in refused(trained, "--template", str(trained), format="gguf")
    vit = checkpoint(tmp_path, "vit")
    line = refused(vit, "--embedding_bits", "4", format="hf")
    assert "a vision transformer has no token embedding" in line
    assert "only language models have one" in refused(vit, "--tokenizer", "gpt2", format="hf")
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert "no such tokenizer file" in refused(trained, "--tokenizer", "nowhere.json", format="hf")


@pytest.mark.parametrize("format", ["hf", "compressed-tensors", "gguf", "torchao"])
def test_a_full_disk(trained, refused, format):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        line = refused(trained, format=format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot be written" in line
    assert "nothing is left" in line


NAME = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda w, _: w[NAME][0, 0].add_(1e-7), f"{NAME} in the file differs from the model's by up to 1"),
        (lambda w, _: w[NAME][0, 0].fill_(torch.nan), f"{NAME} in the file differs .* by up to nan"),
        (lambda _, logits: logits[0, 0, 0].add_(0.01), "logits of the file differ .* by up to 1.0e-02"),
        (lambda _, logits: logits[0, 0, 0].fill_(torch.nan), "logits of the file differ .* by up to nan"),
    ],
    ids=["a weight", "a weight NaN", "a logit", "a logit NaN"],
)
def test_a_file_that_differs_is_not_left(change, line, trained, refused, monkeypatch):
    from stableqat.export import hf

    read = hf.read

    def off(packed, folder):
        weights, logits = read(packed, folder)
        weights = {name: weight.clone() for name, weight in weights.items()}
        change(weights, logits)
        return weights, logits

    monkeypatch.setattr(hf, "read", off)
    told = refused(trained, format="hf")
    assert re.search(f"hf: {line}", told)
    assert "so the file is discarded; use another format" in told


def test_what_arguments_decide_is_refused_before_anything_is_computed(trained, refused, monkeypatch):
    from stableqat.export import packed

    monkeypatch.setattr(packed, "evaluate", None)
    assert "leave --scale_dtype at fp16" in refused(trained, "--scale_dtype", "bf16", format="gguf")
    pytest.importorskip("onnx")
    assert "leave --dtype at fp32" in refused(trained, "--dtype", "bf16", format="onnx")


@pytest.mark.parametrize(("limit", "shape"), [(3 * 16 * 300, (3, 16)), (7 * 300, (1, 7))])
def test_large_logits_take_fewer_rows_and_then_fewer_tokens(limit, shape, run, monkeypatch):
    assert source.load_source(str(run), None).batch["input_ids"].shape == (5, 16)
    monkeypatch.setattr(source, "LOGITS", limit)
    batch = source.load_source(str(run), None).batch
    assert batch["input_ids"].shape == batch["labels"].shape == shape


def test_a_run_of_images_brings_its_normalisation(tmp_path):
    """Also where its data is gone; without a run timm's own values of the architecture stay."""
    folder, timms = tmp_path / "run" / "checkpoints", {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9}
    folder.mkdir(parents=True)
    checkpoint(tmp_path, "vit").rename(folder / "best.ckpt")
    gone = {"source": str(tmp_path / "gone"), "mean": [0.1, 0.2, 0.3], "crop_pct": 0.5}
    for number, (given, expected) in enumerate(
        [
            (None, timms),
            (gone, {"mean": gone["mean"], "std": [0.229, 0.224, 0.225], "crop_pct": 0.5}),
            ({}, {"mean": [DIGITS_MEAN], "std": [DIGITS_STD], "crop_pct": 1.0}),
        ]
    ):
        if given is not None:
            data = {"class_path": "stableqat.data.ImageDataModule", "init_args": given}
            (folder.parent / "config.yaml").write_text(yaml.safe_dump({"data": data}))
        out = tmp_path / str(number)
        assert main(["export", str(folder / "best.ckpt"), "--format", "hf", "--out", str(out)]) == 0
        model = timm.create_model(f"local-dir:{out}", pretrained=True)
        resolved = timm.data.resolve_model_data_config(model)
        for found in (model.pretrained_cfg, resolved):
            found = {key: list(x) if isinstance(x, tuple) else x for key, x in found.items()}
            assert {**expected, "interpolation": "bicubic"}.items() <= found.items()


def of_timm(folder, name, args, size, skip=("head",)):
    """A checkpoint of any classifier of timm."""
    quantizer, optimizer = partial(STE, bits=2), partial(torch.optim.AdamW, lr=1e-3)
    module = ViTModule(
        model_name=name, num_classes=3, model_args=args, quantizer=quantizer, skip=skip, optimizer=optimizer
    )
    image = {"pixel_values": torch.randn(args.get("in_chans", 3), size, size), "labels": torch.tensor(1)}
    trainer = tiny.trainer(max_steps=1)
    trainer.fit(module, DataLoader([image] * 2, batch_size=2))
    trainer.save_checkpoint(folder / f"{name}.ckpt")
    return folder / f"{name}.ckpt"


SMALL = {"depths": [1, 1, 1, 1], "dims": [16, 16, 16, 32]}
SWIN = {"img_size": 28, "embed_dim": 32, "depths": [1], "num_heads": [1]}


@pytest.mark.parametrize(
    ("name", "args", "skip", "size"),
    [
        ("resnet10t", {"in_chans": 1}, (), 176),
        ("convnext_tiny", SMALL, ("head*",), 224),
        ("swin_tiny_patch4_window7_224", SWIN, ("head*",), 28),
    ],
)
def test_classifiers_of_timm_that_are_no_vision_transformers(name, args, skip, size, tmp_path, capsys):
    source, out = of_timm(tmp_path, name, args, min(size, 32), skip), tmp_path / "out"
    assert main(["export", str(source), "--format", "hf", "--out", str(out)]) == 0
    assert "mean, std and crop are timm's for this architecture" in capsys.readouterr().out
    model = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert list(model.pretrained_cfg["input_size"]) == [args.get("in_chans", 3), size, size]
    assert f"| architecture | {name} |" in (out / "README.md").read_text()


def test_a_layer_that_onnx_cannot_call_is_named(tmp_path, refused):
    pytest.importorskip("onnxscript")
    source = of_timm(tmp_path, "eva02_tiny_patch14_224", {"depth": 1, "img_size": 28}, 28)
    line = refused(source, format="onnx")
    assert "onnx: blocks.0.attn.qkv is not called: the model reads its weight itself" in line
    assert line.endswith("take hf")


@pytest.mark.parametrize("error", [RuntimeError, AttributeError, AssertionError, NotImplementedError])
def test_whatever_torch_raises_is_one_line(error, trained, refused, monkeypatch):
    pytest.importorskip("onnxscript")

    def fail(*_, **__):
        try:
            raise error("no such\n operator")
        except error as cause:
            raise torch.onnx.OnnxExporterError("a long story\nof several lines") from cause

    monkeypatch.setattr(torch.onnx, "export", fail)
    line = refused(trained, format="onnx")
    assert f"onnx: torch cannot export this model ({error.__name__}: no such operator); take hf" in line


def test_no_file_says_where_the_start_lay(tmp_path):
    start = tmp_path / "private" / "start"
    AutoConfig.for_model(**tiny.LLAMA | models.SHAPE).save_pretrained(start)
    module = LlamaModule(config=str(start), quantizer=partial(STE, bits=2))
    trainer = tiny.trainer(max_steps=1)
    trainer.fit(module, tiny.loader("llama"))
    trainer.save_checkpoint(tmp_path / "of.ckpt")
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "of.ckpt"), "--format", "hf", "--out", str(out)]) == 0
    assert not [p.name for p in out.iterdir() if b"private" in p.read_bytes()]
    assert "_name_or_path" not in (out / "config.json").read_text()


def test_a_checkpoint_is_mapped_once_and_nothing_is_computed_in_vain(trained, monkeypatch):
    read, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: read.append(k["mmap"]) or load(*a, **k))
    monkeypatch.setattr(STE, "initialize", None)
    opened = open_run(str(trained))
    module, found = opened.load(), opened.content
    assert read == [True]
    assert module.state_dict().keys() == found["state_dict"].keys()
    assert all(torch.equal(value, found["state_dict"][key]) for key, value in module.state_dict().items())
    assert not module.training


def test_settings_that_only_training_needs_or_that_are_gone_are_left_out(trained, tmp_path):
    read = torch.load(trained, weights_only=True)
    read["hyper_parameters"] |= {"compile_model": True, "activation_checkpointing": True, "of_old": 1}
    torch.save(read, tmp_path / "settings.ckpt")
    module = open_run(str(tmp_path / "settings.ckpt")).load()
    assert not module.compile_model
    assert not module.activation_checkpointing


def test_a_sharded_best_checkpoint_is_the_one_that_is_named(run, refused):
    folder = run / "checkpoints"
    (folder / "best.ckpt").rename(folder / "last.ckpt")
    (folder / "best.ckpt").mkdir()
    line = refused(run)
    assert "best.ckpt is sharded; make one file of it first" in line
