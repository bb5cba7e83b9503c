"""The launcher of TPU VMs, on a cloud of one slice of one host: requests, restarts, preemption, signals."""

import re
import signal
import time

import pytest

from tests.launch.stage import PLACES, TRAIN, VLMEM, WORDS, Stage

GCLOUD = """
[ "$1 $2" = "compute tpus" ] || exit 1
for word; do case $word in --command=*) command=${word#*=} ;; esac; done
case "$3 $4" in
    "queued-resources create") echo WAITING_FOR_RESOURCES >"$RECORDS/state" ;;
    "queued-resources delete") rm "$RECORDS/state" ;;
    "queued-resources describe")
        cat "$RECORDS/state" 2>&1 || exit 1
        sed -i -e s/PROVISIONING/ACTIVE/ -e s/WAITING_FOR_RESOURCES/PROVISIONING/ "$RECORDS/state"
        ;;
    "tpu-vm describe") cat "$RECORDS/node" 2>/dev/null || echo READY ;;
    "tpu-vm scp") cp "$5" "$HOST" ;;
    "tpu-vm ssh")
        cd "$HOST"
        # the first line of the file is what becomes of the connection
        if [[ $command == *follow* && -s $RECORDS/connections ]]; then
            happens=$(head -n 1 "$RECORDS/connections")
            sed -i 1d "$RECORDS/connections"
            eval "$happens"
        fi
        HOME=$HOST bash -c "$command"
        ;;
    *) exit 1 ;;
esac
"""
"""A cloud of one slice of one host, whose home is the folder $HOST."""


@pytest.fixture
def cloud(stage, tmp_path) -> Stage:
    """A stage with a cloud; its host finds everything installed."""
    host = tmp_path / "host"
    stage.environment |= {"HOST": str(host), "HOSTNAME": "host-w-0"}
    stage.tool("gcloud", GCLOUD)
    stage.tool("vlmem", VLMEM, host / "vlmem_jax" / ".venv" / "bin")
    stage.install("tpu,gcs", host / "vlmem_jax")
    return stage


def launch(stage: Stage, *words: str) -> tuple[int, str, str]:
    return stage.run("tpu_vm.sh", *words, *PLACES["tpu_vm.sh"], "--poll", "0", *TRAIN)


def verbs(stage: Stage) -> list[str]:
    """What was asked of the cloud, looks at states left out."""
    verbs = []
    for call in stage.calls("gcloud"):
        if call[3] == "ssh":
            (command,) = [word for word in call if word.startswith("--command=")]
            assert "--worker=all" in call
            verbs.append(re.search(r".*worker\.sh (\w+)|$", command)[1] or command.removeprefix("--command="))
        elif call[3] != "describe":
            verbs.append(call[3])
    return verbs


def test_from_nothing_to_a_training_that_is_done(cloud):
    status, out, err = launch(cloud, "--spot", "--create=--labels=team=a --internal-ips", "--setup", "echo set up")
    assert status == 0, err
    assert verbs(cloud) == ["create", "scp", "install", "cd vlmem_jax && echo set up", "follow"]
    (create,) = [call for call in cloud.calls("gcloud") if call[3] == "create"]
    assert create == [
        "compute",
        "tpus",
        "queued-resources",
        "create",
        "mine",
        "--node-id=mine",
        "--zone=us-west4-a",
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--labels=team=a",
        "--internal-ips",
        "--spot",
    ]
    assert cloud.trainings() == [["--multihost", *WORDS]]
    assert "[0] step 1\n[0] saved\n" in out and "set up\n" in out
    assert "slice mine: WAITING_FOR_RESOURCES" in err and "mine still costs" in err


def test_gives_the_slice_back_in_the_end_if_told(cloud):
    assert launch(cloud, "--delete")[0] == 0
    (delete,) = [call for call in cloud.calls("gcloud") if call[3] == "delete"]
    assert delete[2:] == ["queued-resources", "delete", "mine", "--zone=us-west4-a", "--force", "--quiet"]
    assert verbs(cloud)[-1] == "delete"


def test_starts_again_after_a_failure_up_to_the_limit(cloud):
    (cloud.records / "vlmem.fails").write_text("4\n" * 5)
    status, _, err = launch(cloud, "--max-restarts", "2")
    assert status == 4
    # the rest of the hosts is stopped before each restart
    assert verbs(cloud) == ["create", "scp", "install", "follow", "stop", "follow", "stop", "follow"]
    assert "restart 2 of 2" in err and "mine still costs" in err


def test_a_connection_that_breaks_does_not_end_the_training(cloud):
    (cloud.records / "vlmem.waits").touch()
    lost = 'timeout 2 env HOME="$HOST" bash -c "$command"; exit 255'
    (cloud.records / "connections").write_text(f'{lost}\n(sleep 1; rm "$RECORDS/vlmem.waits") &\n')
    status, out, err = launch(cloud)
    assert status == 0, err
    assert verbs(cloud) == ["create", "scp", "install", "follow", "follow"]
    assert cloud.trainings() == [["--multihost", *WORDS]] and cloud.signals() == []
    assert out.endswith("[0] saved\n")


def test_a_slice_that_was_preempted_is_asked_for_again(cloud):
    (cloud.records / "connections").write_text('echo SUSPENDED >"$RECORDS/state"; exit 255\n')
    status, _, err = launch(cloud, "--spot")
    assert status == 0, err
    assert verbs(cloud) == [
        "create",
        "scp",
        "install",
        "follow",
        "delete",
        "create",
        "scp",
        "install",
        "follow",
    ]
    assert "slice mine was preempted" in err


def test_a_request_that_failed_is_shown_and_not_repeated(cloud):
    (cloud.records / "state").write_text("FAILED\n")
    status, _, err = launch(cloud, "--max-restarts", "0")
    assert status == 1
    assert verbs(cloud) == [] and "the request for mine failed" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_makes_the_hosts_save(number, cloud):
    (cloud.records / "vlmem.waits").touch()
    process = cloud.start("tpu_vm.sh", *PLACES["tpu_vm.sh"], "--poll", "0", "--delete", *TRAIN)
    cloud.wait_for_trainings(1)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert cloud.signals() == ["TERM\n"] and out.endswith("[0] saved\n")
    assert verbs(cloud)[-2:] == ["follow", "stop"]  # the slice stays
    assert "mine still costs" in err


def test_a_second_signal_leaves_the_hosts_alone(cloud, tmp_path):
    for file in ("vlmem.waits", "vlmem.saves"):
        (cloud.records / file).touch()
    process = cloud.start("tpu_vm.sh", *PLACES["tpu_vm.sh"], "--poll", "0", *TRAIN)
    cloud.wait_for_trainings(1)
    process.send_signal(signal.SIGTERM)
    while not cloud.signals():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=10)  # no connection is left that would keep it open
    assert process.returncode == 130 and "saved" not in out
    (cloud.records / "vlmem.saves").unlink()
    status = tmp_path / "host" / ".vlmem" / "status"
    while not (status.exists() and status.read_text()):
        time.sleep(0.02)
    assert status.read_text() == "0\n" and cloud.signals() == ["TERM\n"]


def test_stop_ends_a_training_that_another_terminal_follows(cloud):
    (cloud.records / "vlmem.waits").touch()
    process = cloud.start("tpu_vm.sh", *PLACES["tpu_vm.sh"], "--poll", "0", *TRAIN)
    cloud.wait_for_trainings(1)
    assert cloud.run("tpu_vm.sh", "stop", "--name", "mine", "--zone", "us-west4-a")[0] == 0
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and out.endswith("[0] saved\n")


def test_train_neither_copies_nor_starts_a_second_training(cloud):
    (cloud.records / "vlmem.waits").touch()
    first = cloud.start("tpu_vm.sh", *PLACES["tpu_vm.sh"], "--poll", "0", *TRAIN)
    cloud.wait_for_trainings(1)
    second = cloud.start("tpu_vm.sh", "train", *PLACES["tpu_vm.sh"], "--poll", "0", *TRAIN)
    while verbs(cloud).count("follow") < 2:
        time.sleep(0.02)
    for words in (
        ["train", *PLACES["tpu_vm.sh"], *TRAIN, "--stage", "finetune"],
        ["run", *PLACES["tpu_vm.sh"], *TRAIN],
    ):
        status, _, err = cloud.run("tpu_vm.sh", *words)
        assert status == 64 and "error: on host-w-0 runs vlmem train" in err
    (cloud.records / "vlmem.waits").unlink()
    for process in (first, second):
        out, _ = process.communicate(timeout=30)
        assert process.returncode == 0 and out.endswith("[0] saved\n")
    assert cloud.signals() == []
    assert verbs(cloud) == ["create", "scp", "install", "follow", "follow", "follow", "scp", "install"]
    assert len(cloud.trainings()) == 1


def test_delete(cloud):
    (cloud.records / "state").write_text("ACTIVE\n")
    assert cloud.run("tpu_vm.sh", "delete", "--name", "mine", "--zone", "us-west4-a")[0] == 0
    assert verbs(cloud) == ["delete"]
