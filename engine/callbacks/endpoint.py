"""The numbers of the last step as text at http://ADDRESS:PORT/metrics, in the format that Prometheus reads.

Off unless log.metrics_port says where. Listens on the loopback interface, or on the one address that
log.metrics_address names; a wildcard is refused by the config. Answers GET /metrics and nothing else, and no request
reaches the training thread.
"""

import math
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from engine.record import Callback, Record, RunInfo

PATH = "/metrics"
_PREFIX = "eva_megatron_"
_REQUEST_S = 5.0
"""A client that sends nothing for so long is dropped."""


class MetricsEndpoint(Callback):
    """Serves the last record. World rank 0 only."""

    def __init__(self, address: str, port: int):
        """Raises OSError, with the setting's name, where the address cannot be listened on."""
        self._page = b""
        self._labels = ""
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            timeout = _REQUEST_S

            def do_GET(self) -> None:  # the name that http.server calls
                if self.path != PATH:
                    self.send_error(404)
                    return
                page = endpoint._page
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
                self.send_header("Content-Length", str(len(page)))
                self.end_headers()
                self.wfile.write(page)

            def log_message(self, format: str, *arguments: Any) -> None:
                """Keep the job's output for the job."""

        try:
            self._server = ThreadingHTTPServer((address, port), Handler)
        except OSError as error:
            what = f"log.metrics_address {address}, log.metrics_port {port}: {error.strerror}"
            raise OSError(error.errno, what) from None
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        """Port that is listened on."""
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def on_start(self, run: RunInfo) -> None:
        """Label every number with the run's folder."""
        self._labels = f'{{run="{_escaped(str(run.run_dir))}"}}'
        self._page = as_text({"total_steps": run.total_steps, "world_size": run.world_size}, self._labels)

    def on_step(self, record: Record) -> None:
        self._page = as_text(record, self._labels)

    def on_end(self, record: Record) -> None:
        self._server.shutdown()
        self._server.server_close()


def as_text(numbers: Mapping[str, Any], labels: str) -> bytes:
    """Every number as a gauge; texts are left out."""
    lines = []
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        metric = _PREFIX + re.sub(r"[^a-zA-Z0-9_]", "_", name)
        lines += [f"# TYPE {metric} gauge", f"{metric}{labels} {_number(value)}"]
    return ("\n".join(lines) + "\n").encode()


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return repr(value) if math.isfinite(value) else f"{'+' if value > 0 else '-'}Inf"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
