"""Cameras, pipes and addresses: over a loopback, and by an opener that stands for what there is not here."""

import contextlib
import functools
import http.server
import io
import os
import socket
import socketserver
import struct
import threading
import time

import numpy as np
import pytest
from PIL import Image

from tests.stream import world
from tests.stream.test_sources import greys, write
from vlmem_jax.processing.media import described
from vlmem_jax.stream import frames, live, open_source
from vlmem_jax.stream.frames import Times
from vlmem_jax.stream.live import Live

av = pytest.importorskip("av")
COUNT = 8


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """The bytes of an MPEG-TS of 8 pictures, each grey of its own."""
    file = write(tmp_path_factory.mktemp("ts") / "a.ts", greys(COUNT, (64, 48)), 10, codec="mpeg2video")
    return file.read_bytes()


@pytest.fixture
def server():
    """Serves each connection what `serve(content, ...)` lists, one content a connection; gives the port."""
    with contextlib.ExitStack() as stack:

        def serve(*contents):
            listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

            def work():
                for content in contents:
                    with contextlib.suppress(OSError):
                        connection, _ = listening.accept()
                        with connection:
                            connection.sendall(content)
                listening.close()

            threading.Thread(target=work, daemon=True).start()
            return listening.getsockname()[1]

        yield serve


@pytest.fixture
def quick(monkeypatch):
    """Waits that are short, all of them kept."""
    waits = []
    event = threading.Event()
    monkeypatch.setattr(event, "wait", lambda seconds: waits.append(seconds) or threading.Event.wait(event, 0.01))
    return event, waits


def levels(source):
    """Brightness of each frame that comes, in steps of 20."""
    return [round(np.asarray(one.picture()).mean() / 20) for one in source]


def test_frames_come_over_tcp(server, recording):
    said = world.Said(give_up=0.0)
    source = open_source(f"tcp://127.0.0.1:{server(recording)}", said.reading)
    assert source.live and levels(source) == list(range(1, COUNT + 1))
    assert "is lost (it ended), and given up after 0 s" in said[-1]


def test_a_stream_that_is_lost_comes_back_and_its_time_goes_on(server, recording, quick):
    stop, waits = quick
    said = world.Said(stop=stop, give_up=1e9)
    source = open_source(f"tcp://127.0.0.1:{server(recording, recording)}", said.reading)
    times = []
    for one in source:
        times.append(one.time)
        if len(times) == 2 * COUNT:
            stop.set()
    assert len(times) == 2 * COUNT and all(np.diff(times) > 0)
    assert said.notes.counts == {"lost": 1, "gap": 1} and waits == [1.0]
    assert "is lost: it ended; trying again in 1 s" in said[0] and "what was seen before is kept" in said[1]


def test_tries_come_after_1_2_4_up_to_30_seconds(server, recording, monkeypatch):
    stop, waits = threading.Event(), []
    monkeypatch.setattr(stop, "wait", lambda seconds: waits.append(seconds) or len(waits) == 8)  # then it is stopped
    said = world.Said(stop=stop)
    source = open_source(f"tcp://127.0.0.1:{server(recording)}", said.reading)
    assert levels(source) == list(range(1, COUNT + 1))
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    assert said.notes.counts["lost"] == 8 and "Connection refused" in said[1]


class Camera(socketserver.StreamRequestHandler):
    """The least of an RTSP server: MPEG-TS in RTP, between the lines of one connection."""

    def handle(self):
        while request := self.rfile.readline().decode():
            method, headers = request.split()[0], {}
            while line := self.rfile.readline().decode().strip():
                key, _, value = line.partition(": ")
                headers[key.lower()] = value
            more, body = [], b""
            if method == "DESCRIBE":
                body = b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nt=0 0\r\nm=video 0 RTP/AVP 33\r\na=control:1\r\n"
                more = ["Content-Type: application/sdp", f"Content-Length: {len(body)}"]
            elif method == "SETUP":
                more = [f"Transport: {headers['transport'].split(',')[0]}", "Session: 1"]
            lines = ["RTSP/1.0 200 OK", f"CSeq: {headers['cseq']}", *more, "", ""]
            self.wfile.write("\r\n".join(lines).encode() + body)
            if method == "PLAY":
                content = self.server.content
                for n, at in enumerate(range(0, len(content), 1316)):
                    packet = struct.pack(">BBHII", 0x80, 33, n, 9000 * n, 7) + content[at : at + 1316]
                    self.wfile.write(struct.pack(">cBH", b"$", 0, len(packet)) + packet)
                return


def test_frames_come_from_a_camera_over_rtsp(recording):
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Camera) as serving:
        serving.content = recording
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        said = world.Said(give_up=0.0)
        source = open_source(f"rtsp://me:secret@127.0.0.1:{serving.server_address[1]}/1", said.reading)
        # a picture ends where the next one begins
        assert source.live and levels(source)[: COUNT - 1] == list(range(1, COUNT))
        serving.shutdown()


@contextlib.contextmanager
def http_server(folder):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.func.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield serving.server_address[1]
        serving.shutdown()


def test_a_file_at_an_address_has_an_end_and_can_wait(tmp_path, recording):
    (tmp_path / "a.ts").write_bytes(recording)
    with http_server(tmp_path) as port:
        said = world.Said()
        source = open_source(f"http://127.0.0.1:{port}/a.ts", said.reading)
        assert not source.live and levels(source) == list(range(1, COUNT + 1)) and said == []
        with pytest.raises(ValueError, match="/none.ts cannot be opened: .*404"):
            open_source(f"http://127.0.0.1:{port}/none.ts", said.reading)


class Pictures(http.server.BaseHTTPRequestHandler):
    """A camera that sends JPEGs, one after the other."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=next")
        self.end_headers()
        for picture in greys(COUNT, (64, 48)):
            out = io.BytesIO()
            picture.save(out, "JPEG")
            self.wfile.write(b"--next\r\nContent-Type: image/jpeg\r\n")
            self.wfile.write(b"Content-Length: %d\r\n\r\n" % len(out.getvalue()) + out.getvalue() + b"\r\n")

    def log_message(self, *_):
        """Nothing."""


def test_frames_come_from_a_camera_that_sends_jpegs():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pictures) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        source = open_source(f"http://127.0.0.1:{serving.server_address[1]}/", world.Said(give_up=0.0).reading)
        assert source.live and levels(source) == list(range(1, COUNT + 1))
        serving.shutdown()


def test_frames_come_over_udp(recording, monkeypatch):
    monkeypatch.setattr(live, "SILENCE", 2.0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = threading.Event()

    def send():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
            while not done.is_set():
                for at in range(0, len(recording), 1316):
                    out.sendto(recording[at : at + 1316], ("127.0.0.1", port))
                    time.sleep(0.001)

    threading.Thread(target=send, daemon=True).start()
    try:
        said = world.Said(give_up=0.0)
        source = open_source(f"udp://127.0.0.1:{port}", said.reading)
        found = []
        for one in source:
            with contextlib.suppress(ValueError):  # what came before the first whole picture
                found.append(one.picture())
            if len(found) == 2 * COUNT:
                break
        assert source.live and len(found) == 2 * COUNT
    finally:
        done.set()


def test_a_pipe_is_live_and_ends_with_its_writer(tmp_path, recording):
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(recording), daemon=True).start()
    said = world.Said()
    source = open_source(str(tmp_path / "pipe"), said.reading)
    assert source.live and levels(source) == list(range(1, COUNT + 1)) and said == []


def test_a_camera_is_opened_by_the_format_of_cameras_alone():
    """A made-up one: FFmpeg's test picture behind an opener that takes what a camera takes."""
    asked = []

    def opener(name, **options):
        asked.append((name, options))
        return av.open("testsrc=size=64x48:rate=10:duration=0.5", format="lavfi")

    said = world.Said(give_up=0.0)
    camera = Live("/dev/video0", "device", said.reading, opener)
    found = [(one.time, one.picture().size) for one in camera]
    assert asked == [("/dev/video0", {"format": "v4l2", "timeout": live.SILENCE})] and camera.live
    assert found == [(pytest.approx(n / 10), (64, 48)) for n in range(5)]


def test_what_is_a_device_but_no_camera_is_refused():
    with pytest.raises(ValueError, match="--video /dev/null cannot be opened: "):
        open_source("/dev/null", world.Said().reading)


# --- what may not be opened -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["ftp://127.0.0.1/a.mp4", "concat://a", "file:///etc/passwd", "crypto://a", "gs://b/a"]
)
def test_other_addresses_are_refused(name):
    with pytest.raises(ValueError, match="an address is one of rtsp, rtsps, http, https, tcp, udp; got "):
        open_source(name, world.Said().reading)


def test_an_address_opens_no_other(tmp_path, recording):
    """A playlist or description at an address names files and addresses; none of them is opened."""
    (tmp_path / "secret.ts").write_bytes(recording)
    os.utime(tmp_path / "secret.ts", (0, 0))
    texts = {
        "m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{tmp_path}/secret.ts\n#EXT-X-ENDLIST\n",
        "ffconcat": f"ffconcat version 1.0\nfile {tmp_path}/secret.ts\n",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5000 RTP/AVP 96\n",
    }
    with http_server(tmp_path) as port:
        for suffix, text in texts.items():
            (tmp_path / f"a.{suffix}").write_text(text)
            assert described(tmp_path / f"a.{suffix}")
            with pytest.raises(ValueError, match="cannot be opened"):
                open_source(f"http://127.0.0.1:{port}/a.{suffix}", world.Said().reading)
    assert (tmp_path / "secret.ts").stat().st_atime == 0


def test_an_address_where_nobody_listens_is_an_error_at_once_without_its_password():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ValueError) as error:
        open_source(f"rtsp://me:secret@127.0.0.1:{port}/1", world.Said().reading)
    assert f"--video rtsp://...@127.0.0.1:{port}/1 cannot be opened: " in str(error.value)
    assert "secret" not in str(error.value)


def test_what_sends_no_video_is_refused(server):
    with pytest.raises(ValueError, match="cannot be opened"):
        open_source(f"tcp://127.0.0.1:{server(b'hello' * 1000)}", world.Said().reading)


# --- times ------------------------------------------------------------------------------------------------------------


class Decoded:
    """What PyAV says of a frame, in milliseconds."""

    def __init__(self, pts, duration=0):
        self.pts, self.duration, self.time_base = pts, duration, frames.Fraction(1, 1000)


def times_of(pts, clock=None, rate=10):
    said = world.Said()
    times = Times("x", rate, said.notes, clock)
    return [times.of(Decoded(one))[0] for one in pts], said


@pytest.mark.parametrize(
    ("pts", "wanted"),
    [
        ([500, 600, 800], [0.0, 0.1, 0.3]),  # from the first
        ([None, None, None], [0.0, 0.1, 0.2]),  # by the rate
        ([0, None, 200], [0.0, 0.1, 0.2]),
        ([0, 100, 0, 100], [0.0, 0.1, 0.2, 0.3]),  # begins anew
        ([0, 5_000_000], [0.0, 5000.0]),  # a file may be silent for long
    ],
)
def test_times_of_a_file(pts, wanted):
    assert times_of(pts)[0] == pytest.approx(wanted)


def test_the_clock_of_a_live_stream_may_jump():
    now = iter([0.0, 0.1, 0.2, 0.3, 60.3])
    times, said = times_of([0, 100, 9_000_000, 9_000_100, 9_060_100], lambda: next(now))
    assert times == pytest.approx([0.0, 0.1, 0.2, 0.3, 60.3])
    assert said == ["x: time leapt by 8999.90 s; it goes on from 0.20 s"]


def test_a_frame_that_is_damaged_on_its_way_or_too_large_is_no_picture():
    frame = av.VideoFrame.from_image(Image.new("RGB", (64, 48)))
    reading = world.Said(max_pixels=100).reading
    with pytest.raises(ValueError, match="camera has 64x48 = 3072 pixels but image.max_pixels is 100"):
        live.picture(frame, None, "camera", reading)
