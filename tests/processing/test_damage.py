"""Damaged files are samples' errors, and nothing else."""

import subprocess
import sys


def test_damaged_images_and_videos_open_or_raise_valueerror():
    """In a process of its own: a decoder that crashes or hangs would take the suite along."""
    command = [sys.executable, "-m", "tests.processing.damage", "--count", "300"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    opened = int(done.stdout.split(", ")[1].split()[0])
    assert 0 < opened < 300, "some open, others do not"
