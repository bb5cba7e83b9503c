"""Two real processes of four devices each."""

import os
import socket
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "two_hosts.py"


def run_hosts(paths, processor):
    """Exit codes and output of both hosts."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}"
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2])}
    hosts = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(i), coordinator, path, processor.tokenizer.folder],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i, path in enumerate(paths)
    ]
    try:
        outputs = [host.communicate(timeout=120)[0] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    return [host.returncode for host in hosts], outputs


def lines(folder):
    content = [folder.talk(f"{i}?", "z" * (1 + i % 9), image=folder.image(f"{i}.png", seed=i)) for i in range(12)]
    folder.image("3.png", 64, 32)
    folder.truncate("3.png")  # skipped without a word between the hosts
    return content


def test_each_host_decodes_its_part_of_the_global_batch(folder, processor):
    path = folder.jsonl(lines(folder))
    codes, outputs = run_hosts([path, path], processor)
    assert codes == [0, 0] and all("rows agree" in output for output in outputs), "\n".join(outputs)


def test_hosts_with_different_data_refuse_to_start(folder, processor):
    content = lines(folder)
    (folder.path / "other").mkdir()
    paths = [folder.jsonl(content), folder.jsonl(content[1:], "other/train.jsonl")]
    codes, outputs = run_hosts(paths, processor)
    assert all(codes)
    for output in outputs:
        assert "hosts must have the same data files and tokenizer, but these differ:\n  train.jsonl: " in output, (
            outputs
        )
