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
