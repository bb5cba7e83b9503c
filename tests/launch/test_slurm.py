"""The job for SLURM: what it asks for, and what it makes of signals and failures."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.stage import ROOT, TRAIN, WORDS


@pytest.fixture
def job(stage) -> list[str]:
    """The command line of a job whose tools are at hand: srun starts two processes, scancel signals them."""
    stage.tool("sbatch", 'cat >"$RECORDS/job.sh"')
    stage.tool(
        "srun",
        """
        trap 'kill -KILL $(cat "$RECORDS/pids")' TERM # as srun does
        while [ "$1" != vlmem ]; do shift; done
        "$@" & echo $! >"$RECORDS/pids"
        "$@" & echo $! >>"$RECORDS/pids"
        code=0
        for pid in $(cat "$RECORDS/pids"); do wait $pid || code=$?; done
        exit $code
        """,
    )
    stage.tool("scancel", 'kill -TERM $(cat "$RECORDS/pids")')
    stage.tool("scontrol", "exit 0")
    stage.environment["SLURM_JOB_ID"] = "17"
    return ["bash", str(stage.records / "job.sh")]


def start(stage, job) -> subprocess.Popen:
    return subprocess.Popen(job, env=stage.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_batch_script_asks_for_what_was_said(stage, job):
    words = ["--nodes", "2", "--gpus-per-node", "4", "--time", "24:00:00", "--partition", "gpu", "--name", "mine"]
    words += ["--cpus-per-process", "12", "--sbatch=--exclusive --mem=0", "--grace", "120"]
    assert stage.run("slurm.sh", *words, *TRAIN)[0] == 0
    text = Path(job[1]).read_text()
    assert set(re.findall("^#SBATCH (.*)", text, re.MULTILINE)) == {
        "--job-name=mine",
        "--output=mine-%j.log",
        "--open-mode=append",
        "--nodes=2",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
        "--cpus-per-task=12",
        "--time=24:00:00",
        "--partition=gpu",
        "--exclusive",
        "--mem=0",
        "--requeue",
        "--signal=B:USR1@120",
    }
    assert "srun --kill-on-bad-exit=1 --cpus-per-task=12" in text
    assert "JAX_LOCAL_DEVICE_IDS" not in text
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run(
        [shellcheck, "-x", "--exclude=SC2016,SC2329", job[1]], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_one_process_a_node_gets_all_its_gpus(stage, job):
    stage.run("slurm.sh", "--gpus-per-node", "4", "--processes-per-node", "1", *TRAIN)
    text = Path(job[1]).read_text()
    assert "#SBATCH --ntasks-per-node=1\n" in text
    assert "export JAX_LOCAL_DEVICE_IDS=0,1,2,3\n" in text


def test_the_job_trains_and_starts_again_after_a_failure(stage, job):
    (stage.records / "vlmem.fails").write_text("5\n5\n")
    stage.run("slurm.sh", *TRAIN)
    process = start(stage, job)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "failed with status 5; restart 1 of 3" in err
    assert stage.trainings() == [["--multihost", *WORDS]] * 4
    assert stage.calls("scontrol") == []


@pytest.mark.parametrize(
    ("number", "requeued"), [(signal.SIGUSR1, [["requeue", "17"]]), (signal.SIGUSR2, [])], ids=["limit", "stopped"]
)
def test_a_signal_saves(number, requeued, stage, job):
    """Before the time limit, then the job goes back into the queue; and on demand."""
    (stage.records / "vlmem.waits").touch()
    stage.run("slurm.sh", *TRAIN)
    process = start(stage, job)
    stage.wait_for_trainings(2)
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert stage.calls("scancel") == [["--signal=TERM", "17"]]
    assert stage.signals() == ["TERM\n"] * 2 and out.count("saved") == 2
    assert stage.calls("scontrol") == requeued


def test_when_slurm_ends_the_job_nothing_is_started_again(stage, job):
    (stage.records / "vlmem.waits").touch()
    stage.run("slurm.sh", *TRAIN)
    process = start(stage, job)
    stage.wait_for_trainings(2)
    process.send_signal(signal.SIGTERM)
    subprocess.run([stage.bin / "scancel"], env=stage.environment, check=True)  # SLURM, at the processes
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert stage.signals() == ["TERM\n"] * 2
    assert stage.calls("scontrol") == [] and len(stage.trainings()) == 2
