"""Keys and values in few bits: what attention sees, what stays as it was."""

from functools import partial

import pytest
import torch

import tiny
from stableqat.errors import UserError
from stableqat.export.packed import pack
from stableqat.layers.full_precision import full_precision
from stableqat.quantizers import STE
from stableqat.runs import open_run, write_run

BITS = partial(STE, bits=4)
GROUPED = {**tiny.LLAMA, "num_key_value_heads": 1}
PACKED = torch.tensor([[*range(6), *range(10)], [*range(16)]])


def configured(cache_bits, **options):
    return tiny.configured("llama", config=GROUPED, quantizer=BITS, cache_bits=cache_bits, **options).eval()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_attention_sees_keys_and_values_of_few_levels(bits, monkeypatch):
    from transformers.integrations import sdpa_attention

    seen, attend = [], sdpa_attention.sdpa_attention_forward

    def noted(module, query, key, value, *args, **options):
        seen.append((query, key, value))
        return attend(module, query, key, value, *args, **options)

    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", noted)
    module, ids = configured(bits), tiny.batch("llama")["input_ids"]
    seen.clear()
    with torch.no_grad():
        module(ids)
    assert len(seen) == 2
    query, key, value = seen[0]
    assert key.shape == value.shape == (8, 1, 16, 16)
    for each in (key, value):
        assert all(len(row.unique()) <= 2**bits - 1 for row in each.flatten(0, 2))
    assert max(len(row.unique()) for row in query.flatten(0, 2)) == 16
    with full_precision(module.model), torch.no_grad():
        module(ids)
    assert max(len(row.unique()) for row in seen[2][1].flatten(0, 2)) == 16


def test_nothing_else_changes():
    """Within `full_precision`, also masks of packed rows are those of the plain model."""
    module, plain = configured(4), tiny.configured("llama", config=GROUPED, quantizer=None).eval()
    ids = tiny.batch("llama", 2)["input_ids"]
    with torch.no_grad():
        for positions in (None, PACKED):
            rounded = module(ids, positions)
            with full_precision(module.model):
                assert torch.equal(module(ids, positions), plain(ids, positions))
            assert not torch.equal(module(ids, positions), plain(ids, positions))
            assert torch.equal(module(ids, positions), rounded)
    assert module.state_dict().keys() == configured(None).state_dict().keys()


def test_text_is_the_same_with_a_cache_and_without():
    module, ids = configured(3), tiny.batch("llama", 2)["input_ids"][:, :6]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        one, other = (module.model.generate(ids, use_cache=cached, **options) for cached in (True, False))
    assert torch.equal(one, other)


def test_a_run_trains_and_is_read_again(tmp_path):
    module = tiny.module("llama", config=GROUPED, quantizer=BITS, cache_bits=4)
    losses = tiny.Losses()
    tiny.trainer(max_steps=3, callbacks=[losses]).fit(module, tiny.loader("llama"))
    assert losses.values[-1] < losses.values[0]
    folder = tmp_path / "run"
    folder.mkdir()
    write_run(folder, module, place=folder)
    loaded, ids = open_run(str(folder)).load(), tiny.batch("llama")["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded(ids), module.eval()(ids))
    assert loaded.describe()["cache_bits"] == 4
    with pytest.raises(UserError, match=r"model.cache_bits: .* export a run without it"):
        pack(loaded, torch.float32, torch.float32)


def test_checkpointed_activations_give_the_same_gradients():
    found = []
    for checkpointed in (False, True):
        module = configured(4, activation_checkpointing=checkpointed).train()
        module.loss(tiny.batch("llama")).backward()
        found.append([p.grad for p in module.parameters() if p.grad is not None])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("bits", [1, 9])
def test_a_width_out_of_range_is_a_line(bits):
    with pytest.raises(UserError, match=r"model.cache_bits: must be"):
        configured(bits)
