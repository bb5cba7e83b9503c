"""Geometry of what data show: made once, kept, and read with each sample; what does not fit is named."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.data.conftest import Folder
from tests.patches_world import save_tokenizer, save_video
from vlmem_jax.data import DataConfig, SourceConfig
from vlmem_jax.data.geometry import GeometryStore, with_geometry
from vlmem_jax.data.rows import pack_row
from vlmem_jax.data.samples import Samples
from vlmem_jax.geometry.store import store_clips
from vlmem_jax.hub.tokenizer_files import TokenizerFiles
from vlmem_jax.processing import FrameConfig, Tokenizer, make_processor
from vlmem_jax.processing.chat import FRAME
from vlmem_jax.types import FrameGeometry, Geometry, GeometryShape, TileShape

pytest.importorskip("av")
READS = GeometryShape(4, 6, 5)
MADE = {"model": "stand-in"}


def brightness(pixels_ISSc):
    """A stand-in for a model of geometry: every number says how bright the frame is."""
    bright_I = np.asarray(pixels_ISSc, np.float32).mean((1, 2, 3)) / 255
    N, G, V = READS
    tokens, views, coords = (np.repeat(bright_I, N * size).reshape(-1, N, size) for size in (G, V, 3))
    return Geometry(tokens * np.linspace(-1, 1, G, dtype=np.float32), views, coords)


@pytest.fixture
def world(tmp_path):
    """Lines that show two videos, one of them twice, and an image; and one that shows nothing."""
    save_tokenizer(tmp_path / "qwen", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    TokenizerFiles.of(tmp_path / "qwen", (FRAME,)).copy(tmp_path / "tokenizer", {})
    save_video(tmp_path / "a.mp4", frames=12, fps=4)
    save_video(tmp_path / "b.mp4", frames=3, fps=4, level=60)
    folder = Folder(tmp_path)
    folder.image("c.png")
    shown = [{"video": "a.mp4"}, {"video": "b.mp4"}, {"video": "a.mp4"}, {"image": "c.png"}, {}]
    folder.lines = [folder.talk(**one) for one in shown]
    folder.source = SourceConfig(folder.jsonl(folder.lines), geometry=str(tmp_path / "g.array_record"))
    return folder


def samples_of(world, reads=READS, frames=4, **source):
    image = FrameConfig(frames=frames, time_line=False)
    tokenizer = Tokenizer.load(world.path / "tokenizer")
    processor = make_processor(
        tokenizer, image, FrameGeometry(8, 6), "s", "llava-video", tile=TileShape(8, 3, 6, geometry=reads)
    )
    config = DataConfig(pack_tokens=400, pack_tiles=12, max_sample_tokens=200, threads=1)
    return Samples([dataclasses.replace(world.source, **source)], config, processor)


def made(world, **options):
    return store_clips(samples_of(world, geometry=""), brightness, MADE, world.source.geometry, **options)


@pytest.mark.parametrize("values, error", [("bf16", 0.004), ("int8", 0.008)])
def test_a_sample_comes_with_the_geometry_of_its_frames(world, values, error):
    stored = made(world, values=values)
    assert (stored.written, stored.before) == (3, 0)  # a.mp4 once
    samples = samples_of(world)
    keys = [(0, line) for line in range(5)]
    samples.measure(keys)
    loaded = [samples.load(key) for key in keys]
    for sample in loaded[:4]:
        wanted = brightness(sample.pixels_ISSc)
        for got, want in zip(jax.tree.leaves(sample.geometry), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=error)
    assert not any(map(np.any, jax.tree.leaves(loaded[4].geometry)))  # of a blank tile nothing is known
    row = pack_row([loaded[1], loaded[0]], samples.config, samples.processor.tile)
    there, first = row.views.geometry.coords_BN3, len(loaded[1].pixels_ISSc)
    np.testing.assert_array_equal(there[:first], loaded[1].geometry.coords_BN3)
    np.testing.assert_array_equal(there[first : first + 4], loaded[0].geometry.coords_BN3)
    assert not there[first + 4 :].any()


def test_a_call_that_was_stopped_goes_on_and_machines_share_the_work(world):
    made(world, clips_a_file=1)
    files = sorted(world.path.glob("g-*"))
    whole = [file.read_bytes() for file in files]
    files[1].unlink()
    assert made(world, clips_a_file=1).written == 1
    assert [file.read_bytes() for file in files] == whole
    for file in files:
        file.unlink()
    parts = [made(world, clips_a_file=1, part=(n, 2)).written for n in range(2)]
    assert parts == [2, 1] and [file.read_bytes() for file in files] == whole


def test_what_is_there_is_not_mixed_with_another_model_or_other_clips(world):
    made(world)
    with pytest.raises(ValueError, match="g-00000-of-00001.array_record is of .*stand-in.*, not of .*other"):
        store_clips(samples_of(world, geometry=""), brightness, {"model": "other"}, world.source.geometry)
    with pytest.raises(ValueError, match="holds other clips than these data show"):  # other frames of the same videos
        store_clips(samples_of(world, geometry="", frames=3), brightness, MADE, world.source.geometry)
    world.jsonl(world.lines[3:])
    with pytest.raises(ValueError, match="holds other clips than these data show; remove it or choose another --out"):
        made(world)


def error_of(world, **changes):
    """What is wrong with the first line."""
    samples = samples_of(world, **changes)
    samples.measure([(0, 0)])
    with pytest.raises(ValueError) as caught:
        samples.load((0, 0))
    return str(caught.value)


def test_what_does_not_fit_is_named(world):
    made(world)
    assert "set geometry of this file (data.train.0.geometry)" in error_of(world, geometry="")
    assert "frames 0, 3, 7, 11 (4) of a.mp4, but 0, 5, 11 (3) are taken now" in error_of(world, frames=3)
    wider = error_of(world, reads=GeometryShape(4, 8, 5))
    assert "has 4 patches a frame, tokens of 6 and views of 5 numbers, but the model reads 4, 8 and 5" in wider
    save_video(world.path / "a.mp4", frames=12, fps=4, level=10)
    assert "has geometry of another file of the name a.mp4" in error_of(world)
    save_video(world.path / "a.mp4", frames=12, fps=4, size=(16, 16))
    assert "a a.mp4 of 12 frames of 24x16, but now it has 12 frames of 16x16" in error_of(world)
    world.jsonl([world.talk(video="b.mp4"), world.talk(video="d.mp4")])
    save_video(world.path / "d.mp4", frames=3, fps=4)
    samples = samples_of(world)
    samples.measure([(0, 0), (0, 1)])
    samples.load((0, 0))
    with pytest.raises(ValueError, match="has no geometry of d.mp4; make it by `vlmem data geometry` of the same data"):
        samples.load((0, 1))


def test_frames_that_become_several_tiles_have_no_geometry(world):
    made(world)
    samples = samples_of(world)
    samples.measure([(0, 3)])
    sample = samples.load((0, 3))
    cut = dataclasses.replace(sample, pixels_ISSc=np.repeat(sample.pixels_ISSc, 5, axis=0))
    with pytest.raises(ValueError, match="1 frames have become 5 tiles .*set image.max_tiles=1"):
        with_geometry(cut, [sample.geometry])


def test_a_model_without_such_a_memory_reads_none(world):
    samples = samples_of(world, reads=None, geometry="nowhere.array_record")
    samples.measure([(0, 0)])
    assert samples.load((0, 0)).geometry is None


def test_numbers_that_are_not_finite_and_damaged_files_are_refused(world):
    def broken(pixels):
        return dataclasses.replace(brightness(pixels), coords_BN3=np.full((len(pixels), 4, 3), np.nan, np.float32))

    with pytest.raises(ValueError, match="geometry of a.mp4 holds numbers that are not finite .*train.jsonl:1"):
        store_clips(samples_of(world, geometry=""), broken, MADE, world.source.geometry)
    assert not list(world.path.glob("g-*"))  # nothing half done is left
    with pytest.raises(ValueError, match="no geometry of a.mp4"):
        left = store_clips(samples_of(world, geometry=""), broken, MADE, world.source.geometry, skip=True)
        assert left.written == 0 and len(left.skipped) == 3
        samples = samples_of(world)
        samples.measure([(0, 0)])
        samples.load((0, 0))
    [file] = world.path.glob("g-*")
    file.unlink()
    made(world)
    [file] = world.path.glob("g-*")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged, or was not written by `vlmem data`"):
        GeometryStore(world.source.geometry)
