"""What every quantizer of inputs keeps, at every width, with every surrogate."""

import io
from functools import partial

import pytest
import torch
from torch import nn

import stableqat
from stableqat import ops
from stableqat.errors import UserError
from stableqat.layers.calibration import uncalibrated
from stableqat.layers.full_precision import full_precision
from stableqat.quantizers import STE
from stableqat.quantizers.inputs import LSQ, InputQuantizer, LearnedScale, LSQPlus, PerToken

FEATURES = 32
CLASSES = [LSQ, LSQPlus, PerToken]
KINDS = [(c, s) for c in CLASSES for s in ("ste", "dsq", "stableqat") if (c, s) != (PerToken, "dsq")]
each_kind = pytest.mark.parametrize(("kind", "surrogate"), KINDS)
each_width = pytest.mark.parametrize("bits", range(2, 9))


def gelu(rows: int = 64) -> torch.Tensor:
    return torch.nn.functional.gelu(torch.randn(rows, FEATURES))


def calibrated(kind: type[InputQuantizer], x: torch.Tensor, **options) -> InputQuantizer:
    quantizer = kind(FEATURES, **options)
    if list(quantizer.parameters()):
        quantizer.calibrate(ops.count_values(x))
    return quantizer


def test_every_class_is_tested():
    found = [*InputQuantizer.__subclasses__(), *LearnedScale.__subclasses__()]
    own = [c for c in found if c.__module__.startswith("stableqat.") and c is not LearnedScale]
    assert set(own) == set(CLASSES)


@each_kind
@each_width
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_take_few_levels_and_everything_learns(kind, surrogate, bits, dtype):
    x = gelu().to(dtype).requires_grad_()
    quantizer = calibrated(kind, x, bits=bits, surrogate=surrogate)
    value = quantizer(x)
    assert value.shape == x.shape
    assert value.dtype == dtype
    rows = value.detach() if kind is PerToken else value.detach().reshape(1, -1)
    assert all(len(row.unique()) <= 2**bits for row in rows)
    error = (value - x).detach().float().square().mean() / x.detach().float().square().mean()
    assert error < {2: 0.5, 3: 0.15, 4: 0.05}.get(bits, 0.015)
    (value.float() * torch.randn(x.shape)).sum().backward()
    learned = {name: p.grad for name, p in quantizer.named_parameters() if p.requires_grad}
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in (x.grad.float(), *learned.values())), learned
    frozen = {name for name, p in quantizer.named_parameters() if not p.requires_grad}
    assert frozen <= {"scale_floor", "lowest"}


@each_kind
def test_a_power_of_two_passes_through(kind, surrogate):
    x = gelu()
    for c in (2.0**-12, 8.0):
        few = calibrated(kind, x, bits=4, surrogate=surrogate)(x)
        assert torch.equal(calibrated(kind, c * x, bits=4, surrogate=surrogate)(c * x), c * few)


@pytest.mark.parametrize("kind", [LSQ, LSQPlus])
def test_a_scale_that_falls_acts_at_its_floor_and_can_recover(kind):
    x = gelu()
    quantizer = calibrated(kind, x, bits=4)
    with torch.no_grad():
        quantizer.scale.fill_(-1.0)
    value = quantizer(x)
    assert value.isfinite().all()
    value.sum().backward()
    assert quantizer.scale.grad != 0


def test_codes_are_unsigned_where_nothing_is_negative():
    signed, unsigned = (calibrated(LSQ, x, bits=4) for x in (gelu(), gelu().relu()))
    assert signed.lowest == -8
    assert unsigned.lowest == 0


@pytest.mark.parametrize("kind", [LSQ, LSQPlus])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.full((4, FEATURES), 0.25), "its input is 0.25 everywhere in calibration"),
        (torch.zeros(4, FEATURES), "its input is 0 everywhere"),
        (torch.full((4, FEATURES), torch.nan), "NaN or infinity flowed into it"),
        (torch.empty(0, FEATURES), "nothing flowed into it"),
    ],
)
def test_what_gives_no_scale_is_refused_in_one_line_that_names_the_layer(kind, x, message):
    model = stableqat.prepare(
        nn.Sequential(nn.Linear(FEATURES, 4)), "ste", (), bits=4, input_quantizer=partial(kind, bits=4)
    )
    with pytest.raises(UserError, match=message) as error:
        stableqat.calibrate(model, [x])
    assert str(error.value).startswith("layer 0: ")
    assert "\n" not in str(error.value)
    assert list(uncalibrated(model)) == ["0.input_quantizer"]


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"bits": 1}, "bits"),
        ({"bits": 9}, "bits"),
        ({"bits": 4, "surrogate": "tanh"}, "surrogate"),
        ({"bits": 4, "mask": "half"}, "mask"),
    ],
)
def test_an_option_out_of_range_is_refused(options, key):
    with pytest.raises(UserError, match=f"^input_quantizer.{key}: "):
        stableqat.prepare(net(), "ste", (), bits=4, input_quantizer=partial(LSQ, **options))


def test_a_sharpness_needs_a_scale():
    with pytest.raises(UserError, match="PerToken has none"):
        PerToken(FEATURES, bits=8, surrogate="dsq")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.GELU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))


def prepared(kind=LSQ, **options) -> nn.Module:
    spec = partial(kind, bits=options.pop("input_bits", 8))
    return stableqat.prepare(net(), "ste", options.pop("skip", ()), bits=4, input_quantizer=spec)


def test_a_model_that_is_not_calibrated_refuses_to_compute():
    model = prepared()
    with pytest.raises(UserError, match=r"call stableqat.calibrate\(model, batches\)"):
        model(gelu())
    stableqat.calibrate(model, [gelu()])
    assert model(gelu()).isfinite().all()


def test_calibration_sees_inputs_as_they_are_and_leaves_the_modes():
    model = prepared()
    model[1].eval()
    batches = [gelu(), gelu()]
    assert stableqat.calibrate(model, batches) is model
    assert [module.training for module in model] == [True, False, True, True, True]
    with torch.no_grad():  # what flows into the last layer, with quantized weights and plain inputs
        value = model[0].weight_quantizer(model[0].weight)
        hidden = model[1](nn.functional.linear(torch.cat(batches), value, model[0].bias))
        value = model[2].weight_quantizer(model[2].weight)
        hidden = nn.functional.linear(hidden, value, model[2].bias).relu()
    alone = LSQ(8, bits=8)
    alone.calibrate(ops.count_values(hidden))
    assert torch.equal(alone.scale, model[4].input_quantizer.scale)
    assert model[4].input_quantizer.lowest == 0
    before = model[4].input_quantizer.scale.clone()
    stableqat.calibrate(model, [100 * gelu()])  # what is set stays
    assert torch.equal(before, model[4].input_quantizer.scale)


def test_in_full_precision_inputs_are_plain_too():
    model, x = prepared(input_bits=2), gelu()
    stableqat.calibrate(model, [x])
    assert not torch.equal(model(x), net()(x))
    with full_precision(model):
        assert torch.equal(model(x), net()(x))
    assert isinstance(model[0].input_quantizer, LSQ)


def test_a_state_dict_brings_the_scales():
    model, x = prepared(LSQPlus), gelu()
    stableqat.calibrate(model, [x])
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = prepared(LSQPlus)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert not uncalibrated(again)
    assert torch.equal(model(x), again(x))


def test_scales_and_offsets_train_in_the_scales_group():
    model = prepared(LSQPlus)
    groups = {g["name"]: {id(p) for p in g["params"]} for g in stableqat.parameter_groups(model)}
    quantizer = model[0].input_quantizer
    assert {id(quantizer.scale), id(quantizer.offset)} <= groups["scales"]
    assert id(quantizer.scale_floor) not in set().union(*groups.values())


def test_a_mapping_gives_layers_their_own():
    spec = {"0": partial(LSQPlus, bits=8), "2": None, "*": partial(PerToken, bits=4)}
    model = stableqat.prepare(net(), "ste", (), bits=4, input_quantizer=spec)
    assert [type(model[i].input_quantizer).__name__ for i in (0, 2, 4)] == ["LSQPlus", "NoneType", "PerToken"]
    with pytest.raises(UserError, match="input_quantizer: 9 chooses no layer"):
        stableqat.prepare(net(), "ste", (), bits=4, input_quantizer={"9": None, **spec})


def test_layers_that_are_skipped_have_plain_inputs():
    model = prepared(skip=("4",))
    assert type(model[4]) is nn.Linear
    assert isinstance(model[2].input_quantizer, LSQ)


def test_a_model_that_quantizes_inputs_does_not_convert_to_plain_layers():
    model = prepared()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(UserError, match="layer 0 quantizes its input"):
        stableqat.convert(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) or parameter.isnan().all()


def test_preparing_again_asks_for_the_same_inputs():
    model = prepared()
    again = stableqat.prepare(model, "ste", (), bits=4, input_quantizer=partial(LSQ, bits=8))
    assert again is model
    with pytest.raises(UserError, match="input_bits 8 instead of 4"):
        stableqat.prepare(model, "ste", (), bits=4, input_quantizer=partial(LSQ, bits=4))
    with pytest.raises(UserError, match="input_quantizer LSQ instead of None"):
        stableqat.prepare(model, "ste", (), bits=4)


class Reads(nn.Module):
    """Multiplies with a layer's weight itself."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(FEATURES, 4)

    def forward(self, x):
        return x @ self.layer.weight.T


def test_a_weight_that_is_read_without_its_layer_is_refused():
    example = {"example_inputs": gelu()}
    stableqat.prepare(Reads(), "ste", (), bits=4, **example)
    with pytest.raises(UserError, match=r"layer layer: .* would not quantize its input"):
        stableqat.prepare(Reads(), "ste", (), bits=4, input_quantizer=partial(LSQ, bits=8), **example)


def test_a_held_weight_takes_a_quantized_input():
    model, x = prepared(PerToken, input_bits=2), gelu()
    expected = model(x)
    stableqat.hold_weights(model)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), expected)


def test_a_method_with_its_own_forward_takes_a_quantized_input():
    class Doubled(STE):
        def forward(self, weight):
            return 2 * super().forward(weight)

    linear, x = nn.Linear(FEATURES, 4), gelu()
    model = nn.Sequential(linear)
    stableqat.quantize_linears(model, partial(Doubled, bits=4), input_quantizer=partial(PerToken, bits=3))
    layer = model[0]
    value = 2 * STE(linear.weight, bits=4)(linear.weight)
    assert torch.equal(layer(x), nn.functional.linear(layer.input_quantizer(x), value, linear.bias))


@each_kind
def test_a_layer_compiles_whole(kind, surrogate):
    """Forward and backward of `QuantLinear`, without a break in the graph, equal the eager ones."""

    def run(compiled: bool):
        torch.manual_seed(0)
        spec = partial(kind, bits=4, surrogate=surrogate)
        model = stableqat.prepare(net(), "stableqat", (), bits=4, input_quantizer=spec)
        stableqat.calibrate(model, [x := gelu()])
        layer = torch.compile(model[0], backend="aot_eager", fullgraph=True) if compiled else model[0]
        output = layer(x)
        output.square().sum().backward()
        return [output.detach(), *(p.grad for p in model[0].parameters() if p.requires_grad)]

    torch.compiler.reset()
    assert all(map(torch.equal, run(True), run(False)))
