"""FSDP2 that gathers codes trains as FSDP2 that gathers weights, and as one process (gloo).

In float32 the first loss is the same bit for bit. Later ones follow from gradients summed in another order,
after which a code may flip in one run and not in the other.
"""

from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from statistics import median

import forked
import pytest
import torch
from test_kill import differing
from test_processes import arguments, probe
from torch import Tensor, nn
from torch import distributed as dist

import tiny
from stableqat.bench.architecture import Architecture
from stableqat.bench.gather import Counting, Settings, markdown, measure
from stableqat.checkpoints.sharded import read_whole
from stableqat.events import read_run
from stableqat.layers.full_precision import full_precision
from stableqat.layers.gathered import gathered_weights, pull_back
from stableqat.layers.linear import QuantLinear
from stableqat.modules.clipping import clip_gradients
from stableqat.modules.parallel import shard
from stableqat.parameters import parameter_groups
from stableqat.quantizers import DSQ, STE, ParetoQ, StableQAT

CLIP = 0.5
QUANTIZERS = {
    "binary": partial(StableQAT, bits=1),
    "2 bits": partial(StableQAT, bits=2),
    "3 bits": partial(ParetoQ, bits=3),
    "4 bits": partial(STE, bits=4),
    "8 bits": partial(STE, bits=8),
    "groups": partial(StableQAT, bits=2, group_size=8),
    "a learned surrogate": partial(DSQ, bits=2),
    "the head too": partial(StableQAT, bits=2),
}


CASES: dict[str, tuple] = {name: (name,) for name in QUANTIZERS} | {
    "accumulated": ("a learned surrogate", 2),
    "everything": ("the head too", 2, True, True),
}


def train(codes: bool, name: str, windows: int = 1, bf16: bool = False, checkpointing: bool = False) -> dict:
    """Three steps of a tiny model on six rows a micro-batch."""
    processes = dist.get_world_size()
    skip = () if name == "the head too" else ("lm_head",)
    module = tiny.configured(
        "llama", quantizer=QUANTIZERS[name], skip=skip, activation_checkpointing=checkpointing
    )
    model, kind = module.model, torch.bfloat16 if bf16 else torch.float32
    mesh = dist.init_device_mesh("cpu", (processes, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    shard(model, module.blocks(model), mesh, kind if codes else None)
    assert bool(gathered_weights(model)) == codes
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    found: dict = {"losses": [], "norms": []}
    context = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
    for step in range(3):
        for window in range(windows):
            first = (step * windows + window) * 6
            rows = range(first + dist.get_rank(), first + 6, processes)
            ids = torch.stack([tiny.tokens(row) for row in rows])
            with context:
                loss = model(input_ids=ids, labels=ids).loss / windows
            loss.backward()
            dist.all_reduce(mean := loss.detach())
            found["losses"].append(mean.item() / processes)
        pull_back(gathered_weights(model))
        if not step:
            grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            found["gradients"] = {name: grad.full_tensor().clone() for name, grad in grads.items()}
        found["norms"].append(clip_gradients(optimizer, CLIP, by_norm=True).item())
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad(), context:
        found["evaluated"] = model(input_ids=tiny.tokens(1)[None]).logits
        with full_precision(model):
            found["latent"] = model(input_ids=tiny.tokens(1)[None]).logits
    return found


def train_all(path: Path, cases: list[tuple]) -> None:
    torch.set_num_threads(1)
    found = {str(case): train(*case) for case in cases}
    if not dist.get_rank():
        torch.save(found, path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What happened in a case, gathering codes or weights, on 1, 2 or 3 processes."""
    folder = tmp_path_factory.mktemp("gathered")

    @cache
    def made(processes: int) -> dict:
        names = CASES if processes == 2 else ("2 bits",)
        cases = [(codes, *CASES[name]) for codes in (False, True) for name in names]
        path = folder / f"{processes}.pt"
        forked.call(train_all, path, cases, log=folder / "log", processes=processes)
        return torch.load(path, weights_only=True)

    return lambda codes, name, processes=2: made(processes)[str((codes, *CASES[name]))]


def agree(one, two, rel):
    assert one["gradients"].keys() == two["gradients"].keys()
    for name, gradient in one["gradients"].items():
        assert (two["gradients"][name] - gradient).norm() <= rel * gradient.norm(), name
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-2)
    assert two["norms"] == pytest.approx(one["norms"], rel=0.1)
    assert two["norms"][0] == pytest.approx(one["norms"][0], rel=rel)


@pytest.mark.parametrize("name", CASES)
def test_codes_train_as_weights_do(name, trained):
    one, two = trained(False, name), trained(True, name)
    assert two["losses"][0] == one["losses"][0]
    agree(one, two, 1e-2 if name == "everything" else 2e-6)  # which adds bfloat16 gradients
    for what in ("evaluated", "latent"):
        assert (two[what] - one[what]).norm() <= 0.05 * one[what].norm()
    assert (one["latent"] - one["evaluated"]).norm() > 0.01 * one["latent"].norm()


def test_rows_that_processes_cannot_share_alike(trained):
    one, two = trained(False, "2 bits", 3), trained(True, "2 bits", 3)
    assert two["losses"][0] == one["losses"][0]
    agree(one, two, 2e-6)
    agree(trained(True, "2 bits", 1), two, 2e-6)


def gather_once(codes: bool, bits: int) -> tuple[int, Tensor]:
    """Bytes of a gather of 64 rows with 2048 inputs, and the layer's output."""
    torch.manual_seed(0)
    linear = nn.Linear(2048, 64, bias=False)
    model = nn.Sequential(QuantLinear.from_linear(linear, STE(linear.weight, bits=bits)))
    mesh = dist.init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    shard(model, [], mesh, torch.bfloat16 if codes else None)
    model.set_custom_all_gather(counting := Counting())
    with torch.autocast("cpu", torch.bfloat16):
        output = model(torch.ones(1, 2048))
    return counting.gathered, output.detach()


def gather_all(path: Path) -> None:
    found = {bits: [gather_once(codes, bits) for codes in (False, True)] for bits in (1, 2, 4, 8)}
    if not dist.get_rank():
        torch.save(found, path)


def test_bytes_of_a_gather(tmp_path):
    forked.call(gather_all, tmp_path / "found.pt", log=tmp_path / "log", processes=2)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for bits, ((weights, expected), (codes, output)) in found.items():
        assert codes == 64 * 2048 * bits // 8 + 64 * 4
        assert weights == 64 * 2048 * 4 + 2 * 64 * 4
        assert torch.equal(output, expected)
    assert found[2][1][0] <= found[2][0][0] / 14


def bench_all(path: Path) -> None:
    torch.set_num_threads(1)
    architecture = Architecture("tiny", Path("tiny.yaml"), "LlamaModule", {"config": tiny.LLAMA})
    settings = Settings(architecture, 2, 16, "32-true", ("STE", partial(STE, bits=2)), 2, 2, "cpu")
    found = measure(settings, torch.device("cpu"))
    if not dist.get_rank():
        torch.save(found, path)


@pytest.mark.slow
def test_the_benchmark_of_gathers(tmp_path):
    forked.call(bench_all, tmp_path / "found.pt", log=tmp_path / "log", processes=2)
    arms = torch.load(tmp_path / "found.pt", weights_only=True)
    assert not any("failed" in arm for name, arm in arms.items() if "torchao" not in name)
    by_codes, weights = arms["STE, codes"], arms["STE, float32"]
    assert by_codes["losses"][0] == weights["losses"][0] != arms["FP, float32"]["losses"][0]
    assert by_codes["losses"] == pytest.approx(weights["losses"], rel=1e-4)
    sent = {name: arm["gathered_bytes"] for name, arm in arms.items() if "failed" not in arm}
    assert sent["STE, codes"] < sent["FP, bfloat16"] < sent["FP, float32"] < sent["STE, float32"]
    assert {len(arm["step_ms"]) for arm in arms.values() if "failed" not in arm} == {2}
    settings = {"model": "tiny", "processes": 2, "bits": 2, "rounds": 2}
    told = {"command": "stableqat bench", "device": "cpu", "date": "today", "versions": {}, "seeds": [0]}
    table = markdown({"settings": settings, "arms": arms, **told})
    assert f"| STE, codes | {median(by_codes['step_ms']):.1f} (" in table
    assert f" | {sent['STE, codes'] / sent['STE, float32']:.3f} | " in table


class Runs:
    """Runs of the command."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.probed = cache(self._probed)

    def _probed(self, version: str, *more: str) -> dict:
        """Six steps of two micro-batches; the checkpoint of the third is kept."""
        result = self.folder / f"{version}.pt"
        flags = {"trainer__max_steps": 6, "trainer__val_check_interval": 6}
        argv = arguments("llama", self.folder, version, "fsdp2", **flags)
        argv[argv.index("--trainer.strategy") + 1] = "stableqat.modules.FSDP2Strategy"
        argv += ["--trainer.strategy.gather", version.split()[0], "--trainer.accumulate_grad_batches", "2"]
        argv += [*probe(result), "--trainer.callbacks.keep_at", "-1" if more else "4", *more]
        forked.succeed(argv, self.folder / "log", 2)
        return torch.load(result, weights_only=True)

    def at(self, version: str) -> Path:
        return self.folder / "llama" / version / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("gathered-runs"))


def test_a_run_that_gathers_codes(runs):
    one, two = runs.probed("weights"), runs.probed("codes")
    assert two["sharded"]
    assert two["losses"][:2] == one["losses"][:2]
    agree({"norms": [1], **one}, {"norms": [1], **two}, 2e-6)
    assert two["clipped_norms"] == pytest.approx(one["clipped_norms"], rel=1e-4)
    started = [read_run(runs.folder / "llama" / each, ("hp/loss_",)) for each in ("weights", "codes")]
    for which in ("fp", "ptq"):
        assert started[1].last(f"hp/loss_{which}") == started[0].last(f"hp/loss_{which}")


def test_its_checkpoint_is_that_of_a_run_that_gathers_weights(runs):
    """The same entries in the same order, of equal values up to what its steps rounded otherwise."""
    files = []
    for version in ("weights", "codes"):
        runs.probed(version)
        files.append(torch.load(runs.at(version), weights_only=True))
    one, two = files
    assert list(one["state_dict"]) == list(two["state_dict"])
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, atol=2e-3, rtol=0)
    rounded = ("/optimizer_states/", "/state_dict/", "/callbacks/DivergenceGuard/average")  # of the losses
    assert not [key for key in differing(one, two) if not key.startswith(rounded)]


@pytest.mark.slow
def test_it_resumes_what_the_other_saved(runs):
    straight = runs.probed("weights")["losses"]
    for start, version in (("weights", "codes after weights"), ("codes", "weights after codes")):
        runs.probed(start)
        resumed = runs.probed(version, "--ckpt_path", str(runs.folder / f"{start}.ckpt"))["losses"]
        assert resumed[:2] == pytest.approx(straight[6:8], rel=1e-5)
        assert resumed == pytest.approx(straight[6:], abs=1e-2)


@pytest.mark.slow
def test_shards_become_the_one_file(runs):
    runs.probed("codes")
    runs.probed("codes in shards", "--trainer.strategy.save_distributed_checkpoint", "true")
    whole, file = read_whole(runs.at("codes in shards")), torch.load(runs.at("codes"), weights_only=True)
    assert not list(differing(file["state_dict"], whole["state_dict"]))
