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

SHOWN = {
    "base": "no memory, all tiles in the sequence",
    "base_at_budget": "the same, the thumbnails alone",
    "comemo": "CoMemo, the thumbnails, and all tiles in its memory",
}
"""Parts of the summary, and what they are of."""


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
        _added(summary),
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
    chance = summary["chance"]

    def one(name: str) -> str:
        return percent(summary[name]["accuracy"]["single_image"])

    cards = [
        ("CoMemo, thumbnails in context", one("comemo")),
        ("no memory, thumbnails", one("base_at_budget")),
        ("no memory, all tiles", one("base")),
        ("chance", percent(chance)),
        ("training steps", f"{summary['steps']['total']:,}"),
        ("minutes in all", f"{summary['seconds']['total'] / 60:.1f}"),
    ]
    about = (
        f"A vision-language model of {comemo['parameters']:,} parameters, trained here from random numbers. Every "
        "accuracy is that of single questions about one cell, of digits that training has never seen; those above are "
        "of one image."
    )
    said = verdict(question["answer"], question["expected"])
    asked = f"<p>Asked about a new picture: <i>{html.escape(question['question'])}</i> Answer: {said}.</p>"
    return head("What a memory adds where the context is short", about, cards) + asked


def _added(summary: Mapping[str, Any]) -> str:
    """The rows that the demo is about, side by side."""
    parts = []
    for title, pick in (
        ("One image", lambda tallies: tallies["single_image"]),
        ("Of it, 2x2 tiles", lambda tallies: tallies["by_grid"]["2x2"]),
    ):
        bars = []
        for n, name in enumerate(SHOWN):
            right, asked = pick(summary[name]["questions"])
            if asked:
                bars.append(Bar(str(n + 1), right / asked, *interval(right, asked), n))
        parts.append(half(title, charts.bar_chart(bars, summary["chance"])))
    costs = [(what, _cost(summary[name]["cost"])) for name, what in SHOWN.items()]
    return (
        "<h2>What the memory adds</h2><p>An image is seen as tiles and, whole but small, as a thumbnail. With all of "
        "them in the sequence the base reads every digit; with the thumbnail alone it cannot. CoMemo has the thumbnail "
        "in its sequence, and all tiles in its memory, which it attends to beside.</p>"
        f"{charts.legend([f'{n} {what}' for n, what in enumerate(SHOWN.values(), 1)])}"
        f'<div class="row">{"".join(parts)}</div>{table(["visual tokens", "MFLOPs", "kB kept"], costs)}'
        '<p class="faint">A question about one image, mean over the grids: visual tokens in its sequence, operations '
        "to read it, and keys and values that are kept while it is answered, those of the memory among them.</p>"
    )


def _cost(cost: Mapping[str, float]) -> list[str]:
    return [f"{cost['tokens']:.0f}", f"{cost['flops'] / 1e6:.0f}", f"{cost['kv_bytes'] / 1e3:.0f}"]


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
        chart("One image, by grid", "Columns x rows of tiles; a tile holds 3 x 3 digits.", tallies["by_grid"]),
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
    note = "What the memory adds is multiplied by these. They start open, and the demo leaves them as they are."
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
    variants = summary["compare"]
    grids = list(summary["comemo"]["accuracy"]["by_grid"])
    rows = []
    for variant in variants.values():
        accuracy = variant["accuracy"]
        numbers = [accuracy[column] for column in ("single_image", "multi_image", "untrained_length")]
        numbers += [accuracy["by_grid"][grid] for grid in grids]
        about = [variant["context"], str(variant["steps"]), *_cost(variant["cost"])]
        rows.append((variant["what"], [*about, *map(percent, numbers)]))
    names = ["context", "steps", "tokens", "MFLOPs", "kB kept"]
    names += ["one image", "2-4 images", "4 x 2x1, never trained", *grids]
    return (
        "<h2>Comparison</h2><p>Same data, same seed, one run each: differences of a few points may be chance. Steps "
        f"are those after the base.</p>{_curves(variants)}{table(names, rows)}"
    )


def _curves(variants: Mapping[str, Mapping[str, Any]]) -> str:
    """Accuracy against what a question costs, of models trained as long with and without memory."""
    parts = []
    for key, unit, label in (
        ("tokens", 1, "visual tokens in the sequence"),
        ("flops", 1e6, "MFLOPs to read a question"),
        ("kv_bytes", 1e3, "kB kept while answering"),
    ):
        curves = {}
        for name, start in (("CoMemo", "comemo"), ("no memory", "plain")):
            points = [v for n, v in variants.items() if n.partition("_")[0] == start]
            curves[name] = sorted((v["cost"][key] / unit, 100 * v["accuracy"]["single_image"]) for v in points)
        parts.append(half(label.capitalize(), charts.line_chart(curves, {}, "right answers, one image, %", label)))
    return f'<div class="row">{"".join(parts)}</div>'


def _how(summary: Mapping[str, Any]) -> str:
    return made(
        summary,
        "The base model (stages read and mix) stands for the public vision tower and language model that CoMemo "
        "(arXiv 2506.06279) starts from; it is handed over in the Hugging Face layout, without memory blocks. CoMemo "
        "is trained in one short stage, where the paper has three; its blocks start from the attention that they stand "
        "before. Optimizer: Muon on matrices, AdamW on the rest.",
    )
