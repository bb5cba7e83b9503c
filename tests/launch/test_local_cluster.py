"""Processes on one machine: their words, their output, signals and failures."""

import os
import re
import signal
import subprocess

import pytest

from tests.launch.stage import TRAIN, WORDS


def test_starts_all_processes_as_one_cluster(stage):
    status, out, _ = stage.run("local_cluster.sh", "--processes", "3", "--devices", "2", *TRAIN)
    assert status == 0
    starts = stage.trainings()
    (coordinator,) = {words[-3] for words in starts}
    assert re.fullmatch(r"--coordinator=127\.0\.0\.1:6\d{4}", coordinator)
    assert starts == [[*WORDS, coordinator, "--processes=3", f"--process={index}"] for index in range(3)]
    for file in stage.records.glob("vlmem.*.env"):
        environment = file.read_text().splitlines()
        assert "XLA_FLAGS=--xla_force_host_platform_device_count=2" in environment
        assert "JAX_PLATFORMS=cpu" in environment and "JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo" in environment
    assert sorted(out.splitlines()) == [f"[{index}] {line}" for index in range(3) for line in ("saved", "step 1")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_each_process_once(number, stage):
    (stage.records / "vlmem.waits").touch()
    process = stage.start("local_cluster.sh", "--max-restarts", "3", *TRAIN)
    stage.wait_for_trainings(2)
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert stage.signals() == [f"{number.name[3:]}\n"] * 2
    assert out.count("saved") == 2 and len(stage.trainings()) == 2


def test_ctrl_c_at_a_terminal_reaches_each_process_once(stage):
    """The terminal sends it to the whole group of the launcher."""
    (stage.records / "vlmem.waits").touch()
    process = subprocess.Popen(
        [stage.root / "launch" / "local_cluster.sh", *TRAIN],
        env=stage.environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    stage.wait_for_trainings(2)
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert stage.signals() == ["INT\n"] * 2
    assert sorted(out.splitlines()) == ["[0] saved", "[0] step 1", "[1] saved", "[1] step 1"]


def test_starts_all_again_when_one_fails(stage):
    (stage.records / "vlmem.waits").touch()
    (stage.records / "vlmem.fails.1").write_text("7\n7\n")
    process = stage.start("local_cluster.sh", "--max-restarts", "2", *TRAIN)
    stage.wait_for_trainings(4)  # process 0 three times, process 1 once
    (stage.records / "vlmem.waits").unlink()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "failed with status 7; restart 2 of 2" in err
    assert len({words[-3] for words in stage.trainings()}) == 3  # a port for each start


def test_gives_up_with_the_first_failure(stage):
    (stage.records / "vlmem.waits").touch()
    (stage.records / "vlmem.fails.1").write_text("7\n9\n")
    status, _, err = stage.run("local_cluster.sh", "--max-restarts", "1", *TRAIN)
    assert status == 9  # of the last start; the process that did not fail was killed, which is no failure
    assert "not restarted any more (--max-restarts 1)" in err
    assert len(stage.trainings()) == 4
