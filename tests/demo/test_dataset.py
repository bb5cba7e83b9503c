import json
from pathlib import Path

import pytest

from vlmem_jax.demo.config import Recipe, base_experiment
from vlmem_jax.demo.dataset import GROUPS, Asked, read_questions, write_dataset
from vlmem_jax.models import VLM
from vlmem_jax.processing.images import image_size
from vlmem_jax.train.config import experiment
from vlmem_jax.train.next_token import experiment_processor


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_config_writes_the_same_bytes(dataset, small, tmp_path):
    write_dataset(tmp_path, small)
    assert files(tmp_path) == files(dataset)


@pytest.mark.parametrize(("name", "least"), [("reading", 0.9), ("mixture", 0.9), ("heldout", 0.9)])
def test_a_conversation_nearly_fills_a_row_and_never_more(dataset, small, name, least):
    config = experiment(base_experiment(dataset, Recipe.scaled(0.01)))
    processor = experiment_processor(config, VLM(config.model))
    room = small.reading_tokens if name == "reading" else small.mixture_tokens
    tokens = []
    for line in (dataset / f"{name}.jsonl").read_text().splitlines():
        sample = json.loads(line)
        sizes = [image_size(dataset / path) for path in sample["image"]]
        plan = processor.plan(sample["conversations"], sizes)
        assert plan.tokens <= room
        assert plan.tiles <= (1 if name == "reading" else 5)
        tokens.append(plan.tokens)
    assert sum(tokens) / len(tokens) > least * room


def test_questions_cover_every_group_and_every_place(dataset, small):
    questions = read_questions(dataset)
    assert {(len(asked.images), asked.grid) for asked in questions} == set(GROUPS)
    assert len(questions) == len(GROUPS) * small.questions_each
    assert {asked.image for asked in questions if len(asked.images) == 4} == {0, 1, 2, 3}
    assert all(asked.answer in "0123456789" and len(asked.answer) == 1 for asked in questions)


def test_held_out_pictures_are_in_no_training_line(dataset):
    for name in ("reading", "mixture"):
        assert "heldout" not in (dataset / f"{name}.jsonl").read_text()
    for asked in read_questions(dataset):
        assert all(path.startswith("images/heldout/") for path in asked.images)


@pytest.mark.parametrize(("image", "place"), [(0, "first"), (1, "middle"), (2, "middle"), (3, "last")])
def test_place_of_the_asked_image_among_four(image, place):
    asked = Asked(("a", "b", "c", "d"), (1, 1), image, 0, 0, "?", "1")
    assert asked.place == place
