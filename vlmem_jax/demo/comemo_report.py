"""The report of CoMemo's demo, made from the numbers of summary.json and a few pictures."""

import html
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vlmem_jax.demo import charts
from vlmem_jax.demo.charts import Bar
from vlmem_jax.demo.evaluate import interval
from vlmem_jax.demo.mosaics import CELL
from vlmem_jax.demo.page import half, head, made, page, percent, table, verdict


class Example(NamedTuple):
    """A held-out question with its pictures."""

    images: list[Image.Image]
    cell: tuple[int, int, int]
    """Image, row and column that are asked about."""
    question: str
    expected: str
    answer: str


class Map(NamedTuple):
    """Attention weights over the tokens of each tile of one picture, and what they are of."""

    title: str
    weights_IRC: np.ndarray


class Looking(NamedTuple):
    """One question, the tiles of its picture, and where the answer was looked for."""

    question: str
    answer: str
    grid: tuple[int, int]
    tiles: list[Image.Image]
    maps: list[Map]


def render(
    summary: Mapping[str, Any],
    curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]],
    marks: Mapping[str, int],
    examples: Sequence[Example],
    looking: Looking,
) -> str:
    """The page. `curves`: chart -> name -> (step, value); `marks`: stage -> first step."""
    comemo = summary["comemo"]
    sections = [
        _head(summary),
        _examples(examples),
        _accuracy(comemo["questions"], summary["chance"]),
        _training(curves, marks),
        _attention(looking),
    ]
    if "compare" in summary:
        sections.append(_comparison(summary))
    sections.append(_how(summary))
    return page(sections)


def _head(summary: Mapping[str, Any]) -> str:
    comemo, question = summary["comemo"], summary["question"]
    accuracy, chance = comemo["accuracy"], summary["chance"]
    cards = [
        ("one image", percent(accuracy["single_image"])),
        ("two to four images", percent(accuracy["multi_image"])),
        ("chance", percent(chance)),
        ("training steps", f"{summary['steps']['total']:,}"),
        ("minutes in all", f"{summary['seconds']['total'] / 60:.1f}"),
    ]
    about = (
        f"A vision-language model of {comemo['parameters']:,} parameters, trained here from random numbers. Every "
        "accuracy is that of single questions about one cell, of digits that training has never seen."
    )
    said = verdict(question["answer"], question["expected"])
    asked = f"<p>Asked about a new picture: <i>{html.escape(question['question'])}</i> Answer: {said}.</p>"
    return head("Reading mosaics of handwriting with CoMemo", about, cards) + asked


def _examples(examples: Sequence[Example]) -> str:
    cards = []
    for example in examples:
        asked, row, column = example.cell
        scale = 2 if len(example.images) * max(image.size[0] for image in example.images) > 64 else 3
        pictures = "".join(
            charts.picture(image, scale, (row, column, CELL) if n == asked else None)
            for n, image in enumerate(example.images)
        )
        cards.append(
            f'<div class="card example"><div class="pictures">{pictures}</div>{html.escape(example.question)}<br>'
            f"{verdict(example.answer, example.expected)}</div>"
        )
    return (
        "<h2>Questions and answers</h2><p>One of each kind, and some wrong ones. The frame round the cell is for the "
        f'reader: the model does not see it.</p><div class="row">{"".join(cards)}</div>'
    )


def _accuracy(tallies: Mapping[str, Any], chance: float) -> str:
    def chart(title: str, note: str, groups: Mapping[str, Sequence[int]]) -> str:
        bars = [Bar(name, right / asked, *interval(right, asked)) for name, (right, asked) in groups.items() if asked]
        return half(title, charts.bar_chart(bars, chance), note)

    parts = [
        chart("One image, by grid", "Columns x rows of tiles; a tile holds 4 x 4 digits.", tallies["by_grid"]),
        chart("By number of images", "Each a single tile.", tallies["by_images"]),
        chart("By place of the asked image", "Among two to four images.", tallies["by_position"]),
        chart("Place among four", "Each a single tile.", tallies["by_place_of_four"]),
    ]
    return (
        "<h2>Accuracy on held-out digits</h2><p>Whiskers are 95 % intervals of the number of questions, not of "
        f'repeated training.</p><div class="row">{"".join(parts)}</div>'
    )


def _training(curves: Mapping[str, Any], marks: Mapping[str, int]) -> str:
    loss = charts.line_chart(curves["loss"], marks, "cross-entropy, nats")
    gates = charts.line_chart(curves["gates"], marks, "tanh(gate)")
    note = "What the memory adds is multiplied by these; at 0 it adds nothing."
    both = half("Loss", loss, "The first stage has easier text and no held-out loss.")
    return f'<h2>Training</h2><div class="row">{both}{half("Gates of the memory", gates, note)}</div>'


def _attention(looking: Looking) -> str:
    cols, rows = looking.grid
    maps = []
    for one in looking.maps:
        most = float(one.weights_IRC.max()) or 1.0
        pairs = zip(looking.tiles, one.weights_IRC, strict=True)
        heats = [charts.heat(tile, weights_RC, most) for tile, weights_RC in pairs]
        tiles, thumbnail = "".join(heats[: cols * rows]), "".join(heats[cols * rows :])
        grid = f'<div class="tiles" style="grid-template-columns:repeat({cols},max-content)">{tiles}</div>'
        maps.append(f'<div><h3>{html.escape(one.title)}</h3><div class="pictures">{grid}{thumbnail}</div></div>')
    return (
        f"<h2>Where it looks</h2><p><i>{html.escape(looking.question)}</i> Answered: {html.escape(looking.answer)}. "
        "Attention of the last token of the question over the visual tokens, mean over heads, each map on a scale of "
        "its own; the tiles as the model sees them, and last the thumbnail. The context path is the decoder's own "
        f'attention.</p><div class="card"><div class="maps">{"".join(maps)}</div></div>'
    )


def _comparison(summary: Mapping[str, Any]) -> str:
    rows = []
    columns = ["single_image", "multi_image", "untrained_length"]
    grids = list(summary["comemo"]["accuracy"]["by_grid"])
    places = list(summary["comemo"]["accuracy"]["by_place_of_four"])
    for variant in summary["compare"].values():
        accuracy = variant["accuracy"]
        numbers = [accuracy[column] for column in columns]
        numbers += [accuracy["by_grid"][grid] for grid in grids]
        numbers += [accuracy["by_place_of_four"][place] for place in places]
        rows.append((variant["what"], [str(variant["steps"]), *map(percent, numbers)]))
    names = ["steps", "one image", "2-4 images", "4 x 2x1, never trained", *grids, *(f"{n} of 4" for n in places)]
    return (
        "<h2>Comparison</h2><p>Same data, same seed, one run each: differences of a few points may be chance. Steps "
        f"are those after the base.</p>{table(names, rows)}"
        f'<div class="row" style="margin-top:16px">{_compared_charts(summary)}</div>'
    )


def _compared_charts(summary: Mapping[str, Any]) -> str:
    variants = list(summary["compare"].values())
    parts = []
    for title, pick in (
        ("One image", lambda tallies: tallies["single_image"]),
        ("2x2 tiles", lambda tallies: tallies["by_grid"]["2x2"]),
        ("Two to four images", lambda tallies: tallies["multi_image"]),
        ("A length never trained", lambda tallies: tallies["untrained_length"]),
    ):
        bars = []
        for n, variant in enumerate(variants):
            right, asked = pick(variant["questions"])
            if asked:
                bars.append(Bar(str(n + 1), right / asked, *interval(right, asked), n))
        parts.append(half(title, charts.bar_chart(bars, summary["chance"])))
    names = charts.legend([f"{n + 1} {variant['what']}" for n, variant in enumerate(variants)])
    return f'<div style="flex-basis:100%">{names}</div>{"".join(parts)}'


def _how(summary: Mapping[str, Any]) -> str:
    return made(
        summary,
        "The base model (stages read and mix) stands for the public vision tower and language model that CoMemo starts "
        "from; it is handed over in the Hugging Face layout, without memory blocks. The stages pretrain, "
        "pretrain_phase2 and finetune are those of the paper (CoMemo, arXiv 2506.06279), far shorter. Optimizer: Muon "
        "on matrices, AdamW on the rest.",
    )
