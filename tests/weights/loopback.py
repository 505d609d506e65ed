"""Servers on 127.0.0.1 that tests download from: plain files, and enough of the Hugging Face hub's API."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

COMMIT = "a" * 40


@dataclass
class Served:
    """One file as a server gives it."""

    content: bytes
    etag: str = '"served"'
    status: int = 200
    break_after: int | None = None  # bytes of a body after which the connection is closed
    breaks: int = 10**9  # how often it is
    ranges: bool = True  # answers Range requests
    length: bool = True  # says Content-Length
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Server:
    """A running server: its address, what it serves by path, and what it was asked."""

    address: str
    files: dict[str, Served]
    asked: list[tuple[str, str, dict[str, str]]]  # method, path, headers

    def bodies(self) -> list[str]:
        return [path for method, path, _ in self.asked if method == "GET"]


@contextmanager
def serving(files: dict[str, Served] | None = None) -> Iterator[Server]:
    """Run a server for the block; afterwards its port refuses connections."""
    state = Server("", files or {}, [])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(with_body=True)

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def answer(self, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            state.asked.append((self.command, path, {k.title(): v for k, v in self.headers.items()}))
            served = state.files.get(path, Served(b"", status=404))
            start, wanted = 0, self.headers.get("Range", "")
            if wanted and served.ranges and self.headers.get("If-Range", served.etag) == served.etag:
                start = int(wanted.removeprefix("bytes=").split("-")[0])
            self.send_response(206 if start else served.status)
            if start:
                self.send_header(
                    "Content-Range", f"bytes {start}-{len(served.content) - 1}/{len(served.content)}"
                )
            if served.etag:
                self.send_header("ETag", served.etag)
            if served.length:
                self.send_header("Content-Length", str(len(served.content) - start))
            for name, value in served.headers.items():
                self.send_header(name, value)
            self.end_headers()
            if not with_body:
                return
            body = served.content[start:]
            if served.break_after is not None and served.breaks > 0:
                served.breaks -= 1
                body = body[: served.break_after]
            self.wfile.write(body)
            self.close_connection = True

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        state.address = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()


def hub_repository(name: str, contents: dict[str, bytes]) -> dict[str, Served]:
    """What the hub answers for a model of these files, by path."""
    info = {
        "id": name,
        "modelId": name,
        "sha": COMMIT,
        "siblings": [{"rfilename": file} for file in contents],
    }
    tree = [
        {"type": "file", "path": file, "size": len(content), "oid": f"{index:040d}"}
        for index, (file, content) in enumerate(contents.items())
    ]
    is_json = {"Content-Type": "application/json"}
    served = {
        f"/api/models/{name}/revision/main": Served(json.dumps(info).encode(), headers=is_json),
        f"/api/models/{name}": Served(json.dumps(info).encode(), headers=is_json),
        f"/api/models/{name}/tree/{COMMIT}": Served(json.dumps(tree).encode(), headers=is_json),
    }
    for index, (file, content) in enumerate(contents.items()):
        for revision in ("main", COMMIT):
            served[f"/{name}/resolve/{revision}/{file}"] = Served(
                content, etag=f'"{index:040d}"', headers={"X-Repo-Commit": COMMIT}
            )
    return served
