"""Formulas compared by math-verify, in a process of its own that can be ended: what a model writes may take for ever.

Needs the extra `math`. Run as a program it answers lines of JSON, [output, reference], with true or false.
"""

import atexit
import json
import logging
import select
import subprocess
import sys
import threading

SECONDS = 5.0
"""That a comparison may take; a longer one counts as different."""
LONGEST = 4000
"""Characters of an output that are looked at, its last."""
_lock = threading.Lock()
_process: subprocess.Popen | None = None


def equal(output: str, reference: str) -> bool:
    """Whether the answer in an output and the reference are the same number, formula, set or interval.

    Raises ImportError where math-verify is missing.
    """
    global _process
    try:
        import math_verify  # noqa: F401 - here only to say what is missing; the process below uses it
    except ImportError as error:
        raise ImportError("the reward math needs math-verify; install vlmem_jax[math]") from error
    with _lock:
        if _process is None or _process.poll() is not None:
            command = [sys.executable, "-m", __name__]
            _process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            atexit.register(_process.kill)
            _process.stdout.readline()  # it is ready
        _process.stdin.write(json.dumps([output[-LONGEST:], reference]).encode() + b"\n")
        _process.stdin.flush()
        ready, _, _ = select.select([_process.stdout], [], [], SECONDS)
        line = _process.stdout.readline() if ready else b""
        if not line:
            _process.kill()
            _process = None
            return False
        return json.loads(line)


def main() -> None:
    """Answers until its input ends."""
    from math_verify import parse, verify

    logging.disable()  # it says that there is no time limit; there is, outside
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        output, reference = json.loads(line)
        try:
            wanted = parse(f"\\boxed{{{reference}}}", parsing_timeout=None) or parse(reference, parsing_timeout=None)
            same = bool(verify(wanted, parse(output, parsing_timeout=None), timeout_seconds=None))
        except Exception:  # of a parser that is given what a model wrote
            same = False
        sys.stdout.write(json.dumps(same) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
