import dataclasses
import threading

import jax
import numpy as np
import pytest
from PIL import Image

from vlmem_jax.data import EvalData, Plan, TrainData, local_rows
from vlmem_jax.runtime.sharding import MeshConfig, make_mesh


def lines(folder, count=24):
    """Texts and images, with a file each."""
    return [
        folder.talk(
            f"{i}?" * (1 + i % 5), "z" * (1 + i % 9), **({"image": folder.image(f"{i}.png", seed=i)} if i % 3 else {})
        )
        for i in range(count)
    ]


def train(config, processor, steps=6, seed=0, **options):
    return TrainData(Plan.train(config, processor, seed), steps, **options)


def assert_equal(left, right):
    """Two HostBatches are the same in everything."""
    jax.tree.map(np.testing.assert_array_equal, left.batch, right.batch)
    assert dataclasses.replace(left, batch=right.batch) == right


def test_a_step_is_what_the_plan_says(folder, processor):
    data = train(folder.config(*lines(folder)), processor)
    host = data[3]
    names = [data.plan.samples.name(key) for row in (6, 7) for key in data.plan.row(row)]
    assert host.step == 3 and host.sample_ids == names
    assert host.batch.text.tokens_BT.shape == (1, 2, 300) and host.batch.views.pixels_BISSc.shape == (1, 2, 8, 8, 8, 3)
    assert host.batch.views.pixels_BISSc.dtype == np.uint8
    assert host.tokens == (host.batch.text.segments_BT > 0).sum()
    assert [sum(of) for of in zip(*host.sizes, strict=True)] == [host.tokens, host.tiles] and len(host.sizes) > 2
    assert host.tiles * processor.tokens_per_side**2 == (host.batch.views.segments_BM > 0).sum()
    assert host.images == sum(int(name.rpartition(":")[2]) % 3 != 1 for name in names)  # see `lines`
    np.testing.assert_allclose(host.denominator, host.batch.text.weights_BT.sum(dtype=np.float64), rtol=1e-6)


def test_pixels_are_those_of_the_image(folder, processor):
    config = folder.config(folder.talk(image=folder.image("a.png", 8, 8)), rows=1)
    pixels = train(config, processor)[0].batch.views.pixels_BISSc
    np.testing.assert_array_equal(pixels[0, 0, 0], np.asarray(Image.open(folder.path / "a.png")))


@pytest.mark.parametrize("threads, prefetch", [(1, 1), (5, 3)])
def test_iteration_resumes_at_any_step_with_any_threads(folder, processor, threads, prefetch):
    config = folder.config(*lines(folder))
    reference = train(config, processor)
    resumed = train(dataclasses.replace(config, threads=threads, prefetch=prefetch), processor, steps=8)
    iterator = resumed.iterate(start=2)
    for step in range(2, 6):
        assert_equal(next(iterator), reference[step])
    iterator.close()
    assert [host.step for host in reference.iterate(5)] == [5]
    assert list(reference.iterate(6)) == []


def test_accumulation_splits_the_same_rows(folder, processor):
    config = folder.config(*lines(folder), rows=4)
    whole, split = train(config, processor)[1], train(config, processor, accumulation=2)[1]
    assert split.batch.text.tokens_BT.shape == (2, 2, 300)
    assert split.denominator == whole.denominator and split.sample_ids == whole.sample_ids
    jax.tree.map(lambda one, two: np.testing.assert_array_equal(one.reshape(two.shape), two), whole.batch, split.batch)
    with pytest.raises(ValueError, match="accumulation 3 must divide data.rows 4"):
        train(config, processor, accumulation=3)


def test_a_stage_goes_on_where_the_last_one_ended(folder, processor):
    config = folder.config(*lines(folder))
    whole, later = train(config, processor, steps=5), train(config, processor, steps=2, first_step=3)
    assert len(later) == 2
    assert_equal(dataclasses.replace(later[1], step=4), whole[4])
    with pytest.raises(IndexError, match="the data has 2 steps; there is no step 2"):
        later[2]


def test_evaluation_pads_the_last_step_with_empty_rows(folder, processor):
    config = folder.config(eval=lines(folder, 10), rows=4)
    data = EvalData(Plan.eval(config, processor))
    assert len(data) * 4 > len(data.plan) > (len(data) - 1) * 4
    hosts = list(data.iterate())
    names = [name for host in hosts for name in host.sample_ids]
    assert sorted(names) == sorted(f"{config.eval[0].path}:{i + 1}" for i in range(10))
    empty = len(data) * 4 - len(data.plan)
    last = hosts[-1].batch
    assert not last.text.weights_BT[0, -empty:].any() and not last.text.segments_BT[0, -empty:].any()
    assert last.text.segments_BT[0, :-empty].any(axis=1).all()
    np.testing.assert_allclose(hosts[-1].denominator, last.text.weights_BT.sum(), rtol=1e-6)


def test_text_without_images_has_a_blank_tile_or_no_memory(folder, processor):
    config = folder.config(folder.talk(), rows=1)
    batch = train(config, processor)[0].batch
    assert np.all(batch.text.visual_index_BT == -1) and np.all(batch.views.pixels_BISSc[0, 0, 0] == 255)
    assert set(batch.views.segments_BM[0, 0, :4]) == {1}
    masked = train(dataclasses.replace(config, mask_text_only=True), processor)[0].batch
    assert not masked.views.segments_BM.any() and not masked.views.pixels_BISSc.any()


def test_jpeg_augmentation_changes_pixels_the_same_way_each_time(folder, processor):
    config = folder.config(folder.talk(image=folder.image("a.png", 8, 8)), rows=1)
    augmented = dataclasses.replace(config, jpeg_augment=True)
    plain, first, again = (train(c, processor)[0].batch.views.pixels_BISSc for c in (config, augmented, augmented))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != plain)
    assert np.any(first[0, 0, 0] != first[0, 0, 1])  # each time the image is seen


# Unreadable images: their headers pass the plan, their pixels do not decode.


def damaged(folder, bad, **changes):
    content = lines(folder)
    for i in bad:
        folder.image(f"{i}.png", 64, 32, seed=i)
        folder.truncate(f"{i}.png")
    return folder.config(*content, **changes)


def test_an_unreadable_image_stops_at_its_step(folder, processor):
    data = train(damaged(folder, [4]), processor)
    name = f"{data.config.train[0].path}:5"
    first_bad = min(row for row in range(len(data.plan)) if (0, 4) in data.plan.row(row)) // 2
    iterator = data.iterate()
    for step in range(first_bad):
        assert next(iterator).step == step
    with pytest.raises(ValueError, match="4.png is truncated or damaged") as error:
        next(iterator)
    assert name in str(error.value) and "data.on_bad_sample=skip" in str(error.value)


@pytest.mark.parametrize("loss_weight", ["token", "sample", "square"])
def test_a_skipped_sample_keeps_its_place_and_the_denominator(folder, processor, loss_weight):
    config = damaged(folder, [4], on_bad_sample="skip", loss_weight=loss_weight)
    data = train(config, processor)
    seen = 0
    for step in range(len(data)):
        host = data[step]
        rows = [data.plan.row(row) for row in (2 * step, 2 * step + 1)]
        np.testing.assert_allclose(host.denominator, host.batch.text.weights_BT.sum(dtype=np.float64), rtol=1e-6)
        for row, keys in enumerate(rows):
            segments_T, weights_T = host.batch.text.segments_BT[0, row], host.batch.text.weights_BT[0, row]
            np.testing.assert_allclose(weights_T.sum(), data.plan.weight(keys), rtol=1e-6)
            sizes = [data.plan.samples.size(key) for key in keys]
            assert np.bincount(segments_T)[1:].tolist() == [size.tokens for size in sizes]
            weighted = [bool(weights_T[segments_T == i + 1].any()) for i in range(len(keys))]
            assert weighted == [key != (0, 4) for key in keys]
            seen += (0, 4) in keys
    assert seen and list(data.unreadable) == [f"{config.train[0].path}:5"]


def test_skipping_does_not_depend_on_hosts_or_threads(folder, processor):
    config = damaged(folder, [4, 7, 8, 11], on_bad_sample="skip", rows=4)
    serial = train(config, processor, steps=3)
    for host in train(dataclasses.replace(config, threads=4), processor, steps=3).iterate():
        assert_equal(host, serial[host.step])


def test_a_row_with_nothing_readable_is_replaced_by_the_row_before_it(folder, processor):
    config = damaged(folder, [1], on_bad_sample="skip", pack_tiles=3, rows=1)  # an image of three tiles fills a row
    data = train(config, processor, steps=40)
    rows = [data.plan.row(row) for row in range(40)]
    lonely = next(row for row in range(1, 40) if rows[row] == [(0, 1)] and rows[row - 1] != [(0, 1)])
    host, before = data[lonely], data[lonely - 1]
    np.testing.assert_array_equal(host.batch.text.tokens_BT, before.batch.text.tokens_BT)
    assert host.sample_ids == before.sample_ids and host.denominator == data.plan.weight([(0, 1)])
    np.testing.assert_allclose(host.batch.text.weights_BT.sum(), host.denominator, rtol=1e-6)


def test_nothing_readable_at_all_is_an_error(folder, processor):
    folder.image("a.png", 64, 32)
    config = folder.config(folder.talk(image="a.png"), on_bad_sample="skip")
    folder.truncate("a.png")
    with pytest.raises(ValueError, match="no sample can be read any more; the last that failed: .*a.png"):
        train(config, processor)[0]


def test_data_that_changed_after_planning_is_noticed(folder, processor):
    config = folder.config(folder.talk(image=folder.image("a.png", 8, 8)))
    data = train(config, processor)
    folder.image("a.png", 16, 8)
    with pytest.raises(ValueError, match="data must not change under a run, but .*tiles=1.*tiles=3.*train.jsonl:1"):
        data[0]


# Devices.


@pytest.mark.parametrize("mesh_config", [MeshConfig(data=2, fsdp=4), MeshConfig(data=4, fsdp=1, tensor=2)])
def test_batches_arrive_on_the_devices_in_order(folder, processor, mesh_config):
    config = folder.config(*lines(folder), rows=16)
    data, mesh = train(config, processor, steps=3, accumulation=2), make_mesh(mesh_config)
    with jax.transfer_guard("disallow"):
        sent = list(data.on_devices(mesh, start=1))
    assert [host.step for host in sent] == [1, 2]
    for host in sent:
        pixels = host.batch.views.pixels_BISSc
        assert pixels.shape == (2, 8, 8, 8, 8, 3) and pixels.dtype == np.uint8
        assert pixels.sharding.shard_shape(pixels.shape)[1] == 8 // (mesh_config.data * mesh_config.fsdp)
        assert_equal(host, data[host.step])


def test_closing_early_ends_the_threads(folder, processor):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    batches = train(folder.config(*lines(folder)), processor, steps=50).on_devices(mesh)
    next(batches)
    batches.close()
    assert not [thread.name for thread in threading.enumerate() if "grain-thread" in thread.name]


def test_rows_that_do_not_fit_the_mesh_are_refused_at_once(folder, processor):
    with pytest.raises(ValueError, match="mesh.data x mesh.fsdp = 8 must divide the 2 rows"):
        train(folder.config(*lines(folder)), processor, mesh=make_mesh(MeshConfig()))


def test_local_rows_are_all_rows_of_a_single_process():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    assert local_rows(mesh, 16).tolist() == list(range(16))
    with pytest.raises(ValueError, match="mesh.data x mesh.fsdp = 8 must divide the 12 rows"):
        local_rows(mesh, 12)
