"""Experiments of the demos, which their own tests train on one device."""

import pytest

from vlmem_jax.demo import config, vismem
from vlmem_jax.demo.compare import OTHER_POSITIONS
from vlmem_jax.runtime.sharding import make_mesh
from vlmem_jax.train.config import experiment

RECIPE = config.Recipe.scaled(0.01)
VISMEM = vismem.VisMemRecipe.scaled(0.01)


@pytest.mark.parametrize("image", [{}, *(image for _, image in OTHER_POSITIONS.values())])
def test_every_kind_of_positions_fits_eight_devices(tmp_path, image):
    for made in (
        config.comemo_experiment(tmp_path, RECIPE, tmp_path, **image),
        config.mix_experiment(tmp_path, RECIPE, tmp_path, **image),
    ):
        made = experiment(made)
        made.check_mesh(make_mesh(made.mesh))
        assert image.items() <= vars(made.image).items()


def test_other_experiments_fit_eight_devices(tmp_path):
    for made in (
        config.base_experiment(tmp_path, RECIPE),
        config.plain_experiment(tmp_path, RECIPE, tmp_path, steps=3),
        vismem.base_experiment(tmp_path, VISMEM),
        vismem.vismem_experiment(tmp_path, VISMEM, tmp_path),
    ):
        made = experiment(made)
        made.check_mesh(make_mesh(made.mesh))
