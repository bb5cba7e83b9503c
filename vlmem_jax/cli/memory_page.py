"""A memory as one page of HTML that needs no other file: its layers on an axis of time, what stands in them, and how a
question was answered. All that a model or a file wrote is escaped, and browsers are told to run and fetch nothing."""

import base64
import html
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from PIL import Image

from vlmem_jax.agent.answers import Answer, Visit
from vlmem_jax.agent.frames import FrameFiles
from vlmem_jax.agent.manager import thinned
from vlmem_jax.agent.nodes import Cue, Episode, Grounding, Segment
from vlmem_jax.agent.segments import Span
from vlmem_jax.agent.store import Store
from vlmem_jax.cli.memory_show import clock, told
from vlmem_jax.demo.charts import COLOURS, FAINT, INK, LINE, tag
from vlmem_jax.demo.page import head, page
from vlmem_jax.paths import write_whole

THUMBNAILS = 400
"""Of segments in a page, at most; others are told in words alone."""
PIXELS = 96
"""Of the longer side of one."""
WIDTH, LEFT, ROW = 1000, 90, 22
"""Of the axis: of all, of the names of rows, and of a row."""
CONCEPTS = 16
"""Rows of concepts, those of the most episodes."""
LONGEST = 2000
"""Characters of a text."""
STAGES = {"initial": "without memory", "L3": "what episodes are about", "L2": "episodes", "L1": "segments"}


def write_page(store: Store, video: str, out: str | Path, asked: tuple[str, Answer] | None = None) -> None:
    """Writes the page of a memory; `asked`: a question, and how it was answered. Raises OSError."""
    with store.moment():
        segments, episodes = store.nodes("segment", Segment), store.nodes("episode", Episode)
        concepts, cues = store.nodes("concept", Grounding), store.nodes("cue", Cue)
        calls = sum(one.calls for one in store.cost().values())
    axis = _Axis(max((one.end for one in segments), default=0.0))
    sections = [_head(video, store, axis, len(segments), len(episodes), len(concepts), calls)]
    if asked:
        sections += _question(axis, *asked)
    sections += ["<h2>Layers</h2>", _layers(axis, segments, episodes, concepts, cues)]
    shown = {one.number for one in thinned(segments, THUMBNAILS)}
    sections += ["<h2>Episodes</h2>", *(_episode(one, concepts, store.frames) for one in episodes)]
    sections += ["<h2>Segments</h2>", _segments(segments, shown, store.frames)]
    write_whole(Path(out), page(sections, f"memory of {video}").encode())


def _head(video: str, store: Store, axis: "_Axis", segments: int, episodes: int, concepts: int, calls: int) -> str:
    made = store.made
    about = f"{made.get('video', '')}, by {made.get('checkpoint', 'somebody else')}; it is {store.state}"
    cards = [
        ("length", clock(axis.end)), ("segments", str(segments)), ("episodes", str(episodes)),
        ("concepts", str(concepts)), ("calls of the model", f"{calls:,}"),
    ]  # fmt: skip
    return head(_text(video), _text(about), cards)


# --- the axis ---------------------------------------------------------------------------------------------------------


class _Axis:
    """Time from left to right."""

    def __init__(self, end: float):
        self.end = end

    def x(self, time: float) -> float:
        """Where a time is."""
        return LEFT + (WIDTH - LEFT) * time / (self.end or 1.0)

    def bar(self, span: Span, row: int, about: str, **look: str | float) -> str:
        """A stretch of time, which tells what it is to whoever points at it."""
        place = {"x": self.x(span.start), "width": max(self.x(span.end) - self.x(span.start) - 0.5, 0.5)}
        rect = tag("rect", y=row * ROW + 3, height=ROW - 6, rx=2, **place, **look)
        return f"<g>{tag('title', told(about, LONGEST))}{rect}</g>"

    def drawn(self, rows: Sequence[tuple[str, Iterable[str]]]) -> str:
        """Rows of bars with their names, and times below them."""
        parts = []
        for n, (name, bars) in enumerate(rows):
            y = n * ROW + ROW / 2 + 3
            parts += [tag("text", told(name, 16), x=LEFT - 6, y=y, text_anchor="end"), *bars]
        bottom = len(rows) * ROW
        for n in range(9):
            time, x = self.end * n / 8, self.x(self.end * n / 8)
            anchor = "start" if not n else "end" if n == 8 else "middle"
            parts.append(tag("line", x1=x, x2=x, y1=0, y2=bottom, stroke=LINE))
            parts.append(tag("text", clock(time), x=x, y=bottom + 12, text_anchor=anchor, fill=FAINT))
        hatch = (
            '<defs><pattern id="left-out" width="5" height="5" patternUnits="userSpaceOnUse" '
            f'patternTransform="rotate(45)"><rect width="2" height="5" fill="{FAINT}"/></pattern></defs>'
        )
        return f'<svg class="chart" viewBox="0 0 {WIDTH} {bottom + 18}">{hatch}{"".join(parts)}</svg>'


def _layers(
    axis: _Axis, segments: list[Segment], episodes: list[Episode], concepts: list[Grounding], cues: list[Cue]
) -> str:
    spans = {one.number: Span(one.start, one.end) for one in episodes}
    kept = {n for one in episodes for n in one.segments}
    rows: list[tuple[str, Iterable[str]]] = [
        ("segments", [_segment_bar(axis, one, one.number in kept) for one in segments]),
        ("episodes", [
            axis.bar(spans[one.number], 1, f"episode {one.number}: {one.caption}", fill=COLOURS[one.number % 2 * 2])
            for one in episodes
        ]),
    ]  # fmt: skip
    most = sorted(concepts, key=lambda one: (-len(one.episodes), one.number))[:CONCEPTS]
    for one in most:
        about = "; ".join((one.name, *one.glosses))
        bars = [axis.bar(spans[n], len(rows), about, fill=COLOURS[3]) for n in one.episodes if n in spans]
        rows.append((one.name, bars))
    if cues:
        said = [axis.bar(Span(one.start, one.end), len(rows), one.text, fill=INK) for one in cues]
        rows.append(("subtitles", said))
    more = f" The {CONCEPTS} concepts of the most episodes are shown." if len(concepts) > CONCEPTS else ""
    note = f"Point at something to read it. What is hatched was left out of episodes.{more}"
    return f'<div class="card">{axis.drawn(rows)}<p class="faint">{note}</p></div>'


def _segment_bar(axis: _Axis, one: Segment, is_kept: bool) -> str:
    about = f"segment {one.number}, {clock(one.start)}-{clock(one.end)}: {one.caption}"
    fill = COLOURS[0] if is_kept else "url(#left-out)"
    return axis.bar(Span(one.start, one.end), 0, about, fill=fill, opacity=0.55 + 0.25 * (one.number % 2))


# --- what stands in the layers ----------------------------------------------------------------------------------------


def _episode(one: Episode, concepts: list[Grounding], frames: FrameFiles) -> str:
    names = ", ".join(concept.name for concept in concepts if one.number in concept.episodes)
    pictures = "".join(_thumbnail(frames, frame.name) for frame in thinned(one.frames, 6))
    return (
        f'<div class="card"><h3>Episode {one.number}, {clock(one.start)} to {clock(one.end)}</h3>'
        f'<div class="pictures">{pictures}</div><p>{_text(one.caption)}</p><p class="faint">{_text(names)}</p></div>'
    )


def _segments(segments: list[Segment], shown: set[int], frames: FrameFiles) -> str:
    def card(one: Segment) -> str:
        picture = _thumbnail(frames, one.frames[0].name) if one.frames and one.number in shown else ""
        return (
            f'<div class="card example">{picture}<h3>{one.number}, {clock(one.start)}</h3>'
            f"<p>{_text(told(one.caption, 300))}</p></div>"
        )

    return f'<div class="row">{"".join(map(card, segments))}</div>'


def _thumbnail(frames: FrameFiles, name: str) -> str:
    try:
        picture = frames.image(name)
    except (ValueError, OSError):
        return '<span class="faint">the frame is not there</span>'
    picture.thumbnail((PIXELS, PIXELS))
    return f'<img src="{_jpeg_uri(picture)}" width="{picture.width}" height="{picture.height}" alt="">'


def _jpeg_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=70)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _text(text: str) -> str:
    return html.escape(told(text, LONGEST))


# --- a question -------------------------------------------------------------------------------------------------------


def _question(axis: _Axis, question: str, answer: Answer) -> list[str]:
    rows = [
        (visit.stage, [axis.bar(span, n, _number(visit, k), fill=COLOURS[1]) for k, span in enumerate(visit.spans)])
        for n, visit in enumerate(answer.trace)
    ]
    evidence = [axis.bar(span, len(rows), "evidence", fill=COLOURS[2]) for span in answer.evidence]
    said = answer.text if answer.in_memory else f"The memory does not tell; the likeliest answer: {answer.text}"
    return [
        f"<h2>{_text(question)}</h2><p><b>{_text(said)}</b></p>",
        f'<div class="card">{axis.drawn([*rows, ("evidence", evidence)])}</div>',
        _stages(answer),
        f'<p class="faint">{answer.calls} calls, {answer.images} images</p>',
    ]


def _number(visit: Visit, k: int) -> str:
    return f"{visit.stage}: number {visit.taken[k]}" if k < len(visit.taken) else visit.stage


def _stages(answer: Answer) -> str:
    cells: list[Callable[[Visit], str]] = [
        lambda visit: f"{visit.stage}, {STAGES[visit.stage]}",
        lambda visit: (
            ", ".join(f"{label} {p:.2f}" for label, p in visit.belief.probabilities.items()) or told(visit.text, 200)
        ),
        lambda visit: f"{visit.belief.entropy:.2f} nats" if visit.belief.probabilities else "",
        lambda visit: "" if visit.enough is None else f"{visit.enough:.2f}",
        lambda visit: "believed" if visit.is_sure else "goes on",
    ]
    names = ("stage", "answer", "entropy", "is it enough", "")
    top = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell(visit))}</td>' for cell in cells)}</tr>" for visit in answer.trace
    )
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'
