"""The layout keeps its promises: imports point one way, and forbidden habits stay out."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "stableqat"
FILES = sorted(SOURCE.rglob("*.py"))

# what each package may import of the project, beside errors and itself
ALLOWED = {
    "errors": set(),
    "terminal": set(),
    "files": set(),
    "shipped": set(),
    "events": set(),
    "refusals": set(),
    "trust": {"refusals"},
    "construct": {"refusals", "trust"},
    "ops": set(),
    "quantizers": {"ops"},
    "layers": {"ops", "quantizers"},
    "surgery": {"layers", "ops", "quantizers"},
    "parameters": {"layers", "quantizers"},
    "api": {"layers", "surgery", "quantizers"},
    "checkpoints": {"trust"},
    "modules": {
        "construct",
        *("callbacks", "checkpoints", "layers", "ops", "parameters", "quantizers", "surgery", "trust"),
    },
    "data": set(),
    "callbacks": {"api", "checkpoints", "evaluate", "layers", "ops", "quantizers", "surgery"},
    "studies": {"checkpoints", "cli", "events", "shipped", "trust"},  # a sweep's points are command lines
    "analysis": {"events", "studies"},
    "importing": {"data", "layers", "modules", "ops", "quantizers", "runs", "surgery"},
    "runs": {"construct", "checkpoints", "data", "modules", "trust"},
    "evaluate": {"checkpoints", "data", "layers", "modules", "runs", "surgery"},
    "export": {"api", "checkpoints", "data", "layers", "modules", "ops", "quantizers", "runs", "surgery"},
    "bench": {
        "construct",
        "analysis",
        "export",
        "layers",
        "modules",
        "ops",
        "quantizers",
        "shipped",
        "surgery",
        "trust",
    },
    "cli": {
        *("analysis", "bench", "callbacks", "checkpoints", "data", "evaluate", "export", "importing"),
        *("construct", "modules", "refusals", "runs", "shipped", "studies", "trust"),
    },
    "__init__": {"api", "callbacks", "surgery"},
}
# third-party packages that a part of the project must not know
FOREIGN = {
    "ops": {"lightning", "transformers", "timm", "datasets", "numpy", "tensorboard"},
    "quantizers": {"lightning", "transformers", "timm", "datasets"},
    "layers": {"lightning", "transformers", "timm", "datasets"},
    "surgery": {"lightning", "transformers", "timm", "datasets"},
    "api": {"lightning", "transformers", "timm", "datasets"},
    "data": {"stableqat.quantizers"},
    "bench": {"construct", "lightning", "transformers", "timm", "datasets"},
    "events": {"lightning", "transformers", "timm", "datasets", "torch"},
    "analysis": {"lightning", "transformers", "timm", "datasets", "torch"},
    "studies": {"lightning", "transformers", "timm", "datasets", "torch"},
}


def part(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
            if node.module == "stableqat":
                names.update(f"stableqat.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_one_way(path: Path) -> None:
    own = {name.split(".")[1] for name in imported(path) if name.startswith("stableqat.")}
    surplus = own - {"errors", "terminal", "files", part(path)} - ALLOWED[part(path)]
    assert not surplus, f"{path.name} imports {sorted(surplus)}"
    foreign = {name.split(".")[0] for name in imported(path)} & FOREIGN.get(part(path), set())
    assert not foreign, f"{path.name} imports {sorted(foreign)}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_forbidden_habits(path: Path) -> None:
    text, tree = path.read_text(), ast.parse(path.read_text())
    assert path.stem not in {"utils", "helpers", "common", "misc"}
    assert text.isascii(), "sources are ASCII"
    assert ast.get_docstring(tree), "a module says what it is for"
    assert "weights_only=False" not in text
    assert "import pickle" not in text
    assert "trust_remote_code=True" not in text
    for node in ast.walk(tree):
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), "bare except"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr != "cuda", "where a tensor lives is not for the library to say"
            if re.fullmatch(r"Auto\w+\.from_\w+", ast.unparse(node.func)):
                named = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert named.get("trust_remote_code") == "False", "a model folder's own code is never run"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and part(path) != "cli":
            assert node.func.id != "print", "the library logs, the command line prints"


def test_every_published_name_resolves() -> None:
    import stableqat

    for name in stableqat.__all__:
        assert getattr(stableqat, name).__name__ == name
    with pytest.raises(AttributeError):
        _ = stableqat.nothing
