"""What stands before every route: request ids, hosts and origins, keys and roles, limits, headers, a log line.

Without keys the server speaks to this machine only, and a page of another site must not read from
it: the Host has to be a loopback name, and an Origin, where there is one, has to be ours.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
import uuid
from urllib.parse import unquote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import metrics
from server.problems import Refused, problem
from server.settings import ROLES, ApiKey, Role, Settings

log = logging.getLogger("lightbox.access")

LOOPBACK = {"127.0.0.1", "localhost", "::1"}
OPEN = re.compile(r"/(|livez|readyz|docs|openapi\.json|static/.*|favicon\.ico)")
BODIES = ("application/json", "application/x-ndjson", "multipart/form-data")
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": CSP,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
METHODS = ("GET", "POST", "PUT", "DELETE")
MAX_BUCKETS = 10_000
SLASH = "\x1f"  # stands for a slash within one segment of a path; no id can hold it
READS = re.compile(r"/v1/collections/[^/]+/search(/batch)?|/v1/embeddings")
DROPS = re.compile(r"/v1/collections/[^/]+/?")


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.settings = settings
        self._buckets: dict[str, tuple[float, float]] = {}  # caller -> tokens, when

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        # A copy: the server still sees HEAD, and leaves the body of the answer out.
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        scope = {**scope, "method": method, "path": segments(scope), "request_id": uuid.uuid4().hex[:16]}
        status = 500
        caller = "-"

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = scope["request_id"]
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            caller = self._admit(scope)
            await self.app(scope, _limited(receive, self.settings.max_body), sending)
        except Refused as refused:
            answer = problem(refused.status_code, refused.detail, scope["request_id"], headers=refused.headers)
            await answer(scope, receive, sending)
        finally:
            self._record(scope, status, caller, time.perf_counter() - start)

    def _admit(self, scope: Scope) -> str:
        """The caller's name. Raises Refused for a request that must not reach a route."""
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit() and len(length) < 20) or int(length) > self.settings.max_body:
            raise too_big(self.settings.max_body)
        body = headers.get("content-type", "").partition(";")[0].strip().lower()
        if (int(length) or "transfer-encoding" in headers) and body not in BODIES:
            raise Refused(415, f"content-type: expected one of {', '.join(BODIES)}")
        if not self.settings.api_keys:
            self._check_host(headers)
            return "local"
        if OPEN.fullmatch(scope["path"]):
            return "open"
        try:
            caller = self._check_key(headers, scope)
        except Refused as refused:
            if refused.status_code == 401:  # guessing is slow
                self._check_rate(f"no key from {(scope.get('client') or ('',))[0]}")
            raise
        self._check_rate(f"key {caller}")
        return caller

    def _check_host(self, headers: Headers) -> None:
        ours = LOOPBACK | set(self.settings.allowed_hosts)
        if _host(headers.get("host", "")) not in ours:
            raise Refused(403, "host: not one that this server answers to; set LIGHTBOX_ALLOWED_HOSTS, or keys")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            raise Refused(403, "origin: a page of another site may not read from this server")
        if (
            headers.get("sec-fetch-site") in ("cross-site", "same-site")
            and headers.get("sec-fetch-mode") != "navigate"
        ):
            raise Refused(403, "origin: a page of another site may not read from this server")

    def _check_key(self, headers: Headers, scope: Scope) -> str:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        digest = hashlib.sha256(given.encode()).hexdigest()
        # Every key is compared, so that the time taken tells nothing about which one came close.
        matching = [key for key in self.settings.api_keys if hmac.compare_digest(key.sha256, digest)]
        if not given or not matching:
            raise Refused(401, "a valid API key is needed", {"WWW-Authenticate": "Bearer"})
        key: ApiKey = matching[0]
        needed = role_for(scope["method"], scope["path"])
        if ROLES.index(key.role) < ROLES.index(needed):
            raise Refused(403, f"this needs the role '{needed}', the key has '{key.role}'")
        return key.name

    def _check_rate(self, caller: str) -> None:
        rate, now = self.settings.max_rate, time.monotonic()
        tokens, then = self._buckets.get(caller, (rate, now))
        tokens = min(rate, tokens + (now - then) * rate)
        if tokens < 1:
            raise Refused(429, f"over {rate:g} requests a second", {"Retry-After": "1"})
        if len(self._buckets) > MAX_BUCKETS:
            self._buckets.clear()
        self._buckets[caller] = (tokens - 1, now)

    def _record(self, scope: Scope, status: int, caller: str, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        method = scope["method"] if scope["method"] in METHODS else "other"
        metrics.REQUESTS.labels(method, route, str(status)).inc()
        metrics.SECONDS.labels(route).observe(seconds)
        log.info(
            "request",
            extra={
                "request_id": scope["request_id"],
                "caller": caller,
                "method": method,
                "route": route,
                "status": status,
                "ms": round(seconds * 1000, 1),
            },
        )


def role_for(method: str, path: str) -> Role:
    """The role that a route needs: read to look, write to change documents, admin to drop a collection.

    >>> role_for("POST", "/v1/collections/films/search"), role_for("DELETE", "/v1/collections/films/documents/search")
    ('read', 'write')
    """
    if method == "GET" or (method == "POST" and READS.fullmatch(path)):
        return "read"
    return "admin" if method == "DELETE" and DROPS.fullmatch(path) else "write"


def segments(scope: Scope) -> str:
    """The path, decoded so that an encoded slash does not part it: ids may hold slashes."""
    raw = scope.get("raw_path", b"").partition(b"?")[0]
    if b"%2f" not in raw.lower():
        return str(scope["path"])
    return unquote(re.sub(b"%2f", b"%1f", raw, flags=re.IGNORECASE).decode("latin-1"))


def too_big(limit: int) -> Refused:
    return Refused(413, f"the body is over the limit of {limit} bytes")


def _limited(receive: Receive, limit: int) -> Receive:
    """Counts what arrives, for bodies that do not say their length."""
    seen = 0

    async def receiving() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > limit:
            raise too_big(limit)
        return message

    return receiving


def _host(header: str) -> str:
    """The name in a Host header, without port and brackets."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""
