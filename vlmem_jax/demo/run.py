"""The main job: make the dataset, train the base and then CoMemo, ask held-out questions, write the report."""

import json
import time
from pathlib import Path
from typing import Any

from vlmem_jax.config import to_dict
from vlmem_jax.demo import comemo_report, pictures
from vlmem_jax.demo.compare import compare
from vlmem_jax.demo.config import Recipe
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
    say("3/5 Training CoMemo on it, in the paper's three stages")
    folder = demo.comemo(base)
    say("4/5 Asking about digits that training has never seen")
    comemo = demo.ask(folder)
    train, heldout = load_digits()
    steps = {**recipe.base, **recipe.comemo}
    summary = {
        "comemo": comemo.numbers,
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
        summary["compare"] = compare(demo, base, comemo)
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
    accuracy, question = summary["comemo"]["accuracy"], summary["question"]
    return "\n".join(
        [
            "",
            f"Right answers to held-out questions, chance {summary['chance']:.0%}:",
            f"  one image        {accuracy['single_image']:.1%}   by grid: {_shares(accuracy['by_grid'])}",
            f"  2 to 4 images    {accuracy['multi_image']:.1%}   by place: {_shares(accuracy['by_position'])}",
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


def _shares(groups: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.1%}" for name, share in groups.items())
