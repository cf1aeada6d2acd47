"""`stableqat consolidate`: merges a sharded checkpoint into one file, as the run could have written it.

It needs one process, no GPU, and memory for one copy of what the checkpoint holds, optimizer included.
"""

import shlex
from pathlib import Path

from stableqat.checkpoints.names import consolidated, find_checkpoint, is_sharded
from stableqat.errors import UserError
from stableqat.files import whole_file, writing
from stableqat.terminal import size, terminal


def consolidate(checkpoint: str, *, out: str | None = None) -> int:
    """Merges a sharded checkpoint into one file, which any strategy resumes and `init_from` takes.

    Args:
        checkpoint: The folder, such as lightning_logs/llama/version_0/checkpoints/last.ckpt.
        out: The file. Default: NAME.consolidated.ckpt beside the folder.

    Returns:
        0.

    Raises:
        UserError: If the folder is not a sharded checkpoint or is damaged, or the file exists or cannot be
            written.
    """
    folder = Path(checkpoint)
    if not is_sharded(folder):
        raise UserError(_refusal(checkpoint))
    from stableqat.checkpoints.read import check_sums, read_checkpoint
    from stableqat.checkpoints.write import StreamedCheckpointIO

    target = Path(out) if out is not None else consolidated(folder)
    if target.exists():
        merged = "use it as it is, or " if out is None else ""
        raise UserError(f"out: {target} exists already; {merged}name a new file with --out")
    check_sums(folder)
    content = read_checkpoint(folder, optimizers=True)
    with writing(f"out: {target}", "make room, or name another place"), whole_file(target) as part:
        StreamedCheckpointIO().save_checkpoint(content, part)
    terminal().print(f"{target}: {size(target.stat().st_size)}")
    return 0


def _refusal(source: str) -> str:
    """What a path is that is no sharded checkpoint, and what to type instead."""
    found = find_checkpoint(source)
    if found is None:
        return f"{source}: not a sharded checkpoint; name a folder that --trainer.strategy fsdp2 saved"
    if not is_sharded(found):
        return f"{found}: not a sharded checkpoint, but one file already; use it as it is"
    return f"{source}: a run's folder; name a checkpoint: stableqat consolidate {shlex.quote(str(found))}"
