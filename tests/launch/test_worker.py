"""What a host does for the launchers, beyond what their own tests show."""

import subprocess
import sys

import pytest

from tests.launch.stage import Stage


@pytest.fixture
def host(stage) -> Stage:
    """A host whose system has no Python that is new enough; uv knows of one. Everything is installed for it."""
    for name in ("python", "python3", "python3.11"):
        stage.tool(name, f'case $* in "-c "*) exit 1 ;; *find*) echo {sys.executable} ;; esac')
    del stage.environment["PYTHON"]
    stage.install("tpu,gcs")
    return stage


def install(host: Stage) -> None:
    subprocess.run(["bash", "launch/worker.sh", "install"], cwd=host.root, env=host.environment, check=True)


def test_an_old_system_gets_a_python_of_its_own(host):
    install(host)
    brought = [call for call in host.calls("python3") if call[0] == "-m"]
    assert brought == [
        ["-m", "pip", "install", "--user", "--quiet", "uv"],
        ["-m", "uv", "python", "install", "--quiet", "3.11"],
        ["-m", "uv", "python", "find", "3.11"],
    ]


def test_and_keeps_it(host):
    (host.root / ".venv" / "bin").mkdir(parents=True)
    (host.root / ".venv" / "bin" / "python").symlink_to(sys.executable)
    install(host)
    assert all(call[0] == "-c" for call in host.calls("python3"))
