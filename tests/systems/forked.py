"""Run the command in processes of its own, without paying seconds of imports for each.

A fork server imports the suite once; every process is a fresh fork of it, so it can be killed,
and several can be the ranks of one run, as a launcher such as torchrun starts them.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
PRELOAD = [
    "stableqat.cli.lightning",
    "stableqat.data",
    "datasets",
    "timm",
    "omegaconf",
    "scipy.io",
    "sklearn.datasets",
    "tensorboard.plugins.hparams.api_pb2",
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
    "parsed",
]
SECONDS = 600


def command(argv: list[str], log: Path, processes: int = 1) -> list[int]:
    """Exit codes of `stableqat ARGV` in each process; they print to `log`, further ranks to `log.1` and on.

    A process that a signal ended has the signal's negative number.
    """
    return _codes(_run, (argv,), log, processes)


def call(function: Callable[..., None], *arguments: Any, log: Path, processes: int) -> None:
    """Call a function of a test module in processes of one group (gloo)."""
    codes = _codes(_call, (function, arguments), log, processes)
    assert not any(codes), f"{function.__name__} ended with {codes}:\n{log.read_text()[-4000:]}"


def _codes(target: Callable[..., None], arguments: tuple[Any, ...], log: Path, processes: int) -> list[int]:
    address = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(processes),
    }
    _serve()
    started = []
    for rank in range(processes):
        alone = processes == 1 and target is _run  # as a user starts it
        environment = {} if alone else {**address, "LOCAL_RANK": str(rank)}
        output = Path(f"{log}.{rank}") if rank else log
        process = SERVER.Process(target=target, args=(*arguments, environment, str(output)))
        process.start()
        started.append(process)
    deadline = time.monotonic() + SECONDS
    while any(p.exitcode is None for p in started) and time.monotonic() < deadline:
        # when one rank fails, the others would wait for it for good
        for process in started:
            if process.exitcode:
                deadline = min(deadline, time.monotonic() + 5)
            process.join(0.05)
    for process in started:
        if process.exitcode is None:
            process.kill()
            process.join()
    return [process.exitcode for process in started]


def succeed(argv: list[str], log: Path, processes: int = 1) -> None:
    codes = command(argv, log, processes)
    assert not any(codes), f"{' '.join(argv)} ended with {codes}:\n{log.read_text()[-4000:]}"


def _serve() -> None:
    """Python has one fork server; that of another test module (a sweep's) may have imported nothing."""
    if forkserver._forkserver._preload_modules is not PRELOAD:
        forkserver._forkserver._stop()
        forkserver._forkserver._preload_modules = PRELOAD


def _run(argv: list[str], environment: dict[str, str], log: str) -> None:
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # of the loaders' workers
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which tests in the background lack
    _print_to(log)
    from stableqat.cli.main import main

    sys.exit(main(argv))


def _call(
    function: Callable[..., None], arguments: tuple[Any, ...], environment: dict[str, str], log: str
) -> None:
    os.environ.update(environment, RANK=environment["LOCAL_RANK"])
    _print_to(log)
    from torch import distributed as dist

    dist.init_process_group("gloo")
    function(*arguments)
    dist.destroy_process_group()


def _print_to(log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
