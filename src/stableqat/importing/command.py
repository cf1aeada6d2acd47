"""`stableqat import`: a checkpoint of the released StableQAT or ParetoQ code becomes a run of this suite.

Both keep latent weights and beside them, a row each, `weight_clip_val`. The run deploys what the released
layer computes, weight by weight, in the arithmetic of the checkpoint's type, and goes wherever a run goes: to
`validate`, to `--model.init_from`, to every exact format.
"""

import shutil
from functools import partial
from pathlib import Path
from typing import Any, Literal

from stableqat.errors import UserError
from stableqat.terminal import terminal


def import_(
    checkpoint: str, *, from_: Literal["stableqat", "paretoq"], out: str, bits: int | None = None
) -> int:
    """Makes a run of a checkpoint that the released StableQAT or ParetoQ code has written.

    Args:
        checkpoint: Its folder: config.json beside safetensors or pytorch_model.bin files, sharded or not.
        from_: The code that wrote it: stableqat (its Fourier surrogate, LSQ or DSQ) or paretoq.
        out: New run folder, such as lightning_logs/imported/llama-2bit.
        bits: Bits as the released codes count them, 0 for ternary; not needed where config.json names them
            (w_bits).

    Returns:
        0.
    """
    source, run = Path(checkpoint).expanduser(), Path(out).expanduser()
    if run.exists():
        raise UserError(f"out: {run} exists already; name a new folder")

    from stableqat.importing.checkpoint import read_config, read_state
    from stableqat.importing.released import SHARPNESS, ReleasedLayer, transfer
    from stableqat.modules import LlamaModule
    from stableqat.modules.base import state_dict_follows

    config, extras = read_config(source)
    state = read_state(source)
    dsq = any(name.endswith(f".{SHARPNESS}") for name in state)
    released = ReleasedLayer.read(from_, bits, config, extras, dsq)
    module = LlamaModule(config=config, quantizer=partial(released.method, **released.options))
    with state_dict_follows():
        module.configure_model()
    assert module.model is not None
    moved = transfer(state, module.model, released, str(source))

    part = run.with_name(f".{run.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a call that was killed
    try:
        _write(module, source, run, part)
        part.rename(run)
    except (OSError, RuntimeError) as error:  # torch's writer has only the latter for a full disk
        raise UserError(f"out: {run} cannot be written: {' '.join(str(error).split())}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    say = terminal().print
    say(f"{run}: {moved}")
    say(f"stableqat validate -c {run}/config.yaml --ckpt_path last")
    return 0


def _write(module: Any, source: Path, run: Path, part: Path) -> None:
    """A run as it is before its first step: Lightning finds no optimizer state and begins with none."""
    import lightning as L
    import torch
    import yaml

    hyper_parameters = {**module.hparams, **module.resolved(), "init_from": None}
    (part / "checkpoints").mkdir(parents=True)
    torch.save(
        {
            "epoch": 0,
            "global_step": 0,
            "pytorch-lightning_version": L.__version__,
            "state_dict": module.state_dict(),
            "callbacks": {},
            "optimizer_states": [],
            "lr_schedulers": [],
            module.CHECKPOINT_HYPER_PARAMS_KEY: hyper_parameters,
        },
        part / "checkpoints" / "last.ckpt",
    )
    arguments = {"config": module.resolved()["config"], "skip": list(module.skip)}
    arguments["quantizer"] = hyper_parameters["quantizer"]
    logger = {"save_dir": str(run.parent), "name": "", "version": run.name, "default_hp_metric": False}
    data = {}
    if (source / "tokenizer.json").exists():
        tokenizer = {"tokenizer": str(source.absolute())}
        data = {"data": {"class_path": "stableqat.data.TextDataModule", "init_args": tokenizer}}
    settings = {
        "model": {"class_path": hyper_parameters["_class_path"], "init_args": arguments},
        **data,
        "trainer": {
            "logger": {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": logger}
        },
    }
    (part / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
