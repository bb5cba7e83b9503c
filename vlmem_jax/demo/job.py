"""One workdir of the demo: its dataset, its trained models, and the questions put to them."""

import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vlmem_jax import rl
from vlmem_jax.config import to_dict
from vlmem_jax.demo.config import Recipe, base_experiment, comemo_experiment
from vlmem_jax.demo.dataset import SIDE, read_questions
from vlmem_jax.demo.evaluate import Answered, accuracies, answer, ask_all, cost, tally
from vlmem_jax.demo.mosaics import draw_mosaic, load_digits
from vlmem_jax.demo.questions import ask, opening
from vlmem_jax.generate import LoadedModel, load_model
from vlmem_jax.hub.convert import export_folder
from vlmem_jax.paths import write_whole
from vlmem_jax.processing.images import open_image
from vlmem_jax.train.config import experiment
from vlmem_jax.train.run import TASKS
from vlmem_jax.train.run import run as train

Say = Callable[[str], None]


class Interrupted(Exception):
    """Training was stopped and is saved; the same command goes on from there."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model of the demo and what it answered."""

    model: LoadedModel
    answered: list[Answered]
    cost: dict[str, float]
    """See `evaluate.cost`."""

    @property
    def numbers(self) -> dict[str, Any]:
        """Its part of summary.json."""
        tallies = tally(self.answered)
        gates = self.model.vlm.metrics(self.model.params)
        return {
            "accuracy": accuracies(tallies),
            "questions": tallies,
            "cost": self.cost,
            "gates": {name: float(value) for name, value in gates.items()},
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(self.model.params)),
        }


class Workdir:
    """One workdir of a demo. Every method leaves alone what is done already, so that a stopped run goes on."""

    def __init__(self, workdir: Path, say: Say = print):
        self.workdir, self.say = workdir.absolute(), say
        self.workdir.mkdir(parents=True, exist_ok=True)
        self.dataset = self.workdir / "dataset"
        self.seconds: dict[str, float] = {}
        """Time that each part took in this call."""

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Adds the time of the block to `seconds`."""
        start = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

    def make_dataset(self, config: Any, write: Callable[[Path, Any], None]) -> None:
        """Has `write` write the dataset. Raises ValueError if one of another `config`, a dataclass, is there."""
        sizes, about = to_dict(config), self.dataset / "dataset.json"
        if about.is_file():
            if json.loads(about.read_text()) != sizes:
                raise ValueError(
                    f"{self.dataset} was made with another --steps-scale or --memory; give that, or another --workdir"
                )
            return
        unfinished = self.workdir / "dataset.tmp"
        shutil.rmtree(unfinished, ignore_errors=True)
        with self.timed("dataset"):
            write(unfinished, config)
        (unfinished / about.name).write_text(json.dumps(sizes, indent=1))
        os.replace(unfinished, self.dataset)

    def train(self, name: str, config: ConfigDict) -> Path:
        """Trains in the folder `name` as `vlmem train` does, and gives the folder. Raises Interrupted."""
        folder = self.workdir / name
        with self.timed("training"):
            if not train(experiment(config), folder, tasks=TASKS | rl.TASKS, say=self.say):
                raise Interrupted
        return folder

    def hand_over(self, trained: Path) -> Path:
        """The newest checkpoint of a run as a folder in the Hugging Face layout."""
        folder = trained.with_name(f"{trained.name}_hf")
        if not folder.is_dir():
            export_folder(trained, folder)
        return folder

    def write(self, name: str, text: str) -> None:
        """A file of the workdir, whole or not at all."""
        write_whole(self.workdir / name, text.encode())


class Demo(Workdir):
    """The workdir of CoMemo's demo."""

    def __init__(self, workdir: Path, recipe: Recipe, say: Say = print):
        super().__init__(workdir, say)
        self.recipe = recipe

    def base(self) -> Path:
        """Trains the base; the folder to start from, in the Hugging Face layout."""
        return self.hand_over(self.train("base", base_experiment(self.dataset, self.recipe)))

    def comemo(self, base: Path) -> Path:
        """Trains CoMemo on a base, at the budget of context."""
        return self.train("comemo", comemo_experiment(self.dataset, self.recipe, init=base))

    def ask(self, trained: Path | LoadedModel, context: str | None = None) -> Trained:
        """Asks all held-out questions, with another context than the one trained with if one is given."""
        with self.timed("questions"):
            model = trained if isinstance(trained, LoadedModel) else load_model(trained, context=context)
            questions = read_questions(self.dataset)
            return Trained(model, ask_all(model, self.dataset, questions), cost(model, self.dataset, questions))

    def question(self, model: LoadedModel) -> dict[str, str]:
        """Asks about a new picture, saved as question.png."""
        rng = np.random.default_rng(self.recipe.dataset.seed + 1)
        mosaic = draw_mosaic(rng, load_digits()[1], (2, 2), SIDE)
        row, column = (int(rng.integers(size)) for size in mosaic.digits_RC.shape)
        asked = ask("cell", 0, mosaic.digits_RC, row, column)
        path = self.workdir / "question.png"
        mosaic.image.save(path)
        sample = model.processor.prompt([*opening([open_image(path)]), asked.text])
        said = answer(model, [sample])[0]
        return {"image": path.name, "question": asked.text, "expected": asked.answer, "answer": said}
