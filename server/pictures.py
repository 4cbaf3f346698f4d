"""Pictures by URL: only from listed hosts, and never from an address inside somebody's network."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Collection
from ipaddress import IPv6Address, ip_address
from urllib.parse import urljoin, urlsplit

import httpx

from retrieval.errors import Invalid, NotAnImage, TooLarge

MAX_REDIRECTS = 3
TIMEOUT_S = 10.0  # for the whole of it

Resolve = Callable[[str, int], list[str]]


def is_url(text: str) -> bool:
    return text[:8].lower().startswith(("http://", "https://"))


def addresses(host: str, port: int) -> list[str]:
    """Every address of a name, as the system resolves it."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return [str(entry[4][0]) for entry in found]


def is_public(address: str) -> bool:
    """Whether an address belongs to the open internet.

    >>> [is_public(a) for a in ("93.184.216.34", "127.0.0.1", "10.0.0.1", "169.254.169.254", "::ffff:127.0.0.1")]
    [True, False, False, False, False]
    """
    ip = ip_address(address.partition("%")[0])
    if isinstance(ip, IPv6Address):
        if ip.sixtofour or ip.teredo:  # IPv4 in disguise
            return False
        ip = ip.ipv4_mapped or ip
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


class Fetch:
    """Fetches pictures. `hosts`: exact names that the operator allows; none means that nothing is fetched."""

    def __init__(
        self,
        hosts: Collection[str],
        max_bytes: int,
        *,
        resolve: Resolve = addresses,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.hosts = {host.lower() for host in hosts}
        self.max_bytes = max_bytes
        self._resolve = resolve
        self._transport = transport

    def __call__(self, url: str, field: str) -> bytes:
        """The body behind `url`. Raises Invalid, TooLarge or NotAnImage, with `field` as the place of the fault."""
        if not self.hosts:
            raise Invalid(f"{field}: this server fetches no pictures; send the picture itself", field)
        until = time.monotonic() + TIMEOUT_S
        with httpx.Client(transport=self._transport, trust_env=False, timeout=TIMEOUT_S) as client:
            for _ in range(MAX_REDIRECTS + 1):
                found, onward = self._one(client, url, field, until)
                if onward is None:
                    return found
                url = onward
        raise Invalid(f"{field}: more than {MAX_REDIRECTS} redirects", field)

    def _one(self, client: httpx.Client, url: str, field: str, until: float) -> tuple[bytes, str | None]:
        """One request to an address that was checked: its body, or where it leads on to."""
        place, host = self._checked(url, field)
        headers = {"Host": host, "Accept-Encoding": "identity"}
        try:
            with client.stream("GET", place, headers=headers, extensions={"sni_hostname": host}) as response:
                if response.is_redirect:
                    return b"", urljoin(url, response.headers["location"])
                if response.status_code != 200:
                    raise NotAnImage(f"{field}: the host answered with status {response.status_code}", field)
                return self._body(response, field, until), None
        except (httpx.HTTPError, httpx.InvalidURL, ValueError):
            raise NotAnImage(f"{field}: the host did not answer with a picture", field) from None

    def _checked(self, url: str, field: str) -> tuple[str, str]:
        """`url` with the very address that was looked at, so that a second look-up cannot differ, and its host."""
        try:
            split = urlsplit(url)
            host, port = (split.hostname or "").lower(), split.port
        except ValueError:
            raise Invalid(f"{field}: not a URL", field) from None
        default = {"http": 80, "https": 443}.get(split.scheme)
        if default is None or port not in (None, default) or split.username or host not in self.hosts:
            raise Invalid(f"{field}: not on the list of hosts that pictures are fetched from", field)
        found = self._resolve(host, default)
        if not found or not all(is_public(address) for address in found):
            raise Invalid(f"{field}: its host has no public address", field)
        address = f"[{found[0]}]" if ":" in found[0] else found[0]
        return split._replace(netloc=address, fragment="").geturl(), host

    def _body(self, response: httpx.Response, field: str, until: float) -> bytes:
        out = bytearray()
        for piece in response.iter_raw():
            out += piece
            if len(out) > self.max_bytes:
                raise TooLarge(f"{field}: over the limit of {self.max_bytes} bytes", field)
            if time.monotonic() > until:
                raise NotAnImage(f"{field}: not sent within {TIMEOUT_S:g} s", field)
        return bytes(out)
