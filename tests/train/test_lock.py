"""One run in a folder at a time."""

import json
import multiprocessing
import os
import socket
import time

import pytest

from vlmem_jax.config import ConfigError
from vlmem_jax.train import lock
from vlmem_jax.train.lock import NAME, locked


def write(folder, **facts):
    folder.mkdir(exist_ok=True)
    about = {"host": socket.gethostname(), "pid": 1, "born": "1", "since": "then", "token": "t", "beat": 0}
    (folder / NAME).write_text(json.dumps(about | facts))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "SILENCE", 0.5)


def test_a_second_run_is_refused_by_name_and_the_folder_is_free_after(tmp_path):
    said = []
    refused = pytest.raises(ConfigError, match=rf"another run works in .*run: process {os.getpid()} on")
    with locked(tmp_path / "run", said.append), refused:
        _in_another_process(tmp_path / "run")
    assert not (tmp_path / "run" / NAME).exists() and said == []
    _in_another_process(tmp_path / "run")


def _hold(folder, answer):
    try:
        with locked(folder):
            answer.put("")
    except ConfigError as error:
        answer.put(str(error))


def _in_another_process(folder):
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=_hold, args=(folder, answer))
    process.start()
    words = answer.get()
    process.join()
    if words:
        raise ConfigError(words)


@pytest.mark.parametrize("facts", [{"pid": 2**22 + 1}, {"born": "0"}, {"pid": os.getpid()}])
def test_what_a_dead_process_left_is_taken_over_and_told(tmp_path, facts):
    write(tmp_path, **facts)
    said = []
    with locked(tmp_path, said.append):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    assert "since then, which is gone" in said[0]


def test_of_another_machine_signs_of_life_count(tmp_path):
    said = []
    write(tmp_path, host="elsewhere")
    with locked(tmp_path, said.append):
        pass
    assert "waiting up to" in said[0] and "which is gone" in said[1]

    beating = iter(range(1000))
    real = lock._read

    def read(file):
        write(tmp_path, host="elsewhere", beat=next(beating))
        return real(file)

    lock._read = read
    try:
        write(tmp_path, host="elsewhere")
        with pytest.raises(ConfigError, match="process 1 on elsewhere since then"), locked(tmp_path, said.append):
            pass
    finally:
        lock._read = real


def test_a_lock_that_cannot_be_read_is_taken_over(tmp_path):
    (tmp_path / NAME).write_text("{")
    with locked(tmp_path):
        pass


def test_a_lock_keeps_beating(tmp_path):
    with locked(tmp_path):
        first = json.loads((tmp_path / NAME).read_text())["beat"]
        for _ in range(100):
            if json.loads((tmp_path / NAME).read_text())["beat"] > first:
                return
            time.sleep(0.05)
    raise AssertionError("no sign of life in 5 s")
