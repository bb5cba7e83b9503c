"""A memory that is written by whoever is killed, and calls that are made once."""

import json
import subprocess
import sys
from pathlib import Path

from tests.agent.killed import Logged
from tests.agent.scripted import frames_of, segment
from tests.agent.stores import MADE, written
from vlmem_jax.agent.building import build
from vlmem_jax.agent.calls import Call, Cost, Reply, run, run_all
from vlmem_jax.agent.nodes import Frame
from vlmem_jax.agent.store import CallCount, open_store
from vlmem_jax.agent.writing import journalled, write_store

ROOT = Path(__file__).parents[2]


def test_killed_at_any_statement_it_goes_on_to_the_same_memory(tmp_path):
    command = [sys.executable, "-m", "tests.agent.killed", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    points, finished = told["points"], [point["finished"] for point in told["points"]]
    assert all(point["killed"] and point["the same"] and not point["faults"] for point in points)
    assert [point["made twice"] for point in points] == [0] * len(points)
    assert finished == sorted(finished) and finished[-1] == told["calls"], "it was killed between all calls"
    assert {(point["nodes"], point["state"]) for point in points} == {(None, "building"), (0, "building")}
    assert told["episodes"] > 1 and told["state"] == "closed"


def test_a_memory_that_is_there_asks_nothing(tmp_path):
    segments = [segment(n) for n in range(4)]
    with write_store(tmp_path, MADE) as store:
        first = run(journalled(build(segments, frames_of=frames_of), store), Logged(tmp_path / "log"))
        calls = (tmp_path / "log").read_text()
        assert run(journalled(build(segments, frames_of=frames_of), store), Logged(tmp_path / "log")) == first
        assert (tmp_path / "log").read_text() == calls
        assert store.cost()["caption"] == CallCount(4, 200)


def test_equal_calls_are_made_once_and_few_together(tmp_path):
    calls = [Call("caption", (Frame("a", float(n % 3)),)) for n in range(7)]
    asked = []

    class Model:
        def answer(self, calls):
            asked.append(len(calls))
            return [Reply(f"at {call.frames[0].time}") for call in calls]

    def work():
        return (yield calls)

    with write_store(tmp_path, MADE) as store:
        replies = run(journalled(work(), store, at_once=2), Model())
    assert [reply.text for reply in replies] == [f"at {n % 3}.0" for n in range(7)] and asked == [2, 1]


def test_videos_side_by_side_each_have_their_journal(tmp_path):
    def work(name):
        [reply] = yield [Call("caption", (name,))]
        return reply.text

    class Model:
        def answer(self, calls):
            assert [call.text for call in calls] == ["a", "b"]
            return [Reply(call.text.upper()) for call in calls]

    with write_store(tmp_path / "a", MADE) as a, write_store(tmp_path / "b", MADE) as b:
        assert run_all([journalled(work("a"), a), journalled(work("b"), b)], Model()) == ["A", "B"]
        assert a.reply(Call("caption", ("a",)).key) == Reply("A") and a.reply(Call("caption", ("b",)).key) is None


def test_what_calls_took_is_added_up(tmp_path):
    costs = [Cost(100, 7, 3, 12, 1 / 3, 0.1), Cost(50, 0, 2, 8, 2 / 3, 0.2)]
    with write_store(tmp_path, MADE) as store:
        for n, cost in enumerate(costs):
            with store.transaction() as batch:
                batch.reply(Call("decide", (str(n),)), Reply(cost=cost))
        assert store.spent() == {"decide": costs[0] + costs[1]}
        assert store.reply(Call("decide", ("0",)).key).cost == costs[0]


def test_replies_come_back_bit_by_bit(tmp_path):
    replies = [Reply("\ud800 ä"), Reply(tokens=[("yes", -1 / 3), ("no", float("-inf"))]), Reply(tokens=[])]
    with write_store(tmp_path, MADE) as store:
        for n, reply in enumerate(replies):
            with store.transaction() as batch:
                batch.reply(call := Call("answer", (str(n),)), reply)
            assert store.reply(call.key) == reply


def test_a_memory_is_one_file_when_nobody_writes(tmp_path):
    written(tmp_path)
    with open_store(tmp_path) as reader:
        with write_store(tmp_path, MADE) as store, store.transaction() as batch:
            batch.mark("open")
        assert reader.state == "open" and reader.pyramid()
    with write_store(tmp_path, MADE):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"memory.sqlite", "writer.lock", "frames"}
