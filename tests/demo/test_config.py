"""Experiments of the demos, which their own tests train on one device."""

import pytest

from vlmem_jax.demo import config, vismem
from vlmem_jax.demo.compare import BUDGETS, OTHER_STARTS
from vlmem_jax.runtime.sharding import make_mesh
from vlmem_jax.train.config import experiment

RECIPE = config.Recipe.scaled(0.01)
VISMEM = vismem.VisMemRecipe.scaled(0.01)


@pytest.mark.parametrize("context", BUDGETS)
def test_every_budget_fits_eight_devices(tmp_path, context):
    for make in (config.comemo_experiment, config.plain_experiment):
        made = experiment(make(tmp_path, RECIPE, tmp_path, context=context))
        made.check_mesh(make_mesh(made.mesh))
        assert made.image.context == context


@pytest.mark.parametrize("changes", [changes for _, changes in OTHER_STARTS.values()])
def test_every_start_fits_eight_devices(tmp_path, changes):
    made = experiment(config.comemo_experiment(tmp_path, RECIPE, tmp_path, **changes))
    made.check_mesh(make_mesh(made.mesh))
    memory, [stage] = changes.get("memory", config.MEMORY), made.stages
    assert memory.items() <= vars(made.model.memory).items()
    assert stage.frozen == changes.get("frozen", config.GATES)
    assert made.image.dhr_map == changes.get("dhr_map", "fine")


def test_other_experiments_fit_eight_devices(tmp_path):
    for made in (
        config.base_experiment(tmp_path, RECIPE),
        config.plain_experiment(tmp_path, RECIPE, tmp_path),
        vismem.base_experiment(tmp_path, VISMEM),
        vismem.vismem_experiment(tmp_path, VISMEM, tmp_path),
        vismem.plain_at_budget(tmp_path, VISMEM, tmp_path),
        vismem.vismem_at_budget(tmp_path, VISMEM, tmp_path),
    ):
        made = experiment(made)
        made.check_mesh(make_mesh(made.mesh))


def test_a_seed_reaches_every_experiment(tmp_path):
    recipe, other = config.Recipe.scaled(0.01, seed=3), vismem.VisMemRecipe.scaled(0.01, seed=3)
    made = config.base_experiment(tmp_path, recipe), config.comemo_experiment(tmp_path, recipe, tmp_path)
    assert {one.seed for one in (*made, vismem.base_experiment(tmp_path, other))} == {3}
    seeds = {vismem.vismem_experiment(tmp_path, recipe, tmp_path).seed for recipe in (other, VISMEM)}
    assert len(seeds) == 2
