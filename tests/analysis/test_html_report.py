"""The HTML report: one file, nothing fetched, everything escaped; and the pictures in it."""

import base64
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import synthetic

from stableqat.analysis import layers, report
from stableqat.analysis.plot import CAPTIONS, draw_all
from stableqat.analysis.tables import write_page
from stableqat.events import Run


class Page(HTMLParser):
    """What a page asks for, and the text of its cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.resources: list[str] = []
        self.images: list[bytes] = []
        self.cells: list[str] = []
        self.scripts = 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)
        self.scripts += tag == "script"
        self.resources += [value for key, value in attrs if key in ("src", "href")]
        if tag == "img":
            assert values["alt"]
            self.images.append(base64.b64decode(values["src"].removeprefix("data:image/png;base64,")))
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    study = folder / "<b>study"
    study.mkdir()
    (study / "study.yaml").write_text(synthetic.PLAN)
    summary = synthetic.summary_of(synthetic.runs(study), study)
    losses = {method: {1e-3: [3.0, 3.1], 1e-2: [3.2, 3.3]} for method in ("STE", "StableQAT")}
    runs = [run for bits in (2, 4) for run in synthetic.ended(losses, bits=bits, deployed_mb=bits)]
    for run in runs:
        run.scalars["perf/tokens_per_s"] = {10: 9e4, 20: 1e5}
    monkey = pytest.MonkeyPatch()
    layer = {f"layers/layers.{i}.q_proj/{what}": {10: 0.1} for i in range(2) for what in layers.TAGS}
    monkey.setattr(layers, "read_run", lambda folder, tags: Run(folder, scalars=layer))
    page = write_page(summary)
    pictures = draw_all([summary, synthetic.summary_of(runs)], folder)
    monkey.undo()
    report.write([page], pictures, folder / "compare.html", "tensorboard --logdir .")
    return page, pictures, folder / "compare.html"


def test_the_page_needs_nothing_but_itself(made):
    _, pictures, file = made
    page = Page(file.read_text())
    assert page.open == []
    assert page.scripts == 0
    assert all(resource.startswith("data:") for resource in page.resources)
    assert page.images == [picture.read_bytes() for picture in pictures]
    assert all(image.startswith(b"\x89PNG") for image in page.images)
    assert "http" not in file.read_text().replace("<!doctype html>", "")


def test_the_page_has_every_table(made):
    page, _, file = made
    cells = Page(file.read_text()).cells
    assert cells == [cell for table in page.tables for line in table.lines for cell in line]
    assert "<b>study" not in file.read_text()
    assert "&lt;b&gt;study" in file.read_text()


def test_every_picture_is_drawn_and_explained(made):
    _, pictures, file = made
    assert [picture.stem for picture in pictures] == list(CAPTIONS)
    assert pictures[0].name == "compare.png"
    text = file.read_text()
    assert all(caption.split(":")[0].replace("<", "&lt;") in text for caption in CAPTIONS.values())


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no browser")
def test_a_browser_shows_it_without_complaint(made, tmp_path: Path):
    command = "chromium --headless --no-sandbox --disable-gpu --enable-logging=stderr --dump-dom"
    shown = subprocess.run(
        [*command.split(), f"--user-data-dir={tmp_path}", made[2].as_uri()],
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    assert "CONSOLE" not in shown.stderr
    assert shown.stdout.count("<img") == len(CAPTIONS)
