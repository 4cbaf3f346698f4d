"""What a cluster may answer when it is not well: small HTTP servers on loopback, one before a real server."""

from __future__ import annotations

import json
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_PASSED = ("Content-Type", "Accept")


class Answer(NamedTuple):
    status: int
    body: bytes = b"{}"
    kind: str = "application/vnd.elasticsearch+json;compatible-with=8"
    product: bool = True  # says that it is Elasticsearch


Ask = Callable[[str, str, bytes], Answer]  # method, path, body


def refusing(status: int, type: str) -> Ask:
    """The same error to everything."""
    body = json.dumps({"error": {"type": type, "reason": f"a reason for {type}"}, "status": status}).encode()

    def refuse(method: str, path: str, sent: bytes) -> Answer:
        return Answer(status, body)

    return refuse


def passing(url: str) -> Ask:
    """What a real server answers."""
    kinds = {"Content-Type": Answer(0).kind, "Accept": Answer(0).kind}

    def ask(method: str, path: str, body: bytes) -> Answer:
        lines = "_bulk" in path or "_msearch" in path
        sent = {
            **kinds,
            "Content-Type": kinds["Content-Type"].replace("+json", "+x-ndjson") if lines else Answer(0).kind,
        }
        request = urllib.request.Request(url + path, body or None, sent, method=method)
        try:
            with _direct.open(request, timeout=60) as answer:
                return Answer(answer.status, answer.read())
        except urllib.error.HTTPError as error:
            return Answer(error.code, error.read())

    return ask


@contextmanager
def serving(ask: Ask, certificate: Path | None = None) -> Iterator[str]:
    """The URL of a server that answers by `ask`; certificate: PEM file with a key, for https."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            answer = ask(self.command, self.path, body)
            self.send_response(answer.status)
            if answer.product:
                self.send_header("X-Elastic-Product", "Elasticsearch")
            self.send_header("Content-Type", answer.kind)
            content = b"" if self.command == "HEAD" else answer.body
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _answer

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"{'http' if certificate is None else 'https'}://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
