"""What a report is made of, headings, sentences, tables and pictures, and how they become Markdown and HTML.

Blocks hold plain text. Whatever comes from data (titles, names) is escaped here and nowhere else, so that a title with
HTML or Markdown in it is shown as it is.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Heading:
    """A heading of level 2 or 3."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Sentences; ``strong`` ones are the first that a reader should see."""

    text: str
    strong: bool = False


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Rows of text under columns. ``marked`` cells, (row, column), stand out; the first column is the row's name."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: frozenset[tuple[int, int]] = frozenset()
    prose: bool = False  # Cells hold words that may wrap, instead of numbers.


@dataclass(frozen=True)
class Picture:
    """An ``<svg>`` element made by ``pictures`` and what it shows. Markdown leaves pictures out."""

    svg: str
    caption: str


Block = Heading | Paragraph | Bullets | Table | Picture

# No script, and nothing from elsewhere: the page is a file that can be mailed.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_STYLE = """
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; color: #1c1c1c;
  background: #fff; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.35rem; margin: 2.5rem 0 .6rem; padding-bottom: .2rem; border-bottom: 1px solid #ddd; }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
p, ul { margin: .5rem 0; max-width: 48rem; }
p.strong { font-size: 1.2rem; font-weight: 600; }
nav { font-size: .9rem; color: #555; } nav a { color: #0057a3; white-space: nowrap; }
div.table { overflow-x: auto; margin: .7rem 0; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e6e6e6;
  vertical-align: top; }
th { font-weight: 600; border-bottom: 2px solid #bbb; }
th:first-child, td:first-child, .prose th, .prose td { text-align: left; }
.prose td { white-space: normal; min-width: 7rem; max-width: 22rem; }
td.marked { font-weight: 700; background: #e8f2fb; }
figure { margin: 1rem 0; } figcaption { font-size: .86rem; color: #555; max-width: 48rem; }
svg { display: block; width: 100%; height: auto; max-width: 56rem; }
@media print {
  body { font-size: 10pt; max-width: none; margin: 0; padding: 0; } nav { display: none; }
  h2, h3 { break-after: avoid; } figure, tr { break-inside: avoid; }
  div.table { overflow: visible; } table { font-size: 7.5pt; } th, td { white-space: normal; padding: .15rem .3rem; }
  td.marked { print-color-adjust: exact; }
}
"""


def _line(text: str) -> str:
    return " ".join(str(text).split())


def _md(text: str) -> str:
    """Text as Markdown that shows it as it is, within one line and one cell."""
    # An ampersand or an angle bracket needs no escape unless it begins what reads as a character reference or a tag.
    text = re.sub(r"&(?=#?\w+;)", "&amp;", _line(text))
    text = re.sub(r"<(?=[a-zA-Z/!?])", "&lt;", text)
    return re.sub(r"([\\`*|~]|\[(?=[^\]]*\]\()|!(?=\[))", r"\\\1", text)


def markdown(title: str, blocks: Sequence[Block]) -> str:
    """The blocks as Markdown with tables as GitHub reads them; pictures are left out."""
    lines = [f"# {_md(title)}", ""]
    for block in blocks:
        match block:
            case Heading(text, level):
                lines += [f"{'#' * level} {_md(text)}", ""]
            case Paragraph(text, strong):
                lines += [f"**{_md(text)}**" if strong else _md(text), ""]
            case Bullets(items):
                lines += [*(f"- {_md(item)}" for item in items), ""]
            case Table(columns, rows, marked):
                lines += ["| " + " | ".join(map(_md, columns)) + " |", "|---" * len(columns) + "|"]
                for at, row in enumerate(rows):
                    cells = [_md(text) for text in row]
                    bold = [f"**{text}**" if (at, place) in marked else text for place, text in enumerate(cells)]
                    lines.append("| " + " | ".join(bold) + " |")
                lines.append("")
            case Picture():
                pass
    return "\n".join(lines).rstrip("\n") + "\n"


def page(title: str, blocks: Sequence[Block]) -> str:
    """The blocks as one HTML page that needs no network and no script."""
    parts: list[str] = []
    contents: list[str] = []
    for block in blocks:
        match block:
            case Heading(text, level):
                name = f"s{len(parts)}"
                if level == 2:
                    contents.append(f'<a href="#{name}">{_text(text)}</a>')
                parts.append(f'<h{level} id="{name}">{_text(text)}</h{level}>')
            case Paragraph(text, strong):
                parts.append(f"<p{' class=strong' if strong else ''}>{_text(text)}</p>")
            case Bullets(items):
                parts.append("<ul>" + "".join(f"<li>{_text(item)}</li>" for item in items) + "</ul>")
            case Table(columns, rows, marked, prose):
                head = "".join(f"<th>{_text(column)}</th>" for column in columns)
                body = "".join(
                    "<tr>"
                    + "".join(
                        f"<td{' class=marked' if (at, place) in marked else ''}>{_text(text)}</td>"
                        for place, text in enumerate(row)
                    )
                    + "</tr>\n"
                    for at, row in enumerate(rows)
                )
                kind = "table prose" if prose else "table"
                parts.append(f'<div class="{kind}"><table>\n<tr>{head}</tr>\n{body}</table></div>')
            case Picture(svg, caption):
                parts.append(f"<figure>\n{svg}\n<figcaption>{_text(caption)}</figcaption></figure>")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{_text(title)}</h1>\n"
        f"<nav>{' · '.join(contents)}</nav>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def _text(text: str) -> str:
    return html.escape(_line(text))
