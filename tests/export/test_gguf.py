"""GGUF files: their header, templates, and what other readers than llama.cpp make of them."""

import struct
from dataclasses import replace

import pytest
import tiny_packed as models
import torch
from transformers import AutoModelForCausalLM

from stableqat.errors import UserError
from stableqat.export import gguf as into
from stableqat.export import gguf_header, gguf_template, llama_cpp

gguf = pytest.importorskip("gguf")
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 8}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 4}


def converted(model, folder, extra=(), without=(), **changes):
    """A file as llama.cpp's converter would make it: plain weights, and metadata that we have none of."""
    into.write(model, folder)
    first, path = gguf.GGUFReader(folder / into.FILE), folder / "template.gguf"
    made = gguf.GGUFWriter(path, model.family)
    for field in first.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            value = changes.pop(field.name.removeprefix(f"{model.family}."), field.contents())
            made.add_key_value(field.name, value, field.types[0])
    for key, value in changes.items():
        made.add_key_value(f"{model.family}.{key}", value, gguf.GGUFValueType.FLOAT32)
    made.add_array("stableqat.words", ["one", "two"])
    for tensor in first.tensors:
        if tensor.name not in without:
            made.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).copy())
    for name in extra:
        made.add_tensor(name, torch.ones(8).numpy())
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.write_tensors_to_file()
    made.close()
    (folder / into.FILE).unlink()
    return gguf_template.read(path)


@pytest.mark.parametrize(
    ("family", "rope"),
    [("llama", None), ("llama", LLAMA3), ("llama", YARN), ("qwen3", None), ("qwen3", YARN)],
    ids=["llama", "llama, llama3", "llama, yarn", "qwen3", "qwen3, yarn"],
)
def test_a_file_and_one_with_a_templates_metadata_equal_the_model(rope, family, tmp_path):
    config = {} if rope is None else {"rope_parameters": rope}
    model, logits = models.packed(family, "integer-2", config=config)
    template = converted(model, tmp_path)
    for each in (model, replace(model, template=template)):
        into.check(each)
        into.write(each, tmp_path)
        weights, theirs = into.read(each, tmp_path)
        assert all(torch.equal(weights[name], weight.dequantize()) for name, weight in each.layers.items())
        assert torch.allclose(theirs, logits, atol=2e-5)
    written = gguf.GGUFReader(tmp_path / into.FILE)
    assert written.get_field("stableqat.words").contents() == ["one", "two"]
    assert {tensor.name for tensor in written.tensors} == template.tensors.keys()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_transformers_reads_the_same_model(family, tmp_path):
    model, logits = models.packed(family, "stretched-3")
    into.write(model, tmp_path)
    config = model.model.config
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=into.FILE, config=config, dtype=torch.float32
    )
    with torch.no_grad():
        assert torch.allclose(theirs.eval()(model.input).logits, logits, atol=2e-5)


OTHER = {  # the template of another model: what differs, and what is said
    "frequencies": ({"rope.freq_base": 50.0}, {}, "the rotary embedding is .*'rope.freq_base': 50.0"),
    "epsilon": ({"attention.layer_norm_rms_epsilon": 0.1}, {}, "layer_norm_rms_epsilon is 0.1.*, 1e-06 in"),
    "heads": ({"attention.head_count_kv": 4}, {}, "attention.head_count_kv is 4 in .*, 2 in the model"),
    "scale": ({"attention.scale": 0.5}, {}, "attention.scale is 0.5 in .*, missing in the model"),
    "stretched": ({"rope.scaling.factor": 4.0}, {}, "the rotary embedding is .*'rope.scaling.factor': 4.0"),
    "a head of its own": (
        {},
        {"extra": ["output.weight"]},
        r"output.weight is \(8,\) .*, missing in the model",
    ),
    "a bias": ({}, {"extra": ["blk.0.attn_q.bias"]}, "blk.0.attn_q.bias is .* missing in the model"),
    "no norm": (
        {},
        {"without": ["output_norm.weight"]},
        r"output_norm.weight is missing in .*, \(64,\) in",
    ),
}


@pytest.mark.parametrize("what", OTHER)
def test_the_template_of_another_model(what, tmp_path):
    changes, tensors, line = OTHER[what]
    model, _ = models.packed("llama", "integer-2")
    template = converted(model, tmp_path, **changes, **tensors)
    with pytest.raises(UserError, match=f"^template: {'' if line.startswith('the') else '.*'}{line}"):
        into.check(replace(model, template=template))


@pytest.mark.parametrize("own", [{}, {"rope_parameters": LLAMA3}], ids=["default", "llama3"])
def test_a_template_of_another_rotary_embedding(own, tmp_path):
    """Of a scaled one for a plain model, and of a plain one for a scaled model."""
    other = {"rope_parameters": LLAMA3 | {"factor": 4.0}} if not own else {}
    template = converted(models.packed("llama", "integer-2", config=other)[0], tmp_path)
    model, _ = models.packed("llama", "integer-2", config=own)
    with pytest.raises(UserError, match=r"the rotary embedding is .* rope_freqs.weight in .* the model"):
        into.check(replace(model, template=template))


def test_a_template_of_another_vocabulary_or_architecture(tmp_path):
    template = converted(models.packed("llama", "integer-2")[0], tmp_path)
    model, _ = models.packed("llama", "integer-2", config={"vocab_size": 72})
    with pytest.raises(UserError, match=r"token_embd.weight is \(64, 64\) in .*, \(72, 64\) in the model"):
        into.check(replace(model, template=template))
    model, _ = models.packed("qwen3", "integer-2")
    with pytest.raises(UserError, match=r"general.architecture is llama in .*, qwen3 in the model"):
        into.check(replace(model, template=template))


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def header(*fields, tensors=0, count=None):
    """The bytes of a GGUF with these fields, each a key, a type and the bytes of a value."""
    start = b"GGUF" + struct.pack("<IQQ", 3, tensors, len(fields) if count is None else count)
    return start + b"".join(text(key) + struct.pack("<I", kind) + value for key, kind, value in fields)


def nested(depth):
    return b"".join(struct.pack("<IQ", 9, 1) for _ in range(depth)) + struct.pack("<IQI", 4, 1, 7)


BROKEN = {
    "empty": b"",
    "another format": b"PK\3\4" * 20,
    "a version of the future": b"GGUF" + struct.pack("<IQQ", 9, 0, 0),
    "nested without end": header(("a", 9, nested(100_000))),
    "2^40 numbers": header(("a", 9, struct.pack("<IQ", 4, 2**40))),
    "2^40 texts": header(("a", 9, struct.pack("<IQ", 8, 2**40))),
    "2^60 fields": header(count=2**60),
    "2^40 tensors": header(tensors=2**40),
    "a text of 2^63 bytes": header(("a", 8, struct.pack("<Q", 2**63))),
    "2^32 dimensions": header(tensors=1) + text("t") + struct.pack("<I", 2**32 - 1) + bytes(40),
    "a type of no value": header(("a", 77, bytes(8))),
    "no UTF-8": header(("a", 8, struct.pack("<Q", 2) + b"\xff\xfe")),
    "one key twice": header(("a", 4, bytes(4)), ("a", 4, bytes(4))),
    "no alignment": header(("general.alignment", 4, bytes(4))),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_template_that_is_no_gguf(what, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(BROKEN[what])
    with pytest.raises(UserError, match=r"^template: .*bad.gguf cannot be read as GGUF \(.*\); make it"):
        gguf_template.read(tmp_path / "bad.gguf")


def test_a_template_that_is_cut_short_anywhere(tmp_path):
    template = converted(models.packed("llama", "integer-2")[0], tmp_path)
    content = template.path.read_bytes()
    for size in range(0, template.start - 32, 97):
        (tmp_path / "cut.gguf").write_bytes(content[:size])
        with pytest.raises(UserError, match="cannot be read as GGUF"):
            gguf_template.read(tmp_path / "cut.gguf")


def test_a_header_is_what_ggufs_own_reader_finds(tmp_path):
    model, _ = models.packed("llama", None, quantizer=models.every_grid({"bits": 8}))
    into.write(model, tmp_path)
    theirs, own = gguf.GGUFReader(tmp_path / into.FILE), gguf_header.read(tmp_path / into.FILE)
    fields = {f.name: f.contents() for f in theirs.fields.values() if not f.name.startswith("GGUF.")}
    assert {key: field.value for key, field in own.fields.items()} == fields
    assert list(own.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        assert own.tensors[tensor.name].type == tensor.tensor_type
        assert (own.bytes_of(tensor.name).reshape(-1) == tensor.data.reshape(-1).view("u1")).all()


def test_hostile_numbers_of_a_template_are_another_rotary_embedding(tmp_path):
    model, _ = models.packed("llama", "integer-2")
    for value in (0.0, -1.0, float("nan"), float("inf")):
        template = converted(model, tmp_path, **{"rope.freq_base": value})
        with pytest.raises(UserError, match="the rotary embedding is"):
            into.check(replace(model, template=template))
    assert not llama_cpp.same_rope(model.model, {"rope.scaling.type": "longrope"}, None)
