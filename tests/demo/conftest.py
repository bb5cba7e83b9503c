"""A dataset of the demo so small that it is made in a second."""

import pytest

from vlmem_jax.demo.dataset import DatasetConfig, write_dataset

SMALL = DatasetConfig(
    reading_lines=12, mixture_lines=24, budget_lines=12, tiles=6, larger=5, heldout_lines=6, questions_each=4
)


@pytest.fixture(scope="session")
def small():
    return SMALL


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "dataset"
    write_dataset(folder, SMALL)
    return folder
