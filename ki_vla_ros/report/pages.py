"""HTML pages that need no other file: one style for all, light or dark like the reader's system, from phone to desk."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Final


def page(title: str, subtitle: str, sections: Iterable[str]) -> str:
    """A whole page; `title` and `subtitle` are plain text, the sections are HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<style>{STYLE}</style></head><body>\n"
        f'<h1>{html.escape(title)}</h1><p class="sub">{html.escape(subtitle)}</p>\n'
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def section(title: str, *parts: str, note: str = "") -> str:
    """A section; `note`, in plain text under the heading, says how to read what follows."""
    told = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return f"<section><h2>{html.escape(title)}</h2>{told}{''.join(parts)}</section>"


def tiles(entries: Iterable[tuple[str, str, str]]) -> str:
    """Large figures, each (name, value, note), in plain text."""
    cells = (
        f'<div class="tile"><b>{html.escape(value)}</b><span>{html.escape(name)}</span>'
        f"<small>{html.escape(note)}</small></div>"
        for name, value, note in entries
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def table(names: Sequence[str], rows: Iterable[Sequence[str]], marked: int | None = None) -> str:
    """A table of HTML cells, all but the first column aligned as figures; row number `marked` is highlighted."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join(
        f"<tr{' class=marked' if k == marked else ''}>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>"
        for k, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def warning(text: str) -> str:
    return f'<p class="warning">{html.escape(text)}</p>'


def remark(text: str) -> str:
    """Looks like a warning without its colour: nothing is wrong."""
    return f'<p class="warning told">{html.escape(text)}</p>'


STYLE: Final = """
:root { --ink: #1c2430; --soft: #5f6875; --paper: #fff; --card: #f3f5f8; --line: #d5dae1; --grid: #e2e6ec;
 --blue: #2f6fde; --pale: #bcd2f6; --red: #c2255c; --orange: #d9480f; --green: #15803d; --violet: #7a3fc4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7ebf1; --soft: #9aa5b4; --paper: #12161c; --card: #1b212a;
 --line: #38424f; --grid: #2a323d; --blue: #6ea3ff; --pale: #2b4673; --red: #ff7aa6; --orange: #ff9457;
 --green: #58d68d; --violet: #b794f6; } }
* { box-sizing: border-box; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 24px 16px 48px; max-width: 1120px;
 color: var(--ink); background: var(--paper); overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 26px; } h2 { font-size: 19px; margin: 34px 0 4px; } h3 { font-size: 15px; margin: 0; }
.sub, .note, figcaption small, .tile small { color: var(--soft); } .sub { margin: 4px 0 20px; font-size: 13px; }
.note { margin: 0 0 12px; font-size: 13px; max-width: 46em; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(136px, 1fr)); gap: 10px; }
.tile { background: var(--card); border-radius: 10px; padding: 11px 13px; }
.tile b { display: block; font-size: 19px; line-height: 1.3; white-space: nowrap; }
.tile span, .tile small { display: block; }
.tile small { font-size: 12.5px; }
.good { color: var(--green); } .bad { color: var(--red); }
video { display: block; width: 100%; border-radius: 10px; background: var(--card); margin-top: 14px; }
.warning { border-left: 4px solid var(--orange); background: var(--card); border-radius: 4px; padding: 8px 12px;
 margin: 10px 0; font-size: 14px; } .told { border-color: var(--line); }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 10px; }
.plots.wide { grid-template-columns: 1fr; }
figure { margin: 0; background: var(--card); border-radius: 10px; padding: 9px 12px 8px; min-width: 0; }
figcaption { font-weight: 600; font-size: 13px; display: flex; flex-wrap: wrap; gap: 0 10px; margin-bottom: 6px; }
figcaption small { font-weight: 400; font-size: 12.5px; }
.plot { position: relative; margin: 0 4px 20px 46px; } .plot.bare { margin-left: 0; }
.plot svg { display: block; width: 100%; height: 100%; overflow: hidden; }
.plot span { position: absolute; font-size: 11px; line-height: 1; color: var(--soft); white-space: nowrap; }
.plot .y { right: 100%; padding-right: 6px; transform: translateY(50%); }
.plot .x { top: 100%; padding-top: 6px; transform: translateX(-50%); }
.plot .x.last { transform: translateX(-100%); } .plot .x.first { transform: none; }
svg path, svg line { fill: none; vector-effect: non-scaling-stroke; stroke-linecap: round; stroke-linejoin: round; }
svg .grid { stroke: var(--grid); } svg .axis { stroke: var(--line); }
svg .recorded { stroke: var(--ink); stroke-width: 1.8; } svg .predicted { stroke: var(--blue); stroke-width: 1.1;
 opacity: .55; } svg .mean { stroke: var(--blue); stroke-width: 2; } svg .band { fill: var(--pale); stroke: none;
 opacity: .6; } svg .limit { stroke: var(--orange); stroke-dasharray: 5 4; } svg .bad { stroke: var(--red); }
svg .worst { stroke: var(--red); stroke-width: 2; } svg .c0 { stroke: var(--blue); } svg .c1 { stroke: var(--violet); }
svg .c2 { stroke: var(--green); } svg .c3 { stroke: var(--orange); } svg .c4 { stroke: var(--red); }
svg .dot { stroke-width: 7; opacity: .75; } svg .chosen { stroke-width: 13; }
svg .mark { stroke-width: 1.4; } svg .fine { stroke-width: 1.2; }
.key { display: inline-block; width: 14px; height: 0; border-top: 3px solid; vertical-align: middle;
 margin-right: 4px; }
.lane { display: grid; grid-template-columns: minmax(110px, 22%) 1fr; gap: 3px 10px; align-items: center;
 font-size: 12.5px; } .lane .plot { margin: 0; height: 16px; background: var(--paper); border-radius: 3px; }
.lane .plot.scale { background: none; height: 16px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 12.5px; color: var(--soft); margin: 0 0 8px; }
.moment { margin-bottom: 14px; } .moment p { margin: 1px 0 8px; font-size: 13px; color: var(--soft); }
.thumbs { display: flex; gap: 8px; margin-bottom: 8px; overflow-x: auto; }
.thumbs figure { padding: 0; background: none; flex: 0 1 168px; min-width: 96px; }
.thumbs img { display: block; border-radius: 6px; width: 100%; }
.thumbs figcaption { font-weight: 400; color: var(--soft); margin: 2px 0; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { text-align: right; padding: 5px 9px; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th:first-child, td:first-child { text-align: left; padding-left: 4px; }
th { border-bottom: 2px solid var(--line); font-size: 12.5px; vertical-align: bottom; }
td { border-bottom: 1px solid var(--grid); } td small { color: var(--soft); white-space: nowrap; }
table.words th { text-align: left; }
table.words td { text-align: left; overflow-wrap: anywhere; } tr.marked td { background: var(--pale); }
td .spark { width: 90px; height: 22px; display: inline-block; vertical-align: middle; }
td .spark svg { width: 100%; height: 100%; }
details { margin-top: 10px; } summary { cursor: pointer; font-size: 14px; }
pre { background: var(--card); border-radius: 8px; padding: 10px 12px; font-size: 12.5px; overflow-x: auto;
 white-space: pre-wrap; }
"""
