"""Many videos by several processes: each is remembered by one of them."""

import collections
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlmem_jax.agent.shards import Claims, Shard, claimed, left

ROOT = Path(__file__).parents[2]


def test_processes_share_a_folder_and_finish_what_a_killed_one_left(tmp_path):
    command = [sys.executable, "-m", "tests.agent.sharded", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["killed"] == [True, False, False] and told["failed"] == [0, 0]
    dead = {video for word, *rest in told["before"][told["dead"]] for video in rest if word == "began"}
    assert dead and sorted(told["claims"]) == sorted(f"{video}.0" for video in dead), "the others let go of theirs"
    lines = [line for log in told["after"].values() for line in log]
    began, did = (collections.Counter(line[1] for line in lines if line[0] == word) for word in ("began", "did"))
    assert len(did) == 12 and set(did.values()) == {1}, "each video is done once"
    assert {video for video, count in began.items() if count == 2} == dead and set(began.values()) == {1, 2}
    assert told["states"] == ["closed"] * 12 and told["left"] == 0
    assert len(told["calls"]) == len(set(told["calls"])), "no call that was answered was made again"
    assert set(told["calls"]) == set(told["finished"])


def test_shards_part_all_videos():
    videos = [f"video-{n:016x}" for n in range(200)]
    parts = [[video for video in videos if Shard(n, 4).has(video)] for n in range(4)]
    assert sorted(sum(parts, [])) == videos and all(20 < len(part) < 80 for part in parts)
    assert all(Shard().has(video) for video in videos)
    assert parts[0] == [video for video in [*videos, "another"] if Shard(0, 4).has(video) and video != "another"]


def test_a_video_is_claimed_by_one(tmp_path):
    with Claims(tmp_path) as one, Claims(tmp_path) as other:
        assert one.take("a.mp4-01") and not other.take("a.mp4-01") and not other.take("a.mp4-01", steal=True)
        assert not one.take("a.mp4-01"), "nor twice by the same"
        assert other.take("a.mp4-1"), "of which the other name is no part"
        one.release("a.mp4-01")
        assert other.take("a.mp4-01")
    assert not list(tmp_path.iterdir())


def ended(tmp_path, video, **changes):
    """A claim of a process that has ended."""
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    with Claims(tmp_path) as claims:
        claims._me |= {"process": child} | changes
        assert claims.take(video)
        claims._held.clear()


def test_what_a_process_left_is_taken_over_where_that_is_wanted(tmp_path):
    ended(tmp_path, "a-1")
    with Claims(tmp_path) as one, Claims(tmp_path) as other:
        assert not one.take("a-1")
        assert one.take("a-1", steal=True) and not other.take("a-1", steal=True)
        one.release("a-1")
    assert not list(tmp_path.iterdir())


def test_of_another_machine_signs_of_life_tell(tmp_path):
    """Numbers of its processes say nothing here."""
    ended(tmp_path, "a-1", machine="another")
    with Claims(tmp_path) as claims:
        assert not claims.take("a-1", steal=True), "it may be at it"
        os.utime(tmp_path / "a-1.0", (time.time() - 200, time.time() - 200))
        assert claims.take("a-1", steal=True)
        claims.release("a-1")
    with Claims(tmp_path, lease=0.2) as claims:
        claims._me["machine"] = "another"
        assert claims.take("a-1")
        time.sleep(0.5)
        with Claims(tmp_path, lease=0.2) as other:
            assert not other.take("a-1", steal=True), "it is touched as long as it is held"


def test_who_was_taken_over_and_comes_back_leaves_the_claim_of_the_other(tmp_path):
    with Claims(tmp_path) as slow, Claims(tmp_path) as other, Claims(tmp_path) as third:
        slow._me["machine"] = "another"
        assert slow.take("a-1")
        os.utime(tmp_path / "a-1.0", (0, 0))
        assert other.take("a-1", steal=True)
        slow.release("a-1")
        assert not third.take("a-1") and not third.take("a-1", steal=True)


def test_two_that_take_over_at_once_do_not_both_have_it(tmp_path, monkeypatch):
    """The slower one sees that the claim it meant is gone, though there is one of the same name again."""
    ended(tmp_path, "a-1")
    with Claims(tmp_path) as fast, Claims(tmp_path) as slow, Claims(tmp_path) as third:
        looked = slow._has_ended

        def meanwhile(claim):
            found = looked(claim)
            if fast.take("a-1", steal=True):
                fast.release("a-1")
                assert third.take("a-1")
            return found

        monkeypatch.setattr(slow, "_has_ended", meanwhile)
        assert not slow.take("a-1", steal=True)
        assert [path.name for path in tmp_path.iterdir()] == ["a-1.0"]


def test_own_videos_come_first_and_those_of_others_where_they_are_left(tmp_path):
    videos, done = [f"video-{n}" for n in range(20)], set()
    own, rest = ([video for video in videos if Shard(n, 2).has(video)] for n in range(2))
    with Claims(tmp_path) as claims, Claims(tmp_path) as other:
        assert other.take(own[0]) and other.take(rest[0])
        done.add(own[1])
        assert list(claimed(videos, claims, done.__contains__, Shard(0, 2))) == own[2:]
        for video in own[2:]:
            claims.release(video)
        assert list(claimed(videos, claims, done.__contains__, Shard(0, 2), steal=True)) == own[2:] + rest[1:]
    assert left(videos, done.__contains__, Shard(0, 2)) == [own[0], *own[2:]]


def test_what_was_done_just_now_is_let_go(tmp_path):
    answers = iter([False, True])
    with Claims(tmp_path) as claims:
        assert list(claimed(["a-1"], claims, lambda video: next(answers))) == []
        assert not list(tmp_path.iterdir())


def test_a_lease_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="lease must be above 0, got 0"):
        Claims(tmp_path, lease=0)
