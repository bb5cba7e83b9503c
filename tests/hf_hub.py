"""A server that speaks as much of the Hugging Face hub as downloads and uploads of huggingface_hub use.

A commit is the content of a repository at a time; large files come apart from it, as with the real one. A request
needs a token where `gated` names the repository, and to write.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_standin"
Files = dict[str, bytes]


class Hub(ThreadingHTTPServer):
    """`repos`: files by path, by repository. `asked`: (method, path) of all requests, oldest first."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Files] = {}
        self.private: dict[str, bool] = {}
        self.gated: set[str] = set()
        self.large: Files = {}
        self.asked: list[tuple[str, str]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, repo, folder):
        """A repository of the files of a folder."""
        files = (path for path in folder.rglob("*") if path.is_file())
        self.repos[repo] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    def fetched(self):
        """Paths of the files whose content was asked for."""
        return [path.partition("/resolve/")[2].partition("/")[2] for method, path in self.asked
                if method == "GET" and "/resolve/" in path]  # fmt: skip


def commit_of(files):
    lines = sorted(f"{path} {hashlib.sha1(content).hexdigest()}" for path, content in files.items())
    return hashlib.sha1("\n".join(lines).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = self._asked()
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            if (files := self._files(match[1], match[2])) is not None:
                siblings = [{"rfilename": name} for name in files]
                about = {"id": match[1], "sha": commit_of(files), "private": False, "tags": [], "siblings": siblings}
                self._json(about)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            if (files := self._files(match[1], match[2])) is not None:
                self._json([_entry(name, content) for name, content in files.items()])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if (files := self._files(match[1], match[2])) is not None:
                if match[3] not in files:
                    return self._error(404, "EntryNotFound")
                content = files[match[3]]
                headers = {"X-Repo-Commit": commit_of(files), "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
                self._send(200, content, "application/octet-stream", headers)
        else:
            self._error(404, "")

    do_HEAD = do_GET

    def do_POST(self):
        path, content = self._asked(), self._content()
        if path == "/api/repos/create":
            about = json.loads(content)
            repo = f"{about['organization']}/{about['name']}" if about.get("organization") else about["name"]
            if not self._may_write():
                return self._error(401, "")
            if repo in self.server.repos:
                return self._json({"error": "exists", "url": f"{self.server.url}/{repo}"}, 409)
            self.server.repos[repo] = {}
            self.server.private[repo] = bool(about.get("private")) or about.get("visibility") == "private"
            self._json({"url": f"{self.server.url}/{repo}", "name": repo})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/[^/]+", path):
            paths = [file["path"] for file in json.loads(content)["files"]]
            self._json({"files": [{"path": path, "uploadMode": _mode(path), "shouldIgnore": False} for path in paths]})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.server.url}/large/{one['oid']}"}}}
                for one in json.loads(content)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/[^/]+", path):
            files = self.server.repos[match[1]]
            for line in map(json.loads, content.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.server.large[value["oid"]]
            commit = commit_of(files)
            self._json({"commitUrl": f"{self.server.url}/{match[1]}/commit/{commit}", "commitOid": commit})
        else:
            self._error(404, "")

    def do_PUT(self):
        oid, content = self._asked().removeprefix("/large/"), self._content()
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.large[oid] = content
        self._send(200, b"", "text/plain", {})

    def log_message(self, *_):
        pass

    def _asked(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path))
        return path

    def _content(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"]))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _may_write(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _files(self, repo, revision):
        """The files of a repository; where they cannot be had, None, and the error is sent."""
        files = self.server.repos.get(repo)
        if files is None:
            self._error(404, "RepoNotFound")
        elif repo in self.server.gated:
            self._error(403, "GatedRepo")
        elif revision not in (None, "main", commit_of(files)):
            self._error(404, "RevisionNotFound")
        else:
            return files
        return None

    def _error(self, status, code):
        self._send(status, b'{"error": "no"}', "application/json", {"X-Error-Code": code} if code else {})

    def _json(self, content, status=200):
        self._send(status, json.dumps(content).encode(), "application/json", {})

    def _send(self, status, content, kind, headers):
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _mode(path):
    return "lfs" if path.endswith(".safetensors") else "regular"


def _entry(path, content):
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
