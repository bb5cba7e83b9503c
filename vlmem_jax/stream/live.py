"""Cameras, pipes and addresses as streams: what comes is live, and what is lost is tried again.

An address or a device is opened because the user has named it, by the formats and protocols that its kind needs and no
others: no playlist or description can make it open another.
"""

import re
import time
from collections.abc import Callable, Iterator
from typing import Any

from vlmem_jax.processing.video import FORMATS
from vlmem_jax.stream.decoding import decoded, errors, picture, reason
from vlmem_jax.stream.frames import Reading, Shown, Times

PROTOCOLS = {
    "rtsp": "rtsp,rtp,rtcp,udp,tcp",
    "rtsps": "rtsp,rtsps,rtp,rtcp,udp,tcp,tls",
    "http": "http,tcp",
    "https": "https,http,tcp,tls",
    "tcp": "tcp",
    "udp": "udp",
}
"""By the scheme of an address, the protocols of FFmpeg that may be used."""
ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
LISTED = ",".join((*FORMATS.values(), "mpjpeg"))
"""Formats that are read; the last is that of cameras that send JPEGs over HTTP."""
OF_RTSP = f"rtsp,sdp,rtp,{LISTED}"
CAMERA = "v4l2"
"""FFmpeg's name of what reads cameras under Linux."""
SILENCE = 10.0
"""Seconds without data after which a stream counts as lost."""
LONGEST_WAIT = 30.0
"""Seconds between two tries to reach a stream that was lost; the first comes after one, the next after twice that."""


class Live:
    """A stream whose frames come when they come. One that breaks off is opened again, and its time goes on."""

    def __init__(self, name: str, kind: str, reading: Reading, opener: Callable[..., Any] | None = None):
        """`kind`: address, device or pipe; `opener` in place of `av.open`. Raises ValueError if it cannot be opened at
        first."""
        self.name, self._url, self._kind, self._reading = without_password(name), name, kind, reading
        self._opener = opener or _av_open
        self._options = self._allowed()
        try:
            self._container = self._open()
        except (*errors(), ValueError) as error:
            raise ValueError(f"--video {self.name} cannot be opened: {reason(error)}") from error
        self.live = not (kind == "address" and _size(self._container) > 0)
        """False of a file that is read from an address, which has an end and can wait."""
        self._comes_back = self.live and kind != "pipe"
        self._wait, self._last = 1.0, time.monotonic()
        """Seconds before the next try; when the newest frame came."""

    def _allowed(self) -> dict[str, Any]:
        """Arguments of `av.open`."""
        if self._kind == "device":
            return {"format": CAMERA}
        if self._kind == "pipe":
            return {"options": {"format_whitelist": LISTED, "protocol_whitelist": "file"}}
        scheme = ADDRESS.match(self._url)[1].lower()
        if scheme not in PROTOCOLS:
            raise ValueError(f"--video {self.name}: an address is one of {', '.join(PROTOCOLS)}; got {scheme}")
        is_rtsp = scheme.startswith("rtsp")
        options = {"format_whitelist": OF_RTSP if is_rtsp else LISTED, "protocol_whitelist": PROTOCOLS[scheme]}
        return {"options": options | ({"rtsp_flags": "prefer_tcp"} if is_rtsp else {})}

    def _open(self) -> Any:
        url = f"file:{self._url}" if self._kind == "pipe" else self._url
        container = self._opener(url, timeout=SILENCE, **self._options)
        if not container.streams.video or container.streams.video[0].codec_context is None:
            container.close()
            raise ValueError("it holds no video stream of a known codec")
        return container

    def __iter__(self) -> Iterator[Shown]:
        notes, container = self._reading.notes, self._container
        times = Times(self.name, _rate(container), notes, time.monotonic if self.live else None)
        while container is not None:
            problem = "it ended"
            try:
                stream = container.streams.video[0]
                for frame in decoded(container, stream, self.name, notes):
                    at, ends = times.of(frame)
                    self._wait, self._last = 1.0, time.monotonic()
                    yield Shown(
                        at, ends, lambda frame=frame, stream=stream: picture(frame, stream, self.name, self._reading)
                    )
            except errors() as error:
                problem = reason(error)
            finally:
                container.close()
            if not self._comes_back or self._reading.stop.is_set():
                if problem != "it ended":
                    notes.add("ended early", f"{self.name} broke off: {problem}")
                return
            container = self._again(problem)
            away = time.monotonic() - self._last
            if container is not None:
                times.lost(away)
                notes.add("gap", f"{self.name} is back after {away:.1f} s; what was seen before is kept")

    def _again(self, problem: str) -> Any:
        """The stream opened again; None: it is given up, or nobody waits any more."""
        notes, stop, limit = self._reading.notes, self._reading.stop, self._reading.give_up
        while True:
            if limit is not None and time.monotonic() - self._last + self._wait > limit:
                notes.add("given up", f"{self.name} is lost ({problem}), and given up after {limit:g} s")
                return None
            notes.add("lost", f"{self.name} is lost: {problem}; trying again in {self._wait:g} s")
            if stop.wait(self._wait):
                return None
            self._wait = min(2 * self._wait, LONGEST_WAIT)
            try:
                return self._open()
            except (*errors(), ValueError) as error:
                problem = reason(error)


def without_password(name: str) -> str:
    """An address as messages show it."""
    return re.sub(r"(?<=://)[^/@]*@", "...@", name)


def _av_open(url: str, **options: Any) -> Any:
    import av

    return av.open(url, **options)


def _rate(container: Any) -> float:
    return float(container.streams.video[0].average_rate or 0)


def _size(container: Any) -> int:
    try:
        return container.size
    except errors():
        return 0
