"""Parts that reports share: a report is one page that needs no other file, and cannot ask for one."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

STYLE = """
body{font:15px/1.55 system-ui,sans-serif;color:#1e293b;background:#f8fafc;margin:0}
main{max-width:1020px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:26px;margin:0 0 4px} h2{font-size:18px;margin:36px 0 8px} h3{font-size:14px;margin:0 0 6px}
p{max-width:76ch;margin:6px 0 12px} .faint{color:#64748b;fill:#94a3b8} code{font-size:13px}
.cards,.row{display:flex;flex-wrap:wrap;gap:16px}
.card{background:white;border:1px solid #e2e8f0;border-radius:10px;padding:14px 16px}
.card b{display:block;font-size:24px;font-weight:600} .half{flex:1 1 440px;min-width:0}
.chart{width:100%;height:auto;font-size:10px;fill:#334155} .legend{font-size:12px;color:#475569}
.legend span{margin-right:14px;white-space:nowrap}
.legend i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:5px}
svg image{image-rendering:pixelated} svg{display:block}
table{border-collapse:collapse;background:white;border:1px solid #e2e8f0;border-radius:10px;font-size:13px}
th,td{padding:6px 10px;text-align:right;border-bottom:1px solid #eef2f7} th{font-weight:600;color:#475569}
th:first-child,td:first-child{text-align:left} tr:last-child td{border-bottom:0} .scroll{overflow-x:auto}
.example{box-sizing:border-box;width:calc(25% - 12px);min-width:210px;font-size:13px}
.pictures{display:flex;flex-wrap:wrap;gap:6px;align-items:flex-end;margin-bottom:8px}
.right{color:#047857;font-weight:600} .wrong{color:#b91c1c;font-weight:600}
.tiles{display:grid;gap:3px;width:max-content} .maps{display:flex;flex-wrap:wrap;gap:18px 26px}
"""


ALONE = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What browsers are told: nothing is fetched, and no script runs."""


def page(sections: Sequence[str], title: str = "vlmem demo") -> str:
    """The whole document."""
    body = "\n".join(sections)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{ALONE}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{STYLE}</style><main>{body}</main></html>\n"
    )


def head(title: str, about: str, cards: Sequence[tuple[str, str]]) -> str:
    """The title, what it is about, and the numbers to see first, by their names."""
    boxes = "".join(f'<div class="card">{name}<b>{value}</b></div>' for name, value in cards)
    return f'<h1>{title}</h1><p class="faint">{about}</p><div class="cards">{boxes}</div>'


def table(names: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A row for each model: what it is, and its numbers, which `names` says."""
    top = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(
        f"<tr><td>{html.escape(what)}</td>{''.join(f'<td>{number}</td>' for number in numbers)}</tr>"
        for what, numbers in rows
    )
    return f'<div class="scroll"><table><tr><th>model</th>{top}</tr>{body}</table></div>'


def made(summary: Mapping[str, Any], about: str, pictures: str = "Pictures are mosaics of") -> str:
    """The section on how it was made: the pictures, what `about` says, steps and times."""
    seconds, steps = summary["seconds"].items(), summary["steps"].items()
    return (
        f"<h2>How it was made</h2><p>{pictures} scikit-learn's handwritten digits: "
        f"{summary['dataset']['train_digits']:,} for training, {summary['dataset']['heldout_digits']} held out. {about}"
        f"</p><p>Steps: {', '.join(f'{name} {count}' for name, count in steps if name != 'total')}. Time of this call: "
        f"{', '.join(f'{name} {value:.0f} s' for name, value in seconds if name != 'total')}.</p>"
    )


def half(title: str, chart: str, note: str = "") -> str:
    """A card of half the width of the page."""
    return f'<div class="card half"><h3>{title}</h3>{chart}<p class="faint">{note}</p></div>'


def verdict(answer: str, expected: str) -> str:
    """An answer, and whether it is right."""
    if answer == expected:
        return f'<span class="right">{html.escape(answer)}, right</span>'
    return f'<span class="wrong">{html.escape(answer) or "nothing"}, but it is {html.escape(expected)}</span>'


def percent(share: float | None) -> str:
    """`41.7 %`, or a dash."""
    return "-" if share is None else f"{100 * share:.1f} %"
