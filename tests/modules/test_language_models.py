"""Language models: what a folder describes, a checkpoint describes again; what none can be is refused."""

import json
import re

import pytest

from stableqat.errors import UserError
from stableqat.modules import LlamaModule
from stableqat.modules.config import resolve_config
from stableqat.modules.hyperparameters import rebuild
from stableqat.modules.start import Start, check_start

BASE = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
ROPE3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
WRITTEN = {
    "as it is": {},
    "what trainers leave": {"unsloth_version": "2025.1", "unsloth_fixed": True, "temperature": 0.7},
    "another library's block": {"nested": {"a": [1, {"b": None}]}},
    "the author's code": {"auto_map": {"AutoConfig": "theirs.Config"}},
    "no quantization": {"quantization_config": None},
    "keys of a relative": {"sliding_window": 8, "max_window_layers": 0, "layer_types": ["full_attention"]},
    "an old theta": {"rope_theta": 500000},
    "an old scaling": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **ROPE3}},
    "an older scaling": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "no scaling": {"rope_scaling": None},
    "an old type": {"torch_dtype": "bfloat16", "transformers_version": "4.30.0"},
    "two ends": {"eos_token_id": [1, 2], "pad_token_id": 0},
    "labels": {"id2label": {"0": "a"}, "label2id": {"a": 0}, "architectures": ["LlamaForCausalLM"]},
    "its own way of attention": {"attn_implementation": "eager"},
    "no limit": {"max_position_embeddings": ...},
    "no shared keys": {"num_key_value_heads": None},
}


def described(folder, model_type, changes):
    keys = {**BASE, "model_type": model_type, "head_dim": 8, **changes}
    folder.mkdir(exist_ok=True)
    keys = {key: value for key, value in keys.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(keys))
    return str(folder)


@pytest.mark.parametrize("case", WRITTEN)
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_what_a_folder_describes_a_checkpoint_describes_again(model_type, case, tmp_path):
    module = LlamaModule(config=described(tmp_path / "model", model_type, WRITTEN[case]))
    saved = json.loads(json.dumps(module.resolved()["config"]))
    again = resolve_config(saved, None)
    assert again.to_dict() == module.config.to_dict()
    assert again.use_cache is False
    read = {"hyper_parameters": {**module.hparams, "config": saved, "init_from": None}}
    assert rebuild(LlamaModule, tmp_path, read).config.to_dict() == module.config.to_dict()


def test_a_checkpoint_with_keys_of_another_library_is_opened(tmp_path):
    """As runs before this rule have written them; by hand the same key is a mistake."""
    saved = LlamaModule(config=dict(BASE)).resolved()["config"] | {"unsloth_version": "1"}
    assert not hasattr(resolve_config(saved, None), "unsloth_version")
    with pytest.raises(UserError, match=r"model\.config\.unsloth_version: unknown key"):
        resolve_config(BASE | {"unsloth_version": "1"}, None)


IMPOSSIBLE = {
    "num_hidden_layers": (10**6, "num_hidden_layers: must be from 1 to 1024, not 1000000"),
    "hidden_size": (10**9, "hidden_size: must be from 1 to 131072"),
    "vocab_size": (0, "vocab_size: must be from 1"),
    "attention_dropout": (5, "attention_dropout"),
    "hidden_act": ("sillu", "hidden_act: sillu is unknown; did you mean silu?"),
    "pad_token_id": (64, "pad_token_id: 64 is not one of the 64 tokens"),
    "rope_parameters": ({"rope_type": "nope", "rope_theta": 1.0}, "rope_type"),
    "num_key_value_heads": (3, "num_key_value_heads: 3 does not divide num_attention_heads 4"),
    "model_type": ("mistral", "model_type: 'mistral' is not supported; choose llama or qwen3"),
    "quantization_config": ({"quant_method": "gptq"}, "is already quantized"),
}


@pytest.mark.parametrize("key", IMPOSSIBLE)
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_what_cannot_be_built_is_refused_with_its_key(model_type, key, tmp_path):
    value, words = IMPOSSIBLE[key]
    folder = described(tmp_path / "model", model_type, {key: value})
    with pytest.raises(UserError, match=re.escape(folder)) as refusal:
        LlamaModule(config=folder)
    assert words in str(refusal.value)
    if key != "quantization_config":
        with pytest.raises(UserError, match=rf"model\.config\.{key}|model\.config: .*{key}"):
            LlamaModule(config=BASE | {"model_type": model_type, key: value})


def test_heads_that_qwen3_supposes_are_named(tmp_path):
    folder = described(tmp_path / "model", "qwen3", {"num_key_value_heads": ...})
    with pytest.raises(UserError, match="num_key_value_heads: 32 does not divide num_attention_heads 4"):
        LlamaModule(config=folder)


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_key_value_heads"])
def test_an_architecture_laid_over_a_folder_is_refused(key, tmp_path):
    """Fewer layers would be taken without a word, a narrower one with five lines of another library's."""
    source = described(tmp_path / "model", "llama", {"num_hidden_layers": 2})
    other = {"hidden_size": 64, "num_hidden_layers": 1, "num_key_value_heads": 4}[key]
    module = LlamaModule(config=BASE | {"num_hidden_layers": 2, "head_dim": 8, key: other}, init_from=source)
    words = rf"model\.config\.{key}: is {other}, but .*model in init_from has .*; take .*--model\.config null"
    with pytest.raises(UserError, match=words):
        check_start(module, Start(source))
    with pytest.raises(UserError, match=words):
        module.configure_model()
