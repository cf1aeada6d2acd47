"""One thread a test process, and no trace of one test in the next: cores and order decide no result."""

import logging
import os
import random
import re
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import pytest
from hypothesis import HealthCheck, settings


def _interpreter_works() -> bool:
    """Triton 3.6, torch 2.11's, cannot read the bounds of a loop with numpy 2.4; 3.9 can."""
    try:
        return tuple(map(int, version("triton").split(".")[:2])) >= (3, 7)
    except PackageNotFoundError:
        return False


os.environ.setdefault("OMP_NUM_THREADS", "1")
if os.environ.get("STABLEQAT_TEST_GPU") != "1":
    # many tests fork, which a process that has used a GPU cannot; `make test-gpu` runs those that need one
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if _interpreter_works():  # Triton reads this once, at its import
        os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # asking it in vain takes half a minute
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's calls, not ours

# how long an example takes says how busy the machine is, not whether the code is right
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


def pytest_configure(config: pytest.Config) -> None:
    # Lightning's, of itself under torch 2.15
    config.addinivalue_line("filterwarnings", "ignore:.*isinstance.treespec, LeafSpec.*")
    logging.getLogger("torch.utils._pytree").setLevel(
        logging.ERROR
    )  # as the command does, and for its reason


# of tests that repeat another in a longer or a second form; `pytest -m slow` runs them
SLOW = (
    "bench/test_decode.py::test_(two_models|the_command)",
    "diagnose/test_diagnose_verb.py::test_(groups|blocks|a_diagnosis_is)",
    "notebooks/test_notebooks.py::test_runs_again.(basin|stability|initialisation)",
    "systems/test_killed_sweeps.py::test_(a_run_that_was_told|two_sweeps)",
    "systems/test_faults.py::test_(kills.6|all_processes_stop_at_one_step.01|a_damaged_last.*(flipped|missing))",
    "systems/test_faults.py::test_a_signal_saves_and_ends_with_143.(SIGUSR1|before|between)",
    "systems/test_launch.py::test_what_one_process_finds_wrong",
    "systems/test_divided_rounding.py::.*lapq",
    "systems/test_clocked_runs.py::test_a_run_with_a_clock_resumes_bit_for_bit.kill",
    "systems/test_gathered_codes.py::test_(it_resumes|the_benchmark|shards_become|codes_train.*binary)",
    "systems/test_processes.py::test_two_processes_measure_the_start_as_one_does.vit",
    "systems/test_kill.py::.*(vit-0|llama-2|terminate)",
    "systems/test_memory.py::.*fsdp2",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", type=int, metavar="SEED", help="files, and their tests, in random order")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files first: a worker that got one last would keep the others waiting."""
    import torch

    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if any(re.match(f"(tests/)?{each}", item.nodeid) for each in SLOW):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: not {"systems", "notebooks"} & {*item.path.parts})
    if (seed := config.getoption("shuffle")) is not None:
        chance = random.Random(seed)
        order = {path: chance.random() for path in dict.fromkeys(item.path for item in items)}
        chance.shuffle(items)
        items.sort(key=lambda item: order[item.path])


@pytest.fixture(autouse=True)
def _nothing_from_another_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seed of a run, the generators' states, and what the command and Lightning make of the loggers."""
    import numpy
    import torch

    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(0)
    for name in list(logging.root.manager.loggerDict):
        if name.partition(".")[0] in ("stableqat", "lightning"):
            logger = logging.getLogger(name)
            logger.handlers.clear()
            logger.setLevel(logging.NOTSET)
            logger.propagate = True


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """One entry, its shape, for each fake-quantized weight that is computed by itself."""
    calls: list[tuple[int, ...]] = []
    for name in ("fake_quantize", "product"):  # the package's attributes are the functions
        seam = import_module(f"stableqat.ops.{name}")
        real = seam.value_of
        monkeypatch.setattr(
            seam, "value_of", lambda *args, it=real: calls.append(args[0].x.shape) or it(*args)
        )
    return calls
