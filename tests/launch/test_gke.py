"""The workload for GKE, and what a pod of it does."""

import shlex
import signal
import subprocess
from pathlib import Path

import pytest

from tests.launch.stage import PLACES, TRAIN, WORDS


def test_submits_a_workload_that_restarts(stage):
    stage.tool("xpk", 'for word; do case $word in --script-dir=*) ls -R "${word#*=}" >"$RECORDS/sent" ;; esac; done')
    words = ["--slices", "2", "--project", "p", "--zone", "z", "--max-restarts", "9", "--xpk=--storage data"]
    status, _, _ = stage.run("gke.sh", *PLACES["gke.sh"], *words, *TRAIN)
    assert status == 0
    ((*call, command),) = stage.calls("xpk")
    (folder,) = [word for word in call if word.startswith("--script-dir=")]
    assert (
        call
        == (
            "workload create --cluster=tpus --workload=vlmem --tpu-type=v5p-128 --num-slices=2 --max-restarts=9 "
            "--restart-on-exit-codes=1,2 --termination-grace-period-seconds=300 --storage data --project=p --zone=z "
            f"--base-docker-image=python:3.11 {folder}"
        ).split()
    )
    assert shlex.split(command.removeprefix("--command=")) == ["exec", "bash", "launch/worker.sh", "pod", *WORDS]
    sent = (stage.records / "sent").read_text()
    assert "worker.sh" in sent and "comemo.py" in sent and ".git" not in sent
    assert not Path(folder.partition("=")[2]).exists()


def test_an_image_of_ones_own_is_taken_as_it_is(stage):
    stage.tool("xpk", "exit 0")
    words = ["--image", "gcr.io/p/vlmem", "--setup", "mount data", "--compile-cache", "gs://bucket/c d"]
    stage.run("gke.sh", *PLACES["gke.sh"], *words, *TRAIN)
    ((*call, command),) = stage.calls("xpk")
    assert call[-1] == "--docker-image=gcr.io/p/vlmem" and not any("script-dir" in word for word in call)
    assert command.startswith(
        "--command=mount data && export JAX_COMPILATION_CACHE_DIR='gs://bucket/c d' && exec bash launch/worker.sh pod"
    )


def in_a_pod(stage) -> subprocess.Popen:
    """The training as xpk runs it."""
    line = shlex.join(["exec", "bash", "launch/worker.sh", "pod", *WORDS])
    return subprocess.Popen(
        ["bash", "-c", f"trap 'kill -TERM $!' TERM; ({line}) & PID=$!; wait $PID; wait $PID"],
        cwd=stage.root,
        env=stage.environment,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("status", [0, 3])
def test_a_pod_ends_as_the_training_does(status, stage):
    (stage.records / "vlmem.fails").write_text(f"{status}\n")
    pod = in_a_pod(stage)
    pod.communicate(timeout=20)
    assert pod.returncode == status
    assert stage.trainings() == [["--multihost", *WORDS]]


def test_a_pod_that_is_taken_away_saves_and_is_not_done(stage):
    (stage.records / "vlmem.waits").touch()
    pod = in_a_pod(stage)
    stage.wait_for_trainings(1)
    pod.send_signal(signal.SIGTERM)
    out, _ = pod.communicate(timeout=20)
    assert pod.returncode == 143
    assert stage.signals() == ["TERM\n"] and out.endswith("saved\n")
