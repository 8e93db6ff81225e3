"""A server on loopback that speaks the Hugging Face Hub's protocol, as far as downloads need it.

It serves one folder as the model `owner/name` and notes every request. Large files are answered
as the hub does: a redirect to another place, with the true size and hash in headers.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin", ".gguf")  # kept outside git


class Hub:
    """What the server serves, and what it was asked."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.commit = COMMIT
        self.refusal: tuple[int, dict[str, str]] | None = None  # status and headers for everything
        self.requests: list[tuple[str, str]] = []  # method and path
        self.ranges: list[str] = []  # that were asked for
        self.sent: dict[str, int] = {}  # file -> bytes of its content that went out
        self.ranged = True  # whether ranges are answered as asked
        self.cuts: dict[str, list[int]] = {}  # file -> bytes after which connections break
        self.held: dict[str, threading.Event] = {}
        self.tags: set[str] = set()  # other names of the commit
        self.url = ""

    def hold(self, name: str) -> Callable[[], None]:
        """Answer no request for the content of a file until the returned function is called."""
        self.held[name] = threading.Event()
        return self.held[name].set

    def revisions(self) -> set[str]:
        return {"main", self.commit, *self.tags}

    def files(self) -> dict[str, bytes]:
        paths = (p for p in sorted(self.folder.rglob("*")) if p.is_file())
        return {p.relative_to(self.folder).as_posix(): p.read_bytes() for p in paths}

    def fetched(self) -> set[str]:
        """Names of the files whose content was asked for."""
        found = set()
        for method, path in self.requests:
            if method == "GET" and (match := re.search(r"/(?:resolve|blob)/[^/]+/(.+)$", path)):
                found.add(match[1])
        return found


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def etag(name: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if name.endswith(LARGE) else git_hash(content)


def tree(hub: Hub) -> list[dict]:
    entries = []
    for name, content in hub.files().items():
        entry: dict = {"type": "file", "path": name, "size": len(content)}
        entry["oid"] = git_hash(content)
        if name.endswith(LARGE):
            entry["lfs"] = {"oid": etag(name, content), "size": len(content), "pointerSize": 134}
        entries.append(entry)
    return entries


def siblings(hub: Hub) -> list[dict]:
    """The files as the model's own entry lists them; the real hub gives sizes only if asked."""
    found = []
    for entry in tree(hub):
        file = {"rfilename": entry["path"], "size": entry["size"], "blobId": entry["oid"]}
        if "lfs" in entry:
            file["lfs"] = {"sha256": entry["lfs"]["oid"], **entry["lfs"]}
        found.append(file)
    return found


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer()

    def answer(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path))
        api = f"/api/models/{hub.name}"
        if hub.refusal is not None:
            status, headers = hub.refusal
            self.send(status, b'{"error": "refused"}', headers)
        elif path == api or path in (f"{api}/revision/{name}" for name in hub.revisions()):
            info = {
                "_id": "1",
                "id": hub.name,
                "modelId": hub.name,
                "sha": hub.commit,
                "private": False,
                "gated": False,
                "disabled": False,
                "tags": [],
                "downloads": 1,
                "likes": 1,
                "siblings": siblings(hub),
            }
            self.send_json(info)
        elif path.startswith(f"{api}/tree/"):
            self.send_json(tree(hub))
        elif match := re.fullmatch(rf"{api}/paths-info/([^/]+)", path):
            if match[1] not in hub.revisions():
                self.send(404, b'{"error": "Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"})
                return
            wanted = json.loads(self.body)["paths"]
            self.send_json([entry for entry in tree(hub) if entry["path"] in wanted])
        elif path.startswith(f"{api}/revision/"):
            self.send(404, b'{"error": "Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"})
        elif match := re.fullmatch(rf"/{hub.name}/resolve/([^/]+)/(.+)", path):
            self.send_file(match[2], large_elsewhere=True)
        elif match := re.fullmatch(rf"/cdn/blob/{hub.commit}/(.+)", path):
            self.send_file(match[1], large_elsewhere=False)
        else:
            self.send(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})

    def send_file(self, name: str, *, large_elsewhere: bool) -> None:
        content = self.hub.files().get(name)
        if content is None:
            self.send(404, b"Entry not found", {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"X-Repo-Commit": self.hub.commit, "Accept-Ranges": "bytes"}
        if name.endswith(LARGE) and large_elsewhere:
            headers |= {
                "X-Linked-Etag": f'"{etag(name, content)}"',
                "X-Linked-Size": str(len(content)),
                "Location": f"{self.hub.url}/cdn/blob/{self.hub.commit}/{name}",
            }
            self.send(302, b"", headers)
        else:
            self.send_content(name, content, headers | {"ETag": f'"{etag(name, content)}"'})

    def send_content(self, name: str, content: bytes, headers: dict[str, str]) -> None:
        """The content, or the range that was asked for, as far as the connection lasts."""
        if self.command == "GET" and name in self.hub.held:
            self.hub.held[name].wait(60)
        status, start, end = 200, 0, len(content)
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match and self.hub.ranged:
            self.hub.ranges.append(match[0])
            status, start = 206, int(match[1])
            end = min(end, int(match[2]) + 1) if match[2] else end
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        cuts = self.hub.cuts.get(name, [])
        until = cuts.pop(0) if cuts and self.command == "GET" else None
        if self.command == "GET":
            self.hub.sent[name] = self.hub.sent.get(name, 0) + len(content[start:end][:until])
        self.send(status, content[start:end], headers, until)

    def send_json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(
        self, status: int, content: bytes, headers: dict[str, str], until: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:until])
        if until is not None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *args: object) -> None:
        pass


def environment(tmp_path: Path, endpoint: str, **settings: str) -> dict[str, str]:
    """Settings for a process whose hub is `endpoint`, with caches below `tmp_path`."""
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith("HF_") and "PROXY" not in k.upper()
    }
    return {
        **kept,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        **settings,
    }


def program(code: str) -> list[str]:
    """The command that runs Python code and prints the qdelta error, if any."""
    text = "import qdelta\ntry:\n" + textwrap.indent(textwrap.dedent(code), "    ")
    text += "\nexcept qdelta.Error as error:\n    print(type(error).__name__, error)\n"
    return [sys.executable, "-c", text]


def run(
    code: str, tmp_path: Path, endpoint: str, **settings: str
) -> subprocess.CompletedProcess[str]:
    """Python code in a process of its own, see `program` and `environment`."""
    return subprocess.run(
        program(code),
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(tmp_path, endpoint, **settings),
        check=False,
    )


def output(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@contextmanager
def serve(name: str, folder: Path) -> Iterator[Hub]:
    """The server for the time of the block."""
    hub = Hub(name, folder)
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield hub
        server.shutdown()
