"""`stableqat export`: a run's quantized weights for another runtime, proven equal to the trained model.

Scales are rounded to the file's type inside the model, which is evaluated again. The file is written under a
temporary name and read back with the format's own reader. It gets its name only if every quantized weight
equals the model's, bit for bit, and the reader's logits are the model's; with quantized inputs, the logits on
equal codes (`input_codes`).
"""

import hashlib
import json
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stableqat.errors import UserError
from stableqat.files import check_source, new_folder, writing
from stableqat.terminal import progress, terminal

if TYPE_CHECKING:
    from torch import Tensor

    from stableqat.export.packed import PackedModel
    from stableqat.export.source import Source
    from stableqat.modules import QATModule
    from stableqat.quantizers import QuantizedWeight

REPORT = "export.json"
LOGITS_DIFFER = 1e-3  # of the largest: the order of sums makes 1e-6, a lost bias far more
LIBRARIES = {  # what a format needs, all in the extra `export`
    "": ["stableqat", "torch", "transformers", "timm"],  # every format
    "hf": [],
    "compressed-tensors": ["compressed-tensors"],
    "gguf": ["gguf"],
    "onnx": ["onnx", "onnxruntime", "onnxscript"],
    "torchao": ["torchao"],
}


def export(
    source: str,
    *,
    format: Literal["hf", "compressed-tensors", "gguf", "onnx", "torchao"],
    out: str,
    dtype: Literal["fp16", "bf16", "fp32"] | None = None,
    scale_dtype: Literal["fp16", "bf16", "fp32"] | None = None,
    storage_bits: Literal[4, 8] | None = None,
    embedding_bits: Literal[4, 8] | None = None,
    tokenizer: str | None = None,
    template: str | None = None,
    target: Literal["cpu", "gpu"] = "cpu",
    int8_activations: bool = False,
) -> int:
    """Writes the quantized weights of a trained model and proves them equal to it.

    Args:
        source: Run folder (its best checkpoint), checkpoint, or folder to which a Llama or
            Qwen3 was saved with `save_pretrained` after `prepare` or `convert`.
        format: hf (plain safetensors for transformers or timm), compressed-tensors (transformers, vLLM), gguf
            (llama.cpp), onnx (onnxruntime) or torchao.
        out: New folder for the files.
        dtype: Type of what is not quantized: norms, biases and, without embedding_bits, embeddings. Default:
            that of the weights that the run started from, but fp32 for onnx, and fp16 instead of fp32 for
            compressed-tensors, because vLLM computes in the type of the file and rounds a float32 file to
            bfloat16.
        scale_dtype: Type to which scales are rounded, in the model, before it is evaluated and written.
            Default: fp16, but fp32 for onnx if every layer has an input with one scale, because that file
            holds float32 scales anyway.
        storage_bits: For compressed-tensors, store narrower codes in 4 or 8 bits, which every GPU kernel of
            vLLM and SGLang reads; the values stay the same. For onnx with quantized inputs, 8 stores codes in
            the types that onnxruntime multiplies as integers.
        embedding_bits: Also round token embedding and head to this many bits; the report says what it costs.
        tokenizer: Tokenizer to put beside a language model. Default: the run's or the folder's.
        template: For gguf, a file that llama.cpp's converter made from the hf export; its tokenizer is kept,
            its tensors are replaced. For tokenizers that this package cannot describe to llama.cpp.
        target: For gguf, where llama.cpp runs. 2-bit integers and ternary become TQ2_0 for cpu, the smallest
            type, and Q2_K for gpu, which has kernels there.
        int8_activations: For onnx, let onnxruntime round activations to int8. The file is then not exactly
            the model; the report says by how much its logits differ. Large language models become faster,
            small models may become slower: time both.

    Returns:
        0 if the files are written and equal the model.
    """
    if missing := [name for name in LIBRARIES[format] if find_spec(name.replace("-", "_")) is None]:
        raise UserError(f"format: {format} needs {', '.join(missing)}; pip install 'stableqat[export]'")
    for key, used, those in (
        ("template", template is not None, ("gguf",)),
        ("storage_bits", storage_bits is not None, ("compressed-tensors", "onnx")),
        ("target", target != "cpu", ("gguf",)),
        ("int8_activations", int8_activations, ("onnx",)),
    ):
        if used and format not in those:
            raise UserError(f"{key}: is for {' and '.join(those)}, not for {format}; leave it out")
    check_source(source, local=True)
    # torch is slow to import; mistakes above are refused without it
    from stableqat.export import gguf_template
    from stableqat.export.packed import DTYPES, PackedModel, evaluate, pack, quantize_embeddings
    from stableqat.export.source import load_source

    given = None if template is None else gguf_template.read(Path(template).expanduser())
    evaluations = 2 if embedding_bits is None else 4  # each takes twice as long as reading or writing
    with new_folder(out) as part, progress(6 + evaluations) as show:
        show(0, "reading the model")
        found = load_source(source, tokenizer)
        chosen = dtype or _default_dtype(format, found.dtype)
        scale_dtype = scale_dtype or _default_scale_dtype(format, found.module)
        types = DTYPES[chosen], DTYPES[scale_dtype]
        packed = PackedModel(
            found.module,
            {},
            *types,
            found.batch,
            template=given,
            target=target,
            int8_activations=int8_activations,
            storage_bits=storage_bits,
            images=found.images,
            classes=found.classes,
            tokenizer=found.tokenizer,
        )
        writer = import_module(f"stableqat.export.{format.replace('-', '_')}")
        _check_inputs(packed, format)
        writer.check(packed)  # what does not depend on layers, before anything is computed
        show(1, "evaluating the model")
        _, trained = evaluate(found.module, found.batch)
        losses = {"trained": trained}
        if embedding_bits is not None:
            show(3, "rounding the embeddings")
            quantize_embeddings(found.module, embedding_bits)
            losses["embeddings_quantized"] = evaluate(found.module, found.batch)[1]
        show(1 + evaluations, "rounding to the types of the file")
        packed = replace(packed, layers=pack(found.module, *types))
        writer.check(packed)
        logits, losses["file"] = evaluate(found.module, found.batch)
        with writing(f"out: {out}", "nothing is left of it, name another folder"):
            show(3 + evaluations, "writing")
            _write(writer, found, packed, part)
            show(4 + evaluations, "reading back")
            differences = _compare(format, writer.read(packed, part), packed, logits)
            if packed.inputs:
                from stableqat.export.input_codes import compare_inputs

                differences |= compare_inputs(packed, part, LOGITS_DIFFER)
            report: dict[str, Any] = {
                "format": format,
                "source": str(found.checkpoint),
                "step": found.step,
                "val_loss": found.val_loss,
                "dtype": chosen,
                "scale_dtype": scale_dtype,
                "quantizers": found.quantizers,
                **_sizes(writer, packed, part),
                **differences,
                "batch": found.batch_of,
                "loss": losses,
                "notes": [*writer.notes(packed), *_missing(packed)],
                "versions": {name: version(name) for name in (*LIBRARIES[""], *LIBRARIES[format])},
            }
            _describe(found, packed, report, part)
            report["sha256"] = {}
            for path in _files(part):
                path.chmod(0o644)  # safetensors makes them private
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                report["sha256"][path.relative_to(part).as_posix()] = digest
            (part / REPORT).write_text(json.dumps(report, indent=2) + "\n")
            show(6 + evaluations, "written")
    _tell(report, found, out)
    return 0


def _default_dtype(format: str, of_start: str | None) -> str:
    """The start's type, where the format takes it."""
    if format == "onnx":
        return "fp32"
    if format == "compressed-tensors" and of_start != "bf16":
        return "fp16"
    return of_start or "fp32"


def _default_scale_dtype(format: str, module: "QATModule") -> Literal["fp16", "fp32"]:
    """The shortest type of scales that a file gains from."""
    from stableqat.layers.linear import quantized_inputs, quantized_layers

    assert module.model is not None
    inputs = quantized_inputs(module.model)
    static = [name for name, made in inputs.items() if made.operands().scale is not None]
    return "fp32" if format == "onnx" and len(static) == len(quantized_layers(module.model)) else "fp16"


def _check_inputs(packed: "PackedModel", format: str) -> None:
    from stableqat.export.packed import check_quantizers

    check_quantizers(packed.model)
    if packed.inputs and format != "onnx":
        raise UserError(
            f"{format}: layer {next(iter(packed.inputs))} quantizes its input, which this format cannot "
            "hold; take onnx"
        )


def _write(writer: Any, found: "Source", packed: "PackedModel", part: Path) -> None:
    from safetensors import SafetensorError

    try:
        if found.tokenizer is not None and packed.family != "vit":
            found.tokenizer.save_pretrained(part)
            for end in ("bos_token_id", "eos_token_id"):  # keys alone leave transformers' defaults
                setattr(packed.model.config, end, getattr(found.tokenizer, end))
        writer.write(packed, part)
    except SafetensorError as error:  # the only error of its writer
        raise OSError(str(error)) from error


def _compare(
    format: str, read: tuple[dict[str, "Tensor"], "Tensor"], packed: "PackedModel", logits: "Tensor"
) -> dict[str, float]:
    """Compare file and model: weights must be equal, logits may differ by the order of sums."""
    import torch

    weights, theirs = read
    assert weights.keys() == packed.layers.keys()
    for name, weight in packed.layers.items():
        expected, got = weight.dequantize(), weights[name]
        assert got.shape == expected.shape, f"{name}: {tuple(got.shape)} read back"
        if not torch.equal(got.float(), expected):
            by = (got.float() - expected).abs().max()
            raise UserError(
                f"{format}: {name} in the file differs from the model's by up to {by:.1e}, so the file is "
                "discarded; use another format"
            )
    difference, largest = (theirs.float() - logits).abs().max().item(), logits.abs().max().item()
    # int8 activations change logits, as the report says; with quantized inputs a later comparison decides
    if not (packed.int8_activations or packed.inputs or difference <= LOGITS_DIFFER * largest):
        raise UserError(
            f"{format}: logits of the file differ from the model's by up to {difference:.1e} (the largest is "
            f"{largest:.1e}), so the file is discarded; use another format"
        )
    same = (theirs.argmax(-1) == logits.argmax(-1)).float().mean().item()
    return {
        "max_weight_difference": 0.0,
        "max_logit_difference": difference,
        **({"same_predictions": same} if packed.inputs else {}),
    }


def _sizes(writer: Any, packed: "PackedModel", part: Path) -> dict[str, Any]:
    quantized = sum(weight.codes.numel() for weight in packed.layers.values())
    scales = sum(weight.scale.numel() for weight in packed.layers.values())
    rest = packed.rest()
    left = sum(tensor.numel() * tensor.element_size() for tensor in rest.values())
    # not the tokenizer and configurations, which every format has
    holding = (".safetensors", ".gguf", ".onnx", ".data")
    written = sum(p.stat().st_size for p in _files(part) if p.suffix in holding)
    weights = writer.bytes_packed(packed) if hasattr(writer, "bytes_packed") else written - left
    return {
        "bytes": written,
        "bytes_bf16": 2 * (quantized + sum(tensor.numel() for tensor in rest.values())),
        "bytes_left": left,
        "weights_packed": quantized,
        "scales": scales,
        "bits_a_weight": round(8 * weights / quantized, 3),
        "layers_packed": len(packed.layers),
        "layers_left": sorted(name.removesuffix(".weight") for name, t in rest.items() if t.ndim >= 2),
        "grids": sorted({_grid(weight) for weight in packed.layers.values()}),
    }


def _missing(packed: "PackedModel") -> list[str]:
    """What the export lacks, because the source does not have it."""
    if packed.family == "vit":
        return (
            [] if packed.images else ["mean, std and crop are timm's for this architecture: the run has none"]
        )
    template = packed.template
    found = packed.tokenizer if template is None else template.get("tokenizer.ggml.tokens")
    return [] if found else ["no tokenizer, which most programs need: name one with --tokenizer"]


def _grid(weight: "QuantizedWeight") -> str:
    scales = "row" if weight.scale.shape[1] == 1 else f"{weight.group_size} weights"
    return f"{weight.bits}-bit {weight.grid}, one scale per {scales}"


def _describe(found: "Source", packed: "PackedModel", report: dict[str, Any], part: Path) -> None:
    """The model card."""
    settings = found.settings
    facts: dict[str, Any] = {
        "architecture": getattr(found.module, "model_name", packed.family),
        "quantized": "; ".join(report["grids"]),
        **{key: settings[key] for key in ("method", "widths", "mask", "scale_init") if key in settings},
        "steps": found.step,
        "validation loss of the run": None if found.val_loss is None else f"{found.val_loss:.4g}",
        "loss on the comparison batch": f"{report['loss']['file']:.4g} ({found.batch_of})",
        "bits per quantized weight": report["bits_a_weight"],
    }
    lines = [f"| {key} | {value} |" for key, value in facts.items() if value is not None]
    library = "timm" if packed.family == "vit" else "transformers"
    head = ["---", f"library_name: {library}", "tags: [quantization-aware-training]", "---", ""]
    title = [f"# {packed.family}, {'; '.join(report['grids'])}", "", f"Format: {report['format']}.", ""]
    table = ["| | |", "| --- | --- |", *lines, ""]
    if len(found.quantizers) > 1:
        table += _layers(found.quantizers)
    (part / "README.md").write_text("\n".join([*head, *title, *table]))


def _layers(kinds: list[dict[str, Any]]) -> list[str]:
    """A table of the quantizers of a model that has several kinds."""
    keys = list(dict.fromkeys(key for kind in kinds for key in kind))
    rows = [
        [str(kind.get(key, "")).replace("|", "\\|").replace("*", "\\*") for key in keys] for kind in kinds
    ]
    lines = [keys, ["---"] * len(keys), *rows]
    told = "Quantizers" + (", by the first pattern that matches a layer:" if "pattern" in keys else ":")
    return [told, "", *("| " + " | ".join(line) + " |" for line in lines), ""]


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _tell(report: dict[str, Any], found: "Source", folder: str) -> None:
    left = ", ".join(report["layers_left"]) or "none"
    whole, bits = report["bytes_bf16"], f"{report['bits_a_weight']} bits per quantized weight"
    size = f"{report['bytes']:,} bytes, {report['bytes'] / whole:.2f} of bfloat16's {whole:,}"
    step = "" if found.step is None else f" (step {found.step})"
    losses = ", ".join(f"{key.replace('_', ' ')} {value:.5f}" for key, value in report["loss"].items())
    weights, logits = report["max_weight_difference"], report["max_logit_difference"]
    lines = [
        f"{folder}: {report['format']} of {found.checkpoint}{step}",
        f"{size}; {bits}",
        f"{report['layers_packed']} layers quantized ({'; '.join(report['grids'])}; "
        f"scales in {report['scale_dtype']}); left, in {report['dtype']}: {left}",
        *_of_rest(report),
        *report["notes"],
        f"read back: weights differ by {weights:g}, logits by {logits:.1e}",
        *_of_inputs(report),
        f"loss on {report['batch']}: {losses}",
    ]
    terminal().print("\n  ".join(lines))


def _of_rest(report: dict[str, Any]) -> list[str]:
    """Where most of a file is what no method quantized, say so, and how it gets smaller."""
    share = report["bytes_left"] / report["bytes"]
    flags = ["--dtype bf16"] if report["dtype"] == "fp32" else []
    if report["format"] in ("gguf", "torchao") and "embeddings_quantized" not in report["loss"]:
        flags.append("--embedding_bits 8")
    if share < 0.5 or not flags:
        return []
    make = "make" if len(flags) > 1 else "makes"
    return [f"{share:.0%} of the file is what is left; {' and '.join(flags)} {make} it smaller"]


def _of_inputs(report: dict[str, Any]) -> list[str]:
    if "inputs" not in report:
        return []
    others, count = report["inputs_on_other_codes"], report["inputs"]
    logits = report["max_logit_difference_on_equal_codes"]
    return [
        f"equal inputs have equal codes, and on equal codes logits differ by {logits:.1e}; the order of sums "
        f"moves {others:,} of {count:,} inputs to the next code, and {report['same_predictions']:.2%} of the "
        "likeliest answers are the same"
    ]
