"""One offline HTML page: plotly.js inlined once, figures as plain data, tables as HTML.

A figure is a dict with "data" and "layout" as plotly.js takes them. A colour written "@name" stands for the CSS
variable of that name and is resolved in the browser, so that one figure suits light and dark. `layout.meta.legend`
lists the legend, drawn as HTML because plotly's own runs into the axes on a narrow screen.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from nas.paths import atomic_write

Figure = dict[str, Any]
_HERE = Path(__file__).parent
_PRESSED, _UNPRESSED = 'aria-pressed="true" class="on"', 'aria-pressed="false"'
_LONG = 40  # a text of more characters is broken into lines


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A table cell: what is read, and what is sorted by where that is not the text itself.

    `share`, a fraction, is drawn as a bar behind the text.
    """

    text: str
    sort: float | str | None = None
    code: bool = False
    share: float | None = None


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page under its own heading; `body` is HTML."""

    slug: str
    title: str
    body: str


def escape(text: object) -> str:
    """`text` as HTML."""
    return html.escape(str(text))


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of HTML that is already escaped."""
    return f'<p class="{kind}">{text}</p>' if kind else f"<p>{text}</p>"


def bullets(items: Iterable[object]) -> str:
    """A list; an item is escaped."""
    found = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f"<ul>{found}</ul>" if found else ""


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """Names and values in two columns."""
    found = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs)
    return f'<dl class="facts">{found}</dl>' if found else ""


def tiles(items: Iterable[tuple[str, str, str]]) -> str:
    """Figures that stand out: what it is, the figure, and a word more."""
    found = "".join(
        f'<div><div class="name">{escape(name)}</div><div class="value">{escape(value)}</div>'
        f'<div class="more">{escape(more)}</div></div>'
        for name, value, more in items
    )
    return f'<div class="tiles">{found}</div>'


def command(text: str) -> str:
    """A command line that can be copied."""
    return f'<div class="command"><code>{escape(text)}</code><button type="button" class="copy">copy</button></div>'


def table(
    header: Sequence[str], rows: Iterable[Sequence[Cell | str]], *, keys: Sequence[str] = (), marked: str = ""
) -> str:
    """A table that is sorted by a click on a column's head; the row whose key is `marked` stands out."""
    rows = list(rows)
    figures = [isinstance(cell, Cell) and isinstance(cell.sort, int | float) for cell in rows[0]] if rows else []
    head = "".join(
        f'<th scope="col"{" class=number" if is_figure else ""}><button type="button">{escape(name)}</button></th>'
        for name, is_figure in zip_longest(header, figures)
    )
    lines = []
    for i, row in enumerate(rows):
        key = keys[i] if keys else ""
        attributes = f' data-key="{escape(key)}" tabindex="0"' if key else ""
        attributes += ' class="marked"' if key and key == marked else ""
        lines.append(f"<tr{attributes}>{''.join(_cell(value) for value in row)}</tr>")
    return (
        '<div class="scroll"><table class="sortable"><thead><tr>'
        f"{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(value: Cell | str) -> str:
    cell = value if isinstance(value, Cell) else Cell(text=value)
    is_figure = isinstance(cell.sort, int | float)
    order = "" if cell.sort is None else f' data-sort="{escape(cell.sort)}"'
    text = f"<code>{escape(cell.text)}</code>" if cell.code else escape(cell.text)
    kind = "number" if is_figure else "long" if len(cell.text) > _LONG and not cell.code else ""
    if cell.share is not None and math.isfinite(cell.share):
        kind, order = f"{kind} bar".strip(), f'{order} style="--share:{100 * min(max(cell.share, 0.0), 1.0):.1f}%"'
    return f'<td class="{kind}"{order}>{text}</td>' if kind else f"<td{order}>{text}</td>"


def figure(slug: str, content: Figure, words: str) -> str:
    """A figure with its legend; `words` says for a reader who cannot see it what it shows."""
    legend = content.get("layout", {}).get("meta", {}).get("legend", [])
    items = "".join(_legend_item(item) for item in legend)
    height = int(content.get("layout", {}).get("height", 420))
    return (
        f'<figure id="{escape(slug)}"><div class="legend">{items}</div>'
        f'<div class="plot" style="height:{height}px" role="img" aria-label="{escape(words)}"></div>'
        f'<script type="application/json" class="figure-data">{as_json(content)}</script></figure>'
    )


def _legend_item(item: Mapping[str, Any]) -> str:
    """A swatch and a name; a click hides and shows its traces, if it has any."""
    swatch = f'<span class="swatch {escape(item.get("shape", "dot"))}" style="--swatch:{_css(item["color"])}"></span>'
    text = swatch + escape(item["name"])
    if not item["traces"]:
        return f"<span>{text}</span>"
    traces = escape(json.dumps(item["traces"]))
    return f'<button type="button" class="key" aria-pressed="true" data-traces="{traces}">{text}</button>'


def views(slug: str, choices: Sequence[tuple[str, str]]) -> str:
    """Several bodies of which one is shown at a time; each is (name, HTML)."""
    buttons = "".join(
        f'<button type="button" data-view="{i}" {_PRESSED if i == 0 else _UNPRESSED}>{escape(name)}</button>'
        for i, (name, _) in enumerate(choices)
    )
    bodies = "".join(f"<div{' hidden' if i else ''}>{body}</div>" for i, (_, body) in enumerate(choices))
    return f'<div class="views" id="{escape(slug)}"><div class="tabs">{buttons}</div>{bodies}</div>'


def _css(color: str) -> str:
    return f"var(--{color[1:]})" if color.startswith("@") else color


def as_json(value: Any) -> str:
    """JSON that may stand inside a script element; what is no finite number becomes null."""
    return json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return _finite(value.tolist())
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, np.generic):
        return _finite(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_page(
    path: Path, *, title: str, lead: str, sections: Sequence[Section], made_by: str, scripts: Sequence[Path] = ()
) -> Path:
    """Writes the page whole or not at all.

    Args:
        path: the HTML file.
        title: one line.
        lead: HTML that stands above the sections: what a reader must know first.
        sections: in order; each becomes an entry of the contents.
        made_by: which version made it.
        scripts: JavaScript files that run after the page's own and may call `nasPage.show({key, second, cursor})`.
    """
    from plotly.offline import get_plotlyjs

    contents = "".join(f'<a href="#{escape(s.slug)}">{escape(s.title)}</a>' for s in sections)
    body = "".join(f'<section id="{escape(s.slug)}"><h2>{escape(s.title)}</h2>{s.body}</section>' for s in sections)
    code = "".join(f"<script>{script.read_text()}</script>" for script in (_HERE / "page.js", *scripts))
    # plotly.js stands last: a reader has the words before its megabytes are parsed.
    document = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title>\n<style>{(_HERE / 'page.css').read_text()}</style>\n"
        f"</head>\n<body><main><header><h1>{escape(title)}</h1>{lead}</header>"
        f'<nav aria-label="contents">{contents}</nav>{body}<footer>{escape(made_by)}</footer></main>\n'
        f"<script>{get_plotlyjs()}</script>{code}</body></html>\n"
    )
    return atomic_write(path, document)
