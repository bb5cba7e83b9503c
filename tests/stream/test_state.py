"""Files of what is kept of a stream: a stream that goes on from one is one that was never interrupted."""

import json
import threading

import jax
import numpy as np
import pytest

from tests.stream import world
from vlmem_jax.config import to_dict
from vlmem_jax.evals.digest import digest
from vlmem_jax.runtime.sharding import MeshConfig
from vlmem_jax.stream import Asker, Place, Question, Watcher
from vlmem_jax.stream import state as states
from vlmem_jax.stream.questions import END

NEVER = threading.Event()
COUNT = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def model(folder):
    return world.model(folder)


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return world.pictures(tmp_path_factory.mktemp("film"), COUNT)


def watch(model, film, loaded=None, questions=(), until=None):
    """A watcher that has seen the film, its stream, and the answers; `until`: the number of frames after which it is
    stopped."""
    watcher, place, stopping = Watcher(model), None, threading.Event()
    if loaded is not None:
        arrays, about = loaded
        watcher.restore(arrays, about["streams"])
        place = Place(**about["place"])
    if until is not None:
        look = watcher.look

        def stopped(*args, **kwargs):
            seen = look(*args, **kwargs)
            if watcher.frames_B[0] == until:
                stopping.set()
                stopping.kept = stream.inbox.close()  # nothing more is looked at
            return seen

        watcher.look = stopped
    stream, shown, _ = world.stream(Asker(watcher, world.GREEDY), film, questions, place=place)
    stream.run(stopping)
    return watcher, stream, shown


@pytest.fixture(scope="module")
def halfway(model, film, tmp_path_factory):
    """The file of a stream that was stopped after five frames."""
    file = tmp_path_factory.mktemp("state") / "a.state"
    _, stream, _ = watch(model, film, until=5)
    arrays, about = stream.save()
    made_by = states.made_by(model.vlm, "RUN", digest(model.params))
    states.write_state(file, arrays, {"made_by": made_by, **about})
    return file


def test_a_stream_that_goes_on_is_bit_for_bit_one_that_was_not_stopped(model, film, halfway):
    question = [Question("What?", END)]
    whole, wanted, answers = watch(model, film, questions=question)
    parts, found, again = watch(model, film, states.read_state(halfway), question)
    assert (found.looked, found.place) == (COUNT - 5, wanted.place)
    jax.tree.map(np.testing.assert_array_equal, parts._watched, whole._watched)
    assert parts.save()[1] == whole.save()[1] and again == answers and answers[0][3] is None


def test_another_video_comes_after_the_one_before(model, film, halfway, tmp_path):
    other = world.pictures(tmp_path / "other", 3, seed=1)
    watcher, stream, _ = watch(model, other, states.read_state(halfway))
    assert watcher.frames_B[0] == 8 and stream.looked == 3
    times = watcher.snapshot().times
    assert (stream.place.start, stream.place.time, times[-1]) == (0.5, 0.7, 0.7)
    assert set(times) <= {0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7} and len(times) == world.SLOTS


@pytest.mark.parametrize("sizes", [dict(data=2, fsdp=1, tensor=2), dict(data=1, fsdp=2)])
def test_a_state_goes_on_on_another_mesh(folder, film, halfway, sizes):
    mesh = MeshConfig(**sizes)
    many = world.model(folder, mesh.data * mesh.fsdp * mesh.tensor, mesh)
    one = world.model(folder)
    wanted, found = (watch(model, film, states.read_state(halfway), [Question("What?", END)]) for model in (one, many))
    here, there = wanted[0].snapshot(), found[0].snapshot()
    assert there.times == here.times and there.visual.tokens_BMD.shape[0] == 1
    np.testing.assert_allclose(there.visual.tokens_BMD[:1], here.visual.tokens_BMD, atol=1e-5)
    assert found[2] == wanted[2]
    before = watch(many, film, until=5)[1].save()  # and back
    back = watch(one, film, before, [Question("What?", END)])
    assert back[2] == wanted[2]


def test_a_file_that_is_cut_short_tampered_with_or_no_state_is_refused(halfway, tmp_path):
    content = halfway.read_bytes()
    for size in (0, 5, 300, len(content) // 2, len(content) - 1):
        (tmp_path / "short").write_bytes(content[:size])
        with pytest.raises(ValueError, match="short is cut short or damaged, or no state"):
            states.read_state(tmp_path / "short")
    for at in (len(content) - 10, len(content) // 2):
        (tmp_path / "other").write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(ValueError, match="other was changed after it was written: its checksum is another"):
            states.read_state(tmp_path / "other")
    (tmp_path / "told").write_bytes(content.replace(b'\\"frames\\": 5', b'\\"frames\\": 6'))
    assert (tmp_path / "told").read_bytes() != content
    with pytest.raises(ValueError, match="told was changed after it was written"):
        states.read_state(tmp_path / "told")
    with pytest.raises(ValueError, match="none does not exist"):
        states.read_state(tmp_path / "none")
    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match=r"a\.npz is cut short or damaged, or no state"):
        states.read_state(tmp_path / "a.npz")


def test_a_file_of_another_version_is_refused_by_both_numbers(halfway, tmp_path, monkeypatch):
    arrays, about = states.read_state(halfway)
    monkeypatch.setattr(states, "VERSION", 7)
    states.write_state(tmp_path / "later", arrays, about)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="later has the format version 7, and this vlmem reads version 1"):
        states.read_state(tmp_path / "later")


def test_a_file_of_another_model_is_refused_by_the_names_of_both(model, halfway):
    about, file = states.read_state(halfway)[1], str(halfway)
    mine = states.made_by(model.vlm, "RUN", digest(model.params))
    states.check_made_by(file, about["made_by"], mine)
    with pytest.raises(ValueError, match="a.state was made by RUN, which is not --checkpoint OTHER .* the digest"):
        states.check_made_by(file, about["made_by"], mine | {"checkpoint": "OTHER", "parameters": "0" * 32})
    config = json.loads(json.dumps(to_dict(model.vlm.config)))
    config["memory"]["write"] = "pair"
    other = mine | {"config": {key: config[key] for key in mine["config"]}}
    with pytest.raises(ValueError, match="RUN as it is now: model.memory.write was 'paper', here it is 'pair'"):
        states.check_made_by(file, about["made_by"], other)


def test_arrays_that_do_not_fit_are_refused(model, halfway):
    arrays, about = states.read_state(halfway)
    name = next(name for name in arrays if arrays[name].dtype == np.float32)
    for wrong in (arrays[name][..., :1], arrays[name].astype(np.float16)):
        with pytest.raises(ValueError, match="a state"):
            Watcher(model).restore(arrays | {name: wrong}, about["streams"])


def test_half_precision_comes_back_bit_for_bit(tmp_path):
    model = world.model(tmp_path / "half", compute_dtype="bfloat16")
    watcher = Watcher(model)
    for n in range(2):
        watcher.look([np.full((44, 44, 3), 100 * n, np.uint8)], [float(n)])
    arrays, streams = watcher.save()
    states.write_state(tmp_path / "a.state", arrays, {"streams": streams})
    other = Watcher(model)
    back, about = states.read_state(tmp_path / "a.state")
    other.restore(back, about["streams"])
    assert any(x.dtype == jax.numpy.bfloat16 for x in back.values())
    jax.tree.map(np.testing.assert_array_equal, other._watched, watcher._watched)
