"""Several processes as one run: how this one finds the others, and how it leaves them."""

import atexit
import contextlib
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax

from vlmem_jax.config import ConfigError

TIMEOUT = 300
"""Seconds that a process waits for the others at the start."""
LEAVING_SECONDS = 10
"""For a process that failed: to say why, and to end."""


@contextlib.contextmanager
def joined(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, timeout: int = TIMEOUT
) -> Iterator[None]:
    """Makes this process one of a run of several, before any other use of jax.

    `coordinator` is HOST:PORT of process 0, which listens there. Without it, jax asks the surroundings: TPU pods,
    SLURM, Open MPI and Kubernetes are known. Waits up to `timeout` seconds for the others; raises ConfigError if
    process 0 does not answer, and ends this process if another one does not come. A process that fails in here leaves
    at once, so that the others end, too, and do not wait.
    """
    if coordinator is None:
        _find(timeout)
    else:
        _meet(coordinator, processes, process, timeout)
    try:
        yield
    except BaseException as error:
        # at exit, jax would wait for the others, who wait for this process, and threads for work that never ends
        code = 2 if isinstance(error, ValueError | OSError) else 130 if isinstance(error, KeyboardInterrupt) else 1
        atexit.register(_leave, code)
        _later(LEAVING_SECONDS, lambda: _leave(code))
        if isinstance(error, jax.errors.JaxRuntimeError) and _LOST.search(str(error)):
            print(
                "error: another process of this run has ended or cannot be reached; its output may say why. Start all "
                f"again: the run goes on from its last checkpoint ({str(error).splitlines()[0]})",
                file=sys.stderr,
                flush=True,
            )
            raise SystemExit(1) from error
        raise
    jax.distributed.shutdown()


def _find(timeout: int) -> None:
    try:
        _initialize(timeout, f"--multihost did not bring all processes together within {timeout} s")
    except ValueError as error:  # of jax: it has found nothing
        raise ConfigError(
            f"--multihost found no cluster that jax knows (TPU pod, SLURM, Open MPI, Kubernetes): {error} Elsewhere, "
            "give --coordinator HOST:PORT, --processes and --process"
        ) from error


def _meet(coordinator: str, processes: int | None, process: int | None, timeout: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"--coordinator must be HOST:PORT, such as 10.0.0.1:8476; got {coordinator!r}")
    if processes is None or process is None:
        raise ConfigError("--coordinator needs --processes, how many there are, and --process, the number of this one")
    if not 0 <= process < processes:
        raise ConfigError(f"--process must be from 0 to {processes - 1} for --processes {processes}; got {process}")
    end = time.monotonic() + timeout
    if process:
        _await_coordinator(host.strip("[]"), int(port), timeout)
    _initialize(
        max(round(end - time.monotonic()), 1),
        f"not all of the {processes} processes came to --coordinator {coordinator} within {timeout} s; each must be "
        f"running, with a --process of its own from 0 to {processes - 1}",
        coordinator_address=coordinator,
        num_processes=processes,
        process_id=process,
        cluster_detection_method="deactivate",
    )


def _initialize(timeout: int, late: str, **options) -> None:
    """Joins the others; after `timeout` seconds ends this process with the error `late`."""

    def give_up() -> None:
        print(f"error: {late}; or raise --cluster-timeout", file=sys.stderr)
        _leave(2)

    # the loop has its own way to agree on a stop; jax's would swallow every SIGTERM before the loop begins
    jax.config.update("jax_enable_preemption_service", False)
    watch = _later(timeout, give_up)  # jax aborts when its own time is over, with a stack trace
    try:
        jax.distributed.initialize(initialization_timeout=timeout + 60, **options)
    finally:
        watch.cancel()


def _await_coordinator(host: str, port: int, timeout: int) -> None:
    """Waits until somebody listens there."""
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise ConfigError(
                    f"nothing answered at {host}:{port} for {timeout} s ({error.strerror or error}); --coordinator "
                    "must be the address of process 0, which must be running; or raise --cluster-timeout"
                ) from error
            time.sleep(0.2)


def _later(seconds: float, action: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(seconds, action)
    timer.daemon = True
    timer.start()
    return timer


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


_LOST = re.compile("gloo|connection|socket|UNAVAILABLE|heartbeat", re.IGNORECASE)
"""What the collectives of CPU, GPU and TPU say when a process at the other end is gone."""
