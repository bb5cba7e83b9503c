"""Streams whose frames get their places by a model of geometry, some frames after they were seen."""

import threading

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from tests.geometry.conftest import tiny
from tests.stream import world
from vlmem_jax.cli.main import main
from vlmem_jax.config import to_dict
from vlmem_jax.geometry import load_geometry
from vlmem_jax.geometry.live import LiveGeometry
from vlmem_jax.geometry.store import Seer
from vlmem_jax.stream import Asker, Place, Watcher, state
from vlmem_jax.stream.questions import END, Question

COUNT = 11


@pytest.fixture(scope="module")
def seeing(golden, tmp_path_factory):
    return load_geometry(tiny(golden, tmp_path_factory.mktemp("geometry") / "pi3", "pi3").folder)


@pytest.fixture(scope="module")
def model(seeing, tmp_path_factory):
    """A model whose memory reads as much as the model of geometry gives."""
    memory = world.KEYS["memory"] | {"geometry_width": seeing.token_width, "view_width": seeing.view_width}
    return world.model(tmp_path_factory.mktemp("model"), memory=memory)


@pytest.fixture
def live(seeing, model):
    """Geometry of a new stream; with weights drawn at random every window fits badly, and counts all the same."""
    seer = Seer(seeing, model.vlm.tile.geometry, "resize")
    return lambda: LiveGeometry(seer, model.vlm.tile.side, edge=1e9, cut=1e9)


def walk():
    """Pictures of a camera that moves a little from one to the next."""
    wide = np.random.default_rng(3).integers(0, 256, (16, 24 + COUNT, 3), np.uint8)
    return [Image.fromarray(wide[:, n : n + 24]) for n in range(COUNT)]


def watch(model, geometry, loaded=None, until=None):
    """(watcher, stream, answers) of a stream that ends, or is stopped after so many frames came in."""
    asker, stopping, push = Asker(Watcher(model), world.GREEDY), threading.Event(), geometry.push

    def stopped(tile):
        known = push(tile)
        if geometry.save()["pushed"] == until:
            stopping.set()
            stream.inbox.close()  # nothing more is looked at
        return known

    geometry.push = stopped
    place = Place(**loaded[1]["place"]) if loaded else None
    questions = [Question("What?", END)]
    stream, answers, said = world.stream(
        asker, "", questions, source=world.Frames(walk()), geometry=geometry, place=place
    )
    if loaded:
        stream.restore(*loaded)
    stream.run(stopping)
    return asker.watcher, stream, answers, said


def test_every_frame_is_looked_at_where_it_is_placed(model, live):
    watcher, stream, answers, _ = watch(model, live())
    assert stream.looked == COUNT and answers[0][3] is None and not stream._waiting
    other, geometry, numbers = Watcher(model), live(), []
    tiles = [model.processor.frame(picture) for picture in walk()]
    known = [one for tile in tiles for one in geometry.push(tile)] + geometry.rest()
    for number, one, _ in known:
        other.look([tiles[number]], [number / 10], geometry=[one])
        numbers.append(number)
    assert numbers == list(range(COUNT))
    jax.tree.map(np.testing.assert_array_equal, watcher._watched, other._watched)


@pytest.mark.parametrize("until", [3, 5, 8])
def test_a_stream_that_goes_on_is_one_that_was_not_stopped(model, live, tmp_path, until):
    """Frames whose geometry has not come are in the file, too."""
    whole, wanted, answers, _ = watch(model, live())
    _, stream, _, _ = watch(model, live(), until=until)
    assert len(stream._waiting) == {3: 3, 5: 0, 8: 3}[until]
    arrays, about = stream.save()
    state.write_state(tmp_path / "a.state", arrays, about)
    found, ended, again, _ = watch(model, live(), state.read_state(tmp_path / "a.state"))
    assert stream.looked + ended.looked == COUNT and ended.place == wanted.place and again == answers
    jax.tree.map(np.testing.assert_array_equal, found._watched, whole._watched)


def test_a_frame_of_no_use_is_left_out_and_said(model, live):
    geometry = live()
    seer, seen = geometry._windows, geometry._windows.see

    def blinded(images):
        scene = seen(images)
        return scene._replace(
            points_NHW3=np.where(np.arange(len(images))[:, None, None, None] == 1, np.nan, scene.points_NHW3)
        )

    seer.see = blinded
    watcher, stream, answers, said = watch(model, geometry)
    assert stream.looked < COUNT and any(
        "points must be finite, got NaN or infinity; the frame is left out" in line for line in said
    )
    assert answers[0][3] is None


def test_a_state_without_geometry_does_not_go_on_with_it(model, live):
    _, stream, _, _ = watch(model, live(), until=5)
    arrays, about = stream.save()
    without = {name: x for name, x in arrays.items() if not name.startswith("geometry/") and name != "waiting"}
    with pytest.raises(ValueError, match="the state has no geometry, which this stream goes on with"):
        watch(model, live(), (without, about))


def test_the_command_makes_geometry_of_what_it_sees(seeing, model, golden, tmp_path, capsys):
    checkpoint = world.checkpoint(tmp_path / "run", memory=to_dict(model.vlm.config.memory))
    film, public = world.pictures(tmp_path / "film", 6), tiny(golden, tmp_path / "pi3", "pi3").folder
    line = ["stream", "--checkpoint", str(checkpoint), "--video", str(film), "--fps", "10", "--max-new-tokens", "2"]
    line += ["--ask", "What?", "--save", str(tmp_path / "a.state")]
    assert main([*line, "--geometry", str(public), "--geometry-fit", "resize"]) == 0
    assert "looked at 6 frames, answered 1 questions" in capsys.readouterr().err
    other = {name: x * 1.01 for name, x in tiny(golden, tmp_path / "copy", "pi3").tensors.items()}
    safetensors.numpy.save_file(other, tmp_path / "copy" / "model.safetensors")
    line += ["--geometry-fit", "resize"]
    assert main([*line, "--load", str(tmp_path / "a.state"), "--geometry", str(tmp_path / "copy")]) == 2
    assert "its geometry had the digest" in capsys.readouterr().err
    assert main(line) == 2
    assert "name a model that makes it by --geometry" in capsys.readouterr().err
