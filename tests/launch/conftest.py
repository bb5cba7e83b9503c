import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.stage import Stage


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path)
    yield stage
    for file in ("vlmem.waits", "vlmem.saves"):  # ends what a test that failed has left
        (stage.records / file).unlink(missing_ok=True)


@pytest.fixture(autouse=True)
def _ctrl_c_is_heard():
    """What a shell starts in the background ignores Ctrl-C, and so would all that it starts."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)
