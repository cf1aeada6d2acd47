"""One thread a test process, and no trace of one test in the next: cores and order decide no result."""

import gc
import logging
import os
import random
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
os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # read once, at the import, as is the next
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
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


# folders and files that take longest
FIRST = ("systems", "notebooks", "test_configs.py", "cli", "export", "callbacks", "data")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", type=int, metavar="SEED", help="files, and their tests, in random order")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files first: a worker that got one last would keep the others waiting."""
    import torch

    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    items.sort(
        key=lambda item: next((at for at, name in enumerate(FIRST) if name in item.path.parts), len(FIRST))
    )
    if (seed := config.getoption("shuffle")) is not None:
        chance = random.Random(seed)
        order = {path: chance.random() for path in dict.fromkeys(item.path for item in items)}
        chance.shuffle(items)
        items.sort(key=lambda item: order[item.path])


def pytest_collection_finish() -> None:
    """What the imports made stays; looking for garbage in it takes a tenth of the time."""
    gc.collect()
    gc.freeze()


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
            logger.propagate = True
            if logger.level:  # setting it empties a cache of every logger there is
                logger.setLevel(logging.NOTSET)


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
