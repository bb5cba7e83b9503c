"""Runs of several processes on this machine."""

import os
import socket
import subprocess
import sys
import textwrap


def start(line, processes=2, last=(), script="", devices=8):
    """Processes that have `devices` between them; the last one also gets the options `last`, and runs `script`."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    # the last of two values counts
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices // processes}"
    command = "import sys\nfrom vlmem_jax.cli.main import main\n{}\nsys.exit(main(sys.argv[1:]))"
    hosts = []
    for number in range(processes):
        is_last = number == processes - 1
        program = command.format(textwrap.dedent(script) if is_last else "")
        options = ["--coordinator", address, "--processes", str(processes), "--process", str(number)]
        hosts.append(
            subprocess.Popen(
                [sys.executable, "-c", program, *line, *options, *(last if is_last else ())],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "XLA_FLAGS": flags},
            )
        )
    return hosts


def finish(hosts, codes):
    """Output and errors of each, which must end with these exit codes."""
    try:
        texts = [host.communicate(timeout=900) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == codes, texts
    return texts
