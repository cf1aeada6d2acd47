"""`stableqat import`: a checkpoint of the released StableQAT or ParetoQ code becomes a run of this suite.

Both keep latent weights and beside them, a row each, `weight_clip_val`. The run deploys what the released
layer computes, weight by weight, in the arithmetic of the checkpoint's type, and goes wherever a run goes: to
`validate`, to `--model.init_from`, to every exact format.
"""

import logging
from functools import partial
from pathlib import Path
from typing import Any, Literal

from stableqat.errors import UserError
from stableqat.files import new_folder, writing
from stableqat.terminal import terminal

logger = logging.getLogger(__name__)


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
    if not (Path(checkpoint).expanduser() / "config.json").is_file():
        raise UserError(f"checkpoint: {checkpoint} has no config.json; name the folder that the code saved")
    # torch is heavy; a misspelt name does without it
    from stableqat.importing.checkpoint import check_sizes, read_config, read_state
    from stableqat.importing.released import SHARPNESS, ReleasedLayer, check_computes, transfer
    from stableqat.modules.start import state_dict_follows
    from stableqat.runs import write_run

    source, run = Path(checkpoint).expanduser(), Path(out).expanduser()
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
    say = terminal().print
    say(f"{run}: {moved}")
    say(f"stableqat validate -c {run}/config.yaml --ckpt_path last")
    return 0


def _module(config: dict[str, Any], released: Any, source: Path) -> Any:
    from stableqat.modules import LlamaModule

    try:
        return LlamaModule(config=config, quantizer=partial(released.method, **released.options))
    except UserError:
        raise
    except Exception as error:  # transformers fails in many ways over values that it has not checked
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{source}/config.json: transformers cannot build this model ({reason})") from error


def _tokenizer(source: Path) -> Any:
    """The tokenizer of a folder; None without one, or with one that cannot be read."""
    if not (source / "tokenizer.json").exists():
        return None
    from stableqat.data.tokenizer import load_tokenizer

    try:
        return load_tokenizer(str(source))
    except UserError as error:
        logger.warning("the run has no tokenizer: %s", error)
        return None
