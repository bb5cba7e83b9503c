"""The dataset of VLM^2's demo, as its experiments read it."""

import json

import numpy as np
import pytest

from vlmem_jax.demo import vlm2
from vlmem_jax.demo.cameras import draw_path
from vlmem_jax.demo.mosaics import load_digits
from vlmem_jax.demo.room_dataset import RoomsConfig, best, write_rooms, write_video
from vlmem_jax.demo.room_evaluate import Videos, coverage, oracle, uniform
from vlmem_jax.demo.room_questions import TYPES
from vlmem_jax.demo.rooms import draw_room, render
from vlmem_jax.families import resolve
from vlmem_jax.models import VLM
from vlmem_jax.processing.video import probe, read_frames
from vlmem_jax.train.config import experiment
from vlmem_jax.train.next_token import experiment_processor

SMALL = RoomsConfig(read=4, glimpses=6, clips=6, long=2, asked=3, lengths={"dwell": (24,), "scan": (24,)})


def write(folder):
    model = VLM(resolve({"preset": vlm2.PRESET, "memory": vlm2.BOTH}))
    write_rooms(folder, SMALL, model.tile.geometry, model.config.vision.grid)
    return folder


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    return write(tmp_path_factory.mktemp("rooms") / "dataset")


def lines(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_the_same_config_writes_the_same_bytes(rooms, tmp_path):
    again = write(tmp_path / "again")
    for path in sorted(path for path in rooms.rglob("*") if path.is_file()):
        assert (again / path.relative_to(rooms)).read_bytes() == path.read_bytes(), path


def test_a_video_comes_back_to_the_bit(tmp_path):
    rng = np.random.default_rng(0)
    room = draw_room(rng, load_digits()[0])
    seen = render(room, draw_path(rng, room, "dwell", 24))
    write_video(tmp_path / "x.mov", seen.pixels_TSSc)
    assert probe(tmp_path / "x.mov")[:4] == (24, 1.0, 32, 32)
    read = np.stack([np.asarray(frame) for frame in read_frames(tmp_path / "x.mov", list(range(24)))])
    np.testing.assert_array_equal(read, seen.pixels_TSSc)
    for colour, time in best(room, seen).items():
        assert (seen.posters_TSS[time] >= 0).any(), colour


@pytest.mark.parametrize("name", ["read", "glimpses", "told", "clips", "long"])
def test_every_conversation_fits_a_row(rooms, tmp_path, name):
    recipe = vlm2.VLM2Recipe.scaled(0.01)
    base = vlm2.read_experiment(rooms, recipe)
    short = vlm2.short_experiment(rooms, recipe, tmp_path, vlm2.PLACED)
    long = vlm2.long_experiment(rooms, recipe, tmp_path, vlm2.BOTH)
    made = experiment({"long": long, "read": base, "glimpses": base}.get(name, short))
    data = next(data for data in map(made.data_of, made.stages) if data.train[0].path.endswith(f"/{name}.jsonl"))
    processor = experiment_processor(made, VLM(made.model))
    for line in lines(rooms, name):
        clip = probe(rooms / line["video"])
        chosen = processor.choose_frames(clip)
        assert len(chosen) == clip.frames  # what geometry is known of
        plan = processor.plan(line["conversations"], video_sizes=[clip.taken(chosen)])
        assert plan.tokens <= data.pack_tokens and plan.tiles <= data.pack_tiles
        if name in ("clips", "long"):
            assert plan.tokens > 0.6 * data.pack_tokens


def test_held_out_videos_have_their_questions_and_their_space(rooms):
    videos = Videos.read(rooms, "asked/dwell_24")
    assert len(videos.clips) == SMALL.asked
    for n, clip in enumerate(videos.clips):
        assert set(clip.asked) <= set(TYPES) and "digit" in clip.asked
        geometry = clip.geometry(videos.store, VLM(resolve({"preset": vlm2.PRESET, "memory": "vlm2"})).tile.geometry)
        assert geometry.coords_BN3.shape == (24, 16, 3)
        assert {0, *clip.best.values()} <= set(oracle(clip, n)) and len(oracle(clip, n)) == 8
        assert len(set(uniform(clip, n))) == 8
    shown = np.array([oracle(clip, n) for n, clip in enumerate(videos.clips)])
    assert coverage(videos, shown) == 1
    assert coverage(videos, np.zeros_like(shown)) < 0.5
