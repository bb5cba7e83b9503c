"""report.html of VLM^2's demo, from the numbers of summary.json and a few frames."""

import html
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vlmem_jax.demo import charts
from vlmem_jax.demo.charts import Bar
from vlmem_jax.demo.evaluate import interval
from vlmem_jax.demo.page import half, head, made, page, percent, table
from vlmem_jax.demo.pictures import Curve

RULES = {"paper": "The paper's rule of writing", "pair": "Our rule: the older of the two most alike goes"}


class Strip(NamedTuple):
    """The frames of one video that a row of the table shows."""

    what: str
    frames_LSSc: UInt8[np.ndarray, "L S S 3"]
    times_L: Sequence[int]
    length: int
    """Frames of the video."""


def title(column: str) -> str:
    """`asked/dwell_96` in words."""
    motion, length = column.rpartition("/")[2].split("_")
    return f"{length} frames, {'dwelling' if motion == 'dwell' else 'scanning'}"


def accuracy(counts: Mapping[str, Sequence[int]]) -> float | None:
    """The share of right answers of all types together."""
    right, asked = (sum(pair[n] for pair in counts.values()) for n in range(2))
    return right / asked if asked else None


def render(
    summary: Mapping[str, Any], losses: Mapping[str, Curve], marks: Mapping[str, int], strips: Sequence[Strip]
) -> str:
    """The page. `losses`: name -> curve of training; `marks`: stage -> first step."""
    sections = [_head(summary), _whole(summary), _types(summary), _kept(strips)]
    if summary["vlm2"]["swept"]:
        sections.append(_swept(summary))
    loss = charts.line_chart(losses, marks, "cross-entropy, nats")
    sections.append(f'<h2>Training</h2><div class="row">{half("Loss", loss, "Stages ask different questions.")}</div>')
    return page([*sections, _how(summary)])


def _head(summary: Mapping[str, Any]) -> str:
    rows, column = summary["vlm2"]["rows"], summary["vlm2"]["longest"]
    cards = [(html.escape(row["what"]), percent(accuracy(row["questions"][column]))) for row in rows.values()][:5]
    about = (
        f"What a small model answers about videos of rooms when {summary['vlm2']['shown']} frames stand in its "
        f"sequence, whichever those are. Above: {title(column)}."
    )
    return head("Few frames of long videos, chosen by VLM^2's memory", about, cards)


def _whole(summary: Mapping[str, Any]) -> str:
    told = summary["vlm2"]
    names = [f"{title(column)}{what}" for column in told["columns"] for what in ("", ", posters shown")]
    rows = []
    for row in told["rows"].values():
        numbers = []
        for column in told["columns"]:
            numbers += [percent(accuracy(row["questions"][column])), percent(row["coverage"][column])]
        rows.append((row["what"], numbers))
    return (
        "<h2>Right answers</h2><p>All types of questions together, one run. Posters shown: the share of posters of "
        "which the frame that shows most stands in the sequence. A camera that dwells looks one way, but for a glance "
        f"at each poster; one that scans turns evenly.</p>{table(names, rows)}"
    )


def _types(summary: Mapping[str, Any]) -> str:
    told = summary["vlm2"]
    parts = []
    for column in told["columns"]:
        rows = []
        for row in told["rows"].values():
            counts = row["questions"][column]
            rows.append((row["what"], [percent(_share(counts.get(kind))) for kind in told["types"]]))
        chance = [percent(told["chance"][kind]) for kind in told["types"]]
        parts.append(f"<h3>{title(column)}</h3>{table(told['types'], [*rows, ('guessing', chance)])}")
    bars = []
    for n, row in enumerate(told["rows"].values()):
        counts = row["questions"][told["longest"]]
        right, asked = (sum(pair[i] for pair in counts.values()) for i in range(2))
        bars.append(Bar(str(n + 1), right / max(asked, 1), *interval(right, asked), n))
    chart = charts.bar_chart(bars) + charts.legend([row["what"] for row in told["rows"].values()])
    return (
        "<h2>By type</h2><p>Types of VSI-Bench: where a poster is as seen from where the video begins (direction), "
        "which of two is nearer to it (distance), which of two appears first (order), how many there are (count); and "
        f"what is on one (digit).</p>{''.join(parts)}<h3>{title(told['longest'])}, 95 % intervals of the number of "
        f"questions</h3>{chart}"
    )


def _kept(strips: Sequence[Strip]) -> str:
    parts = []
    for strip in strips:
        frames = "".join(
            f"<figure>{charts.picture(Image.fromarray(frame_SSc), 3)}<figcaption>{time + 1}</figcaption></figure>"
            for frame_SSc, time in zip(strip.frames_LSSc, strip.times_L, strict=True)
        )
        parts.append(f'<h3>{html.escape(strip.what)}</h3><div class="pictures">{frames}</div>')
    length = strips[0].length if strips else 0
    style = "<style>figure{margin:0;font-size:11px;color:#64748b;text-align:center}</style>"
    return (
        f"<h2>What is kept</h2>{style}<p>The frames of one video of {length} that stand in the sequence, and where in "
        f"it they were taken.</p>{''.join(parts)}"
    )


def _swept(summary: Mapping[str, Any]) -> str:
    told = summary["vlm2"]
    parts = []
    for rule, found in told["swept"].items():
        episodic = list(dict.fromkeys(one["episodic"] for one in found))
        rows: dict[str, list[str]] = {}
        for one in found:
            rows.setdefault(f"{one['working']} working entries", []).append(percent(accuracy(one["questions"])))
        names = [f"{count} episodes" for count in episodic]
        parts.append(f"<h3>{RULES[rule]}</h3>{table(names, list(rows.items()))}")
    return (
        f"<h2>Sizes of the memory</h2><p>{title(told['middle']).capitalize()}; the episodes are what stands in the "
        f"sequence. Trained with one size, asked with each.</p>{''.join(parts)}"
    )


def _how(summary: Mapping[str, Any]) -> str:
    return made(
        summary,
        "Where each point lies is known exactly, and takes the place of what a model of geometry makes of it. The base "
        "(stages read and glimpse) stands for the public model that VLM^2 starts from. It goes on (stages tell and "
        "ask) on short videos as it is and with places, in as many steps; banks (stage memory) are trained on longer "
        "ones.",
        "Posters in rooms show",
    )


def _share(counts: Sequence[int] | None) -> float | None:
    return counts[0] / counts[1] if counts else None
