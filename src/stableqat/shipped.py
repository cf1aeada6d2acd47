"""The shipped configurations, and which file a name means.

`llama/base`, `llama/base.yaml` and `configs/llama/base.yaml` name a file of the current folder if it exists,
and the shipped configuration otherwise.
"""

from pathlib import Path

from stableqat.errors import UserError, did_you_mean

SHIPPED = Path(__file__).with_name("configs")


def shipped_names() -> list[str]:
    """The names of all shipped configurations, such as llama/base."""
    return sorted(path.relative_to(SHIPPED).with_suffix("").as_posix() for path in SHIPPED.rglob("*.yaml"))


def shipped_config(name: str) -> Path | None:
    """The shipped configuration of a name; None if there is none."""
    stem = name.removeprefix("configs/").removesuffix(".yaml")
    return SHIPPED / f"{stem}.yaml" if stem in shipped_names() else None


def find_config(name: str) -> Path:
    """The file that a name means.

    Args:
        name: A path, or the name of a shipped configuration; both with or without `.yaml`.

    Raises:
        UserError: If there is neither.
    """
    for path in (Path(name).expanduser(), Path(f"{name}.yaml").expanduser()):
        if path.is_file():
            return path
        if path.exists() and not path.is_dir():
            raise UserError(
                f"{name}: a pipe, which can be read only once, and settings are read more often; write them "
                "to a file"
            )
    if shipped := shipped_config(name):
        return shipped
    names = shipped_names()
    stem = name.removesuffix(".yaml")
    if same := [each for each in names if each.endswith(f"/{stem}")]:
        hint = f"did you mean {', '.join(same)}?"
    else:
        hint = did_you_mean(stem, names, "stableqat fit --help lists the shipped ones")
    raise UserError(f"{name}: there is no such file, and no shipped configuration of this name; {hint}")
