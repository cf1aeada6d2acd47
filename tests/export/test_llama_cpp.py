"""What llama.cpp computes of an exported file is what was trained, or the file is refused.

llama.cpp rounds activations to 8 bits, which moves the distribution of the next token by 1e-4 to 1e-3 nats
here. Weights are drawn wide enough for a wrong model to be a hundred times further off.
"""

import re
from dataclasses import dataclass, field, replace
from typing import Any

import engine
import pytest
import tiny_packed as models
import torch

from stableqat.data.tokenizer import train_bpe
from stableqat.errors import UserError
from stableqat.export import gguf

KL = 5e-3  # nats a token
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}
SHAPE = WIDE | {"vocab_size": 300, "num_hidden_layers": 2, "max_position_embeddings": 128}
TOKENS = torch.randint(300, (64,), generator=torch.Generator().manual_seed(1))
PROMPTS = range(7, 64, 8)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}


@dataclass(frozen=True)
class Case:
    """A model, and how it is exported."""

    family: str = "llama"
    quantizer: Any = field(default_factory=lambda: models.GRIDS["integer-2"])
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    target: str = "cpu"
    later: dict[str, Any] = field(default_factory=dict)  # of a model folder's configuration

    def packed(self):
        config = SHAPE | {"initializer_range": 0.06} | self.config
        quantizer = self.quantizer if callable(self.quantizer) else dict(self.quantizer)
        made, _ = models.packed(self.family, None, config=config, quantizer=quantizer, **self.options)
        for key, value in self.later.items():
            setattr(made.model.config, key, value)
        return replace(made, tokenizer=tokenizer(), target=self.target)


BINARY = {"bits": 1, "grid": None}
QUANTIZERS = models.GRIDS | {"binary": BINARY} | {f"integer-{bits}": {"bits": bits} for bits in (5, 6, 8)}
QUANTIZERS |= {f"stretched-{bits}": {"bits": bits, "grid": "stretched"} for bits in (5, 7)}
GROUPS = {
    f"{name}, groups": Case(quantizer=options | {"group_size": 32}) for name, options in QUANTIZERS.items()
}
CASES = {
    **{name: Case(quantizer=options) for name, options in QUANTIZERS.items()},
    **{name: GROUPS[name] for name in ("binary, groups", "stretched-2, groups", "integer-4, groups")},
    "binary, groups of 128": Case(quantizer=BINARY | {"group_size": 128}),
    "one scale": Case(quantizer={"bits": 3, "per_channel": False}),
    **{f"{name}, gpu": Case(quantizer=models.GRIDS[name], target="gpu") for name in ("integer-2", "ternary")},
    "qwen3": Case("qwen3", models.every_grid(BINARY)),
    "qwen3, tied": Case("qwen3", models.GRIDS["stretched-2"], {"tie_word_embeddings": True}),
    "llama, untied": Case(config={"tie_word_embeddings": False}),
    "one key for all heads": Case(config={"num_key_value_heads": 1}),
    "a key a head": Case(config={"num_key_value_heads": 4}),
    "biases": Case(config={"attention_bias": True, "mlp_bias": True}),
    "heads of another size": Case(config={"head_dim": 48}),
    "theta, epsilon": Case(config={"rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
                                   "rms_norm_eps": 0.1}),
    **{f"{kind['rope_type']} rope": Case(config={"rope_parameters": kind})
       for kind in (LLAMA3, LINEAR, YARN)},
    **{f"qwen3, {kind['rope_type']} rope": Case("qwen3", config={"rope_parameters": kind})
       for kind in (LINEAR, YARN)},
    "yarn with its own magnitude": Case(config={"rope_parameters": YARN | {"attention_factor": 1.4}}),
    "bfloat16": Case(options={"dtype": torch.bfloat16}),
    "float16": Case("qwen3", options={"dtype": torch.float16}),
    "quantized embedding": Case(options={"skip": []}),
    "quantized embedding, ternary": Case("qwen3", models.GRIDS["ternary"], {"tie_word_embeddings": True},
                                         options={"skip": []}),
    "quantized embedding, binary": Case(quantizer=BINARY, options={"skip": []}),
    "quantized embedding, 8 bits": Case(quantizer={"bits": 8}, options={"skip": []}),
}  # fmt: skip
SLIDING = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
IGNORED = {  # what llama.cpp does not read from a file, and what the refusal says
    "another activation": (Case(config={"hidden_act": "relu2"}), "hidden_act: .* with silu, .* relu2;"),
    "qwen3, another activation": (Case("qwen3", config={"hidden_act": "relu"}), "hidden_act: .* relu;"),
    "qwen3, sliding window": (Case("qwen3", config=SLIDING), r"layer_types: .* \(8 tokens\)"),
    "qwen3, one sliding layer": (Case("qwen3", config=SLIDING | {"max_window_layers": 1}), "layer_types: "),
    "both directions": (Case(later={"is_causal": False}), "is_causal: .* with True, this model has False"),
    "dynamic rope": (Case(config={"rope_parameters": LINEAR | {"rope_type": "dynamic"}}),
                     "rope_parameters.rope_type: llama.cpp has no dynamic rotary embedding for llama"),
    "qwen3, llama3 rope": (Case("qwen3", config={"rope_parameters": LLAMA3}), ".*no llama3 .* for qwen3;"),
    "yarn, other turns": (Case(config={"rope_parameters": YARN | {"beta_slow": 0.25}}), "rope_parameters: "),
    "qwen3, biases": (Case("qwen3", config={"attention_bias": True}), "attention_bias: .* has True;"),
}  # fmt: skip
UNWRITABLE = ("dynamic rope", "qwen3, llama3 rope")
MORE = {
    **{f"{name} in qwen3": replace(case, family="qwen3") for name, case in GROUPS.items()},
    **{f"{name} on one key head": replace(case, config={"num_key_value_heads": 1, "attention_bias": True})
       for name, case in CASES.items() if case.family == "llama"},
}  # fmt: skip


def tokenizer():
    return train_bpe(["scale the grid, round and clamp: 4 bits a weight"], 300)


def refusal(packed):
    """What the check says of it; nothing where it passes."""
    try:
        gguf.check(packed)
    except UserError as error:
        return str(error)
    return ""


def answers(cases, folder):
    """Refusals, and how far llama.cpp is off in nats a token (None if it does not load the file), by name.

    Files are written of what is refused, too.
    """
    jobs, expected, refusals = [], {}, {}
    for number, (name, case) in enumerate(cases.items()):
        packed, path = case.packed(), folder / str(number)
        refusals[name] = refusal(packed)
        if name in UNWRITABLE:
            continue
        path.mkdir()
        gguf.write(packed, path)
        with torch.no_grad():
            expected[name] = packed.module(TOKENS[None])[0, PROMPTS].double().log_softmax(-1)
        prompts = [TOKENS[: end + 1].tolist() for end in PROMPTS]
        jobs.append({"file": str(path / gguf.FILE), "prompts": prompts, "vocabulary": 300})
    off = dict.fromkeys(cases)
    for (name, own), answer in zip(expected.items(), engine.run(jobs), strict=True):
        if "logprobs" in answer:
            theirs = torch.tensor(answer["logprobs"], dtype=torch.float64)
            off[name] = (own.exp() * (own - theirs)).sum(-1).mean().item()
    return refusals, off


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Of all cases; those that may end the process of llama.cpp come last."""
    ignored = {name: case for name, (case, _) in IGNORED.items()}
    return answers(CASES | ignored, tmp_path_factory.mktemp("files"))


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_what_was_trained(name, found):
    refusals, off = found
    assert refusals[name] == ""
    assert off[name] < KL


def test_rows_in_another_order_are_far_off(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "_row_order", lambda packed, name: None)
    _, off = answers({"rows": CASES["integer-2"]}, tmp_path)
    assert off["rows"] > 10 * KL


@pytest.mark.parametrize("name", IGNORED)
def test_what_llama_cpp_ignores_is_refused(name, found):
    refusals, off = found
    assert re.match(f"gguf: {IGNORED[name][1]}.* take compressed-tensors, or hf$", refusals[name])
    assert off[name] is None or off[name] > 10 * KL


@pytest.mark.slow
def test_llama_cpp_computes_what_was_trained_in_every_pair(tmp_path):
    refusals, off = answers(MORE, tmp_path)
    assert set(refusals.values()) == {""}
    assert max(off.values()) < KL
