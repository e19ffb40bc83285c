"""The page of `maisi qc`: one HTML file with a picture and the findings of every case, light and dark."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from .judging import Judged

if TYPE_CHECKING:
    from .memorisation import Audit, Neighbour
    from .quality import Finding

STYLE = """
:root { color-scheme: light dark; --ground: #fbfbfa; --card: #ffffff; --line: #dcdcd8; --text: #1c1d1f; --faint: #63666b;
  --bad: #b3261e; --good: #1c6b3c; --told: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --ground: #121316; --card: #1a1c20; --line: #32353b; --text: #e4e6ea;
  --faint: #9aa0a8; --bad: #ff8a80; --good: #7ccf9a; --told: #e8b961; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px; max-width: 1180px; background: var(--ground); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 32px 0 8px; }
p { margin: 4px 0 12px; color: var(--faint); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 3px 10px 3px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
table.short { width: auto; } table.short td, table.short th { padding-right: 28px; }
th { font-weight: 600; color: var(--faint); } td.n, th.n { text-align: right; white-space: nowrap; }
.case { background: var(--card); border: 1px solid var(--line); border-radius: 8px; margin: 12px 0; padding: 14px 16px;
  display: grid; grid-template-columns: minmax(0, 320px) minmax(0, 1fr); gap: 16px; }
.case > div { min-width: 0; } .case h3 { margin: 0 0 6px; font-size: 16px; overflow-wrap: anywhere; }
.case img, .pair img { width: 100%; height: auto; border-radius: 4px; display: block; }
.case ul { margin: 4px 0 8px; padding-left: 18px; } .wide { overflow-x: auto; }
.bad { color: var(--bad); } .good { color: var(--good); } .told { color: var(--told); }
.pair { background: var(--card); border: 1px solid var(--line); border-radius: 8px; margin: 12px 0; padding: 14px 16px; }
summary { cursor: pointer; color: var(--faint); } label { color: var(--faint); }
body:has(#only:checked) .case.passed { display: none; }
@media (max-width: 720px) { .case { grid-template-columns: 1fr; } }
"""


def page(cases: Sequence[Judged], *, audit: Audit | None = None, pairs: Sequence[tuple[Neighbour, bytes]] = ()) -> str:
    """Return the page: a summary, the failures by check, the cases, and the pairs of an audit."""
    passed = sum(one.passed for one in cases)
    failing = Counter(name for one in cases for name in {found.check for found in one.verdict.failures()})
    parts = [f"<h1>Quality check</h1><p>{passed} of {len(cases)} cases passed</p>"]
    if failing:
        rows = "".join(f'<tr><td>{escape(name)}</td><td class="n">{number}</td></tr>' for name, number in failing.most_common())
        parts.append(f'<table class="short"><tr><th>check</th><th class="n">cases that fail it</th></tr>{rows}</table>')
    if audit is not None:
        parts.append(_audit(audit, pairs))
    parts.append('<h2>Cases</h2><label><input type="checkbox" id="only"> only those that did not pass</label>')
    parts += [_case(one) for one in cases]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Quality check</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _case(one: Judged) -> str:
    state = "passed" if one.passed else "failed"
    mark = '<span class="good">pass</span>' if one.passed else '<span class="bad">FAIL</span>'
    picture = f'<img alt="three planes of {escape(one.case.id)}" src="{_source(one.picture)}">' if one.picture else ""
    failed = "".join(f"<li>{escape(found.text)} <small>({escape(found.check)})</small></li>" for found in one.verdict.failures())
    notes = "".join(f"<p>{escape(note)}</p>" for note in one.notes)
    rows = "".join(map(_row, one.verdict.findings))
    head = (
        '<tr><th>check</th><th>of</th><th class="n">value</th><th class="n">low</th><th class="n">high</th><th></th><th>in words</th></tr>'
    )
    return (
        f'<section class="case {state}"><div>{picture}</div><div><h3>{mark} {escape(one.case.id)}</h3>'
        f"{f'<ul>{failed}</ul>' if failed else ''}{notes}<details><summary>{len(one.verdict.findings)} findings</summary>"
        f'<div class="wide"><table>{head}{rows}</table></div></details></div></section>'
    )


def _row(found: Finding) -> str:
    numbers = "".join(f'<td class="n">{"" if value is None else f"{value:.4g}"}</td>' for value in (found.value, found.low, found.high))
    state = ("told", "told") if found.informative else ("good", "pass") if found.passed else ("bad", "FAIL")
    return (
        f'<tr><td>{escape(found.check)}</td><td>{escape(found.label or "")}</td>{numbers}<td class="{state[0]}">{state[1]}</td>'
        f"<td>{escape(found.text)}</td></tr>"
    )


def _audit(audit: Audit, pairs: Sequence[tuple[Neighbour, bytes]]) -> str:
    tone = "good" if audit.passed else "bad"
    blocks = "".join(
        f'<div class="pair"><p>{escape(one.finding(audit.threshold).text)}</p><img alt="{escape(one.id)} beside {escape(one.nearest)}" '
        f'src="{_source(picture)}"></div>'
        for one, picture in pairs
    )  # fmt: skip
    return (
        f'<h2>Search for copies</h2><p class="{tone}">{escape(audit.summary())}</p>'
        f"<p>The nearest pairs, generated left, reference right.</p>{blocks}"
    )


def _source(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
