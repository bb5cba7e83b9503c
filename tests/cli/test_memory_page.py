"""Memories as pages: whole, alone, and whatever a model or a file wrote is text in them."""

import re
from html.parser import HTMLParser

import pytest

from tests.agent.stores import MADE, jpeg
from vlmem_jax.agent.answers import Answer, Visit
from vlmem_jax.agent.gates import Belief
from vlmem_jax.agent.nodes import Cue, Episode, Frame, Grounding, Segment
from vlmem_jax.agent.segments import Span
from vlmem_jax.agent.store import open_store
from vlmem_jax.agent.writing import write_store
from vlmem_jax.cli.memory_page import THUMBNAILS, write_page

BAD = "</title><script>alert(1)</script><img src=//evil.example/x onerror='a()'> \" ' & ]]> <!-- "
"""What tries to be more than text."""


class Page(HTMLParser):
    """What a browser makes of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)


def written(folder, segments=3, text=BAD):
    with write_store(folder, {**MADE, "video": text, "checkpoint": text}) as store, store.transaction() as batch:
        for n in range(segments):
            frames = (Frame(store.frames.write(jpeg(n)), 10.0 * n),)
            batch.put(Segment(n, 10.0 * n, 10.0 * n + 10, f"{text} {n}", frames))
        batch.put(Episode(0, 0.0, 20.0, (0, 1), f"{text} story", (frames[0],)))
        batch.put(Grounding(0, "entity", f"{text} thing", (f"{text} gloss",), (0,)))
        batch.put(Cue(0, 1.0, 2.0, f"{text} said"))
        batch.mark("closed")
    return open_store(folder)


def trace(text=BAD):
    belief = Belief({"A": 0.9, "B": 0.1}, 1.0)
    visit = Visit("L2", belief, text, True, (0,), (Span(0.0, 20.0),))
    return Answer("A", text, "L2", belief, True, (visit,), 3, 5)


def page_of(store, folder, **asked):
    write_page(store, BAD, folder / "page.html", **asked)
    return Page((folder / "page.html").read_text())


@pytest.fixture
def page(tmp_path):
    with written(tmp_path / "m") as store:
        return page_of(store, tmp_path, asked=(BAD, trace()))


def test_no_text_becomes_markup(page):
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object", "embed", "link", "base", "form"}
    names = {name for _, attributes in page.tags for name in attributes}
    assert not [name for name in names if name.startswith("on")]
    assert page.text.count("alert(1)") >= 10, "it is there to be read"
    for what in ("story", "thing", "gloss", "said"):
        assert what in page.text


def test_it_needs_nothing_else(page):
    addresses = [
        attributes[name]
        for _, attributes in page.tags
        for name in ("src", "href", "data", "action")
        if name in attributes
    ]
    assert addresses and all(address.startswith("data:image/") for address in addresses)
    styles = " ".join(f"{a.get('style', '')} {a.get('fill', '')}" for _, a in page.tags)
    assert set(re.findall(r"url\((.*?)\)", styles)) == {"#left-out"}, "what was left out is hatched"
    [policy] = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")


def test_how_a_question_was_answered(page):
    assert "L2, episodes A 0.90, B 0.10 0.33 nats" in page.text and "3 calls, 5 images" in page.text


def test_bars_stand_where_times_are(tmp_path):
    """Three segments of ten seconds, each a third of the axis; the last is in no episode."""
    with written(tmp_path / "m", text="x") as store:
        page = page_of(store, tmp_path)
    rects = [attributes for tag, attributes in page.tags if tag == "rect" and "opacity" in attributes]
    starts = [float(one["x"]) for one in rects]
    assert starts[1] - starts[0] == pytest.approx(starts[2] - starts[1], abs=0.01) and len(starts) == 3
    assert [one["fill"] == "url(#left-out)" for one in rects] == [False, False, True]


def test_a_long_video_has_some_pictures_and_lost_frames_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr("vlmem_jax.cli.memory_page.THUMBNAILS", 4)
    assert THUMBNAILS == 400
    with written(tmp_path / "m", segments=12) as store:
        store.frames.path(store.nodes("segment", Segment)[0].frames[0].name).unlink()
        page = page_of(store, tmp_path)
    assert sum(tag == "img" for tag, _ in page.tags) == 1 + 3 and page.text.count("the frame is not there") == 1


def test_an_empty_memory(tmp_path):
    with write_store(tmp_path / "m", {}) as store:
        assert "00:00:00" in page_of(store, tmp_path).text
