"""The demos by the memory that they show."""

from collections.abc import Callable
from typing import Any, NamedTuple

from vlmem_jax.demo import run, vismem, vlm2
from vlmem_jax.demo.config import Recipe


class Demo(NamedTuple):
    """One demo that `vlmem demo` runs."""

    about: str
    run: Callable[..., Any]
    """`run(workdir, recipe, compare)` gives a summary."""
    closing_words: Callable[..., str]
    """`closing_words(summary, workdir)`."""
    recipe: Any
    folder: str
    """The folder that it works in by default."""
    more: str
    """What --compare adds."""


DEMOS = {
    "comemo": Demo(
        "many images and high resolution, at a small budget of context",
        run.run_demo,
        run.closing_words,
        Recipe,
        "runs/demo",
        "also train with and without memory at three budgets of context, and from other starts, in as many steps",
    ),
    "vismem": Demo(
        "answers in several steps, learned from examples and then by reward",
        vismem.run_demo,
        vismem.closing_words,
        vismem.VisMemRecipe,
        "runs/demo_vismem",
        "also answer with more ways to call for memories",
    ),
    "vlm2": Demo(
        "questions about long videos of rooms, of which few frames are kept",
        vlm2.run_demo,
        vlm2.closing_words,
        vlm2.VLM2Recipe,
        "runs/demo_vlm2",
        "also show other frames, and each of the two memories alone",
    ),
}
DEFAULT = "comemo"
