"""Runs that are killed at random moments, in short; tests/train/kills.py does it as often as one likes."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_loses_nothing():
    command = [sys.executable, "-m", "tests.train.kills", "--count", "3"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "killed 3 times: no step lost, the same losses" in done.stdout
