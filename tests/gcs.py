"""A server that speaks as much of Google Cloud Storage's JSON API as TensorStore, gcsfs and google-cloud-storage use.

Objects appear whole, replace each other only under the conditions that the request states, and are found at once by
everybody, as with the real one. Nothing is checked of who asks.
"""

import json
import os
import sys
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class Server(ThreadingHTTPServer):
    """`objects`: generation and content by (bucket, name). `refuse`: asked of each write, given the object's name."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *buckets):
        super().__init__(("127.0.0.1", 0), Handler)
        self.buckets, self.objects, self.lock = set(buckets), {}, threading.Lock()
        self.uploads = {}
        self.refuse = lambda name: False
        self.generation = 1_700_000_000_000_000
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def environment(self):
        """Sends every client in a process here; TensorStore reads it once."""
        url = f"http://127.0.0.1:{self.server_port}"
        return {
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "STORAGE_EMULATOR_HOST": url,
            "NO_GCE_CHECK": "true",  # do not look for a metadata server
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks for the kind of bucket by gRPC
        }

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # a client that has gone
            super().handle_error(request, client_address)

    def names(self, bucket, prefix=""):
        """Names of the objects, sorted."""
        with self.lock:
            return sorted(name for where, name in self.objects if where == bucket and name.startswith(prefix))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # an answer is one packet
    disable_nagle_algorithm = True

    def do_GET(self):
        bucket, name, query = self._asked()
        if bucket not in self.server.buckets:
            return self._error(404, "no such bucket")
        if name is None:
            return self._json({"kind": "storage#bucket", "name": bucket})
        if not name:
            return self._json(self._listing(bucket, query))
        generation, content = self.server.objects.get((bucket, name), (0, b""))
        if not self._holds(query, generation):
            return self._error(304 if "ifGenerationNotMatch" in query else 412)
        if not generation:
            return self._error(404, "no such object")
        if query.get("alt") == "media":
            return self._media(generation, content)
        self._json(describe(bucket, name, generation, content))

    def do_POST(self):
        bucket, _, query = self._asked()
        content = self.rfile.read(int(self.headers["Content-Length"]))
        name = query.get("name")
        if "upload_id" in query:  # a part, the last one if its range has an end
            parts = self.server.uploads[query["upload_id"]]
            parts.append(content)
            if self.headers["Content-Range"].endswith("/*"):
                return self._send(308, b"", {"Range": f"bytes=0-{sum(map(len, parts)) - 1}"})
            content = b"".join(self.server.uploads.pop(query["upload_id"]))
        elif query["uploadType"] == "resumable":
            upload = uuid.uuid4().hex
            self.server.uploads[upload] = []
            return self._send(200, b"", {"Location": f"http://{self.headers['Host']}{self.path}&upload_id={upload}"})
        elif query["uploadType"] == "multipart":
            boundary = self.headers["Content-Type"].partition("boundary=")[2].strip('"')
            _, about, part, _ = content.split(b"--" + boundary.encode())
            name, content = json.loads(about.partition(b"\n\n")[2])["name"], part.partition(b"\n\n")[2][:-1]
        if self.server.refuse(name):
            return self._error(403, "no permission to write")
        with self.server.lock:
            if not self._holds(query, self.server.objects.get((bucket, name), (0,))[0]):
                return self._error(412)
            self.server.generation += 1
            self.server.objects[bucket, name] = generation, content = self.server.generation, content
        self._json(describe(bucket, name, generation, content))

    def do_DELETE(self):
        bucket, name, query = self._asked()
        with self.server.lock:
            generation, _ = self.server.objects.get((bucket, name), (0, b""))
            if not self._holds(query, generation):
                return self._error(412)
            if not self.server.objects.pop((bucket, name), None):
                return self._error(404, "no such object")
        self._send(204, b"")

    def _asked(self):
        """Bucket, object (None: the bucket, empty: its objects) and query of the request."""
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
        bucket, found, name = url.path.partition("/b/")[2].partition("/o")
        return unquote(bucket), unquote(name.removeprefix("/")) if found else None, query

    def _listing(self, bucket, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        first, end = query.get("startOffset", ""), query.get("endOffset", "")
        items, prefixes = [], []
        for name in self.server.names(bucket, prefix):
            if name < first or (end and name >= end):
                continue
            inside, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            if found:
                prefixes.append(prefix + inside + delimiter)
            else:
                items.append(describe(bucket, name, *self.server.objects[bucket, name]))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(set(prefixes))}

    def _holds(self, query, generation):
        """Whether the conditions of the request are met; generation 0: there is no object."""
        match, other = query.get("ifGenerationMatch"), query.get("ifGenerationNotMatch")
        return (match is None or int(match) == generation) and (other is None or int(other) != generation)

    def _media(self, generation, content):
        headers, status, size = {"x-goog-generation": str(generation)}, 200, len(content)
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = (int(first), int(last or size - 1) + 1) if first else (size - int(last), size)
            if start >= size:
                return self._error(416, "range not satisfiable")
            status, content = 206, content[start:stop]
            headers["Content-Range"] = f"bytes {start}-{start + len(content) - 1}/{size}"
        self._send(status, content, headers)

    def _json(self, answer):
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _error(self, status, message=""):
        content = json.dumps({"error": {"code": status, "message": message}}).encode()
        self._send(status, b"" if status == 304 else content)

    def _send(self, status, content, headers=()):
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


def describe(bucket, name, generation, content):
    """What the API tells of an object."""
    now = time.strftime("%Y-%m-%dT%H:%M:%S.000Z")
    about = {"kind": "storage#object", "bucket": bucket, "name": name, "size": str(len(content))}
    return about | {"generation": str(generation), "metageneration": "1", "timeCreated": now, "updated": now}


def serve(*buckets):
    """A server that this process and its children take for Google Cloud Storage."""
    server = Server(*buckets)
    os.environ.update(server.environment)
    return server
