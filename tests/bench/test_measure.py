"""What is compared is equal but for the linear layers, and what fails harms nobody else."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from stableqat.bench import arms, measure
from stableqat.bench.architecture import read_architecture
from stableqat.bench.arms import Arm, build_arms, method_factories, rival_factories
from stableqat.bench.workload import Workload
from stableqat.layers.linear import quantized_layers
from stableqat.modules import loss

CPU = torch.device("cpu")


@pytest.fixture
def workload(at) -> Workload:
    return Workload(
        read_architecture("tiny-llama"), batch=2, tokens=None, precision="32-true", device=CPU, seeds=2
    )


@pytest.fixture
def built(workload, monkeypatch) -> dict[str, nn.Module]:
    monkeypatch.setattr(arms, "find_spec", lambda name: None)
    model = workload.build_model()
    methods = method_factories(["all"], 4)
    rivals = rival_factories(["rivals.py:rounded"], 4, list(methods))
    return {arm.name: arm.model for arm in build_arms(model, workload.module, methods, rivals)}


def test_the_overlay_lies_over_its_base(at):
    overlay, base = read_architecture("tiny-llama"), read_architecture("configs/llama/base.yaml")
    assert overlay.class_path == base.class_path
    assert overlay.init_args["config"]["intermediate_size"] == 64
    assert set(overlay.init_args) == {"config"}  # no optimizer
    assert overlay.name == "tiny-llama"


def test_all_means_every_method():
    assert set(method_factories(["all"], 2)) == {"STE", "DSQ", "ParetoQ", "StableQAT", "LRQAT"}


def test_arms_share_the_weights(built):
    full = dict(built["FP"].named_parameters())
    for name, model in built.items():
        own = dict(model.named_parameters())
        frozen = {f"{key}.weight" for key in quantized_layers(model)} if name == "LRQAT" else set()
        assert all(own[key] is parameter for key, parameter in full.items() if key not in frozen)
        assert all(own[key].dtype == torch.int8 for key in frozen)
        assert all(parameter.requires_grad for parameter in full.values())
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert len(quantized_layers(model)) == (0 if name in ("FP", "rounded") else 14)
        assert type(model.lm_head) is nn.Linear


def test_a_rival_replaces_what_the_surgery_swaps(built):
    replaced = [name for name, m in built["rounded"].named_modules() if type(m).__name__ == "Rounded"]
    assert replaced == list(quantized_layers(built["STE"]))


def test_the_loss_is_the_models_own(workload, built):
    batch = workload.batches()[1]
    assert batch["input_ids"].shape == (2, 32)  # the model's positions, as none were asked for
    own = built["FP"](input_ids=batch["input_ids"], labels=batch["labels"]).loss
    assert workload.loss(built["FP"], batch).item() == own.item()
    assert workload.loss(built["STE"], batch).item() != own.item()


def test_a_lean_loss_is_measured_as_such(at, monkeypatch):
    """Every arm computes what the configuration trains with, and never the logits of a whole batch."""
    options = {"batch": 2, "tokens": 16, "precision": "32-true", "device": CPU, "seeds": 1}
    lean = Workload(read_architecture("lean-llama"), **options)
    full = Workload(read_architecture("configs/llama/base.yaml"), **options)
    assert (lean.kind_of_loss, full.kind_of_loss) == ("lean", "full logits")
    (batch,), losses, seen = lean.batches(), {}, []
    original = loss.sum_over_rows
    monkeypatch.setattr(loss, "sum_over_rows", lambda *args: seen.append(1) or original(*args))
    monkeypatch.setattr(arms, "find_spec", lambda name: None)
    rivals = rival_factories(["rivals.py:rounded"], 4, [])
    for workload in (lean, full):
        built = build_arms(workload.build_model(), workload.module, method_factories(["STE"], 4), rivals)
        losses[workload.kind_of_loss] = [workload.loss(arm.model, batch).item() for arm in built]
    assert len(seen) == 3
    assert losses["lean"] == pytest.approx(losses["full logits"], rel=1e-6)


def test_batches_differ_by_seed_only(workload):
    model = workload.build_model()
    first, second = workload.batches()
    assert not torch.equal(first["input_ids"], second["input_ids"])
    assert torch.equal(first["input_ids"], workload.batches()[0]["input_ids"])
    again = workload.build_model()
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)


class Watched(nn.Linear):
    """A model that notes its forwards, and what they find."""

    def __init__(self, name: str, calls: list, fault: Exception | None = None) -> None:
        super().__init__(3, 3)
        self.name, self.calls, self.fault = name, calls, fault

    def forward(self, x):
        if self.fault:
            raise self.fault
        assert self.weight.grad is None
        self.calls.append((self.name, x[0, 0].item(), self.weight._version))
        return super().forward(x)


def trial(mode: str, models: list[Watched], rivals: tuple[str, ...] = (), rounds: int = 3):
    fake = SimpleNamespace(device=CPU, loss=lambda model, batch: model(batch["x"]).square().mean())
    inputs = [{"x": torch.full((2, 3), float(seed))} for seed in range(2)]
    told: list[str] = []
    trials = [Arm(m.name, m, rival=m.name in rivals) for m in models]
    return measure.measure(mode, trials, fake, inputs, rounds, told.append), told


def test_rounds_take_turns_with_the_same_input():
    calls: list = []
    trial("eager", [Watched(name, calls) for name in "ABC"])
    rounds = [call[:2] for call in calls[-9:]]
    assert [name for name, _ in rounds] == list("ABC" + "BCA" + "CAB")
    assert [seed for _, seed in rounds] == [0, 0, 0, 1, 1, 1, 0, 0, 0]


def test_every_pass_finds_a_changed_weight():
    calls: list = []
    model = Watched("A", calls)
    before = model.weight.detach().clone()
    trial("eager", [model])
    versions = [version for _, _, version in calls]
    assert sorted(set(versions)) == versions
    assert 0 < (model.weight - before).abs().max() < 1e-3  # and the optimizer has moved it


def test_state_is_what_an_arm_keeps_between_steps(workload, monkeypatch):
    """Weights and AdamW's two numbers for each that trains; a frozen weight takes a byte."""
    monkeypatch.setattr(arms, "find_spec", lambda name: None)
    model = workload.build_model()
    built = build_arms(model, workload.module, method_factories(["STE", "LRQAT"], 4), {})
    results = measure.measure("eager", built, workload, workload.batches(), 1, lambda text: None)
    whole = sum(p.numel() for p in model.parameters())
    layers = quantized_layers(built[2].model).values()
    weights = sum(layer.weight.numel() for layer in layers)
    factors = sum(
        p.numel() for x in layers for n, p in x.weight_quantizer.named_parameters() if "factor" in n
    )
    scales = sum(layer.weight_quantizer.scale.numel() for layer in layers)
    few = 4 * 200 + 256  # AdamW counts the steps of each parameter; tables of positions
    assert results["FP"]["state_bytes"] == pytest.approx(12 * whole, abs=few)
    assert results["STE"]["state_bytes"] == pytest.approx(12 * whole + 16 * scales, abs=few)
    expected = 12 * (whole - weights + factors) + weights + 20 * scales
    assert results["LRQAT"]["state_bytes"] == pytest.approx(expected, abs=few)


def test_a_fault_is_its_rivals_alone():
    models = [Watched("FP", []), Watched("mine", []), Watched("theirs", [], RuntimeError("late"))]
    results, _ = trial("eager", models, rivals=("theirs",))
    assert results["theirs"] == {"path": None, "failed": "RuntimeError: late"}
    assert len(results["mine"]["step_ms"]) == 3


def test_a_rival_that_breaks_its_graph_leaves_the_others_theirs(workload, monkeypatch):
    monkeypatch.setattr(arms, "find_spec", lambda name: None)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    workload.module.config.num_hidden_layers = 1
    model = workload.build_model()
    rivals = rival_factories(["rivals.py:late"], 4, ["STE"])
    trials = build_arms(model, workload.module, method_factories(["STE"], 4), rivals)
    told: list[str] = []
    results = measure.measure("compiled", trials, workload, workload.batches(), 1, told.append)
    assert results["late"]["failed"] == "RuntimeError: no such kernel"
    assert len(results["STE"]["step_ms"]) == 1
    assert not any("recompiled" in line for line in told)


def test_a_fault_of_our_own_is_not_hidden():
    with pytest.raises(RuntimeError, match="late"):
        trial("eager", [Watched("FP", []), Watched("mine", [], RuntimeError("late"))])


def test_too_little_memory_is_a_row():
    results, _ = trial("eager", [Watched("FP", []), Watched("mine", [], torch.OutOfMemoryError("CUDA"))])
    assert results["mine"]["failed"] == "out of memory"
    assert len(results["FP"]["step_ms"]) == 3
