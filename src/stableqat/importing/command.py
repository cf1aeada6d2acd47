"""`stableqat import`: turns a checkpoint of the released StableQAT or ParetoQ code into a run of this suite.

Both codes save latent weights and, one per row, `weight_clip_val`. The run deploys what the released layer
computes, weight by weight, in the arithmetic of the checkpoint's type. Like any run, it works with
`validate`, `--model.init_from` and every exact format.
"""

import logging
from functools import partial
from pathlib import Path
from typing import Any, Literal

from stableqat.errors import UserError, one_line
from stableqat.files import new_folder, writing
from stableqat.terminal import terminal

logger = logging.getLogger(__name__)


def import_(
    checkpoint: str, *, from_: Literal["stableqat", "paretoq"], out: str, bits: int | None = None
) -> int:
    """Makes a run from a checkpoint that the released StableQAT or ParetoQ code wrote.

    Args:
        checkpoint: Its folder: config.json beside safetensors or pytorch_model.bin files, sharded or not.
        from_: The code that wrote it: stableqat (its Fourier surrogate, LSQ or DSQ) or paretoq.
        out: New run folder, such as lightning_logs/imported/llama-2bit.
        bits: Bits as the released codes count them, 0 for ternary. Default: w_bits in config.json.

    Returns:
        0.
    """
    source, run = Path(checkpoint).expanduser(), Path(out).expanduser()
    if not (source / "config.json").is_file():
        raise UserError(f"checkpoint: {checkpoint} has no config.json; name the folder that the code saved")
    # torch is slow to import; a misspelt name is refused without it
    from stableqat.importing.checkpoint import check_sizes, read_config, read_state
    from stableqat.importing.released import SHARPNESS, ReleasedLayer, check_computes, transfer
    from stableqat.modules.start import state_dict_follows
    from stableqat.runs import write_run

    with new_folder(out) as part:
        config, extras = read_config(source)
        state = read_state(source)
        check_sizes(config, state, str(source))
        dsq = any(name.endswith(f".{SHARPNESS}") for name in state)
        released = ReleasedLayer.read(from_, bits, config, extras, dsq)
        module = _module(config, released, source)
        with state_dict_follows():
            module.configure_model()
        assert module.model is not None
        moved = transfer(state, module.model, released, str(source))
        check_computes(module.eval(), str(source))
        with writing(f"out: {out}", "nothing is left of it, name another folder"):
            write_run(part, module, place=run, tokenizer=_tokenizer(source))
    terminal().print(f"{run}: {moved}\nstableqat validate -c {run}/config.yaml --ckpt_path last")
    return 0


def _module(config: dict[str, Any], released: Any, source: Path) -> Any:
    from stableqat.modules import LlamaModule

    try:
        return LlamaModule(config=config, quantizer=partial(released.method, **released.options))
    except UserError:
        raise
    except Exception as error:  # transformers fails in many ways on values that it does not check
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{source}/config.json: transformers cannot build this model ({reason})") from error


def _tokenizer(source: Path) -> Any:
    """Load a folder's tokenizer; None if it has none, or one that cannot be read."""
    if not (source / "tokenizer.json").exists():
        return None
    from stableqat.data.tokenizer import load_tokenizer

    try:
        return load_tokenizer(str(source))
    except UserError as error:
        logger.warning("the run gets no tokenizer: %s", error)
        return None
