"""The quantizer monitor on hand-made sequences of weights, whose answers are known."""

from functools import partial
from math import log2, log10

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader

import tiny
from stableqat.callbacks import QuantizerMonitor
from stableqat.callbacks.monitor import sampled_rows
from stableqat.layers.linear import QuantLinear
from stableqat.quantizers import DSQ, STE, StableQAT

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
]


class Memory(DummyLogger):
    """Keeps what is logged, by step."""

    def __init__(self):
        super().__init__()
        self.rows = {}

    def log_metrics(self, metrics, step=None):
        quant = {key: value for key, value in metrics.items() if key.startswith(("quant/", "layers/"))}
        if quant:
            self.rows.setdefault(step, {}).update(quant)


class Play(torch.optim.Optimizer):
    """An optimizer that sets the tensors to the next entries of a script."""

    def __init__(self, scripts):
        super().__init__([tensor for tensor, _ in scripts], {})
        self.scripts, self.steps = scripts, 0

    @torch.no_grad()
    def step(self, closure=None):
        closure()
        self.steps += 1
        for tensor, script in self.scripts:
            tensor.copy_(torch.as_tensor(script[self.steps]))


def layer_of(weight, scale=1.0, bits=2, method=STE, **options):
    """A quantized layer with this weight and scale."""
    weight = torch.as_tensor(weight)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        linear.weight.copy_(weight)
    layer = QuantLinear.from_linear(linear, method(linear.weight, bits=bits, **options))
    with torch.no_grad():
        layer.weight_quantizer.scale.fill_(scale)
        layer.weight_quantizer.scale_floor.fill_(1e-4)
    return layer


class Played(L.LightningModule):
    def __init__(self, scripts, **layers):
        super().__init__()
        self.layers, self.scripts = nn.ModuleDict(layers), scripts

    def training_step(self, batch, batch_idx):
        return sum(p.sum() for p in self.parameters()) * 0.0

    def configure_optimizers(self):
        return Play(self.scripts)


def fit(module, monitor, steps, **options):
    memory = Memory()
    trainer = L.Trainer(
        **{
            "accelerator": "cpu",
            "max_steps": steps,
            "logger": memory,
            "callbacks": [monitor],
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            **options,
        }
    )
    trainer.fit(module, DataLoader(torch.zeros(64, 1)))
    return memory.rows


# codes of four weights before and after each of five steps, written by hand
CODES = {"a": [0, 1, 0, 1, 1, 0], "b": [-1] * 6, "c": [0, 1, 1, 1, 1, 1], "d": [-2, 0, 1, -2, -2, -1]}
FLIPS = [3 / 4, 2 / 4, 2 / 4, 0, 2 / 4]
BACK = [0, 1 / 4, 2 / 4, 0, 2 / 4]  # against the direction of the previous flip


def script():
    """Latent weights of those codes, a quarter step beside the levels, c beyond the outermost."""
    rows = zip(CODES["a"], CODES["b"], CODES["c"], CODES["d"], strict=True)
    return [[[a + 0.25, b - 0.25], [c + 0.25, d - 0.25]] for a, b, c, d in rows]


def averages(shares):
    average, out = 0.0, []
    for share in shares:
        average = 0.99 * average + 0.01 * share
        out.append(average)
    return out


def test_flips_and_oscillation():
    layer = layer_of(script()[0])
    rows = fit(Played([(layer.weight, script())], x=layer), QuantizerMonitor(), 5)
    assert list(rows) == [1, 2, 3, 4, 5]
    assert [row["layers/layers.x/flip_rate"] for row in rows.values()] == pytest.approx(averages(FLIPS))
    oscillation = pytest.approx(averages(BACK), rel=2e-3)  # float16
    assert [row["layers/layers.x/oscillation"] for row in rows.values()] == oscillation
    assert [row["layers/layers.x/oscillating"] for row in rows.values()] == [0, 1 / 4, 2 / 4, 2 / 4, 2 / 4]


def test_a_weight_that_flips_back_once_oscillates_for_a_while():
    weights = [[[0.0, 0.0]], [[1.0, 0.0]], [[0.0, 0.0]], *[[[0.0, 1.0]]] * 80]
    layer = layer_of(weights[0])
    rows = fit(Played([(layer.weight, weights)], x=layer), QuantizerMonitor(), len(weights) - 1, max_epochs=9)
    oscillating = [row["quant/oscillating"] for row in rows.values()]
    assert oscillating == [0] + [0.5] * 69 + [0] * 12  # 0.01 falls below 0.005


def test_what_is_frozen_is_shown_where_something_may_be():
    layers = {name: layer_of([[0.25, 0.25, 0.25, 0.25]] * 2, **options) for name, options in REMEDIED.items()}
    with torch.no_grad():
        layers["freezing"].weight_quantizer.freezing.frequency[:, :3] = 2.0
    weight = layers["plain"].weight
    row = fit(Played([(weight, [weight.clone()] * 2)], **layers), QuantizerMonitor(), 1)[1]
    assert {key: value for key, value in row.items() if "frozen" in key} == {
        "layers/layers.freezing/frozen": 0.75,
        "quant/frozen": 0.75,
    }


REMEDIED = {"plain": {}, "freezing": {"freezing": 0.01}}


def test_flips_are_counted_in_every_step_whenever_they_are_logged():
    layer = layer_of(script()[0])
    rows = fit(Played([(layer.weight, script())], x=layer), QuantizerMonitor(every_n_steps=2), 5)
    assert list(rows) == [2, 4]
    assert rows[4]["layers/layers.x/flip_rate"] == pytest.approx(averages(FLIPS)[3])
    assert rows[4]["layers/layers.x/oscillation"] == pytest.approx(averages(BACK)[3], rel=2e-3)
    rows = fit(Played([(layer.weight, script())], x=layer), QuantizerMonitor(), 5, log_every_n_steps=5)
    assert list(rows) == [5]


@pytest.mark.parametrize(("every", "options"), [(None, {"log_every_n_steps": 0}), (0, {})])
def test_every_0_steps_is_never(every, options):
    layer = layer_of(script()[0])
    played = Played([(layer.weight, script())], x=layer)
    assert not fit(played, QuantizerMonitor(every_n_steps=every), 5, **options)


def test_a_flip_is_an_optimizer_step_not_a_micro_batch():
    layer = layer_of(script()[0])
    rows = fit(Played([(layer.weight, script())], x=layer), QuantizerMonitor(), 5, accumulate_grad_batches=3)
    assert [row["layers/layers.x/flip_rate"] for row in rows.values()] == pytest.approx(averages(FLIPS))


def test_a_jump_across_an_8_bit_grid_keeps_its_direction():
    """Up by 240 and up by 1 again: two flips, no oscillation."""
    weights = [[[-120.0, 3.0]], [[120.0, 3.0]], [[121.0, 3.0]]]
    layer = layer_of(weights[0], bits=8)
    rows = fit(Played([(layer.weight, weights)], x=layer), QuantizerMonitor(), 2)
    assert rows[2]["layers/layers.x/flip_rate"] == pytest.approx(averages([0.5, 0.5])[1])
    assert rows[2]["layers/layers.x/oscillation"] == 0


def test_what_one_step_shows():
    """After the last step: codes 0, -1, 1, -1; latent weights 0.25, -1.25, 1.25, -1.25."""
    layer = layer_of(script()[0])
    row = fit(Played([(layer.weight, script())], x=layer), QuantizerMonitor(), 5)[5]
    assert row["layers/layers.x/clipped"] == 1 / 4  # 1.25 lies beyond the outermost level
    assert row["layers/layers.x/scale_at_floor"] == 0
    assert row["layers/layers.x/scale_drift"] == 0
    assert [row[f"layers/layers.x/share_of_code_{q}"] for q in (-2, -1, 0, 1)] == [0, 1 / 2, 1 / 4, 1 / 4]
    assert row["layers/layers.x/level_entropy_bits"] == pytest.approx(1.5)
    signal, noise = 0.25**2 + 3 * 1.25**2, 4 * 0.25**2
    assert row["layers/layers.x/snr_db"] == pytest.approx(10 * log10(signal / noise), abs=1e-4)


def test_what_is_rounded_is_what_is_shown():
    """A method that rounds another tensor than the weight: codes 0, 1, -1, 1 for the weights above."""

    class Mirrored(STE):
        def latent(self, weight):
            return -weight

    layer = layer_of(script()[0], method=Mirrored)
    row = fit(Played([(layer.weight, script())], x=layer), QuantizerMonitor(), 5)[5]
    assert [row[f"layers/layers.x/share_of_code_{q}"] for q in (-2, -1, 0, 1)] == [0, 1 / 4, 1 / 4, 1 / 2]


def test_codes_of_a_method_with_another_rule_are_those_it_deploys():
    """Rounded down instead of to nearest: codes 0, -2, 1, -2 after the last step."""

    class Floored(STE):
        def codes(self, weight):
            return (weight / self.effective_scale()).floor().clamp(-2, 1).to(torch.int8)

    layers = {"x": layer_of(script()[0], method=Floored), "y": layer_of(script()[0])}
    row = fit(Played([(x.weight, script()) for x in layers.values()], **layers), QuantizerMonitor(), 5)[5]
    shown = {x: [row[f"layers/layers.{x}/share_of_code_{q}"] for q in (-2, -1, 0, 1)] for x in layers}
    assert shown == {"x": [1 / 2, 0, 1 / 4, 1 / 4], "y": [0, 1 / 2, 1 / 4, 1 / 4]}


def test_drift_of_the_scales():
    layer = layer_of([[0.5], [0.5], [0.5], [0.5]], scale=2.0)
    scales = [[[2.0]] * 4, [[4.0], [2.0], [1.0], [0.5]]]
    rows = fit(Played([(layer.weight_quantizer.scale, scales)], x=layer), QuantizerMonitor(), 1)
    assert rows[1]["layers/layers.x/scale_drift"] == pytest.approx((1 + 0 + 1 + 2) / 4)


def test_every_layer_drifts_by_itself():
    layers = {name: layer_of([[0.5]] * rows) for name, rows in (("x", 1), ("y", 3), ("z", 2))}
    scripts = [
        (layer.weight_quantizer.scale, [None, torch.full((len(layer.weight), 1), 2.0**power)])
        for power, layer in enumerate(layers.values(), start=1)
    ]
    row = fit(Played(scripts, **layers), QuantizerMonitor(), 1)[1]
    assert [row[f"layers/layers.{name}/scale_drift"] for name in layers] == [1, 2, 3]


def test_scales_at_their_floor_are_counted():
    layer = layer_of([[0.5], [0.5], [0.5], [0.5]])
    scales = [[[1.0]] * 4, [[-3.0], [1.0], [0.0], [1e-5]], [[1.0]] * 4]
    rows = fit(Played([(layer.weight_quantizer.scale, scales)], x=layer), QuantizerMonitor(), 2)
    assert rows[1]["layers/layers.x/scale_at_floor"] == 3
    assert rows[2]["layers/layers.x/scale_at_floor"] == 0


def test_means_over_layers():
    moving, still = layer_of(script()[0]), layer_of(script()[0], method=DSQ)
    scripts = [(moving.weight, script())]
    row = fit(Played(scripts, x=moving, y=still), QuantizerMonitor(), 1)[1]
    assert row["layers/layers.y/flip_rate"] == 0
    assert row["quant/flip_rate"] == pytest.approx(row["layers/layers.x/flip_rate"] / 2)
    whats = {key.rsplit("/", 1)[1] for key in row}
    assert len(row) == 3 * len(whats)  # two layers and the mean

    row = fit(Played(scripts, x=moving, y=still), QuantizerMonitor(per_layer=False), 1)[1]
    assert set(row) == {f"quant/{what}" for what in whats}


def test_layers_of_all_shapes_at_once():
    """Every layer's figures are those of its own deployed rows, whatever is beside it."""
    torch.manual_seed(0)
    layers = {
        "wide": layer_of(torch.randn(70, 96)),
        "narrow": layer_of(torch.randn(5, 36)),
        "one_scale": layer_of(torch.randn(6, 24), per_channel=False),
        "groups": layer_of(torch.randn(4, 64), group_size=16),
        "stretched": layer_of(torch.randn(4, 36), grid="stretched"),
        "three_bits": layer_of(torch.randn(7, 30), bits=3),
        "wide_grid": layer_of(torch.randn(7, 30), bits=8),
    }
    with torch.no_grad():
        for layer in layers.values():
            layer.weight_quantizer.scale.uniform_(0.3, 0.6)
    after = {
        name: layer.weight.detach() + 0.2 * torch.randn_like(layer.weight) for name, layer in layers.items()
    }
    before = {n: layer.weight_quantizer.quantize(layer.weight).codes[:64] for n, layer in layers.items()}
    scripts = [(layers[name].weight, [None, value]) for name, value in after.items()]
    logged = fit(Played(scripts, **layers), QuantizerMonitor(), 1)[1]
    for name, layer in layers.items():
        row = {key.rsplit("/", 1)[1]: v for key, v in logged.items() if f"/layers.{name}/" in key}
        now = layer.weight_quantizer.quantize(after[name])
        weight, codes, bits = after[name][:64], now.codes[:64], now.bits
        flipped = (codes != before[name]).float().mean().item()
        noise = (now.dequantize()[:64] - weight).square().sum()
        assert flipped > 0
        assert row["flip_rate"] == pytest.approx(0.01 * flipped, rel=1e-4)
        assert row["snr_db"] == pytest.approx(10 * log10(weight.square().sum() / noise), abs=1e-3)
        shares = {
            code: (codes == code).float().mean().item() for code in range(-(2 ** (bits - 1)), 2 ** (bits - 1))
        }
        entropy = -sum(share * log2(share) for share in shares.values() if share)
        assert row["level_entropy_bits"] == pytest.approx(entropy, abs=1e-4)
        named = {key: value for key, value in row.items() if "share" in key}
        assert named == pytest.approx(
            {f"share_of_code_{c}": s for c, s in shares.items()} if bits < 5 else {}
        )
        low, high = layer.weight_quantizer.grid.bounds("range")
        v = (after[name].reshape(*now.scale.shape, -1) / now.scale[..., None]).reshape(after[name].shape)[:64]
        assert row["clipped"] == pytest.approx(((v < low) | (v > high)).float().mean().item())
        assert row["scale_at_floor"] == row["scale_drift"] == 0


def test_tensorboard_shows_every_layer(tmp_path):
    layer = layer_of(script()[0])
    logger = TensorBoardLogger(tmp_path, name="", version="", prefix="my")
    fit(Played([(layer.weight, script())], x=layer), QuantizerMonitor(), 5, logger=logger)
    events = EventAccumulator(str(tmp_path)).Reload()
    for tag in ("my-quant/flip_rate", "my-layers/layers.x/flip_rate"):
        assert [(each.step, each.value) for each in events.Scalars(tag)] == [
            (step, pytest.approx(average)) for step, average in enumerate(averages(FLIPS), start=1)
        ]


def test_a_sample_of_rows():
    weights = [torch.zeros(100, 2), torch.zeros(100, 2)]
    weights[1][80] = 1.0  # beyond the first 64 rows
    for rows, share in ((64, 0.0), (100, 0.01)):
        layer = layer_of(weights[0])
        logged = fit(Played([(layer.weight, weights)], x=layer), QuantizerMonitor(rows=rows), 1)
        assert logged[1]["layers/layers.x/flip_rate"] == pytest.approx(0.01 * share)


def test_the_sample_of_wide_layers_has_fewer_rows():
    assert [sampled_rows(features) for features in (8, 1024, 2048, 8192, 100_000)] == [64, 64, 32, 8, 1]
    weights = [torch.zeros(40, 2048), torch.zeros(40, 2048)]
    weights[1][30] = weights[1][35] = 1.0  # within the first 32 rows, and beyond
    layer = layer_of(weights[0])
    logged = fit(Played([(layer.weight, weights)], x=layer), QuantizerMonitor(), 1)
    assert logged[1]["layers/layers.x/flip_rate"] == pytest.approx(0.01 / 32)


def test_full_precision_logs_nothing():
    layer = nn.Linear(2, 2, bias=False)
    assert fit(Played([(layer.weight, script())], x=layer), QuantizerMonitor(), 3) == {}


def test_without_a_logger_nothing_is_measured():
    layer = layer_of(script()[0])
    monitor = QuantizerMonitor()
    assert fit(Played([(layer.weight, script())], x=layer), monitor, 3, logger=False) == {}
    assert monitor.state_dict() == {"start_scales": {}, "flips": {}}


def test_drift_is_counted_from_the_first_start_after_a_resume():
    scales = [[[1.0], [1.0]], [[2.0], [2.0]], [[4.0], [4.0]]]
    layer = layer_of(script()[0])
    monitor = QuantizerMonitor()
    fit(Played([(layer.weight_quantizer.scale, scales)], x=layer), monitor, 1)
    started = monitor.state_dict()["start_scales"]["layers.x"]
    assert torch.equal(started, torch.ones(2))
    resumed = QuantizerMonitor()
    resumed.load_state_dict({"start_scales": {"layers.x": started[:, None]}})  # as earlier versions saved it
    rows = fit(Played([(layer.weight_quantizer.scale, scales[1:])], x=layer), resumed, 1)
    assert rows[1]["layers/layers.x/scale_drift"] == 2.0


class Saved(L.Callback):
    """Saves once a step is done."""

    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(
    ("family", "quantizer", "options"),
    [
        ("llama", partial(STE, bits=2), {}),
        ("llama", partial(StableQAT, bits=3, group_size=16), {"accumulate_grad_batches": 2}),
        ("vit", partial(DSQ, bits=2, freezing=0.0), {"log_every_n_steps": 2}),
    ],
)
def test_a_resumed_run_logs_what_an_undisturbed_one_does(family, quantizer, options, tmp_path):
    """Flips, oscillation and drift are averages over all steps, also those before the resume."""
    logged, alike = [], DataLoader(tiny.rows(family, 4) * 16, batch_size=4)
    for ckpt_path in (None, tmp_path / "third.ckpt"):
        memory = Memory()
        trainer = tiny.trainer(
            **{"logger": memory, "log_every_n_steps": 1, "max_steps": 8, **options},
            callbacks=[QuantizerMonitor(rows=8), Saved(tmp_path / "third.ckpt", 3)],
        )
        module = tiny.configured(
            family, quantizer=quantizer, optimizer=partial(torch.optim.SGD, lr=1.0, momentum=0.5)
        )
        trainer.fit(module, alike, ckpt_path=ckpt_path, weights_only=True)
        logged.append(memory.rows)
    whole, resumed = logged
    assert whole[8]["quant/oscillation"] > 0
    assert list(resumed) == [step for step in whole if step > 3]
    assert resumed == {step: whole[step] for step in resumed}


def test_flips_go_on_in_shards_of_other_sizes():
    """Rows that the earlier process did not have begin without a direction."""
    weights = [[[0.0]] * 4, [[1.0]] * 4, [[0.0]] * 4]
    layer, monitor = layer_of(weights[0]), QuantizerMonitor(rows=2)
    fit(Played([(layer.weight, weights)], x=layer), monitor, 1)
    for rows, share in ((4, 0.5), (2, 1.0), (1, 1.0)):
        layer, resumed = layer_of(weights[1]), QuantizerMonitor(rows=rows)
        resumed.load_state_dict(monitor.state_dict())
        row = fit(Played([(layer.weight, weights[1:])], x=layer), resumed, 1)[1]
        assert row["quant/flip_rate"] == pytest.approx(averages([1, 1])[1])
        assert row["quant/oscillation"] == pytest.approx(0.01 * share, rel=2e-3)


def test_monitoring_does_not_disturb_training():
    """It leaves parameters, gradients and the random stream alone."""
    layer = layer_of(script()[0])
    states = []
    for callbacks in ([QuantizerMonitor()], []):
        torch.manual_seed(0)
        fit(Played([(layer.weight, script())], x=layer), None, 3, callbacks=callbacks)
        states.append((torch.get_rng_state(), layer.weight.detach().clone()))
    assert torch.equal(states[0][0], states[1][0])
    assert torch.equal(states[0][1], states[1][1])
