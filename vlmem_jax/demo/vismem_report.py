"""report.html of VisMem's demo, from the numbers of summary.json and a few pictures."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from vlmem_jax.demo import charts
from vlmem_jax.demo.charts import Bar
from vlmem_jax.demo.evaluate import interval
from vlmem_jax.demo.page import half, head, made, page, percent, table, verdict
from vlmem_jax.demo.steps import KINDS, final
from vlmem_jax.processing.images import open_image

EXAMPLES = 8
WRONG_SHOWN = 3
"""Wrong answers among the examples, where there are as many."""


class Example(NamedTuple):
    """A held-out question, and what was answered."""

    image: Image.Image
    question: str
    expected: str
    output: str
    memories: list[tuple[str, int]]
    """Kind, and which of the answer's tokens called for it."""
    right: bool


def examples(dataset: Path, asked: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]]) -> list[Example]:
    """Some lines of a prompts file with the lines that an evaluation made of them, those with most memories first."""
    by_id = {str(answer["id"]): answer for answer in answers}
    found = [
        Example(
            *(open_image(dataset / part["image"]) for part in line["prompt"] if isinstance(part, dict)),
            line["prompt"][-1],
            line["answer"],
            by_id[str(n)]["output"],
            [(kind, place) for kind, place in by_id[str(n)].get("memories", ())],
            by_id[str(n)]["score"] == 1,
        )
        for n, line in enumerate(asked)
        if str(n) in by_id
    ]
    found.sort(key=lambda one: -len(one.memories))  # stable: otherwise as they were asked
    wrong = [one for one in found if not one.right][:WRONG_SHOWN]
    return [one for one in found if one.right][: EXAMPLES - len(wrong)] + wrong


def marked(output: str, memories: Sequence[tuple[str, int]]) -> list[tuple[str, str]]:
    """(text, "") and ("", kind of memory), as they follow each other; every word of `output` is a token."""
    words, parts, start = output.split(), [], 0
    for n, (kind, place) in enumerate(memories):
        end = place - n  # calls are tokens, but no words
        parts += [(" ".join(words[start:end]), ""), ("", kind)]
        start = end
    return [part for part in [*parts, (" ".join(words[start:]), "")] if part != ("", "")]


def render(summary: Mapping[str, Any], chosen: Sequence[Example]) -> str:
    """The page."""
    return page(
        [_head(summary), _ablation(summary), _training(summary), _places(summary), _examples(chosen), _how(summary)]
    )


def _head(summary: Mapping[str, Any]) -> str:
    accuracy, parameters = summary["vismem"]["accuracy"], summary["vismem"]["parameters"]
    cards = [
        ("base", percent(accuracy["sft"])),
        ("after stage I", percent(accuracy["formation"])),
        ("after stage II", percent(accuracy["invocation"])),
        ("training steps", f"{summary['steps']['total']:,}"),
        ("minutes, this call", f"{summary['seconds']['total'] / 60:.1f}"),
    ]
    about = (
        f"A vision-language model of {parameters['base']:,} parameters, trained here from random numbers, and VisMem's "
        f"{parameters['vismem'] - parameters['base']:,}. Every accuracy is that of {summary['dataset']['heldout']} "
        "questions about digits that training has never seen."
    )
    return head("Answering in steps, with VisMem's memories in between", about, cards)


def _ablation(summary: Mapping[str, Any]) -> str:
    scores = summary["vismem"]["scores"]
    bars, rows = [], []
    for n, score in enumerate(scores.values()):
        right, asked = round(score["accuracy"] * score["scored"]), score["scored"]
        low, high = interval(right, asked)
        bars.append(Bar(str(n + 1), right / asked, low, high, n))
        numbers = [percent(score["accuracy"]), f"{100 * low:.1f} - {100 * high:.1f}"]
        numbers += [percent(score["sources"].get(kind, {}).get("accuracy")) for kind in KINDS]
        calls = score.get("invocation")
        numbers += [percent(calls["ratio"][kind]) for kind in ("short", "long")] if calls else ["-", "-"]
        numbers += [f"{calls['per_sample']:.2f}" if calls else "-", f"{1000 * score['seconds']:.1f}"]
        rows.append((f"{n + 1} {score['what']}", numbers))
    names = ["accuracy", "95 % interval", *KINDS, "with short", "with long", "memories an answer", "ms an answer"]
    return (
        "<h2>Accuracy on held-out digits</h2><p>The same questions each time, one run, greedy answers: the interval is "
        "that of the number of questions, not of repeated training. With short, with long: the share of answers with "
        f"such a memory.</p>{table(names, rows)}"
        f'<div class="row" style="margin-top:16px">{half("Accuracy", charts.bar_chart(bars))}</div>'
    )


def _training(summary: Mapping[str, Any]) -> str:
    rewards, marks = summary["vismem"]["rewards"], summary["vismem"]["stages"]

    def chart(title: str, note: str, y_label: str, keys: Mapping[str, str]) -> str:
        series = {name: [(line["step"], line[key]) for line in rewards if key in line] for key, name in keys.items()}
        return half(title, charts.line_chart(series, marks, y_label), note)

    return (
        '<h2>Reinforcement</h2><div class="row">'
        + chart(
            "Rewards",
            "Mean of the answers drawn in a step, and of those to the same questions without memory, at temperature 1.",
            "share of right answers",
            {"score/mean": "with memories", "score/base": "without"},
        )
        + chart(
            "Memories",
            "Stage I calls for them at random; in stage II the model does.",
            "memories an answer",
            {"memory/per_answer": "memories an answer", "memory/long": "share that is long"},
        )
        + chart(
            "Penalties of stage II",
            "Of kinds that would have helped more as the other one, and of memories that did not help.",
            "penalty",
            {"penalty/type": "type", "penalty/negative": "negative"},
        )
        + chart("Distance", "From the start of the stage, k3.", "KL a token", {"kl": "KL"})
        + "</div>"
    )


def _places(summary: Mapping[str, Any]) -> str:
    scores = summary["vismem"]["scores"]
    parts = []
    for name in ("formation", "invocation"):
        positions = scores[name]["invocation"]["positions"]
        series = {kind: [(10 * n, float(x)) for n, x in enumerate(counts)] for kind, counts in positions.items()}
        chart = charts.line_chart(series, {}, "memories", "percent of the answer")
        what = scores[name]["what"]
        parts.append(half(html.escape(what[0].upper() + what[1:]), chart))
    return (
        "<h2>Where invocations fall</h2><p>Memories by the tenth of the answer in which they were called for.</p>"
        f'<div class="row">{"".join(parts)}</div>'
    )


def _examples(chosen: Sequence[Example]) -> str:
    cards = []
    for example in chosen:
        said = "".join(
            f' <span class="{kind}">[{kind} memory]</span> ' if kind else html.escape(text)
            for text, kind in marked(example.output, example.memories)
        )
        cards.append(
            f'<div class="card example"><div class="pictures">{charts.picture(example.image, 4)}</div>'
            f"<p>{html.escape(example.question)}</p><p>{said}</p>"
            f"{verdict(final(example.output), example.expected)}</div>"
        )
    style = "<style>.short{color:#2563eb} .long{color:#d97706}</style>"
    return (
        f"<h2>Answers after stage II</h2>{style}<p>Those with most memories, and some wrong ones.</p>"
        f'<div class="row">{"".join(cards)}</div>'
    )


def _how(summary: Mapping[str, Any]) -> str:
    return made(
        summary,
        "The base model (stages read and answer, supervised) stands for the public model that VisMem starts from; it "
        "is handed over in the Hugging Face layout, without memory. Some of its answers had pauses, so that it is "
        "used to tokens that are no step. In the warm-up, what forms memories learns from answers with their steps. "
        "The stages formation and invocation are those of the paper (VisMem, arXiv 2511.11007), far shorter: GRPO, "
        "whose reward is 1 for a right answer and 0 otherwise. They leave the base as it is.",
    )
