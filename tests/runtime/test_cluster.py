"""How a process finds the others: what happens when it does not."""

import os
import socket
import subprocess
import sys

import pytest

from tests.train import world
from vlmem_jax.cli.main import main


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    folder = world.make(tmp_path_factory.mktemp("world"))
    return ["train", "--config", str(world.config_file(folder)), "--workdir", str(folder / "run")]


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--coordinator", "10.0.0.1"], "--coordinator must be HOST:PORT, such as 10.0.0.1:8476; got '10.0.0.1'"),
        (["--coordinator", "10.0.0.1:80", "--processes", "2"], "--coordinator needs --processes, how many there are"),
        (
            ["--coordinator", "10.0.0.1:80", "--processes", "2", "--process", "2"],
            "--process must be from 0 to 1 for --processes 2; got 2",
        ),
        (["--processes", "2", "--process", "0"], "--processes and --process need --coordinator HOST:PORT"),
        (["--profile", "10"], "--profile must be FIRST:END, steps counted from 1, such as 10:13; got '10'"),
        (["--profile", "13:10"], "--profile must be FIRST:END"),
    ],
)
def test_options_that_do_not_fit_are_named(line, capsys, options, message):
    assert main([*line, *options]) == 2
    assert message in capsys.readouterr().err


def test_a_coordinator_that_does_not_answer_is_named(line, capsys, free_port):
    address = f"127.0.0.1:{free_port}"
    options = ["--coordinator", address, "--processes", "2", "--process", "1", "--cluster-timeout", "1"]
    assert main([*line, *options]) == 2
    error = capsys.readouterr().err
    assert f"error: nothing answered at {address} for 1 s (Connection refused)" in error
    assert "--coordinator must be the address of process 0" in error and "--cluster-timeout" in error


def test_processes_that_do_not_come_are_named(line, free_port):
    address = f"127.0.0.1:{free_port}"
    options = ["--coordinator", address, "--processes", "3", "--process", "0", "--cluster-timeout", "2"]
    command = [sys.executable, "-m", "vlmem_jax", *line, *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, env=os.environ)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.endswith(
        f"error: not all of the 3 processes came to --coordinator {address} within 2 s; each must be running, with a "
        "--process of its own from 0 to 2; or raise --cluster-timeout\n"
    )
