"""One HTML page that needs no other file: its pictures are inside."""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path

from runtime import files

STYLE = """
body { margin: 0 auto; max-width: 80rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a;
  background: #fff; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.25rem; margin-top: 2.5rem; border-top: 1px solid #ccc;
  padding-top: 1rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #888; }
tbody th { font-weight: normal; white-space: normal; min-width: 8rem; max-width: 22rem; overflow-wrap: anywhere; }
td.long { white-space: normal; min-width: 11rem; }
.flag { white-space: nowrap; } p { max-width: 60rem; } img { max-width: 100%; height: auto; }
.figures { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 0 1.5rem; }
figure { margin: 1.5rem 0; max-width: 100%; } figcaption { width: 0; min-width: 100%; }
figcaption, .note { color: #444; font-size: .9rem; overflow-wrap: anywhere; }
pre { overflow-x: auto; background: #f4f4f4; padding: .5rem; font-size: .85rem; }
"""


def table(heading: list[str], rows: list[list[str]]) -> str:
    """A table; the first cell of a row names it."""
    head = "".join(f'<th scope="col">{escape(word)}</th>' for word in heading)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(_cell(word) for word in row[1:]) + "</tr>\n"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>'


def escape(text: str) -> str:
    """A text as HTML, in which no line ends within the name of a flag."""
    return re.sub(r"--[a-z][\w-]*", r'<span class="flag">\g<0></span>', html.escape(text))


def _cell(word: str) -> str:
    """A list may be broken after its commas, and nowhere else."""
    parts = [html.escape(part).replace(" ", "&nbsp;") for part in word.split(", ")]
    return f"<td>{parts[0]}</td>" if len(parts) == 1 else f'<td class="long">{", ".join(parts)}</td>'


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def commands(title: str, lines: list[str]) -> str:
    """Command lines that open at a click."""
    return f"<details><summary>{escape(title)}</summary><pre>{html.escape(chr(10).join(lines))}</pre></details>"


def figures(drawn: list[tuple[Path, str]]) -> str:
    """The pictures of PNG files, each above what it shows; as many beside each other as the screen has room for."""
    return f'<div class="figures">{"".join(_figure(*one) for one in drawn)}</div>' if drawn else ""


def _figure(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    text = html.escape(caption)
    picture = f'<div class="wide"><img alt="{text}" src="data:image/png;base64,{data}"></div>'
    return f"<figure>{picture}<figcaption>{text}</figcaption></figure>\n"


def write(path: Path, title: str, paragraphs: list[str], sections: list[tuple[str, list[str]]]) -> None:
    """Write the page.

    Args:
        paragraphs: below the title.
        sections: headings, and the HTML below each.
    """
    body = "".join(
        f"<section><h2>{escape(name)}</h2>\n" + "\n".join(parts) + "</section>\n" for name, parts in sections
    )
    opening = "".join(f"<p>{escape(text)}</p>\n" for text in paragraphs)
    files.write_text(
        path,
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style></head>\n'
        f"<body><h1>{escape(title)}</h1>\n{opening}{body}</body></html>\n",
    )
