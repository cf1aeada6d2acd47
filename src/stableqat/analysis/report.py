"""A comparison as one self-contained HTML page: its tables and pictures, and what they mean.

Styles and pictures are inside it (as data URIs), there is no script, and nothing is fetched, so it opens from
a disk, from a mail and in ten years. Every text is escaped: names of arms come from the user's files.
"""

import base64
import datetime
import re
import shlex
from html import escape
from pathlib import Path

from stableqat.analysis.plot import CAPTIONS
from stableqat.analysis.tables import Page, Table
from stableqat.terminal import plain

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
.said { font-size: 1.1rem; max-width: 60rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas; }
tbody tr:hover td { background-color: var(--soft); }
td.best { font-weight: 700; }
td.lower { color: #087; font-weight: 600; } td.higher { color: #c40; font-weight: 600; }
figure { margin: 1.5rem 0; } figcaption { font-size: .85rem; max-width: 60rem; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
details { margin: 1rem 0; } summary { cursor: pointer; }
footer { margin-top: 3rem; font-size: .85rem; border-top: 1px solid var(--line); }
code { background: var(--soft); padding: .1rem .3rem; border-radius: 3px; }
"""


def write(pages: list[Page], pictures: list[Path], path: Path, tensorboard: str) -> None:
    """Write the page.

    Args:
        pages: The studies, one section each.
        pictures: PNG files; the name of each selects its caption.
        path: File to write.
        tensorboard: The command that opens TensorBoard on the studies.
    """
    summaries = [page.summary for page in pages]
    names = escape(", ".join(summary.name for summary in summaries))
    made_by = shlex.join(["stableqat", "compare", *(str(summary.folder) for summary in summaries)])
    body = [
        f"<h1>{names}</h1>",
        f"<p>{sum(len(arm.runs) for summary in summaries for arm in summary.arms)} runs of"
        f" {sum(len(summary.fits) for summary in summaries)} arms.</p>",
        *(_conclusions(page, several=len(pages) > 1) for page in pages),
        *(_figure(picture) for picture in pictures[:1]),
        *map(_section, pages),
        "<h2>Over training</h2>" if pictures[1:] else "",
        *(_figure(picture) for picture in pictures[1:]),
        f"<footer><p>Made by <code>{escape(plain(made_by))}</code> on"
        f" {datetime.date.today().isoformat()}; curves: <code>{escape(tensorboard)}</code></p></footer>",
    ]
    path.write_text(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{names}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n'
        + "\n".join(filter(None, body))
        + "\n</body>\n</html>\n",
        encoding="utf-8",
    )


def _conclusions(page: Page, *, several: bool) -> str:
    name = f"<b>{escape(page.summary.name)}</b> " if several else ""
    return "\n".join(f'<p class="said">{name}{escape(text)}</p>' for text in page.conclusions)


def _section(page: Page) -> str:
    parts = [f"<h2>{escape(page.summary.name)}</h2>"]
    for table in page.tables:
        parts += [f"<h3>{escape(table.title)}</h3>" if table.title else "", _table(table)]
    paragraphs = "".join(f"<p>{escape(text)}</p>" for text in page.notes.split("\n\n"))
    parts.append(f"<details><summary>What the figures mean</summary>{paragraphs}</details>")
    return "\n".join(filter(None, parts))


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.lines[0])
    cells = [
        [_cell(cell, (i, j) in table.best) for j, cell in enumerate(line)]
        for i, line in enumerate(table.lines)
    ]
    rows = "\n".join(f"<tr>{''.join(line)}</tr>" for line in cells[1:])
    body = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>"
    return f'<div class="wide"><table>\n{body}\n</table></div>'


def _cell(text: str, best: bool) -> str:
    word = "best" if best else text
    style = f' class="{word}"' if word in ("best", "lower", "higher") else ""
    return f"<td{style}>{escape(text)}</td>"


def _figure(picture: Path) -> str:
    name = escape(re.sub(r"\W+", " ", picture.stem))
    data = base64.b64encode(picture.read_bytes()).decode()
    image = f'<img alt="{name}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{escape(CAPTIONS[picture.stem])}</figcaption></figure>"
