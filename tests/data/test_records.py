"""ArrayRecord files: the same samples, plans and batches as the JSONL file they were packed from."""

import concurrent.futures
import dataclasses

import jax
import numpy as np
import pytest

from tests.data.test_plan import mixed_lines
from vlmem_jax.data import Plan, SourceConfig, TrainData, store
from vlmem_jax.data.jsonl import JsonLines
from vlmem_jax.data.records import PackedLines, pack
from vlmem_jax.processing import TileProcessor
from vlmem_jax.types import TileGeometry


def packed(folder, lines, name="data.array_record", **options):
    """The config key of `lines`, packed."""
    jsonl = JsonLines(folder.jsonl(lines, "packed.jsonl"))
    pack(jsonl, SourceConfig(jsonl.path, str(folder.path)), folder.path / name, **options)
    return SourceConfig(str(folder.path / name))


def numbers(names):
    """What stands behind the colon of `file:number`."""
    return [name.rpartition(":")[2] for name in names]


def test_packed_data_give_the_same_plan_and_batches(folder, processor):
    lines = mixed_lines(folder, 40)
    config = folder.config(*lines)
    other = dataclasses.replace(config, train=(packed(folder, lines, shard_bytes=3000),))
    assert len(list(folder.path.glob("data-*.array_record"))) > 3
    from_jsonl, from_records = (TrainData(Plan.train(c, processor, 0), 12) for c in (config, other))
    assert from_jsonl.plan.fingerprint(24) == from_records.plan.fingerprint(24)
    for ours, theirs in zip(from_records.iterate(), from_jsonl.iterate(), strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours.batch, theirs.batch)
        assert numbers(ours.sample_ids) == numbers(theirs.sample_ids)
        assert dataclasses.replace(ours, batch=theirs.batch, sample_ids=theirs.sample_ids) == theirs


def test_the_plan_needs_no_image(folder, processor, monkeypatch):
    source = packed(folder, mixed_lines(folder, 20))
    monkeypatch.setattr(PackedLines, "__getitem__", None)
    monkeypatch.setattr("vlmem_jax.processing.images.image_size", None)
    Plan.train(folder.config(train=(source,)), processor, 0).extend(9)


def test_a_kept_plan_knows_packed_data_by_their_content(folder, processor):
    lines = [folder.talk(image=folder.image(f"{i}.png", seed=i)) for i in range(6)]
    config = folder.config(train=(packed(folder, lines),))
    store(Plan.train(config, processor, 0), folder.path, 3)
    assert "is that of" in store(Plan.train(config, processor, 0), folder.path, 3)
    for file in folder.path.glob("data-*"):
        file.unlink()
    folder.image("3.png", seed=9)  # the same lines and sizes, another picture
    packed(folder, lines)
    assert "data.array_record changed" in store(Plan.train(config, processor, 0), folder.path, 3)


def test_samples_are_read_from_many_threads(folder):
    source = packed(folder, [folder.talk(f"{i}", image=folder.image(f"{i}.png", seed=i)) for i in range(60)])
    lines = PackedLines(source.path)

    def agrees(i):
        record = lines[i % 60]
        [image] = record.images
        expected = (folder.path / f"{i % 60}.png").read_bytes()
        return record.conversations[0]["value"] == str(i % 60) and image.data == expected

    with concurrent.futures.ThreadPoolExecutor(8) as executor:
        assert all(executor.map(agrees, range(600)))


def test_videos_are_packed(folder, processor, video):
    config = folder.config(folder.talk(video=video), min_frames=3, max_frames=5, max_sample_tokens=300)
    other = dataclasses.replace(config, train=(packed(folder, [folder.talk(video=video)]),))
    left, right = (TrainData(Plan.train(c, processor, 0), 2)[1] for c in (config, other))
    jax.tree.map(np.testing.assert_array_equal, left.batch, right.batch)


def test_a_bad_line_stops_packing_and_leaves_nothing(folder):
    (folder.path / "text.png").write_text("not an image")
    outside = folder.path.parent / "outside.png"
    folder.image("../outside.png")
    for line, reason in [
        ("{oops", "must be one JSON object"),
        (folder.talk(image="gone.png"), "gone.png does not exist"),
        (folder.talk(image="text.png"), "text.png is not of a known image format"),
        (folder.talk(image=str(outside)), "below its root"),
    ]:
        with pytest.raises(ValueError, match=r"packed.jsonl:2\b.*--skip-bad leaves out") as error:
            packed(folder, [folder.talk(), line], shard_bytes=1)
        assert reason in str(error.value)
    assert not list(folder.path.glob("data-*"))


def test_bad_lines_are_left_out_and_named(folder, processor):
    lines = JsonLines(folder.jsonl([folder.talk(), "{oops", folder.talk("other")]))
    done = pack(lines, SourceConfig(lines.path), folder.path / "data.array_record", skip=True)
    assert done.samples == 2 and len(done.skipped) == 1 and "train.jsonl:2" in done.skipped[0]
    read = PackedLines(str(folder.path / "data.array_record"))
    assert read[1].conversations[0]["value"] == "other" and read[1].name.endswith(
        "data.array_record:2 (" + lines.name(2) + ")"
    )
    with pytest.raises(ValueError, match="no line of .* can be used; the first: .*bad.jsonl:1"):
        pack(
            JsonLines(bad := folder.jsonl(["{"], "bad.jsonl")),
            SourceConfig(bad),
            folder.path / "bad.array_record",
            skip=True,
        )


def test_files_are_not_written_over(folder):
    packed(folder, [folder.talk()])
    with pytest.raises(ValueError, match="--out must not exist yet, but there is .*data-00000-of-00001.array_record"):
        packed(folder, [folder.talk()])


def test_too_large_an_image_names_the_knob(folder, processor):
    source = packed(folder, [folder.talk(), folder.talk(image=folder.image("big.png", 300, 30))])
    small = TileProcessor(
        processor.tokenizer, dataclasses.replace(processor.image, max_pixels=5000), TileGeometry(8, 2), system="s"
    )
    with pytest.raises(
        ValueError, match=r"big.png has 300x30 .* image.max_pixels .*data.array_record:2 \(.*packed.jsonl:2"
    ):
        Plan.train(folder.config(train=(source,)), small, 0).extend(3)


def test_an_image_that_does_not_decode_is_named(folder, processor):
    folder.image("a.png", 64, 32)
    folder.truncate("a.png")
    with pytest.raises(ValueError, match=r"a.png is truncated or damaged.*packed.jsonl:1\); --skip-bad"):
        packed(folder, [folder.talk(image="a.png")])


def test_files_that_do_not_belong_together_are_refused(folder):
    source = packed(folder, [folder.talk() for _ in range(4)], shard_bytes=1)
    files = sorted(folder.path.glob("data-*"))
    assert len(files) == 4
    extra = folder.path / "data-00000-of-00002.array_record"
    extra.write_bytes(b"")
    with pytest.raises(ValueError, match="must have 2 files, but .* (is missing|is of another set)"):
        PackedLines(source.path)
    extra.unlink()
    content = files[2].read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"x" * len(content)):
        files[2].write_bytes(damaged)
        with pytest.raises(ValueError, match="data-00002-of-00004.array_record is damaged, or was not written by"):
            PackedLines(source.path)
    files[2].unlink()
    with pytest.raises(ValueError, match="must have 4 files, but .*data-00002-of-00004.array_record is missing"):
        PackedLines(source.path)
    with pytest.raises(ValueError, match="data must be files such as .*none-00000-of-00001.array_record, but there is"):
        PackedLines(str(folder.path / "none.array_record"))
    with pytest.raises(ValueError, match="must be named NAME.array_record, got 'data.bin'"):
        pack(JsonLines(good := folder.jsonl([folder.talk()])), SourceConfig(good), "data.bin")
