"""The layout keeps its promises: imports point one way, and forbidden habits stay out."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "stableqat"
FILES = sorted(SOURCE.rglob("*.py"))

# what each part imports of the project, beside errors, terminal, files and itself; no arrow points upward
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
    "surgery": {"layers", "quantizers"},
    "kinds": {"layers", "quantizers", "surgery"},
    "parameters": {"layers", "quantizers"},
    "api": {"layers", "quantizers", "surgery"},
    "clock": {"layers", "quantizers"},
    "data": set(),
    "landscape": {
        *("analysis", "checkpoints", "evaluate", "events", "layers", "modules", "quantizers", "runs"),
    },
    "checkpoints": {"trust"},
    "callbacks": {
        "api",
        "checkpoints",
        "clock",
        "evaluate",
        "landscape",
        "layers",
        "ops",
        "quantizers",
        "surgery",
    },
    "modules": {
        *("callbacks", "checkpoints", "construct", "kinds", "layers", "ops", "parameters", "quantizers"),
        "surgery",
    },
    "runs": {"checkpoints", "construct", "data", "modules", "trust"},
    "model_folder": {"api", "layers", "ops", "quantizers"},
    "evaluate": {"checkpoints", "data", "kinds", "layers", "model_folder", "modules", "runs"},
    "predict": {"data", "evaluate"},
    "export": {"api", "data", "kinds", "layers", "model_folder", "modules", "ops", "quantizers", "runs"},
    "importing": {"data", "layers", "modules", "ops", "quantizers", "runs"},
    "ptq": {"data", "evaluate", "layers", "modules", "ops", "quantizers", "runs"},
    "diagnose": {"evaluate", "landscape", "layers", "modules", "ptq", "quantizers", "surgery"},
    "bench": {"analysis", "construct", "evaluate", "export", "layers", "modules", "quantizers", "shipped"},
    "analysis": {"checkpoints", "events", "studies"},
    "studies": {"checkpoints", "cli", "events", "shipped", "trust"},  # a sweep's points are command lines
    "cli": {
        *("callbacks", "checkpoints", "construct", "data", "modules", "quantizers", "refusals", "runs"),
        *("shipped", "trust"),
    },
    "__init__": set(),
}
# third-party packages that a part of the project must not know
FOREIGN = {
    "ops": {"lightning", "transformers", "timm", "datasets", "numpy", "tensorboard"},
    "quantizers": {"lightning", "transformers", "timm", "datasets"},
    "layers": {"lightning", "transformers", "timm", "datasets"},
    "surgery": {"lightning", "transformers", "timm", "datasets"},
    "kinds": {"lightning", "transformers", "timm", "datasets"},
    "api": {"lightning", "transformers", "timm", "datasets"},
    "clock": {"lightning", "transformers", "timm", "datasets"},
    "data": {"stableqat.quantizers"},
    "landscape": {"transformers", "timm", "datasets"},
    "bench": {"construct", "lightning", "transformers", "timm", "datasets"},
    "events": {"lightning", "transformers", "timm", "datasets", "torch"},
    "analysis": {"lightning", "transformers", "timm", "datasets", "torch"},
    "studies": {"lightning", "transformers", "timm", "datasets", "torch"},
}


LONGEST = 400  # lines of a file
# what a module keeps beside constants, and why
STATE = {
    "data/image.py": {"_READ"},  # a context variable: one command's modules share what one has read
    "data/prepare/encode.py": {"_work"},  # of a worker process, which is told once what to do
    "modules/start.py": {"_STATE_DICT_FOLLOWS"},  # a context variable: who loads says so to who builds
}


def part(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(parsed(path)):
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
    text, tree = path.read_text(), parsed(path)
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


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_file_is_short_and_keeps_no_state(path: Path) -> None:
    text, name = path.read_text(), path.relative_to(SOURCE).as_posix()
    assert len(text.splitlines()) <= LONGEST
    assert path.name == "errors.py" or "difflib" not in text
    tree = parsed(path)
    state = {each for node in ast.walk(tree) if isinstance(node, ast.Global) for each in node.names}
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {ast.unparse(target) for target in targets}
            constant = names == {"__all__"} or all(map(str.isupper, names))
            state |= names if is_mutable(node.value, constant) else set()
    assert state == STATE.get(name, set())
    classes = r"\b(Surrogate|Identity|Fourier|Tanh|Constant|Permuted)\b"
    asked = [ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Call) and len(n.args) == 2]
    assert not [each for each in asked if each.startswith("isinstance(") and re.search(classes, each)]


def is_mutable(value: ast.expr, constant: bool) -> bool:
    """Whether an expression makes what a program changes: of a constant's, what begins empty."""
    if isinstance(value, ast.Call):
        kinds = {"ContextVar", "OrderedDict", "WeakKeyDictionary", "WeakValueDictionary", "defaultdict"}
        kinds |= {"dict", "list", "set"} if not (constant and value.args) else set()
        return ast.unparse(value.func).rpartition(".")[2] in kinds
    if isinstance(value, ast.Dict):
        return not (constant and value.keys)
    if isinstance(value, ast.List | ast.Set):
        return not (constant and value.elts)
    return isinstance(value, ast.DictComp | ast.ListComp | ast.SetComp) and not constant


def test_the_map_of_imports_holds_no_arrow_that_is_gone() -> None:
    real: dict[str, set[str]] = {}
    for path in FILES:
        names = {name.split(".")[1] for name in imported(path) if name.startswith("stableqat.")}
        real.setdefault(part(path), set()).update(names)
    assert not {name: kept - real[name] for name, kept in ALLOWED.items() if kept - real[name]}


def test_every_published_name_resolves() -> None:
    import stableqat

    for name in stableqat.__all__:
        assert getattr(stableqat, name).__name__ == name
    with pytest.raises(AttributeError):
        _ = stableqat.nothing
