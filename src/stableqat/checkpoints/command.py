"""`stableqat consolidate`: one file from a sharded checkpoint, as the run could have written it.

It needs one process, no GPU, and memory for one copy of what the checkpoint holds, optimizer included.
"""

from pathlib import Path

from stableqat.checkpoints.names import is_sharded
from stableqat.errors import UserError
from stableqat.files import whole_file, writing
from stableqat.terminal import terminal


def consolidate(checkpoint: str, *, out: str | None = None) -> int:
    """Make one file of a sharded checkpoint, which any strategy resumes and `init_from` takes.

    Args:
        checkpoint: The folder, such as lightning_logs/llama/version_0/checkpoints/last.ckpt.
        out: The file; by default beside the folder, NAME.consolidated.ckpt.

    Returns:
        0.

    Raises:
        UserError: If the folder is no sharded checkpoint or damaged, or the file exists or cannot be written.
    """
    if not Path(checkpoint).exists():
        raise UserError(f"{checkpoint}: there is no such checkpoint; name a folder that fsdp2 saved")
    from stableqat.checkpoints.read import check_sums, read_consolidated
    from stableqat.checkpoints.write import StreamedCheckpointIO

    folder = Path(checkpoint)
    if not is_sharded(folder):
        raise UserError(
            f"{folder}: not a sharded checkpoint; name a folder that --trainer.strategy fsdp2 saved"
        )
    target = Path(out) if out is not None else folder.with_name(f"{folder.stem}.consolidated.ckpt")
    if target.exists():
        raise UserError(f"out: {target} exists; choose another name, or remove it")
    check_sums(folder)
    merged = read_consolidated(folder)
    with writing(f"out: {target}", "make room, or name another place"), whole_file(target) as part:
        StreamedCheckpointIO().save_checkpoint(merged, part)
    terminal().print(f"{target}: {target.stat().st_size / 1e9:.2f} GB")
    return 0
