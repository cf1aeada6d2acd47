"""`stableqat consolidate`: one file from a sharded checkpoint, as the run could have written it.

It needs one process, no GPU, and memory for one copy of what the checkpoint holds, optimizer included.
"""

import os
from pathlib import Path

from stableqat.errors import UserError


def consolidate(checkpoint: str, *, out: str | None = None) -> int:
    """Make one file of a sharded checkpoint, which any strategy resumes and `init_from` takes.

    Args:
        checkpoint: The folder, such as lightning_logs/llama/version_0/checkpoints/last.ckpt.
        out: The file; by default beside the folder, NAME.consolidated.ckpt.

    Returns:
        0.

    Raises:
        UserError: If the folder is no sharded checkpoint or is damaged, or the file exists.
    """
    import torch
    from rich.console import Console

    from stableqat.modules.sharded import is_sharded
    from stableqat.modules.start import check_sums, read_consolidated

    folder = Path(checkpoint)
    if not is_sharded(folder):
        raise UserError(
            f"{folder}: not a sharded checkpoint; name a folder that --trainer.strategy fsdp2 saved"
        )
    target = Path(out) if out is not None else folder.with_name(f"{folder.stem}.consolidated.ckpt")
    if target.exists():
        raise UserError(f"out: {target} exists; choose another name, or remove it")
    check_sums(folder)
    part = target.with_name(f"{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            torch.save(read_consolidated(folder), file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    Console(markup=False, highlight=False, soft_wrap=True).print(
        f"{target}: {target.stat().st_size / 1e9:.2f} GB"
    )
    return 0
