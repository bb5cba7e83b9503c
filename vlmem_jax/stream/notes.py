"""What is told of a stream: events that are counted and said, and a log of a line a step."""

import collections
import json
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SAID = 3
"""Events of a kind that are said each; of later ones, the tenth, the hundredth, and so on."""


class Log:
    """A JSONL file that grows, or none; a full disk ends the log, not the stream."""

    def __init__(self, file: str | Path | None, say: Callable[[str], None]):
        """Raises OSError for a file that cannot be written."""
        self._say = say
        self._file = None
        if file is not None:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            self._file = open(file, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - it is closed by `close`
        self._lock = threading.Lock()

    def write(self, **fields: Any) -> None:
        with self._lock:
            if self._file is None:
                return
            try:
                self._file.write(json.dumps(fields, ensure_ascii=False) + "\n")
            except OSError as error:
                self._file = None
                self._say(f"--log is given up: {error.strerror}; looking goes on")

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None


class Notes:
    """Events that are no end of a stream, such as a frame that cannot be decoded. Threads may call it side by side."""

    def __init__(self, say: Callable[[str], None] = print, log: Log | None = None):
        self._say, self._log = say, log or Log(None, say)
        self._lock = threading.Lock()
        self.counts: collections.Counter[str] = collections.Counter()

    def add(self, kind: str, text: str) -> None:
        """Counts an event, keeps it in the log, and says it, if there were not too many of its kind."""
        with self._lock:
            self.counts[kind] += 1
            count = self.counts[kind]
            self._log.write(event=kind, text=text, count=count)
            if count <= SAID or math.log10(count).is_integer():
                self._say(text if count <= SAID else f"{text} ({count} such by now)")


class Rates:
    """Means over the newest steps."""

    def __init__(self, size: int = 100):
        self._times: collections.deque[float] = collections.deque(maxlen=size)
        self._alike: collections.deque[float] = collections.deque(maxlen=size)

    def add(self, similarity: float) -> None:
        self._times.append(time.monotonic())
        self._alike.append(similarity)

    @property
    def similarity(self) -> float | None:
        """None before there are as many steps as it is a mean of."""
        return sum(self._alike) / len(self._alike) if len(self._alike) == self._alike.maxlen else None

    @property
    def fps(self) -> float:
        """Frames a second."""
        passed = self._times[-1] - self._times[0] if len(self._times) > 1 else 0.0
        return (len(self._times) - 1) / passed if passed else 0.0
