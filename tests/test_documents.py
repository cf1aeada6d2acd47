"""Every page: links and anchors lead somewhere, paths exist, command lines parse."""

import functools
import re
import shlex
from contextlib import suppress
from importlib import import_module
from inspect import signature
from keyword import iskeyword
from pathlib import Path
from typing import NamedTuple

import pytest
from lightning import Trainer

from stableqat import callbacks, data, modules
from stableqat.cli import lightning
from stableqat.cli.main import RUN_VERBS, TOOL_VERBS, main
from stableqat.shipped import shipped_config

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
GUIDES = [ROOT / "README.md", *DOCS]
PAGES = [*GUIDES, ROOT / "CHANGELOG.md"]
VERB = "|".join([*RUN_VERBS, *TOOL_VERBS])
SCRIPT = "-c llama/base -c llama/fsdp"  # what slurm.sh adds
FENCE = re.compile(r"(?ms)^```(\w*)\n(.*?)^```$")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def targets(page: Path) -> list[str]:
    """What links and pictures of a page point to."""
    text = FENCE.sub("", page.read_text())
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'<img[^>]* src="([^"]+)"', text)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for title in re.findall(r"(?m)^#+ (.+)$", FENCE.sub("", page.read_text())):
        words = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower())
        slug, number = words.replace(" ", "-"), 0
        while (each := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(each)
    return found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_anchors_lead_somewhere(page):
    lost = []
    for target in targets(page):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            lost.append(target)
    assert not lost


@pytest.mark.parametrize("page", GUIDES, ids=name)
def test_paths_that_a_page_names_exist(page):
    folders = "configs|src|tests|docs|notebooks|lightning_logs/published"
    text = FENCE.sub("", page.read_text())
    named = set(re.findall(rf"[`\s]((?:{folders})/[\w./*-]*\w(?:\.\w+)?)`", text))
    assert not [each for each in named if not list(ROOT.glob(each))]


def test_the_index_names_every_page():
    assert set(targets(ROOT / "docs" / "README.md")) == {page.name for page in DOCS} - {"README.md"}


def test_readme_is_one_page_and_the_only_guide_at_the_top():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110
    assert {path.name for path in ROOT.glob("*.md")} == {"README.md", "CHANGELOG.md"}


# -- command lines ------------------------------------------------------------------------------


class Command(NamedTuple):
    """A quoted command line, from its verb on."""

    page: str
    line: str


def commands() -> list[Command]:
    found = {}
    for page in PAGES:
        for language, block in FENCE.findall(page.read_text()):
            if language in ("python", "yaml", "math"):
                continue
            for line in block.replace("\\\n", " ").splitlines():
                line = re.sub(
                    r"^sbatch configs/llama/slurm.sh", f"stableqat fit {SCRIPT}", line.removeprefix("$ ")
                )
                if match := re.search(rf"(?:^|\s)stableqat ((?:{VERB})\b.*)", line):
                    found[" ".join(match[1].split())] = name(page)
    return [Command(page, line) for line, page in found.items()]


COMMANDS = commands()


def words(line: str) -> list[str]:
    """A line as the arguments that it means, with the shipped configurations alone."""
    given = [word for word in shlex.split(line, comments=True) if word != "..."]
    if given[0] in RUN_VERBS and not any(map(shipped_config, given)) and "help" not in line:
        given[1:1] = ["-c", "llama/base"]  # for what a finished run's own configuration says
    kept: list[str] = []
    for word in given:
        if kept[-1:] != ["-c"]:
            kept.append(word)
        elif found := shipped_config(word):
            kept.append(str(found))
        else:
            kept.pop()
    return kept


@pytest.fixture(scope="module")
def parsers():
    return {}


@pytest.fixture
def parse(parsers, monkeypatch, capsys):
    """Parse the arguments of a verb, and do nothing more."""

    class Parsed(Exception):
        pass

    def run_verb(arguments: list[str]) -> None:
        if arguments[0] not in parsers:

            def keep(self, parser, args):
                parsers[arguments[0]] = parser
                raise Parsed

            monkeypatch.setattr(lightning.QATCommand, "parse_arguments", keep)
            with pytest.raises(Parsed):
                lightning.QATCommand(arguments[:1])
        with suppress(SystemExit):  # help; a mistake is a UserError
            parsers[arguments[0]].parse_args(arguments)

    def tool_verb(verb: str, arguments: list[str]) -> None:
        home = import_module(TOOL_VERBS[verb][0])
        for each in (verb.split()[-1], f"{verb.split()[-1]}_"):
            if function := getattr(home, each, None):
                monkeypatch.setattr(home, each, functools.wraps(function)(lambda *_, **__: 0))
        assert main(arguments) == 0, capsys.readouterr().err

    def one(line: str) -> None:
        arguments = words(line)
        verb = " ".join(arguments[:2]) if arguments[0] == "data" else arguments[0]
        if verb in TOOL_VERBS:
            tool_verb(verb, arguments)
        else:
            run_verb(arguments)

    return one


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: f"{c.page}: {c.line[:50]}")
def test_a_quoted_command_line_parses(command, parse):
    parse(command.line)


def test_a_flag_that_does_not_exist_is_noticed(parse):
    with pytest.raises(Exception, match="unknown key"):
        parse("fit -c llama/base --trainer.max_stepz 3")
    with pytest.raises(AssertionError, match="unknown key"):
        parse("export RUN --format gguf --out out --scale_type fp16")


def test_verbs_and_flags_in_running_text_exist():
    """Inline code is cut short, so names alone are looked up."""
    settings = {
        "trainer": [Trainer],
        "model": [modules.QATModule, modules.LlamaModule, modules.ViTModule],
        "data": [data.TextDataModule, data.ImageDataModule],
        "baseline": [callbacks.Baseline],
        "mismatch": [callbacks.GradientMismatch],
        "evaluate": [callbacks.Evaluate],
        "last": [callbacks.LastCheckpoint],
        "ema": [callbacks.EMA],
    }
    known = {
        "ckpt_path",
        "print_config",
        "help",
        "model.help",
        "data.help",
        "allow",
        "debug",
        "logdir",
        "signal",
    }
    known |= {
        f"{key}.{each}" for key, made in settings.items() for of in made for each in signature(of).parameters
    }
    for verb, (home, _) in TOOL_VERBS.items():
        each = verb.split()[-1]
        function = getattr(import_module(home), f"{each}_" if iskeyword(each) else each)
        known |= {parameter.removesuffix("_") for parameter in signature(function).parameters}
    unknown = set()
    for page in GUIDES:
        for quoted in re.findall(r"`([^`]+)`", FENCE.sub("", page.read_text())):
            if re.match("torchrun|python", quoted):
                continue
            if (match := re.match("stableqat (.+)", quoted)) and not re.match(rf"(?:{VERB}|\.)", match[1]):
                unknown.add(quoted)
            flags = re.findall(r"(?<!\S)--([a-z][\w.-]+)", quoted)
            short = {each: ".".join(each.replace("-", "_").split(".")[:2]) for each in flags}
            unknown |= {each for each, key in short.items() if key not in known}
    assert not unknown
