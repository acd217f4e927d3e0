"""A real HTTP server on loopback over a folder, with faults on request."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Server(ThreadingHTTPServer):
    """Serves `folder`; counts the bodies it was asked for."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
        self.gets: Counter[str] = Counter()
        """GET requests by path."""
        self.drops: Counter[str] = Counter()
        """How many of the next bodies of a path break off in the middle."""
        self.shorts: Counter[str] = Counter()
        """How many of the next bodies of a path are half as long, and say so themselves."""
        self.refusals: dict[str, list[tuple[int, dict[str, str]]]] = {}
        """Status and headers of the next answers of a path, without a body."""
        self.hangs: Counter[str] = Counter()
        """How many of the next requests of a path are never answered."""
        self.released = threading.Event()
        """Ends the hanging requests."""

    @property
    def url(self) -> str:
        """Where the folder lies."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.gets[self.path] += 1
        refusals = self.server.refusals.get(self.path)
        if refusals:
            status, headers = refusals.pop(0)
            (self.send_response_only if "Date" in headers else self.send_response)(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self.server.hangs[self.path] > 0:
            self.server.hangs[self.path] -= 1
            self.server.released.wait()
            self.close_connection = True
        elif self.server.shorts[self.path] > 0:
            self.server.shorts[self.path] -= 1
            content = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content) // 2))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
        else:
            super().do_GET()

    def copyfile(self, source: Any, outputfile: Any) -> None:
        if self.server.drops[self.path] > 0 and self.command == "GET":
            self.server.drops[self.path] -= 1
            content = source.read()
            outputfile.write(content[: len(content) // 2])
            self.close_connection = True
        else:
            super().copyfile(source, outputfile)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """The server, for the length of the block."""
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        thread.join()
        server.server_close()
