"""Real servers on this machine that misbehave on request."""

from __future__ import annotations

import http.client
import json
import re
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar, NamedTuple
from urllib.parse import parse_qs, unquote, urlparse


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Fault(NamedTuple):
    """One request's fate: another status, a cut after so many bytes, a stall before the cut."""

    status: int | None = None
    cut: int | None = None
    stall: float = 0.0
    body: bytes = b""


class Handler(BaseHTTPRequestHandler):
    """Answers as ``reply`` says, except where the server's faults have it otherwise."""

    server: FaultyServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Not to the tests' output."""

    def do_GET(self) -> None:
        key = self.path.partition("?")[0]
        self.server.requests.append((self.command, key, self.headers.get("Range")))
        planned = self.server.faults[key if self.command == "GET" else f"{self.command} {key}"]
        fault = planned.popleft() if planned else Fault()
        if fault.status is not None:
            reply = Reply(fault.status, {}, fault.body)
        else:
            reply = self.server.reply(self)
        self._send(reply, fault)

    do_HEAD = do_PUT = do_POST = do_GET  # noqa: N815 (http.server's names)

    def _send(self, reply: Reply, fault: Fault) -> None:
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if "Content-Length" not in reply.headers and not self.server.no_length:
            self.send_header("Content-Length", str(len(reply.body)))
        elif self.server.no_length:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "HEAD":
            return
        body = reply.body if fault.cut is None else reply.body[: fault.cut]
        try:
            for begin in range(0, len(body), 2**16):
                self.wfile.write(body[begin : begin + 2**16])
                time.sleep(self.server.pause)
            time.sleep(fault.stall)
        except OSError:  # the client went away
            self.close_connection = True
        self.close_connection |= fault.cut is not None or self.server.no_length


class FaultyServer(ThreadingHTTPServer):
    """Serves ``files`` (path to bytes), with ranges and ETags unless told otherwise.

    Attributes:
        faults: what is to happen to the next GETs of a path, first one first; other requests by
            method and path, such as ``HEAD /a.tar``.
        requests: (method, path, Range) of every request so far.
        ranges: whether ranges are honoured.
        pause: seconds between pieces of 64 KiB.
        no_length: whether sizes are kept secret.
    """

    daemon_threads = True
    types: ClassVar[dict[str, str]] = {".html": "text/html"}

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: defaultdict[str, deque[Fault]] = defaultdict(deque)
        self.requests: list[tuple[str, str, str | None]] = []
        self.ranges = True
        self.pause = 0.0
        self.no_length = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def gets(self, path: str) -> list[str | None]:
        """The Range of each GET of a path so far."""
        return [wanted for method, key, wanted in self.requests if (method, key) == ("GET", path)]

    def reply(self, handler: Handler) -> Reply:
        path = handler.path.partition("?")[0]
        if path not in self.files:
            return Reply(404, {}, b"not here")
        data = self.files[path]
        suffix = path[path.rfind(".") :]
        headers = {
            "ETag": f'"{hash(data):x}"',
            "Content-Type": self.types.get(suffix, "application/x-tar"),
        }
        wanted = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        if self.ranges and wanted and handler.headers.get("If-Range") == headers["ETag"]:
            begin = int(wanted[1])
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
            return Reply(206, headers, data[begin:])
        return Reply(200, headers, data)


class FaultyProxy(FaultyServer):
    """Hands requests on to another server of this machine, and adds faults to its answers."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.port = port

    def reply(self, handler: Handler) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        size = int(handler.headers.get("Content-Length") or 0)
        connection.request(
            handler.command, handler.path, handler.rfile.read(size), dict(handler.headers)
        )
        answer = connection.getresponse()
        body = answer.read()
        kept = {
            name: value
            for name, value in answer.getheaders()
            if name.lower() not in ("connection", "transfer-encoding", "date", "server")
        }
        if handler.command != "HEAD":
            kept = {k: v for k, v in kept.items() if k.lower() != "content-length"}
            kept["Content-Length"] = str(len(body))
        connection.close()
        return Reply(answer.status, kept, body)


class ObjectServer(FaultyServer):
    """What gs and hf servers have in common: JSON about objects, and ranges of their bytes."""

    def _json(self, value: object) -> Reply:
        return Reply(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _range(self, handler: Handler, data: bytes) -> Reply:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers["Range"])
        assert wanted is not None
        first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
        headers = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
        return Reply(206, headers, data[first : last + 1])


class GoogleServer(ObjectServer):
    """As much of Google Cloud Storage's JSON interface as reading ``files`` of a bucket takes."""

    def reply(self, handler: Handler) -> Reply:
        url = urlparse(handler.path)
        query = parse_qs(url.query)
        name = unquote(url.path).partition("/b/bucket/o")[2].removeprefix("/")
        if not name:
            prefix = query.get("prefix", [""])[0]
            return self._json(
                {"items": [self._about(n) for n in self.files if n.startswith(prefix)]}
            )
        if name not in self.files:
            return Reply(404, {}, b'{"error": {"code": 404, "message": "none"}}')
        if query.get("alt") == ["media"]:
            return self._range(handler, self.files[name])
        return self._json(self._about(name))

    def _about(self, name: str) -> dict[str, str]:
        size = str(len(self.files[name]))
        return {"name": name, "bucket": "bucket", "size": size, "generation": "1", "etag": "e"}


class HubServer(ObjectServer):
    """As much of the Hugging Face Hub's interface as reading ``files`` of ``org/set`` takes."""

    def reply(self, handler: Handler) -> Reply:
        path = unquote(urlparse(handler.path).path)
        _, resolve, name = path.partition("/datasets/org/set/resolve/main/")
        _, tree, folder = path.partition("/api/datasets/org/set/tree/main")
        if resolve and name in self.files:
            return self._range(handler, self.files[name])
        if tree:
            return self._json(self._entries(folder.strip("/")))
        if path.startswith("/api/datasets/org/set"):
            return self._json({"id": "org/set", "sha": "0" * 40, "siblings": []})
        return Reply(404, {"X-Error-Code": "EntryNotFound"}, b"{}")

    def _entries(self, folder: str) -> list[dict[str, object]]:
        inside = {name for name in self.files if name.rpartition("/")[0] == folder}
        folders = {name.partition("/")[0] for name in self.files} if not folder else set()
        return [
            *({"type": "file", "path": n, "size": len(self.files[n]), "oid": "a"} for n in inside),
            *({"type": "directory", "path": name, "oid": "b"} for name in folders),
        ]


@contextmanager
def running(server: FaultyServer) -> Iterator[FaultyServer]:
    """Serves until the block is left."""
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
