"""Checkpoints in a bucket: a server in this process stands for Google Cloud Storage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlmem_jax.checkpoint import CheckpointError, Store, find, load_params, save_params
from vlmem_jax.paths import as_path, write_whole
from vlmem_jax.runtime import sharding


def tree(value):
    kernel = jnp.arange(2 * 16 * 8, dtype=jnp.float32).reshape(2, 16, 8) / 7 + value
    return {"a": {"kernel": kernel}, "gate": jnp.full((3,), value, jnp.bfloat16)}


def target(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def save(store, step, eval_loss=None):
    store.save(step, tree(step), {"count": jnp.int32(step)}, {"step": step}, eval_loss)


def assert_equal(one, other):
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_restores_what_was_saved_and_keeps_the_newest_and_the_best(bucket):
    store = Store(bucket, keep_last=1, keep_best=1)
    for step, loss in [(1, 0.5), (2, 0.1), (3, 0.4)]:
        save(store, step, loss)
    store.close()
    reopened = Store(bucket, keep_last=1, keep_best=1)
    assert reopened.steps() == [2, 3] and reopened.best() == (2, 0.1)
    params, train, meta = reopened.restore(3, target(tree(0)), {"count": jax.ShapeDtypeStruct((), jnp.int32)})
    assert_equal(params, tree(3))
    assert int(train["count"]) == 3 and meta == {"step": 3}
    reopened.close()


def test_a_checkpoint_restores_onto_another_mesh(bucket):
    def place(x, **sizes):
        mesh = sharding.make_mesh(sharding.MeshConfig(**{"fsdp": 1, **sizes}))
        return jax.device_put(x, sharding.param_sharding(mesh, ("embed", "heads"), 3))

    x = tree(1)["a"]["kernel"]
    save_params(f"{bucket}/0", {"w": place(x, fsdp=4, tensor=2)})
    write_whole(as_path(bucket) / "model.json", b"{}")
    for sizes in ({"data": 8}, {"fsdp": 8}, {"fsdp": 2, "tensor": 4}):
        wanted = target({"w": place(x, **sizes)})
        restored = load_params(find(bucket).step_folder, wanted)
        assert restored["w"].sharding == wanted["w"].sharding
        assert_equal(restored, {"w": x})


def test_a_checkpoint_counts_once_it_is_committed_and_a_rest_is_cleared_away(gcs, bucket):
    folder = as_path(bucket)
    store = Store(bucket)
    save(store, 1)
    save(store, 2)
    store.close()
    (folder / "2" / "commit_success.txt").unlink()  # what a run leaves behind that is killed while it saves
    write_whole(folder / "model.json", b"{}")
    assert find(bucket).step_folder == folder / "1"
    with pytest.raises(ValueError, match="needs a folder STEP/params and a file STEP/commit_success.txt"):
        find(folder / "2")
    store = Store(bucket)
    assert store.latest() == 1
    save(store, 3)
    store.close()
    assert store.steps() == [1, 3]
    assert not gcs.names("bucket", f"{bucket.removeprefix('gs://bucket/')}/2/")


def test_a_write_that_is_refused_is_one_clear_error_and_the_last_checkpoint_survives(gcs, bucket):
    store = Store(bucket)
    save(store, 1)
    store.wait()
    for refused in ("/ocdbt.process_0/", "/_METADATA", "2/commit_success.txt"):
        gcs.refuse = lambda name, refused=refused: refused in name
        with pytest.raises(
            CheckpointError, match=f"step 2 could not be written to {bucket}: .*step 1 is whole. Look at its p"
        ):
            save(store, 2)
            store.wait()
        assert store.steps() == [1]
        store.close()
        gcs.refuse = lambda name: False
        store = Store(bucket)
    save(store, 2)
    store.close()
    assert store.steps() == [1, 2]


def test_a_folder_that_is_not_there_is_named(bucket):
    with pytest.raises(ValueError, match=f"there is no folder {bucket}/nowhere"):
        find(f"{bucket}/nowhere")
