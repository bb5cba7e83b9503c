import os
import shutil
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint._src.serialization import limits

from vlmem_jax.checkpoint import CheckpointError, DamagedError, Store, find, load_params, save_params
from vlmem_jax.evals.measure import compilations
from vlmem_jax.runtime import sharding


def tree(value=1.0, shape=(8, 4)):
    return {"a": {"kernel": jnp.full(shape, value)}, "gate": jnp.full((3,), value, jnp.bfloat16)}


def target(tree, dtype=None, place=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=place or x.sharding), tree)


def save(store, step, eval_loss=None, params=None):
    store.save(step, params or tree(step), {"count": jnp.int32(step)}, {"step": step}, eval_loss)


def test_restores_what_was_saved(tmp_path):
    store = Store(tmp_path)
    save(store, 3)
    store.wait()
    params, train, meta = store.restore(3, target(tree()), {"count": jax.ShapeDtypeStruct((), jnp.int32)})
    np.testing.assert_array_equal(params["a"]["kernel"], np.full((8, 4), 3.0))
    assert params["gate"].dtype == jnp.bfloat16
    assert int(train["count"]) == 3 and meta == {"step": 3}
    store.close()


def test_arrays_of_the_host_come_back_as_they_were(tmp_path):
    store = Store(tmp_path)
    arrays = {
        "states_LD": np.arange(6, dtype=np.float32).reshape(3, 2).astype(jnp.bfloat16),
        "advantage_E": np.array([0.1, -1 / 3]),
        "logp_T": np.array([np.nan, -0.25], np.float32),
        "stopped_N": np.array([True, False]),
        "key_E2": np.array([[0, 7]]),
    }
    store.save(1, tree(), {"count": jnp.int32(1)}, {}, arrays=arrays)
    save(store, 2)
    store.wait()
    found = store.arrays(1)
    assert found.keys() == arrays.keys() and store.arrays(2) == {}
    for name, array in arrays.items():
        assert type(found[name]) is np.ndarray and found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    for file in (tmp_path / "1" / "arrays").iterdir():
        if file.is_file():
            file.write_bytes(b"x")
    with pytest.raises(DamagedError, match="arrays is damaged"):
        store.arrays(1)
    store.close()


def test_small_arrays_that_lie_on_all_devices_are_not_cut_into_parts(tmp_path):
    everywhere = NamedSharding(sharding.make_mesh(sharding.MeshConfig()), PartitionSpec())
    params, train = jax.device_put((tree(3.0, shape=(16, 8)), {"count": jnp.int32(3)}), everywhere)
    with compilations() as programs:
        store = Store(tmp_path)
        store.save(3, params, train, {})
        store.close()
    assert programs == []
    np.testing.assert_array_equal(load_params(tmp_path / "3", target(params))["a"]["kernel"], np.full((16, 8), 3.0))


def test_keeps_the_newest_and_the_best_together(tmp_path):
    store = Store(tmp_path, keep_last=2, keep_best=1)
    for step, loss in [(1, 0.5), (2, 0.1), (3, 0.4), (4, 0.6), (5, None)]:
        save(store, step, loss)
    store.close()
    assert store.steps() == [2, 4, 5]
    reopened = Store(tmp_path, keep_last=2, keep_best=1)  # the losses are on disk, not only in memory
    assert reopened.best() == (2, 0.1)
    for step, loss in [(6, 0.3), (7, 0.2)]:
        save(reopened, step, loss)
    reopened.close()
    assert reopened.steps() == [2, 6, 7]


def test_saving_a_step_twice_keeps_the_first(tmp_path):
    store = Store(tmp_path)
    save(store, 1)
    save(store, 1, params=tree(9.0))
    store.close()
    np.testing.assert_array_equal(load_params(tmp_path / "1", target(tree()))["a"]["kernel"], np.ones((8, 4)))


def test_a_donated_array_is_saved_as_it_was(tmp_path):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    params = {"w": jnp.zeros((400, 500))}
    store = Store(tmp_path)
    store.save(0, params, {"count": jnp.int32(0)}, {})
    for _ in range(20):
        params = step(params)
    store.close()
    stored = load_params(tmp_path / "0", {"w": jax.ShapeDtypeStruct((400, 500), jnp.float32)})
    np.testing.assert_array_equal(stored["w"], np.zeros((400, 500)))


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_restores_onto_another_mesh_and_dtype(tmp_path, devices):
    mesh8 = sharding.make_mesh(sharding.MeshConfig(fsdp=4, tensor=2))
    x = np.arange(32, dtype=np.float32).reshape(8, 4)
    save_params(tmp_path / "0", {"w": jax.device_put(x, sharding.param_sharding(mesh8, ("embed", "heads"), 2))})
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:devices])
    place = sharding.param_sharding(mesh, ("embed", "heads"), 2)
    restored = load_params(tmp_path / "0", {"w": jax.ShapeDtypeStruct((8, 4), jnp.bfloat16, sharding=place)})["w"]
    assert restored.sharding == place and restored.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(restored, np.float32), x)


@pytest.mark.parametrize("sizes", [{"data": 8}, {"context": 8}, {"data": 2, "context": 2, "tensor": 2}])
def test_restores_what_any_mesh_wrote_onto_any_other(tmp_path, sizes):
    x = np.arange(256, dtype=np.float32).reshape(2, 16, 8)

    def place(**sizes):
        mesh = sharding.make_mesh(sharding.MeshConfig(**{"fsdp": 1, **sizes}))
        return sharding.param_sharding(mesh, ("embed", "heads"), 3)

    save_params(tmp_path / "0", {"w": jax.device_put(x, place(**sizes))})
    for others in ({"fsdp": 8}, {"fsdp": 2, "tensor": 4}, {"data": 4, "context": 2}):
        wanted = {"w": jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=place(**others))}
        restored = load_params(tmp_path / "0", wanted)["w"]
        assert restored.sharding == wanted["w"].sharding
        np.testing.assert_array_equal(restored, x)


def test_a_restore_reads_no_more_at_a_time_than_asked(tmp_path, monkeypatch):
    peak = 0

    class Watched(limits.LimitInFlightBytes):
        async def wait_for_bytes(self, requested_bytes):
            nonlocal peak
            await super().wait_for_bytes(requested_bytes)
            peak = max(peak, self._max_bytes - self._available_bytes)

    monkeypatch.setattr(limits, "LimitInFlightBytes", Watched)
    params = {f"layer_{n}": jax.random.normal(jax.random.key(n), (64, 100)) for n in range(8)}  # of 25.6 kB
    train = {"count": jnp.int32(1)}
    store = Store(tmp_path)
    store.save(1, params, train, {})
    store.close()
    for gb, most in ((96.0, 8 * 25_600), (60e-6, 2 * 25_600)):
        peak = 0
        restored, _, _ = Store(tmp_path, restore_concurrent_gb=gb).restore(1, target(params), target(train))
        jax.tree.map(np.testing.assert_array_equal, restored, params)
        assert 25_600 <= peak <= most
    assert peak == most
    with pytest.raises(ValueError, match="checkpoint.restore_concurrent_gb=2e-05 allows .*; raise it"):
        load_params(tmp_path / "1", target(params), restore_concurrent_gb=20e-6)


def test_lists_everything_that_does_not_fit(tmp_path):
    save_params(tmp_path / "0", tree())
    wanted = {
        "a": {"kernel": jax.ShapeDtypeStruct((8, 5), jnp.float32), "bias": jax.ShapeDtypeStruct((5,), jnp.float32)}
    }
    with pytest.raises(ValueError) as error:
        load_params(tmp_path / "0", wanted)
    text = str(error.value)
    assert "a/kernel: (8, 4) in the checkpoint, (8, 5) in the model" in text
    assert "a/bias: not in the checkpoint" in text
    assert "gate: not in the model" in text


def test_a_folder_without_params_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="is no checkpoint"):
        load_params(tmp_path, target(tree()))


FULL_DISK = """
    import resource, sys
    import jax.numpy as jnp, jax
    from vlmem_jax.checkpoint import CheckpointError, Store
    store = Store(sys.argv[1])
    params = {"w": jax.random.normal(jax.random.key(0), (400, 400))}
    store.save(1, params, {"count": jnp.int32(1)}, {})
    store.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    store.save(2, params, {"count": jnp.int32(2)}, {})
    try:
        store.wait()
    except CheckpointError as error:
        print(error)
    print(store.steps())
    store.close()
"""


def test_a_full_disk_is_one_clear_error_and_the_last_checkpoint_survives(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    assert "checkpoint of step 2 could not be written" in done.stdout
    assert "the checkpoint of step 1 is whole" in done.stdout
    assert "[1]" in done.stdout
    assert "Traceback" not in done.stderr
    store = Store(tmp_path)
    save(store, 3)
    store.close()
    assert {item.name for item in tmp_path.iterdir()} == {"1", "3"}, "the next run clears the unfinished one away"


def test_a_disk_without_room_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    store = Store(tmp_path)
    save(store, 1)
    store.wait()
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.raises(
        CheckpointError, match="it needs 1.38e-07 GB and the disk has 1e-07 GB left; the checkpoint of step 1"
    ):
        save(store, 2)
    store.close()
    assert [item.name for item in tmp_path.iterdir()] == ["1"]


@pytest.mark.parametrize("lost", ["_METADATA", "manifest.ocdbt", "d"])
def test_a_damaged_checkpoint_is_named(tmp_path, lost):
    save_params(tmp_path / "0", tree())
    path = tmp_path / "0" / "params" / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ValueError, match=f"{tmp_path}/0/params is damaged"):
        load_params(tmp_path / "0", target(tree()))


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot keep checkpoints in"):
        Store(tmp_path / "file" / "stage")


def test_an_unfinished_checkpoint_does_not_count(tmp_path):
    store = Store(tmp_path)
    save(store, 1)
    store.close()
    (tmp_path / "2.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    assert Store(tmp_path).latest() == 1
    (tmp_path / "model.json").write_text("{}")
    assert find(tmp_path).step_folder == tmp_path / "1"
