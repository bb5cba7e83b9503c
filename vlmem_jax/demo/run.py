"""The main job: make the dataset, train the base and then CoMemo, ask held-out questions, write the report.

What it shows is what a memory adds where the context holds a few tokens of each image: the base with all of them, the
same base with those few, and CoMemo with those few, whose memory has all.
"""

import json
import time
from pathlib import Path
from typing import Any

from vlmem_jax.config import to_dict
from vlmem_jax.demo import comemo_report, pictures
from vlmem_jax.demo.comemo_report import SHOWN
from vlmem_jax.demo.compare import compare
from vlmem_jax.demo.config import BUDGET, Recipe
from vlmem_jax.demo.dataset import write_dataset
from vlmem_jax.demo.evaluate import CHANCE
from vlmem_jax.demo.job import Demo, Say
from vlmem_jax.demo.mosaics import load_digits


def run_demo(workdir: Path, recipe: Recipe, comparing: bool = False, say: Say = print) -> dict[str, Any]:
    """The whole demo; gives what it writes to summary.json. Raises Interrupted where training was stopped."""
    start = time.perf_counter()
    demo = Demo(workdir, recipe, say)
    say("1/5 Making pictures of handwritten digits, questions about them, and a tokenizer")
    demo.make_dataset(recipe.dataset, write_dataset)
    say("2/5 Training a base without memory; it stands for a public vision tower and language model")
    base = demo.base()
    say(f"3/5 Training CoMemo on it: of an image, the {BUDGET} alone stands in the sequence, and its memory has all")
    folder = demo.comemo(base)
    say("4/5 Asking about digits that training has never seen")
    comemo, whole = demo.ask(folder), demo.ask(demo.workdir / "base")
    cut = demo.ask(demo.workdir / "base", BUDGET)
    train, heldout = load_digits()
    steps = {**recipe.base, **recipe.comemo}
    summary = {
        "comemo": comemo.numbers | {"context": BUDGET},
        "base": whole.numbers | {"context": "all"},
        "base_at_budget": cut.numbers | {"context": BUDGET},
        "question": demo.question(comemo.model),
        "chance": CHANCE,
        "dataset": {
            "train_digits": len(train.labels_N),
            "heldout_digits": len(heldout.labels_N),
            **to_dict(recipe.dataset),
        },
        "steps": {**steps, "total": sum(steps.values())},
    }
    if comparing:
        rows = {"base": whole, "base_at_budget": cut, "comemo": comemo}
        summary["compare"] = compare(demo, base, rows)
    say("5/5 Writing the report")
    curves, marks = pictures.curves([demo.workdir / "base", folder])
    summary["comemo"]["loss"] = {name: curve[-1][1] for name, curve in curves["loss"].items() if curve}
    examples = pictures.examples(comemo, demo.dataset)
    looking = pictures.looking(comemo.model, demo.workdir, summary["question"])
    summary["seconds"] = {**demo.seconds, "total": time.perf_counter() - start}
    demo.write("report.html", comemo_report.render(summary, curves, marks, examples, looking))
    demo.write("summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def closing_words(summary: dict[str, Any], workdir: Path) -> str:
    """What to say at the end."""
    question, wide = summary["question"], max(map(len, SHOWN.values()))
    lines = []
    for name, what in SHOWN.items():
        accuracy, tokens = summary[name]["accuracy"], summary[name]["cost"]["tokens"]
        one, several = accuracy["single_image"], accuracy["multi_image"]
        lines.append(f"  {what.ljust(wide)}  {tokens:>6.1f}  {one:>9.1%}  {several:>8.1%}")
    added = summary["comemo"]["accuracy"]["single_image"] - summary["base_at_budget"]["accuracy"]["single_image"]
    grids = ", ".join(f"{name} {share:.1%}" for name, share in summary["comemo"]["accuracy"]["by_grid"].items())
    return "\n".join(
        [
            "",
            f"Right answers to held-out questions, chance {summary['chance']:.0%}:",
            f"  {''.ljust(wide)}  tokens  one image   several",
            *lines,
            f"In as few tokens of context, the memory adds {100 * added:.1f} points; by grid: {grids}.",
            "",
            f"A new picture, {workdir / question['image']}: {question['question']}",
            f"  answered {question['answer']}, and it is {question['expected']}. Ask it another:",
            f"  vlmem generate --checkpoint {workdir / 'comemo'} --text 'image 1: ' \\",
            f'    --image {workdir / question["image"]} --prompt "{question["question"]}"',
            "",
            f"{summary['seconds']['total'] / 60:.1f} minutes. Pictures and curves: {workdir / 'report.html'}, "
            f"every number: {workdir / 'summary.json'}",
        ]
    )
