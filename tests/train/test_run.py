"""What a run says before its first stage."""

from tests.train import world
from vlmem_jax.train import run as runs
from vlmem_jax.train.config import experiment


def test_heads_that_do_not_go_round_are_named_with_their_cost(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_run_stage", lambda *_: False)
    settings, said = world.config(world.make(tmp_path), mesh=dict(data=1, fsdp=2, tensor=4)), []
    runs.run(experiment(settings), tmp_path / "run", say=said.append)
    held = 2 * 2 * (16 // 2) * 2 * 8 * 4  # k and v of both layers, rows of their matrices apart, fp32
    assert said[0] == (
        "mesh.tensor=4 does not divide the 2 kv_heads of model.decoder: a device holds all, "
        f"{held:,} bytes of parameters, not {held // 4:,}"
    )
